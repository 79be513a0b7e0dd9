"""Safe Markdown: a stranger's strings as text, code and YAML, and the user's sections.

Everything here takes linear time, also for hostile input. What a card says is `render.py`'s business.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence

from redif_sdk.errors import InvalidRequest

__all__ = [
    "code",
    "has_marker",
    "markdown",
    "marked",
    "merge",
    "metadata",
    "python_string",
    "split_front_matter",
    "table",
    "user_sections",
]

LONGEST = 200  # characters of a manifest's string that a card shows

# ---------------------------------------------------------------- strings into Markdown, Python and YAML

#: Control and format characters (bidi overrides among them), surrogates, private use, unassigned, line separators.
_UNSEEN = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})
_PLAIN = frozenset(" -,()+'/.")
_LINKS = re.compile(r"(?<=:)(?=//)|(?<=www)(?=\.)", re.IGNORECASE)
_CODE = re.compile(r"[A-Za-z0-9._+=-][A-Za-z0-9 ._/+=-]*")


def _visible(text: object) -> str:
    """One line of printable characters, at most `LONGEST`."""
    shown = str(text)[: 2 * LONGEST]
    shown = "".join(" " if unicodedata.category(character) in _UNSEEN else character for character in shown)
    shown = " ".join(shown.split())
    return shown if len(shown) <= LONGEST else shown[: LONGEST - 3] + "..."


def markdown(text: object) -> str:
    """`text` as Markdown that shows it and does nothing else: no HTML, no link, no emphasis, no table cell.

    Addresses, which Markdown links by itself, get a blank into them.
    """
    shown = _LINKS.sub(" ", _visible(text)).replace("@", " (at) ")
    return "".join(
        character if character.isalnum() or character in _PLAIN or ord(character) > 127 else f"&#{ord(character)};"
        for character in shown
    )


def code(text: object) -> str:
    """`text` as a code span where it is an ordinary name, path or number; else as `markdown` shows it."""
    shown = str(text)
    return (
        f"`{shown}`" if len(shown) <= LONGEST and _CODE.fullmatch(shown) and shown == shown.strip() else markdown(text)
    )


def python_string(text: str) -> str:
    """A Python literal of `text`, of which every character that Markdown, HTML or a terminal minds is escaped."""
    return '"' + "".join(_python(character) for character in text) + '"'


def _python(character: str) -> str:
    number = ord(character)
    if character.isascii() and character.isprintable() and character not in '"\\`<>&:':
        return character
    if number > 127 and character.isalnum():
        return character
    return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"


def metadata(text: object) -> str:
    """`text` for the YAML front matter: letters, digits and harmless punctuation."""
    shown = "".join(c if c.isalnum() or c in " ._-+/,():" else "-" for c in _visible(text))
    return shown.strip(" -") or "unnamed"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table of cells that are Markdown already."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


# ---------------------------------------------------------------- the user's sections

_MARKER = re.compile(r"[ \t]*<!--[ \t]*user:([A-Za-z0-9][A-Za-z0-9_-]{0,63})[ \t]+(start|end)[ \t]*-->[ \t]*")
_LIKE_A_MARKER = re.compile(r"<!--\s{0,8}user\s{0,8}:", re.IGNORECASE)
_FRONT_MATTER = re.compile(r"\s{0,8}---[ \t]{0,8}\n(.*?\n)??---[ \t]{0,8}(?:\n|\Z)", re.DOTALL)
HINTS = {
    "about": "<!-- Your own text: what stands between these two lines is kept when the card is made anew. -->",
    "end": "<!-- Your own text, kept as well. Further sections with other names of yours are kept too. -->",
}


def split_front_matter(text: str) -> tuple[str, str]:
    """(YAML, the rest) of a card; no YAML is an empty string."""
    match = _FRONT_MATTER.match(text)
    return (match.group(1) or "", text[match.end() :]) if match else ("", text)


def user_sections(text: str) -> dict[str, str]:
    """The sections of a card that are the user's: name -> text, in their order; an empty one is an empty string.

    A section stands between the lines ``<!-- user:NAME start -->`` and ``<!-- user:NAME end -->``. Raises
    InvalidRequest, naming the line, for markers that are not closed, nested, doubled or misspelt: what they hold would
    be lost.
    """
    text = text.replace("\r\n", "\n")
    body = split_front_matter(text)[1]
    first = text.count("\n") - body.count("\n") + 1
    sections: dict[str, str] = {}
    name, opened, lines = "", 0, list[str]()
    for number, line in enumerate(body.split("\n"), first):
        match = _MARKER.fullmatch(line)
        if match is None:
            if _LIKE_A_MARKER.search(line):
                raise _wrong(number, "is no marker; write <!-- user:NAME start --> or end, alone on its line")
            lines.append(line)
        elif match[2] == "start":
            if name:
                raise _wrong(number, f"starts user:{match[1]} inside user:{name}, which line {opened} starts")
            if match[1] in sections:
                raise _wrong(number, f"starts user:{match[1]} a second time")
            name, opened, lines = match[1], number, []
        else:
            if match[1] != name:
                raise _wrong(number, f"ends user:{match[1]}, which is not open there")
            content = "\n".join(lines)
            sections[name] = "" if content.strip() in ("", HINTS.get(name)) else content
            name = ""
    if name:
        raise _wrong(opened, f"starts user:{name}, which is never closed")
    return sections


def has_marker(text: str) -> bool:
    """Whether there is anything in `text` that is meant as a marker."""
    return _LIKE_A_MARKER.search(text) is not None


def _wrong(line: int, what: str) -> InvalidRequest:
    return InvalidRequest(f"README.md, line {line}, {what}; put the user sections right, so that no text is lost")


def merge(old: Mapping[str, str], new: Mapping[str, str]) -> dict[str, str]:
    """Both cards' sections, in the order of `old`; where both have text, `new`'s."""
    return dict(old) | {name: text for name, text in new.items() if text or not old.get(name)}


def marked(name: str, text: str = "") -> str:
    """A section with its markers. InvalidRequest for a bad name, and for a text that holds a marker."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", name):
        raise InvalidRequest(f"{name!r} is no name of a section; use letters, digits, - and _")
    if has_marker(text):
        raise InvalidRequest(f"the text of the section {name} holds a marker of a section; leave it out")
    text = text.replace("\r\n", "\n") or HINTS.get(name, "")
    return f"<!-- user:{name} start -->\n{text}\n<!-- user:{name} end -->"
