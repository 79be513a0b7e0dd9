"""Conditions that a call gives by name: encoded prompts, and a user's own arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from redif_sdk.artifact.manifest import Manifest
from redif_sdk.artifact.records import TensorSpec
from redif_sdk.errors import InvalidRequest, UnsupportedModel
from redif_sdk.inputs.chunks import check_length

__all__ = ["EMBEDS", "Conditions", "check_arrays", "check_embeds", "check_named", "refuse_arrays"]

#: The conditions of a batch, by the names of the denoiser's and the generator's inputs; axis 0 of each is the batch.
Conditions = dict[str, NDArray[Any]]

#: diffusers' names for encoded prompts: argument -> tensor.
EMBEDS = {
    "prompt_embeds": "encoder_hidden_states",
    "pooled_prompt_embeds": "pooled_projections",
    "prompt_attention_mask": "encoder_attention_mask",
}


def check_arrays(manifest: Manifest, given: object, batch: int | None = None) -> Conditions:
    """The arrays (B, ...) of a student that is conditioned on some; ``batch``: B, where it is known.

    Raises:
        InvalidRequest: There are none, one is missing or not the student's, or of another shape.
    """
    if not isinstance(given, Mapping):
        wanted = ", ".join(f"{spec.name} ({', '.join(map(str, spec.shape))})" for spec in manifest.condition_tensors)
        said = "" if given is None else f", not a {type(given).__name__}"
        raise InvalidRequest(f"{manifest.name} is conditioned on arrays: conditions must be {wanted} by name{said}")
    return check_named(manifest, given, batch)


def refuse_arrays(manifest: Manifest, what: str) -> None:
    """Raise UnsupportedModel for a student on a user's own arrays, which ``what`` does not take."""
    if manifest.arrays is not None:
        names = ", ".join(spec.name for spec in manifest.arrays.tensors)
        raise UnsupportedModel(
            f"{manifest.name} is conditioned on arrays ({names}), which {what} does not take; call "
            "FastPipeline(conditions=...) or redif generate --condition"
        )


def check_embeds(manifest: Manifest, given: Mapping[str, ArrayLike], names: Mapping[str, str] = EMBEDS) -> Conditions:
    """The conditions, from encoded prompts under diffusers' `names`.

    Raises:
        InvalidRequest: A tensor is missing, not the student's, or of another shape.
    """
    taken = [spec.name for spec in manifest.condition_tensors]
    for name in given:
        if names[name] not in taken:
            raise InvalidRequest(
                f"{name} is not supported by {manifest.name}; its encoded prompts are {', '.join(taken)}"
            )
    if missing := [name for name, tensor in names.items() if tensor in taken and name not in given]:
        raise InvalidRequest(f"{', '.join(given)} without {', '.join(missing)}; give all of them, or a prompt")
    return check_named(manifest, {names[name]: value for name, value in given.items()}, None)


def check_named(
    manifest: Manifest,
    asked: Mapping[str, ArrayLike],
    batch: int | None,
    specs: Sequence[TensorSpec] | None = None,
) -> Conditions:
    """The student's conditioning tensors, each of its shape and dtype in the manifest and all of one batch size.

    ``specs``: those that are wanted; None: the student's conditions.

    Raises:
        InvalidRequest: A tensor is missing, not the student's, or of another shape or batch size than ``batch``.
    """
    specs = manifest.condition_inputs if specs is None else specs
    if set(asked) != {spec.name for spec in specs}:
        names = ", ".join(spec.name for spec in specs)
        raise InvalidRequest(f"{manifest.name} takes {names}, not {', '.join(map(str, asked)) or 'nothing'}")
    states = np.shape(asked[specs[0].name])
    if manifest.text is not None and len(states) == 3:
        check_length(manifest, states[1])
    found = {spec.name: _tensor(spec, asked[spec.name]) for spec in specs}
    lengths = {len(value) for value in found.values()}
    if len(lengths) > 1 or 0 in lengths or (batch is not None and lengths != {batch}):
        wanted = "the same for all, at least 1" if batch is None else f"{batch}"
        raise InvalidRequest(f"{', '.join(found)} have batch sizes {sorted(lengths)}; give {wanted}")
    return found


def _tensor(spec: TensorSpec, value: ArrayLike) -> NDArray[Any]:
    array = np.asarray(value)
    expected = f"({', '.join(map(str, spec.shape))})"
    if array.dtype.kind not in "fiub":
        raise InvalidRequest(f"{spec.name} has dtype {array.dtype}; give an array of numbers")
    fits = zip(array.shape, spec.shape, strict=False)
    if array.ndim != len(spec.shape) or any(isinstance(wanted, int) and size != wanted for size, wanted in fits):
        raise InvalidRequest(f"{spec.name} has shape {array.shape}; give {expected}")
    with np.errstate(over="ignore"):  # as in check_latents
        result = np.ascontiguousarray(array, dtype=spec.dtype)
    if not np.isfinite(result).all():
        raise InvalidRequest(f"{spec.name} holds NaN or infinite values; give finite numbers")
    return result
