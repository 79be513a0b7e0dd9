"""Safe Markdown: a stranger's strings as text, code and YAML; the user's sections; what no card may hold.

Everything here takes linear time, also for hostile input. What a card says is `card.py`'s business.
"""

from __future__ import annotations

import html.entities
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence

from redif_sdk.artifact.manifest import CARD_LIMIT
from redif_sdk.errors import InvalidRequest, ManifestError

__all__ = [
    "CARD_LIMIT",
    "check_active",
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


# ---------------------------------------------------------------- what no card may hold

_ELEMENTS = (
    "script|iframe|frame|frameset|object|embed|applet|form|input|button|textarea|select|meta|link|base|style|svg|math"
    "|template|noscript|portal"
)
_ELEMENT = re.compile(rf"<[\s/\x00-\x20]*(?:[\w-]{{1,32}}:)?({_ELEMENTS})(?![\w-])", re.IGNORECASE)
_TAG = re.compile(r"<[A-Za-z]")
#: A handler inside one tag, and the known ones anywhere after a tag: where a tag ends depends on who reads it.
_HANDLER = re.compile(r"<[A-Za-z/][^<>]*?[\s\"'/](on\w+)\s*=", re.IGNORECASE)
_KNOWN_HANDLER = re.compile(
    r"(?<![\w-])(on(?:abort|after|animation|auxclick|before|begin|blur|canplay|cancel|change|click|close|context|copy"
    r"|cuechange|cut|dblclick|drag|drop|durationchange|emptied|end|ended|error|focus|formdata|fullscreen|gotpointer"
    r"|hashchange|input|invalid|key|language|load|lostpointer|message|mouse|navigate|offline|online|page|paste|pause"
    r"|play|pointer|popstate|progress|ratechange|readystate|rejection|repeat|reset|resize|scroll|search|security"
    r"|seek|select|show|slotchange|stalled|start|storage|submit|suspend|timeupdate|toggle|touch|transition|unhandled"
    r"|unload|visibility|volumechange|waiting|webkit|wheel)[a-z]{0,24})\s{0,64}=",
    re.IGNORECASE,
)
#: What browsers and Markdown drop, or may drop, inside a scheme.
_JUNK = "\\x00-\\x20\\x7f-\\xa0\\xad\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\\\\"
_QUOTES = "\"'`<"
_SCHEME = re.compile(
    "|".join(rf"[{_JUNK}]*".join(scheme) for scheme in ("javascript:", "vbscript:", "data:text", "data:application"))
    + "|"
    + rf"[{_JUNK}]*".join("data:image/svg"),
    re.IGNORECASE,
)
_ENTITY = re.compile(r"&(?:#[xX]([0-9A-Fa-f]+)|#([0-9]+)|([A-Za-z][A-Za-z0-9]{1,31}));?")
_NOT_IN_URLS = re.compile(rf"[{_JUNK}{_QUOTES}]+")
_OPENS_URL = re.compile(r"(?:\](?:\(|:)|=)\Z")
_OPENS_STYLE_URL = re.compile(r"url\(\Z", re.IGNORECASE)


def check_active(text: str, where: str) -> None:
    """Raise ManifestError, naming `where` and the line, if a card could do anything but show text, pictures and links.

    Refused: elements that run, embed, style or submit; ``on...=`` handlers; ``javascript:``, ``vbscript:`` and
    ``data:text`` (or SVG, application) addresses in attributes, links, pictures and definitions, however they are
    written; NUL bytes; more than 1 MiB. Code blocks are no exception: sites differ in what they take for code.
    """
    if len(text) > CARD_LIMIT or len(text.encode("utf-8", "surrogatepass")) > CARD_LIMIT:
        raise ManifestError(f"{where} has more than {CARD_LIMIT} bytes, which no card of ours has")
    if "\0" in text:
        raise _active(text, text.index("\0"), where, "a NUL byte")
    if found := _ELEMENT.search(text):
        raise _active(text, found.start(), where, f"the HTML element {found[1].lower()}")
    tag = _TAG.search(text)
    if tag is not None:
        for pattern in (_HANDLER, _KNOWN_HANDLER):
            if found := pattern.search(text, tag.start()):
                raise _active(text, found.start(1), where, f"the handler {found[1].lower()[:40]}")
    decoded = _ENTITY.sub(_decode, text)
    for found in _SCHEME.finditer(decoded):
        if _starts_url(decoded, found.start(), in_styles=tag is not None):
            raise _active(decoded, found.start(), where, "an address that runs code")


def _active(text: str, position: int, where: str, what: str) -> ManifestError:
    line = text.count("\n", 0, position) + 1
    return ManifestError(f"{where}, line {line}, holds {what}; cards may hold text, pictures and plain links alone")


def _decode(match: re.Match[str]) -> str:
    hexadecimal, decimal, name = match.groups()
    if name:
        return _content(html.entities.html5.get(f"{name};", match[0]))
    digits, base = (hexadecimal, 16) if hexadecimal else (decimal, 10)
    digits = digits.lstrip("0")[:9] or "0"
    number = int(digits, base)
    return _content(chr(number) if number < 0x110000 else "\ufffd")


def _content(text: str) -> str:
    """What an entity stands for; it is never markup, so it opens no link, no tag and no attribute."""
    return "\ufffd" if text in ("]", "<", "=") else text


def _starts_url(text: str, position: int, *, in_styles: bool) -> bool:
    """Whether an address may begin at `position`: after ``](``, ``]:``, ``=`` or ``<``, and ``url(`` in styles."""
    before = position
    angle = False
    while before and (character := text[before - 1]) and _NOT_IN_URLS.fullmatch(character):
        angle = angle or character == "<"
        before -= 1
    ahead = text[max(0, before - 4) : before]
    return angle or bool(_OPENS_URL.search(ahead)) or (in_styles and bool(_OPENS_STYLE_URL.search(ahead)))
