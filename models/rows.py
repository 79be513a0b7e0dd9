"""Conditions by index: what training hands around is an index (B,) int64, what a network takes are tensors by name.

So batches, groups, guidance, caches and checkpoints are the same for classes, prompts and a user's own arrays, and a
batch of prompts costs eight bytes an image until a network is called. `Denoiser` looks the tensors up here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor

__all__ = ["LARGEST_COPY", "Rows"]

LARGEST_COPY = 1 << 30  # bytes of a GPU's memory


class Rows(ABC):
    """Conditions by index: (B,) int64 -> tensors (B, ...) by name. Each row is made once, when it is first needed.

    Indices below ``len(self)`` are of the rows that a teacher is distilled on, `null` is the unconditional half of
    guidance, and those after it are of rows that were asked for beside them. Copies of a network share one object,
    since nothing in it is trained.

    Args:
        count: How many rows there are.
    """

    #: Rows that are made at once.
    at_once = 32

    def __init__(self, count: int) -> None:
        self._count = count
        self._rows: dict[str, Tensor] = {}
        self._copies: dict[torch.device, dict[str, Tensor]] = {}  # of the rows, on the devices that ask for them
        self._known = torch.zeros(count + 1, dtype=torch.bool)
        self._all_known = False

    @abstractmethod
    def _make(self, places: Tensor) -> Mapping[str, Tensor]:
        """The rows at ``places`` (N,): tensors (N, ...) by name, on any device."""

    @property
    @abstractmethod
    def digest(self) -> str:
        """SHA-256 of what the rows are made of, in their order."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def __len__(self) -> int:
        return self._count

    @property
    def null(self) -> int:
        """The index of guidance's unconditional half."""
        return self._count

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the tensors without their batch axis, by name."""
        if not self._rows:
            self._learn(torch.tensor([self._first]))
        return {name: tuple(rows.shape[1:]) for name, rows in self._rows.items()}

    @property
    def _first(self) -> int:
        """A row that can always be made."""
        return 0

    @property
    def row_bytes(self) -> int:
        """The bytes of one row."""
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

    def _add(self) -> int:
        """Make room for one more row; returns its index."""
        self._known = torch.cat([self._known, torch.zeros(1, dtype=torch.bool)])
        self._all_known = False
        return len(self._known) - 1

    def _hold(self, places: Tensor, rows: Mapping[str, Tensor]) -> None:
        """Keep rows that are made."""
        for name, values in rows.items():
            self._room(name, values)[places] = values.cpu()
        self._known[places] = True
        self._all_known = bool(self._known.all())
        self._copies.clear()

    @torch.no_grad()
    def _learn(self, places: Tensor) -> None:
        if bool(self._known[places].all()):
            return
        for part in torch.unique(places[~self._known[places]]).split(self.at_once):
            self._hold(part, self._make(part))

    def _room(self, name: str, values: Tensor) -> Tensor:
        """The rows of a tensor, as large as all need; the pages are taken when they are written."""
        rows, wanted = self._rows.get(name), len(self._known)
        if rows is None or len(rows) < wanted:
            size = wanted if rows is None else wanted + wanted // 2  # more are asked for one by one
            room = torch.empty(size, *values.shape[1:], dtype=values.dtype)
            if rows is not None:
                room[: len(rows)] = rows
            self._rows[name] = room
        return self._rows[name]
