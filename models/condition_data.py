"""A user's own conditions: a data set of named arrays, such as low-resolution images, whose rows training refers to."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from redif_sdk.artifact.records import MOST_CONDITIONS, TensorSpec, is_condition_name
from redif_sdk.errors import InvalidRequest
from redif_sdk.models.rows import Rows

__all__ = ["ConditionData"]

Source = Mapping[str, ArrayLike] | str | Path
Row = Callable[[int], Mapping[str, ArrayLike]]


class ConditionData(Rows):
    """Conditions by index: (B,) int64 -> a user's own tensors (B, ...) by name, float32 or int64.

    Make one with `of` from arrays, or with `from_function` from a function. A row is read once and stays in memory.
    """

    def __init__(self, count: int, row: Row, null: Mapping[str, ArrayLike] | None = None) -> None:
        """
        Args:
            count: How many rows there are.
            row: The arrays of a row by name, without a batch axis; called once a row.
            null: The arrays of guidance's unconditional half, without a batch axis; None: it cannot be guided.

        Raises:
            InvalidRequest: There are no rows, or the first one, or ``null``, cannot be a condition.
        """
        if count < 1:
            raise InvalidRequest(f"conditions have {count} rows; give at least one")
        super().__init__(count)
        self._row = row
        self._digest: str | None = None
        self._specs: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        first = _tensors({name: np.asarray(value)[None] for name, value in row(0).items()}, "the first condition")
        self._specs = {name: (value.dtype, tuple(value.shape[1:])) for name, value in first.items()}
        self._hold(torch.tensor([0]), first)
        self.has_null = null is not None
        if null is not None:
            self._hold(torch.tensor([self.null]), self._one(null, "null"))

    @classmethod
    def of(cls, source: Source | ConditionData, *, null: Mapping[str, ArrayLike] | None = None) -> ConditionData:
        """From arrays (N, ...) by name, or an ``.npz`` of these.

        Floats become float32, integers and booleans int64.

        Args:
            source: The arrays, all of one length N, or the file; or what `from_function` returned.
            null: As for the class.

        Raises:
            InvalidRequest: No arrays, arrays of other lengths or of no numbers, NaN, a name that no input can have, or
                a file that is no ``.npz``.
        """
        if isinstance(source, ConditionData):
            return source
        where = f"the conditions in {source}" if isinstance(source, str | Path) else "conditions"
        arrays = _tensors(_read(source) if isinstance(source, str | Path) else source, where)
        lengths = {name: len(value) for name, value in arrays.items()}
        if len(set(lengths.values())) > 1:
            said = ", ".join(f"{name} {length}" for name, length in lengths.items())
            raise InvalidRequest(f"{where} have different lengths ({said}); give one row of each for every condition")
        count = next(iter(lengths.values()))
        made = cls(count, lambda place: {name: value[place] for name, value in arrays.items()}, null)
        digest = hashlib.sha256()
        for name, value in sorted(arrays.items()):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(np.ascontiguousarray(value.numpy()).data)
        made._digest = digest.hexdigest()
        made._hold(torch.arange(count), arrays)
        made._row = _gone  # all rows are held: the caller's arrays need not stay
        return made

    @classmethod
    def from_function(cls, row: Row, count: int, *, null: Mapping[str, ArrayLike] | None = None) -> ConditionData:
        """From a function of an index below ``count``, such as one that reads a file. It must return the same arrays
        each time. Arguments and errors as for the class."""
        return cls(count, row, null)

    @property
    def names(self) -> list[str]:
        """The names of the arrays, in their order."""
        return list(self._specs)

    def specs(self) -> list[TensorSpec]:
        """The inputs of the graphs, in the order of the arrays."""
        return [
            TensorSpec(name=name, dtype=str(dtype).removeprefix("torch."), shape=["batch", *shape])
            for name, (dtype, shape) in self._specs.items()
        ]

    @property
    def digest(self) -> str:
        """SHA-256 of all arrays; of a function's, of their number and the first row."""
        if self._digest is None:
            first = self(torch.tensor([0]))
            facts = [str(len(self)), *(f"{name} {value.tolist()}" for name, value in sorted(first.items()))]
            self._digest = hashlib.sha256("\n".join(facts).encode()).hexdigest()
        return self._digest

    def examples(self, most: int) -> dict[str, NDArray[Any]]:
        """The first rows, up to ``most``, by name."""
        rows = self(torch.arange(min(most, len(self))))
        return {name: value.numpy() for name, value in rows.items()}

    def ask(self, arrays: Mapping[str, ArrayLike]) -> Tensor:
        """The indices (B,) int64 of further conditions: arrays (B, ...) by name.

        Raises:
            InvalidRequest: They have other names, shapes or lengths than the data.
        """
        tensors = _tensors(arrays, "conditions")
        self._check(tensors, "conditions")
        lengths = {len(value) for value in tensors.values()}
        if len(lengths) != 1:
            raise InvalidRequest(f"conditions have lengths {sorted(lengths)}; give one row of each for every image")
        places = torch.tensor([self._add() for _ in range(lengths.pop())], dtype=torch.int64)
        self._hold(places, tensors)
        return places

    def _make(self, places: Tensor) -> Mapping[str, Tensor]:
        rows = [self._one(self._row(int(place)), f"condition {int(place)}") for place in places]
        return {name: torch.cat([row[name] for row in rows]) for name in self._specs}

    def _one(self, row: Mapping[str, ArrayLike], where: str) -> dict[str, Tensor]:
        tensors = _tensors({name: np.asarray(value)[None] for name, value in row.items()}, where)
        self._check(tensors, where)
        return tensors

    def _check(self, tensors: Mapping[str, Tensor], where: str) -> None:
        """Raise InvalidRequest unless tensors (B, ...) have the data's names, dtypes and shapes."""
        found = {name: (value.dtype, tuple(value.shape[1:])) for name, value in tensors.items()}
        if found != self._specs:
            raise InvalidRequest(f"{where} has {_said(found)}; all have {_said(self._specs)}")


def _gone(place: int) -> Mapping[str, ArrayLike]:
    raise IndexError(f"there is no condition {place}")


def _said(specs: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> str:
    parts = [f"{name} {shape} {str(dtype).removeprefix('torch.')}" for name, (dtype, shape) in specs.items()]
    return ", ".join(parts) or "nothing"


def _read(path: str | Path) -> dict[str, NDArray[Any]]:
    try:
        with np.load(path, allow_pickle=False) as file:
            if isinstance(file, np.ndarray):
                raise ValueError("it is a single array")
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, AttributeError, TypeError) as error:
        raise InvalidRequest(
            f"the conditions in {path} cannot be read ({error!s:.200}); write them with numpy.savez(path, image=..., "
            "label=...)"
        ) from error


def _tensors(arrays: Mapping[str, ArrayLike], where: str) -> dict[str, Tensor]:
    """Arrays (N, ...) as float32 and int64 tensors of their own memory or a copy, checked one by one."""
    if not isinstance(arrays, Mapping) or not 1 <= len(arrays) <= MOST_CONDITIONS:
        said = f"{len(arrays)} arrays" if isinstance(arrays, Mapping) else f"a {type(arrays).__name__}"
        raise InvalidRequest(f"{where}: {said}; give 1 to {MOST_CONDITIONS} arrays by name")
    found = {}
    for name, value in arrays.items():
        if not isinstance(name, str) or not is_condition_name(name):
            raise InvalidRequest(
                f"{where}: {name!r:.60} cannot name a condition; use letters, digits and _, and no name of a graph's "
                "other inputs and outputs (sample, timestep, noise, table, images ...)"
            )
        array = value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
        if array.dtype.kind not in "fiub":
            raise InvalidRequest(f"{where}: {name} has dtype {array.dtype}; give numbers")
        if array.ndim < 1 or not len(array):
            raise InvalidRequest(f"{where}: {name} has shape {array.shape}; give at least one row")
        kind = np.float32 if array.dtype.kind == "f" else np.int64
        with np.errstate(over="ignore"):  # what is too large becomes infinite, and is refused
            tensor = torch.from_numpy(np.array(array, dtype=kind, order="C"))
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise InvalidRequest(f"{where}: {name} holds NaN or infinite values; give finite numbers")
        found[name] = tensor
    return found
