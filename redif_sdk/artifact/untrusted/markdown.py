"""Markdown from anybody: a card may hold text, images and links, and nothing that a browser would run."""

from __future__ import annotations

import html.entities
import re

from redif_sdk.errors import ManifestError

__all__ = ["CARD_LIMIT", "check_active"]

CARD_LIMIT = 1 << 20  # bytes of a card that are read

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
    """Raise ManifestError, naming `where` and the line, if a card could do anything but show text, images and links.

    Refused: elements that run, embed, style or submit; ``on...=`` handlers; ``javascript:``, ``vbscript:`` and
    ``data:text`` (or SVG, application) addresses in attributes, links, images and definitions, however they are
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
    return ManifestError(f"{where}, line {line}, holds {what}; cards may hold text, images and plain links only")


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
