"""Files beside docs/ that pages link to: they are part of the site, below ``repository/``."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable
from pathlib import Path

__all__ = ["FOLDER", "ROOT", "linked_files", "rewritten"]

ROOT = Path(__file__).resolve().parents[2]
FOLDER = "repository"
#: A link's or an image's target; angle brackets, titles and reference links are not used here.
_TARGET = re.compile(r"(?<=\]\()(?![a-z][a-z0-9+.-]*:|#)([^()\s]+)(?=\))")


def _origin(page: str) -> str:
    """The file in the repository of a page of the site."""
    own = page.removeprefix(f"{FOLDER}/")
    return own if own != page else f"docs/{page}"


def _page(origin: str) -> str:
    """The place in the site of a file in the repository."""
    return origin.removeprefix("docs/") if origin.startswith("docs/") else f"{FOLDER}/{origin}"


def rewritten(markdown: str, page: str, seen: Callable[[str], object] = lambda origin: None) -> str:
    """The text of a page with its links to files beside docs/ as links within the site.

    Args:
        markdown: The page's text.
        page: Its place in the site.
        seen: Called with each file of the repository beside docs/ that is linked to.
    """
    origin = _origin(page)
    outside = origin != f"docs/{page}"

    def link(found: re.Match[str]) -> str:
        path, hash_, anchor = found[1].partition("#")
        target = posixpath.normpath(posixpath.join(posixpath.dirname(origin), path))
        if target.startswith("../") or (not outside and target.startswith("docs/")):
            return found[0]
        if not (ROOT / target).is_file():
            return found[0]  # mkdocs names it
        if not target.startswith("docs/"):
            seen(target)
        return posixpath.relpath(_page(target), posixpath.dirname(page) or ".") + hash_ + anchor

    return _TARGET.sub(link, markdown)


def linked_files(pages: dict[str, str], also: tuple[str, ...] = ()) -> list[str]:
    """The files of the repository beside docs/ that pages link to, directly or through one another.

    Args:
        pages: Markdown by place in the site.
        also: Files that are part of the site in any case.
    """
    found: dict[str, None] = dict.fromkeys(also)
    waiting = [*pages.items()]
    waiting += [(_page(origin), (ROOT / origin).read_text(encoding="utf-8")) for origin in also]
    while waiting:
        page, text = waiting.pop()

        def add(origin: str) -> None:
            if origin not in found:
                found[origin] = None
                if origin.endswith(".md"):
                    waiting.append((_page(origin), (ROOT / origin).read_text(encoding="utf-8")))

        rewritten(text, page, add)
    return list(found)
