"""What a request may say: classes, seeds, latents and steps, checked against the manifest before anything is computed.

Every refusal is an InvalidRequest that names what would have been accepted. No graph is run and no file is read here.
"""

from __future__ import annotations

import math
import operator
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, SupportsIndex

import numpy as np
from numpy.typing import ArrayLike, NDArray

from redif_sdk.errors import InvalidRequest
from redif_sdk.manifest import Manifest
from redif_sdk.noise import noise as draw
from redif_sdk.steps import StepTable

__all__ = [
    "OUTPUT_TYPES",
    "Labels",
    "Request",
    "Seeds",
    "check_labels",
    "check_latents",
    "check_noise",
    "check_request",
    "check_size",
]

OUTPUT_TYPES = ("pil", "np", "uint8")
SEED_LIMIT = 1 << 64
DRAWN_SEED_BITS = 32  # short enough to be read out and typed in

Label = SupportsIndex | str
Labels = Label | Sequence[Label] | NDArray[np.integer[Any]]
Seeds = SupportsIndex | Sequence[SupportsIndex | tuple[SupportsIndex, SupportsIndex]] | None


@dataclass(frozen=True)
class Request:
    """A checked request for B pictures."""

    table: StepTable
    labels: NDArray[np.int64] | None  # (B,)
    seeds: list[tuple[int, int]]  # (seed, image index), B of them
    latents: NDArray[np.float32] | None  # (B, C, H, W)
    size: tuple[int, int]  # (H, W)

    def noise(self, manifest: Manifest) -> NDArray[np.float32]:
        """The noise (N, B, C, H, W), with the given latents as its first slice."""
        shape = (manifest.latents.channels, *self.size)
        if self.latents is None:
            return draw(self.seeds, shape, slices=self.table.noise_slices)
        if self.table.noise_slices == 1:
            return self.latents[None]
        later = draw(self.seeds, shape, slices=self.table.noise_slices - 1, first_slot=1)
        return np.concatenate([self.latents[None], later])


def check_request(
    manifest: Manifest,
    prompt: str | Sequence[str] | None,
    class_labels: Labels | None,
    num_images_per_prompt: int,
    num_inference_steps: int | None,
    seed: Seeds,
    latents: ArrayLike | None,
    height: int | None = None,
    width: int | None = None,
) -> Request:
    """The request, or InvalidRequest."""
    size = check_size(manifest, height, width, latents)
    per_prompt = _integer("num_images_per_prompt", num_images_per_prompt, minimum=1)
    if num_inference_steps is not None:
        num_inference_steps = _integer("num_inference_steps", num_inference_steps, minimum=1)
    table = manifest.step_table(num_inference_steps)
    if prompt is not None and class_labels is not None:
        raise InvalidRequest("prompt and class_labels both name the class; give one of them")
    asked = prompt if prompt is not None else class_labels
    labels = None
    if manifest.condition is None:
        if asked is not None:
            raise InvalidRequest(f"{manifest.name} is unconditional; ask for pictures with num_images_per_prompt alone")
        count = per_prompt
    else:
        labels = np.repeat(np.array(_labels(manifest, asked), dtype=np.int64), per_prompt)
        count = len(labels)
    starts = None if latents is None else check_latents(manifest, latents, count, size)
    return Request(table, labels, _seeds(seed, count), starts, size)


def check_size(
    manifest: Manifest, height: int | None, width: int | None, latents: ArrayLike | None = None
) -> tuple[int, int]:
    """(H, W) of the latents for pictures of that height and width in pixels; by default the given latents' own."""
    scale = manifest.postprocess.pixel_shuffle
    if latents is not None and height is None and width is None and np.ndim(latents) == 4:
        height, width = (extent * scale for extent in np.shape(latents)[2:])
    if height is not None:
        height = _integer("height", height, minimum=1)
    if width is not None:
        width = _integer("width", width, minimum=1)
    return manifest.latents.size(height, width, scale)


def check_labels(manifest: Manifest, class_labels: Any, batch: int) -> NDArray[np.int64] | None:
    """Labels (batch,) int64 of a conditional student, None of an unconditional one."""
    if manifest.condition is None:
        if class_labels is not None:
            raise InvalidRequest(f"{manifest.name} is unconditional; it takes no class_labels")
        return None
    usual = isinstance(class_labels, np.ndarray) and class_labels.dtype == np.int64 and class_labels.shape == (batch,)
    if usual and class_labels.min() >= 0 and class_labels.max() < manifest.condition.num_classes:
        return class_labels  # type: ignore[no-any-return]  # in a fraction of the time
    labels = np.array(_labels(manifest, class_labels), dtype=np.int64)
    if len(labels) != batch:
        raise InvalidRequest(f"{len(labels)} class_labels for {batch} pictures; give one a picture")
    return labels


def check_latents(
    manifest: Manifest, latents: ArrayLike, batch: int, size: tuple[int, int] | None = None
) -> NDArray[np.float32]:
    """Latents (batch, C, H, W) as finite float32 of the student's shape, or of `size`."""
    array = np.asarray(latents)
    if array.dtype.kind not in "fiu":
        raise InvalidRequest(f"latents have dtype {array.dtype}; give an array of floating-point numbers")
    height, width = size or (manifest.latents.height, manifest.latents.width)
    expected = (batch, manifest.latents.channels, height, width)
    if array.shape != expected:
        raise InvalidRequest(f"latents have shape {array.shape}; give {expected}")
    with np.errstate(over="ignore"):  # what is too large for float32 becomes infinite, and is refused as such
        result = np.ascontiguousarray(array, dtype=np.float32)
    if not np.isfinite(result).all():
        raise InvalidRequest("latents hold NaN or infinite values; give finite numbers")
    return result


def check_noise(manifest: Manifest, noise: ArrayLike, table: StepTable) -> NDArray[np.float32]:
    """Noise (N, B, C, H, W) as float32, cut to the slices that the table reads."""
    array = np.asarray(noise)
    if array.ndim != 5 or array.shape[0] < table.noise_slices or array.shape[1] < 1:
        shape = f"({table.noise_slices}, B, {manifest.latents.channels}, H, W)"
        raise InvalidRequest(f"noise has shape {array.shape}; give {shape}")
    array = array[: table.noise_slices]
    latents = manifest.latents
    own = (latents.channels, latents.height, latents.width)
    usual = array.dtype == np.float32 and array.shape[2:] == own and array.flags.c_contiguous
    if usual and math.isfinite(np.vdot(array, array)):  # then every number is
        return array  # in a fraction of the time
    flat = array.reshape(-1, *array.shape[2:])
    return check_latents(manifest, flat, len(flat), check_size(manifest, None, None, flat)).reshape(array.shape)


def _integer(name: str, value: Any, *, minimum: int, limit: int | None = None) -> int:
    """`value` as an int, if it is one (not a bool, not 2.0) and in range."""
    try:
        if isinstance(value, bool | np.bool_):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise InvalidRequest(f"{name} is {value!r}; give an integer") from None
    if number < minimum or (limit is not None and number >= limit):
        bound = f"from {minimum}" if limit is None else f"from {minimum} to {limit - 1}"
        raise InvalidRequest(f"{name} is {number}; give an integer {bound}")
    return number


def _several(value: Any) -> list[Any] | None:
    """The items of a sequence or array; None for a single thing, which a string is too."""
    if isinstance(value, str):
        return None
    try:
        return list(value)
    except TypeError:
        return None


def _labels(manifest: Manifest, asked: Any) -> list[int]:
    """Class numbers for a number, a name, or a sequence of these."""
    condition = manifest.condition
    assert condition is not None
    if asked is None:
        raise InvalidRequest(f"{manifest.name} draws what it is asked for; name a class: {_choices(manifest)}")
    several = _several(asked)
    wanted = [asked] if several is None else several
    if not wanted:
        raise InvalidRequest("no class was given; give at least one")
    return [_label(manifest, item) for item in wanted]


def _label(manifest: Manifest, item: Any) -> int:
    condition = manifest.condition
    assert condition is not None
    if isinstance(item, str):
        names = [name.casefold() for name in condition.class_names or []]
        wanted = item.strip().casefold()
        if wanted in names:
            return names.index(wanted)
        raise InvalidRequest(f"{item!r} is no class of {manifest.name}; use {_choices(manifest)}")
    try:
        return _integer("a class label", item, minimum=0, limit=condition.num_classes)
    except InvalidRequest:
        raise InvalidRequest(f"{item!r} is no class of {manifest.name}; use {_choices(manifest)}") from None


def _choices(manifest: Manifest) -> str:
    condition = manifest.condition
    assert condition is not None
    numbers = f"0 to {condition.num_classes - 1}"
    if condition.class_names is None:
        return numbers
    shown = ", ".join(condition.class_names[:20]) + (", ..." if condition.num_classes > 20 else "")
    return f"{numbers} ({shown})"


def _seeds(seed: Any, count: int) -> list[tuple[int, int]]:
    """(seed, image index) of `count` pictures."""
    if seed is None:
        seed = secrets.randbits(DRAWN_SEED_BITS)
    given = _several(seed)
    if given is None:
        number = _integer("seed", seed, minimum=0, limit=SEED_LIMIT)
        return [(number, index) for index in range(count)]
    if len(given) != count:
        raise InvalidRequest(f"{len(given)} seeds for {count} pictures; give one a picture, or a single one for all")
    seeds = []
    for item in given:
        pair = _several(item) or [item, 0]
        if len(pair) != 2:
            raise InvalidRequest(f"a seed is {item!r}; give an integer or a pair (seed, image index)")
        seeds.append(
            (
                _integer("a seed", pair[0], minimum=0, limit=SEED_LIMIT),
                _integer("an image index", pair[1], minimum=0, limit=SEED_LIMIT),
            )
        )
    return seeds
