"""The prompts that a text-to-image teacher is distilled on, as conditions by index.

`rows` says why they are indices; each prompt is encoded once, when it is first needed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from redif_sdk.artifact.records import LONGEST_PROMPT, is_plain_text
from redif_sdk.errors import InvalidRequest
from redif_sdk.models.rows import Rows
from redif_sdk.textfile import folded, forbidden_character, read_lines

Encode = Callable[[Sequence[str]], dict[str, Tensor]]
ENCODE_BATCH = 32


def read_prompts(path: str | Path) -> list[str]:
    """The prompts of a text file, one for each line, in order; empty lines and repetitions are left out.

    The file is UTF-8, or UTF-16 with a byte order mark. White space in a line, tabs and no-break spaces among it, is
    one space.

    Raises:
        InvalidRequest: The file cannot be read, holds no prompts, or a prompt is too long; the message has the line.
    """
    lines = read_lines(path, "the prompts, one a line")
    if not lines:
        raise InvalidRequest(f"there are no prompts in {path}; give --prompts FILE with one prompt a line")
    for number, text in lines:
        if len(text) > LONGEST_PROMPT:
            raise InvalidRequest(
                f"{path}, line {number}: a prompt has {len(text)} characters; give at most {LONGEST_PROMPT}"
            )
    return list(dict.fromkeys(text for _, text in lines))


def checked(prompts: Sequence[str]) -> list[str]:
    """``prompts`` with their white space folded, without empty ones and repetitions.

    Raises:
        InvalidRequest: There are none, or one is no text, too long, or holds a control character.
    """
    if isinstance(prompts, str):
        raise InvalidRequest("prompts is one string; give a list of prompts")
    for prompt in prompts:
        if not isinstance(prompt, str):
            raise InvalidRequest(f"a prompt is {prompt!r:.60}; give strings")
    found = list(dict.fromkeys(text for prompt in prompts if (text := folded(prompt))))
    if not found:
        raise InvalidRequest("there are no prompts; give --prompts FILE with one prompt a line")
    for text in found:
        if len(text) > LONGEST_PROMPT:
            raise InvalidRequest(f"a prompt has {len(text)} characters; give at most {LONGEST_PROMPT}")
        if bad := forbidden_character(text):
            raise InvalidRequest(f"prompt {text!r:.60} holds the control character {bad}; remove it")
    return found


class Prompts(Rows):
    """Encoded prompts by index: (B,) int64 -> the tensors that the network takes, by name.

    The index ``null`` = ``len(prompts)`` is the null prompt of guidance; those after it are of prompts that are not
    trained on, but were asked for (`ask`).

    Args:
        texts: The prompts.
        encode: Encodes a list of prompts; returns tensors (B, ...) by name.
        null_prompt: The prompt of guidance's unconditional half.
        null_zeros: Whether that half takes zeros instead.

    Raises:
        InvalidRequest: There are no prompts, or one is too long.
    """

    at_once = ENCODE_BATCH

    def __init__(
        self, texts: Sequence[str], encode: Encode, *, null_prompt: str = "", null_zeros: bool = False
    ) -> None:
        self.texts = checked(texts)
        super().__init__(len(self.texts))
        self.null_prompt, self.null_zeros = null_prompt, null_zeros
        self._encode = encode
        self._places = {text: place for place, text in enumerate(self.texts)}
        self._more: list[str] = []  # asked for, beside those that are trained on

    def text(self, place: int) -> str:
        """The prompt at an index.

        Raises:
            IndexError: There is none.
        """
        if place < self.null:
            return self.texts[place]
        return self.null_prompt if place == self.null else self._more[place - self.null - 1]

    def ask(self, prompts: Sequence[str]) -> Tensor:
        """The indices (B,) int64 of any prompts: each is encoded once, when it is first needed.

        Raises:
            InvalidRequest: One is no text, too long, or holds a control character.
        """
        places = []
        for prompt in prompts:
            (text,) = checked([prompt])
            if text not in self._places:
                self._more.append(text)
                self._places[text] = self._add()
            places.append(self._places[text])
        return torch.tensor(places, dtype=torch.int64)

    def examples(self, most: int) -> list[str]:
        """The first prompts that a manifest takes, up to ``most``: none with invisible characters.

        Raises:
            InvalidRequest: There are none.
        """
        found = [text for text in self.texts if is_plain_text(text)][:most]
        if not found:
            raise InvalidRequest(
                f"every prompt holds invisible characters, as {self.texts[0]!r:.60} does; give one that has none"
            )
        return found

    @property
    def digest(self) -> str:
        """SHA-256 of the prompts in their order."""
        return hashlib.sha256("\n".join(self.texts).encode()).hexdigest()

    @property
    def _first(self) -> int:
        return self.null  # which is always encoded, if any is

    def _make(self, places: Tensor) -> Mapping[str, Tensor]:
        found = self._encode([self.text(int(place)) for place in places])
        if not self.null_zeros:
            return found
        null = places == self.null
        return {
            name: torch.where(null.view(-1, *[1] * (values.dim() - 1)), 0, values.cpu())
            for name, values in found.items()
        }
