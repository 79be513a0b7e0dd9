"""``redif generate --condition``: the arrays of a student that is conditioned on some, from files and numbers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from redif_sdk.artifact.examples import example_conditions
from redif_sdk.artifact.folder import StudentFolder
from redif_sdk.artifact.records import TensorSpec
from redif_sdk.errors import InvalidRequest
from redif_sdk.inputs.images import open_image

__all__ = ["read_conditions"]

EXAMPLE = "example"


def read_conditions(student: StudentFolder, given: Sequence[str]) -> dict[str, NDArray[Any]] | None:
    """Arrays (B, ...) by name of ``NAME=VALUE`` each; what is given for one name more than once are further rows.
    ``example`` alone is the first of the student's own examples.

    A value is an ``.npy`` file with or without the batch axis, an image file for an input of (C, H, W) floats, which
    becomes numbers in [-1, 1], or a number for an input of one number an image.

    Raises:
        InvalidRequest: The student has no such input, or a value does not fit it.
    """
    if not given:
        return None
    manifest = student.manifest
    if list(given) == [EXAMPLE] and manifest.arrays is not None:
        return example_conditions(student, [0])
    specs = {spec.name: spec for spec in (manifest.arrays.tensors if manifest.arrays else [])}
    rows: dict[str, list[NDArray[Any]]] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or name not in specs:
            known = f"its inputs are {', '.join(specs)}" if specs else "it takes no arrays"
            raise InvalidRequest(f"--condition {text!r:.100} does not fit {manifest.name}; give NAME=FILE, {known}")
        rows.setdefault(name, []).append(_value(specs[name], value))
    return {name: np.concatenate(parts) for name, parts in rows.items()}


def _value(spec: TensorSpec, value: str) -> NDArray[Any]:
    """The rows (N, ...) that a value gives for an input."""
    path = Path(value)
    if path.suffix == ".npy":
        try:
            array = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise InvalidRequest(f"--condition {spec.name}: {path} cannot be read: {error!s:.200}") from error
        found: NDArray[Any] = array[None] if array.ndim == len(spec.shape) - 1 else array
        return found
    if path.suffix and path.exists():
        return _image(spec, path)
    try:
        number = float(value) if spec.dtype == "float32" else int(value)
    except ValueError:
        raise InvalidRequest(
            f"--condition {spec.name}={value!r:.100} is neither a file that is there nor a number; give a .npy "
            "file, an image or a number"
        ) from None
    if len(spec.shape) > 1:
        raise InvalidRequest(f"--condition {spec.name} is one number, and the input has {_shape(spec)}; give a file")
    return np.array([number])


def _image(spec: TensorSpec, path: Path) -> NDArray[np.float32]:
    modes = {1: "L", 3: "RGB", 4: "RGBA"}
    if spec.dtype != "float32" or len(spec.shape) != 4 or spec.shape[1] not in modes:
        raise InvalidRequest(f"--condition {spec.name} is an image, and the input has {_shape(spec)}; give a .npy file")
    image = open_image(path, str(path)).convert(modes[int(spec.shape[1])])
    levels = np.asarray(image, np.float32).reshape(image.height, image.width, -1)
    wanted = tuple(spec.shape[2:])
    if levels.shape[:2] != wanted:
        raise InvalidRequest(
            f"{path} is {image.width} x {image.height}; {spec.name} takes {wanted[1]} x {wanted[0]}: resize it first"
        )
    found: NDArray[np.float32] = levels.transpose(2, 0, 1)[None] / np.float32(127.5) - np.float32(1)
    return found


def _shape(spec: TensorSpec) -> str:
    return f"the shape ({', '.join(map(str, spec.shape))}) of {spec.dtype}"
