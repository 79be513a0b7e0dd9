"""Strings of a stranger's manifest as Markdown, Python, JSON or YAML that shows them and does nothing else.

Everything here takes linear time, also for hostile input. The template (`render.py`) sends every value through
`markdown` unless one of these functions has marked it as safe already.
"""

from __future__ import annotations

import json
import re
import shlex
import unicodedata
from typing import Any

__all__ = ["LONGEST", "code", "json_text", "markdown", "plain", "python_string", "shell"]

LONGEST = 200  # characters of a manifest's string that a card shows

#: Control and format characters (bidi overrides among them), surrogates, private use, unassigned, line separators.
_UNSEEN = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})
_PLAIN = frozenset(" -,()+'/.")
_LINKS = re.compile(r"(?<=:)(?=//)|(?<=www)(?=\.)", re.IGNORECASE)
_CODE = re.compile(r"[A-Za-z0-9._+=-][A-Za-z0-9 ._/+=-]*")
_SHELL = re.compile(r"[A-Za-z0-9.][A-Za-z0-9 ,.'_/-]{0,200}")


def _visible(text: object) -> str:
    """One line of printable characters, at most `LONGEST`."""
    shown = str(text)[: 2 * LONGEST]
    shown = "".join(" " if unicodedata.category(character) in _UNSEEN else character for character in shown)
    shown = " ".join(shown.split())
    return shown if len(shown) <= LONGEST else shown[: LONGEST - 3] + "..."


def markdown(text: object) -> str:
    """Return `text` as Markdown without effect: no HTML, link, emphasis or table cell.

    Web addresses, which Markdown links by itself, are broken by a blank.
    """
    shown = _LINKS.sub(" ", _visible(text)).replace("@", " (at) ")
    return "".join(
        character if character.isalnum() or character in _PLAIN or ord(character) > 127 else f"&#{ord(character)};"
        for character in shown
    )


def code(text: object) -> str:
    """Return `text` as a code span if it is an ordinary name, path or number, else as `markdown` does."""
    shown = str(text)
    ordinary = len(shown) <= LONGEST and _CODE.fullmatch(shown) and shown == shown.strip()
    return f"`{shown}`" if ordinary else markdown(text)


def python_string(text: str) -> str:
    """Return a Python literal of `text` in which all characters special to Markdown, HTML or a terminal are escaped."""
    return '"' + "".join(_python(character) for character in text) + '"'


def _python(character: str) -> str:
    number = ord(character)
    if character.isascii() and character.isprintable() and character not in '"\\`<>&:':
        return character
    if number > 127 and character.isalnum():
        return character
    return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"


def json_text(value: Any) -> str:
    """Return `value` as indented ASCII JSON for a fenced code block: without backquotes, ``<``, ``>`` and ``&``."""
    text = json.dumps(value, indent=1, ensure_ascii=True)
    return re.sub("[`<>&]", lambda found: f"\\u{ord(found[0]):04x}", text)


def shell(text: str, otherwise: str) -> str:
    """Return `text` quoted for a command line, or the word `otherwise` if it holds unusual characters."""
    return shlex.quote(text) if _SHELL.fullmatch(text) else otherwise


def plain(text: object) -> str:
    """Return `text` for the YAML front matter: letters, digits and harmless punctuation."""
    shown = "".join(c if c.isalnum() or c in " ._-+/,():" else "-" for c in _visible(text))
    return shown.strip(" -") or "unnamed"
