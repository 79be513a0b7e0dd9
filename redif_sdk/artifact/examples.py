"""The conditions that a student on a user's own arrays has in its folder: what it is recorded and shown with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from redif_sdk.artifact.folder import StudentFolder
from redif_sdk.artifact.untrusted.npz import npz_arrays
from redif_sdk.errors import ManifestError

__all__ = ["example_conditions", "example_count"]


def _rows(student: StudentFolder) -> dict[str, NDArray[Any]]:
    arrays = student.manifest.arrays
    assert arrays is not None
    held = npz_arrays(student.read(arrays.examples), arrays.examples)
    names = {f"conditions.{spec.name}": spec for spec in arrays.tensors}
    lengths = {len(value) if value.ndim else 0 for value in held.values()}
    shapes = {name: [*value.shape[1:]] for name, value in held.items()}
    numbers = all(value.dtype.kind in "fiub" and np.isfinite(value).all() for value in held.values())
    fits = shapes == {name: spec.shape[1:] for name, spec in names.items()} and len(lengths) == 1 and 0 not in lengths
    if not (fits and numbers):
        raise ManifestError(
            f"{arrays.examples} in {student.path} does not hold the conditions of its manifest; make the student again"
        )
    return {spec.name: np.ascontiguousarray(held[name], dtype=spec.dtype) for name, spec in names.items()}


def example_count(student: StudentFolder) -> int:
    """How many example conditions a student on arrays has."""
    return len(next(iter(_rows(student).values())))


def example_conditions(student: StudentFolder, indices: Sequence[int]) -> dict[str, NDArray[Any]]:
    """Arrays (B, ...) by name: the student's examples at ``indices``, in turn.

    Raises:
        IntegrityError: The file was altered.
        ManifestError: It holds other arrays than the manifest says.
    """
    rows = _rows(student)
    count = len(next(iter(rows.values())))
    return {name: value[[index % count for index in indices]] for name, value in rows.items()}
