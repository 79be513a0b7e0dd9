"""The prompts that a text-to-image teacher is distilled on, as conditions by index.

A method sees the index of a prompt, as it sees a class label, so that batches, groups, guidance and caches are the same
for both. `Denoiser` looks up the encoded prompts here; each is encoded once, when it is first needed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from redif_sdk.artifact.records import LONGEST_PROMPT, is_plain_text
from redif_sdk.errors import InvalidRequest
from redif_sdk.textfile import folded, forbidden_character, read_lines

Encode = Callable[[Sequence[str]], dict[str, Tensor]]
ENCODE_BATCH = 32
LARGEST_COPY = 1 << 30  # bytes of a GPU's memory


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


class Prompts:
    """Encoded prompts by index: (B,) int64 -> the tensors that the network takes, by name.

    The index ``null`` = ``len(prompts)`` is the null prompt of guidance; those after it are of prompts that are not
    trained on, but were asked for (`ask`). Copies of a network share one object, since nothing in it is trained.

    Args:
        texts: The prompts.
        encode: Encodes a list of prompts; returns tensors (B, ...) by name.
        null_prompt: The prompt of guidance's unconditional half.
        null_zeros: Whether that half takes zeros instead.

    Raises:
        InvalidRequest: There are no prompts, or one is too long.
    """

    def __init__(
        self, texts: Sequence[str], encode: Encode, *, null_prompt: str = "", null_zeros: bool = False
    ) -> None:
        self.texts = checked(texts)
        self.null_prompt, self.null_zeros = null_prompt, null_zeros
        self._encode = encode
        self._rows: dict[str, Tensor] = {}
        self._copies: dict[torch.device, dict[str, Tensor]] = {}  # of the rows, on the devices that ask for them
        self._known = torch.zeros(len(self.texts) + 1, dtype=torch.bool)
        self._all_known = False
        self._places = {text: place for place, text in enumerate(self.texts)}
        self._more: list[str] = []  # asked for, beside those that are trained on

    def __deepcopy__(self, memo: dict[int, Any]) -> Prompts:
        return self

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def null(self) -> int:
        """The index of the null prompt."""
        return len(self.texts)

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
                self._places[text] = self.null + len(self._more)
                self._known = torch.cat([self._known, torch.zeros(1, dtype=torch.bool)])
                self._all_known = False
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

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the tensors without their batch axis, by name."""
        self._learn(torch.tensor([self.null]))
        return {name: tuple(rows.shape[1:]) for name, rows in self._rows.items()}

    @property
    def row_bytes(self) -> int:
        """The bytes of one encoded prompt."""
        self.shapes()
        return sum(rows[0].nbytes for rows in self._rows.values())

    def __call__(self, index: Tensor) -> dict[str, Tensor]:
        """The tensors (B, ...) of an index (B,) int64 by name, on the index's device."""
        if not self._all_known:  # once all are known, a GPU need not wait for its indices
            self._learn(index.cpu())
        rows = self._on(index.device)
        return {name: part[index.to(part.device)].to(index.device) for name, part in rows.items()}

    def _on(self, device: torch.device) -> dict[str, Tensor]:
        """The rows on ``device`` if they take at most ``LARGEST_COPY`` bytes, else on the CPU."""
        if device.type == "cpu" or sum(part.nbytes for part in self._rows.values()) > LARGEST_COPY:
            return self._rows
        if device not in self._copies:
            self._copies[device] = {name: part.to(device) for name, part in self._rows.items()}
        return self._copies[device]

    @torch.no_grad()
    def _learn(self, places: Tensor) -> None:
        if bool(self._known[places].all()):
            return
        missing = torch.unique(places[~self._known[places]])
        for part in missing.split(ENCODE_BATCH):
            wanted = [self.text(int(place)) for place in part]
            for name, values in self._encode(wanted).items():
                if self.null_zeros:
                    values = torch.where((part == self.null).view(-1, *[1] * (values.dim() - 1)), 0, values.cpu())
                self._room(name, values)[part] = values.cpu()
        self._known[missing] = True
        self._all_known = bool(self._known.all())
        self._copies.clear()

    def _room(self, name: str, values: Tensor) -> Tensor:
        """The rows of a tensor, as large as all prompts need; the pages are taken when they are written."""
        rows, wanted = self._rows.get(name), len(self._known)
        if rows is None or len(rows) < wanted:
            size = wanted if rows is None else wanted + wanted // 2  # more are asked for one by one
            room = torch.empty(size, *values.shape[1:], dtype=values.dtype)
            if rows is not None:
                room[: len(rows)] = rows
            self._rows[name] = room
        return self._rows[name]
