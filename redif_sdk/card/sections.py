"""The parts of a card that belong to its user: marked sections, tags and front matter keys. Linear time throughout."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from redif_sdk.artifact.manifest import CARD_NAME
from redif_sdk.errors import InvalidRequest

__all__ = [
    "HINTS",
    "KEPT_KEYS",
    "OWN_TAGS",
    "body",
    "check_section",
    "is_foreign",
    "is_generated",
    "merge",
    "user_keys",
    "user_sections",
    "user_tags",
]

#: The tags that a card gets by itself; other tags in an existing card are the user's.
OWN_TAGS = ("diffusion", "few-step", "distillation", "redif", "onnx", "diffusers", "class-conditional")

#: The Hub's keys that a manifest has no value for: the user's, kept when a card is made anew.
KEPT_KEYS = frozenset(
    {
        *("co2_eq_emissions", "datasets", "inference", "language", "new_version", "thumbnail", "widget"),
        *("extra_gated_button_content", "extra_gated_description", "extra_gated_eu_disallowed"),
        *("extra_gated_fields", "extra_gated_heading", "extra_gated_prompt"),
    }
)

HINTS = {
    "about": "<!-- Your own text: what stands between these two lines is kept when the card is made anew. -->",
    "end": "<!-- Your own text, kept as well. Further sections with other names of yours are kept too. -->",
}
LARGEST_FRONT_MATTER = 1 << 16  # characters that are parsed

_NAME = "[A-Za-z0-9][A-Za-z0-9_-]{0,63}"
_MARKER = re.compile(rf"[ \t]*<!--[ \t]*user:({_NAME})[ \t]+(start|end)[ \t]*-->[ \t]*")
_LIKE_A_MARKER = re.compile(r"<!--\s{0,8}user\s{0,8}:", re.IGNORECASE)
_FRONT_MATTER = re.compile(r"\s{0,8}---[ \t]{0,8}\n(.*?\n)??---[ \t]{0,8}(?:\n|\Z)", re.DOTALL)


def _split(text: str) -> tuple[str, str]:
    """(YAML, the rest) of a card, with plain line ends; a card without YAML has an empty first part."""
    text = text.replace("\r\n", "\n")
    match = _FRONT_MATTER.match(text)
    return (match.group(1) or "", text[match.end() :]) if match else ("", text)


def body(text: str) -> str:
    """Return a card without its front matter."""
    return _split(text)[1]


def user_sections(text: str) -> dict[str, str]:
    """Return the user's sections of a card by name, in order; a section that holds only our hint is empty.

    A section stands between the lines ``<!-- user:NAME start -->`` and ``<!-- user:NAME end -->``.

    Raises:
        InvalidRequest: a marker is not closed, nested, doubled or misspelt, which would lose text; names the line.
    """
    rest = body(text)
    first = text.count("\n") - rest.count("\n") + 1
    sections: dict[str, str] = {}
    name, opened, lines = "", 0, list[str]()
    for number, line in enumerate(rest.split("\n"), first):
        match = _MARKER.fullmatch(line)
        if match is None:
            if _LIKE_A_MARKER.search(line):
                raise _wrong(number, "is not a marker; write <!-- user:NAME start --> or end, alone on its line")
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


def _wrong(line: int, what: str) -> InvalidRequest:
    return InvalidRequest(f"{CARD_NAME}, line {line}, {what}; correct the user sections, so that no text is lost")


def check_section(name: str, text: str) -> None:
    """Raise InvalidRequest for a section that `user_sections` could not read back."""
    if not re.fullmatch(_NAME, name):
        raise InvalidRequest(f"{name!r} is not a section name; use letters, digits, - and _")
    if _LIKE_A_MARKER.search(text):
        raise InvalidRequest(f"the text of the section {name} holds a section marker; remove it")


def merge(old: Mapping[str, str], new: Mapping[str, str]) -> dict[str, str]:
    """Return the sections of both cards, in the order of `old`; where both have text, `new`'s."""
    return dict(old) | {name: text for name, text in new.items() if text or not old.get(name)}


def is_generated(text: str) -> bool:
    """Whether redif-sdk made a card: it has marked sections, or the first line of cards of old releases."""
    return _LIKE_A_MARKER.search(text) is not None or "\nA few-step diffusion student of `" in text


def is_foreign(text: str) -> bool:
    """Whether somebody wrote the whole card by hand: it has metadata and text, and no sections of ours."""
    head, rest = _split(text)
    return bool(head.strip()) and bool(rest.strip()) and not is_generated(text)


def user_tags(text: str) -> list[str]:
    """Return the tags of a card that are not ours."""
    found = _front_matter(text).get("tags")
    return [tag for tag in found if isinstance(tag, str) and tag not in OWN_TAGS] if isinstance(found, list) else []


def user_keys(text: str) -> dict[str, Any]:
    """Return the front matter entries that only the user can know (`KEPT_KEYS`), such as the text of a gate."""
    return {key: value for key, value in _front_matter(text).items() if key in KEPT_KEYS}


def _front_matter(text: str) -> dict[str, Any]:
    import yaml

    front = _split(text)[0]
    if len(front) > LARGEST_FRONT_MATTER:
        raise InvalidRequest(f"the front matter of {CARD_NAME} has more than {LARGEST_FRONT_MATTER} characters")
    try:
        parsed = yaml.safe_load(front)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InvalidRequest(f"the front matter of {CARD_NAME} is not YAML: {reason}; correct it") from error
    return parsed if isinstance(parsed, dict) else {}
