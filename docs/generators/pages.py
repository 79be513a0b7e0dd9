"""The generated pages by their place in the site."""

from __future__ import annotations

from collections.abc import Callable

from docs.generators import api, capabilities, commands, errors, manifest, settings

__all__ = ["PAGES", "generated"]

PAGES: dict[str, Callable[[], str]] = {
    "reference/capabilities.md": capabilities.page,
    "reference/cli.md": commands.page,
    "reference/settings.md": settings.page,
    "reference/manifest.md": manifest.manifest_page,
    "reference/errors.md": errors.errors_page,
    "reference/messages.md": errors.messages_page,
    "reference/formats.md": manifest.formats_page,
}


def generated() -> dict[str, str]:
    """Markdown by page, of every page that is generated."""
    return {place: make() for place, make in PAGES.items()} | api.pages()
