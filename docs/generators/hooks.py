"""mkdocs' hooks: the generated pages, the files beside docs/ that pages link to, and what the navigation leaves out."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # mkdocs and mike are started as scripts

from docs.generators import api, outside, pages  # noqa: E402

#: Files of the repository that the navigation names.
ALWAYS = ("SECURITY.md", "CONTRIBUTING.md", "CHANGELOG.md")
API = "API"  # the entry of the navigation that api.nav() fills
MORE = "More"  # the entry that lists pages which the navigation does not name


def _places(nav: Any) -> set[str]:
    """Every page that a navigation names."""
    if isinstance(nav, str):
        return {nav}
    found = nav.values() if isinstance(nav, dict) else nav
    return {place for entry in found for place in _places(entry)}


def _filled(nav: Any, name: str, entries: list[Any]) -> Any:
    """The navigation with ``entries`` in place of the empty entry ``name``; without it where there are none."""
    if isinstance(nav, str):
        return nav
    if isinstance(nav, dict):
        return {key: entries if key == name else _filled(value, name, entries) for key, value in nav.items()}
    kept = [entry for entry in nav if entries or entry != {name: []}]
    return [_filled(entry, name, entries) for entry in kept]


def on_config(config: Any) -> Any:
    """Fill the navigation: the API, and the pages of docs/ that it does not name."""
    if "MIKE_DOCS_VERSION" in os.environ:  # mike is building one of several versions: the header offers them
        config.extra["version"] = {"provider": "mike", "default": "latest"}
    config.nav = _filled(config.nav, API, api.nav())
    docs = Path(config.docs_dir)
    written = sorted(path.relative_to(docs).as_posix() for path in docs.rglob("*.md"))
    unnamed = [place for place in written if place not in _places(config.nav)]
    config.nav = _filled(config.nav, MORE, unnamed)
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages, and the files beside docs/ that any page links to."""
    made = pages.generated()
    for place, text in made.items():
        files.append(File.generated(config, place, content=text))
    texts = {file.src_uri: file.content_string for file in files if file.src_uri.endswith(".md")}
    for origin in outside.linked_files(texts, ALWAYS):
        files.append(File.generated(config, f"{outside.FOLDER}/{origin}", abs_src_path=str(ROOT / origin)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links that leave docs/, as links within the site."""
    return outside.rewritten(markdown, page.file.src_uri)


def on_page_content(html: str, **_: Any) -> str:
    """Roles of reStructuredText that docstrings hold, without their names."""
    return re.sub(r":(?:class|meth|func|data|mod|attr):(?=<code)", "", html)
