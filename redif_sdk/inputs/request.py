"""Checks of a request, before anything is computed: classes or prompts, seeds, latents, steps, sizes.

Every error is an InvalidRequest that names the valid choices. No graph is run and no file is read here.
"""

from __future__ import annotations

import math
import operator
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, SupportsIndex

import numpy as np
from numpy.typing import ArrayLike, NDArray

from redif_sdk.artifact.manifest import Manifest
from redif_sdk.artifact.records import LONGEST_PROMPT
from redif_sdk.errors import InvalidRequest
from redif_sdk.inputs.named import Conditions, check_arrays, check_embeds, check_named
from redif_sdk.marks.xmp import Mark
from redif_sdk.sampling.noise import noise as draw
from redif_sdk.sampling.table import StepTable

if TYPE_CHECKING:
    from redif_sdk.inputs.guiding import Guiding

__all__ = [
    "LONGEST_PROMPT",
    "Asked",
    "GenerationRequest",
    "Labels",
    "Seeds",
    "check_conditions",
    "check_latents",
    "check_noise",
    "check_prompts",
    "check_request",
    "check_size",
    "count_of",
]

MOST_PROMPTS = 10_000  # a call

SEED_LIMIT = 1 << 64
DRAWN_SEED_BITS = 32  # short enough to be read out and typed in

Label = SupportsIndex | str
Labels = Label | Sequence[Label] | NDArray[np.integer[Any]]
Seeds = SupportsIndex | Sequence[SupportsIndex | tuple[SupportsIndex, SupportsIndex]] | None

#: Conditions as a caller may give them: class labels, or all tensors by name; None for an unconditional student.
Asked = Labels | Mapping[str, ArrayLike] | None


@dataclass(frozen=True)
class GenerationRequest:
    """A checked request for B images.

    `prompts` (one for each image) still have to be encoded; where they are None, `conditions` is complete.
    """

    table: StepTable
    conditions: Conditions
    prompts: list[str] | None
    seeds: list[tuple[int, int]]  # (seed, image index), B of them
    latents: NDArray[np.float32] | None  # (B, C, H, W)
    size: tuple[int, int]  # (H, W)
    num_images_per_prompt: int = 1
    guiding: Guiding | None = None  # where a call chooses its guidance

    def marks(self, manifest: Manifest, precision: str, begins_with: str | None = None) -> list[Mark]:
        """What makes each image, for its file. ``begins_with``: "image" or "mask", where it is not noise alone."""
        scale = manifest.postprocess.scale
        common: Mark = {"student": manifest.name, "digest": manifest.digest, "precision": precision}
        common |= {"num_inference_steps": self.table.num_inference_steps}
        common |= {"height": self.size[0] * scale, "width": self.size[1] * scale}
        if begins_with is not None or self.latents is not None:
            common["begins_with"] = begins_with or "latents"
        labels = None if manifest.classes is None else self.conditions.get("class_labels")
        marks = [{**common, "seed": seed, "index": index} for seed, index in self.seeds]
        for place, mark in enumerate(marks):
            if self.prompts is not None:
                mark["prompt"] = self.prompts[place]
            elif labels is not None:
                mark["class_label"] = int(labels[place])
            if (guiding := self.guiding) is not None:
                mark |= {} if guiding.scale == manifest.default_guidance else {"guidance_scale": guiding.scale}
                mark |= {"negative_prompt": guiding.negatives[place]} if guiding.negatives else {}
                mark |= {"nag_scale": guiding.nag} if guiding.nag is not None else {}
        return marks

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
    embeds: Mapping[str, ArrayLike | None] | None = None,
    arrays: Mapping[str, ArrayLike] | None = None,
) -> GenerationRequest:
    """Check the arguments of a pipeline call.

    Args:
        manifest: The student's manifest.
        prompt: A prompt or several, or the name of a class.
        class_labels: Class numbers or names.
        num_images_per_prompt: Images for each prompt or label; an unconditional student makes that many.
        num_inference_steps: Steps; None: the student's default.
        seed: One seed for all images, one for each, or pairs (seed, image index); None: drawn at random.
        latents: Float (B, C, H, W), in place of the first slice of noise.
        height: Pixels; None: the student's own.
        width: Pixels; None: the student's own.
        embeds: Encoded prompts by the names of `EMBEDS`; None counts as not given.
        arrays: The arrays of a student that is conditioned on some, by name.

    Returns:
        The checked request.

    Raises:
        InvalidRequest: An argument is wrong, or does not go with the student or with another argument.
    """
    size = check_size(manifest, height, width, latents)
    per_prompt = _integer("num_images_per_prompt", num_images_per_prompt, minimum=1)
    if num_inference_steps is not None:
        num_inference_steps = _integer("num_inference_steps", num_inference_steps, minimum=1)
    table = manifest.step_table(num_inference_steps)
    conditions, prompts, count = _asked(manifest, prompt, class_labels, embeds or {}, arrays)
    count *= per_prompt
    conditions = {name: np.repeat(value, per_prompt, axis=0) for name, value in conditions.items()}
    if prompts is not None:
        prompts = [text for text in prompts for _ in range(per_prompt)]
    starts = None if latents is None else check_latents(manifest, latents, count, size)
    return GenerationRequest(table, conditions, prompts, _seeds(seed, count), starts, size, per_prompt)


def _asked(
    manifest: Manifest,
    prompt: str | Sequence[str] | None,
    class_labels: Labels | None,
    embeds: Mapping[str, ArrayLike | None],
    arrays: Mapping[str, ArrayLike] | None,
) -> tuple[Conditions, list[str] | None, int]:
    """The conditions, the prompts that are still to be encoded, and their number; arguments as `check_request`."""
    given = {name: value for name, value in embeds.items() if value is not None}
    if given and manifest.text is None:
        raise InvalidRequest(f"{manifest.name} is not a text-to-image model; {', '.join(given)} is not supported")
    if arrays is not None and manifest.arrays is None:
        raise InvalidRequest(f"{manifest.name} is {manifest.task}; conditions is not supported: it takes no arrays")
    conditions: Conditions = {}
    prompts = None
    if manifest.arrays is not None:
        if prompt is not None or class_labels is not None:
            raise InvalidRequest(f"{manifest.name} is conditioned on arrays; give conditions, and no prompt or class")
        conditions = check_arrays(manifest, arrays)
        count = count_of(conditions)
    elif manifest.text is not None:
        if class_labels is not None:
            raise InvalidRequest(
                f"{manifest.name} is a text-to-image model; class_labels is not supported: give a prompt"
            )
        if given:
            if prompt is not None:
                raise InvalidRequest(f"prompt and {', '.join(given)} exclude each other; give one of them")
            conditions = check_embeds(manifest, given)
        else:
            prompts = check_prompts(manifest, prompt)
        count = count_of(conditions) if prompts is None else len(prompts)
    elif manifest.classes is not None:
        if prompt is not None and class_labels is not None:
            raise InvalidRequest("prompt and class_labels both name the class; give one of them")
        labels = _labels(manifest, prompt if prompt is not None else class_labels)
        conditions = {"class_labels": np.array(labels, dtype=np.int64)}
        count = len(labels)
    else:
        if prompt is not None or class_labels is not None:
            raise InvalidRequest(
                f"{manifest.name} is unconditional; prompt and class_labels are not supported: leave them out"
            )
        count = 1
    return conditions, prompts, count


def check_size(
    manifest: Manifest, height: int | None, width: int | None, latents: ArrayLike | None = None
) -> tuple[int, int]:
    """The latents' (H, W) for images of that height and width in pixels; by default those of the given latents.

    Raises:
        InvalidRequest: A size that the student does not make.
    """
    scale = manifest.postprocess.scale
    if latents is not None and height is None and width is None and np.ndim(latents) == 4:
        height, width = (extent * scale for extent in np.shape(latents)[2:])
    if height is not None:
        height = _integer("height", height, minimum=1)
    if width is not None:
        width = _integer("width", width, minimum=1)
    return manifest.latents.size(height, width, scale)


def count_of(conditions: Conditions) -> int:
    """The batch size of conditions."""
    return len(next(iter(conditions.values())))


def check_conditions(manifest: Manifest, asked: Asked, batch: int) -> Conditions:
    """The conditions of `batch` images, from labels or tensors; empty for an unconditional student.

    Raises:
        InvalidRequest: Conditions that the student does not take, or of another number, shape or dtype.
    """
    if manifest.arrays is not None:
        return check_arrays(manifest, asked, batch)
    if manifest.text is not None:
        if not isinstance(asked, Mapping):
            names = ", ".join(spec.name for spec in manifest.condition_tensors)
            raise InvalidRequest(f"{manifest.name} takes {names} by name; use what encode_prompt returns")
        return check_named(manifest, asked, batch, [*manifest.condition_inputs, *manifest.image_tensors])
    if isinstance(asked, Mapping):
        if unknown := set(asked) - {"class_labels"}:
            raise InvalidRequest(
                f"{manifest.name} is conditioned on class_labels only, not on {', '.join(sorted(map(str, unknown)))}"
            )
        asked = asked.get("class_labels")  # type: ignore[assignment]  # anything else is refused below
    if manifest.classes is None:
        if asked is not None:
            raise InvalidRequest(f"{manifest.name} is unconditional; class_labels is not supported")
        return {}
    usual = isinstance(asked, np.ndarray) and asked.dtype == np.int64 and asked.shape == (batch,)
    if usual and asked.min() >= 0 and asked.max() < manifest.classes.num_classes:  # type: ignore[union-attr]
        return {"class_labels": asked}  # type: ignore[dict-item]  # in a fraction of the time
    labels = np.array(_labels(manifest, asked), dtype=np.int64)
    if len(labels) != batch:
        raise InvalidRequest(f"{len(labels)} class_labels for {batch} images; give one for each image")
    return {"class_labels": labels}


def check_prompts(manifest: Manifest, prompt: object, name: str = "prompt") -> list[str]:
    """The prompts of a string, or of a sequence of them; `name` is that of the argument.

    Raises:
        InvalidRequest: None, too many or too long ones, or something else than text.
    """
    text = manifest.text
    assert text is not None
    if prompt is None:
        raise InvalidRequest(
            f"{manifest.name} is a text-to-image model: prompt is required, for example {text.examples[0]!r:.150}"
        )
    several = [prompt] if isinstance(prompt, str) else _several(prompt)
    if several is None or not all(isinstance(item, str) for item in several):
        raise InvalidRequest(f"{name} is {prompt!r:.60}; give a string or a list of strings")
    if not 1 <= len(several) <= MOST_PROMPTS:
        raise InvalidRequest(f"{len(several)} prompts were given; give 1 to {MOST_PROMPTS}")
    for item in several:
        if len(item) > LONGEST_PROMPT:
            raise InvalidRequest(f"a {name} has {len(item)} characters; give at most {LONGEST_PROMPT}")
        try:
            item.encode()
        except UnicodeEncodeError:  # half of a pair of surrogates
            raise InvalidRequest(f"{name} {item!r:.60} cannot be encoded as UTF-8; give another prompt") from None
    return several


def check_latents(
    manifest: Manifest, latents: ArrayLike, batch: int, size: tuple[int, int] | None = None
) -> NDArray[np.float32]:
    """Latents as float32 (batch, C, H, W), with the student's own H and W or those of `size`.

    Raises:
        InvalidRequest: Another shape, no numbers, or values that are not finite.
    """
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
    """Noise as float32 (N, B, C, H, W), cut to the slices that the table reads.

    Raises:
        InvalidRequest: Another shape, too few slices, no numbers, or values that are not finite.
    """
    array = np.asarray(noise)
    if array.ndim != 5 or array.shape[0] < table.noise_slices or array.shape[1] < 1:
        shape = f"({table.noise_slices}, B, {manifest.latents.channels}, H, W)"
        raise InvalidRequest(f"noise has shape {array.shape}; give {shape}")
    array = array[: table.noise_slices]
    latents = manifest.latents
    own = (latents.channels, latents.height, latents.width)
    usual = array.dtype == np.float32 and array.shape[2:] == own and array.flags.c_contiguous
    if usual and math.isfinite(np.vdot(array, array)):  # then every number is
        return array  # without the checks below: a fraction of the time
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
    if asked is None:
        raise InvalidRequest(
            f"{manifest.name} is class-conditional: class_labels is required, one of {_choices(manifest)}"
        )
    several = _several(asked)
    wanted = [asked] if several is None else several
    if not wanted:
        raise InvalidRequest("no class was given; give at least one")
    return [_label(manifest, item) for item in wanted]


def _label(manifest: Manifest, item: Any) -> int:
    classes = manifest.classes
    assert classes is not None
    if isinstance(item, str):
        names = [name.casefold() for name in classes.class_names or []]
        wanted = item.strip().casefold()
        if wanted in names:
            return names.index(wanted)
        raise InvalidRequest(f"{item!r:.100} is not a class of {manifest.name}; use {_choices(manifest)}")
    try:
        return _integer("a class label", item, minimum=0, limit=classes.num_classes)
    except InvalidRequest:
        raise InvalidRequest(f"{item!r:.100} is not a class of {manifest.name}; use {_choices(manifest)}") from None


def _choices(manifest: Manifest) -> str:
    classes = manifest.classes
    assert classes is not None
    numbers = f"0 to {classes.num_classes - 1}"
    if classes.class_names is None:
        return numbers
    shown = ", ".join(classes.class_names[:20]) + (", ..." if classes.num_classes > 20 else "")
    return f"{numbers} ({shown})"


def _seeds(seed: Any, count: int) -> list[tuple[int, int]]:
    """(seed, image index) of `count` images."""
    if seed is None:
        seed = secrets.randbits(DRAWN_SEED_BITS)
    given = _several(seed)
    if given is None:
        number = _integer("seed", seed, minimum=0, limit=SEED_LIMIT)
        return [(number, index) for index in range(count)]
    if len(given) != count:
        raise InvalidRequest(f"{len(given)} seeds for {count} images; give one for each image, or one for all")
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
