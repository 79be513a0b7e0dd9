"""The guidance of a request: its scale, and negative prompts, where the student's graphs take them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from redif_sdk.artifact.manifest import GUIDANCE_SCALE, Manifest
from redif_sdk.errors import InvalidRequest
from redif_sdk.inputs.named import EMBEDS, Conditions, check_embeds
from redif_sdk.inputs.request import GenerationRequest, check_prompts
from redif_sdk.runtimes.guided import NULL, is_guiding

#: The input of the graph "nag", the paper's s, and what it is unless a call says otherwise.
NAG_SCALE, DEFAULT_NAG = "nag_scale", 3.0

__all__ = ["NAG_SCALE", "NEGATIVE_EMBEDS", "Guiding", "check_guidance", "guiding_inputs", "own_nulls"]

#: diffusers' names for encoded negative prompts: argument -> tensor.
NEGATIVE_EMBEDS = {f"negative_{name}": tensor for name, tensor in EMBEDS.items()}


@dataclass(frozen=True)
class Guiding:
    """How the images of a request are guided.

    Attributes:
        scale: Of all of them.
        negatives: The negative prompt of each; None: the student's own, as for an empty one in diffusers.
        embeds: Encoded negative prompts in their place, by the names of the conditions.
        nag: The scale of normalised attention guidance, where that takes the negative prompts.
    """

    scale: float
    negatives: list[str] | None = None
    embeds: Conditions | None = None
    nag: float | None = None


def check_guidance(
    manifest: Manifest,
    request: GenerationRequest,
    guidance_scale: float | None,
    negative_prompt: str | Sequence[str] | None,
    embeds: Mapping[str, ArrayLike | None] | None = None,
    nag_scale: float | None = None,
) -> GenerationRequest:
    """Check the guidance arguments of diffusers' pipelines.

    Args:
        manifest: The student's manifest.
        request: What else is asked for, checked.
        guidance_scale: 0 to 1: no guidance; None: the student's own.
        negative_prompt: One for all images, one a prompt, or one an image.
        embeds: Encoded negative prompts, by the names of `NEGATIVE_EMBEDS`; None counts as not given.
        nag_scale: How far students of one call a step go away from the negative prompt; None: `DEFAULT_NAG`.

    Returns:
        The request with its guidance.

    Raises:
        InvalidRequest: The student's graphs do not take it, or it is not a scale or a prompt.
    """
    given = {name: value for name, value in (embeds or {}).items() if value is not None}
    if negative_prompt is not None and given:
        raise InvalidRequest(f"negative_prompt and {', '.join(given)} exclude each other; give one of them")
    negative = "negative_prompt" if negative_prompt is not None else ", ".join(given)
    kind = manifest.guidance_at_run_time
    by_nag = manifest.takes_nag and bool(negative)
    if nag_scale is not None and not by_nag:
        reason = "give a negative prompt" if manifest.takes_nag else f"{manifest.name} has no graph for it"
        raise InvalidRequest(f"nag_scale={nag_scale!r:.30} has no effect: {reason}")
    if kind is None and not by_nag:
        _check_fixed(manifest, guidance_scale, negative)
        return request
    if kind is None:
        _check_fixed(manifest, guidance_scale, "")
    scale = manifest.default_guidance if guidance_scale is None else _scale(guidance_scale)
    if (learnt := manifest.network.guidance_range) and not learnt[0] <= scale <= learnt[1]:
        raise InvalidRequest(
            f"guidance_scale={scale:g} is not supported by {manifest.name}, which learnt {learnt[0]:g} to "
            f"{learnt[1]:g}; give one in that range"
        )
    if negative and not by_nag:
        if manifest.text is None or kind == "embedded":
            reason = (
                "its network takes the guidance scale as an input, and no second prompt (redif export --nag makes a "
                "graph that does)"
                if kind == "embedded"
                else "it is class-conditional"
            )
            raise InvalidRequest(f"{negative} is not supported by {manifest.name}: {reason}; leave it out")
        if not is_guiding(scale):
            raise InvalidRequest(f"{negative} has no effect at guidance_scale={scale:g}; give one above 1")
    nag = None if not by_nag else DEFAULT_NAG if nag_scale is None else _scale(nag_scale, "nag_scale")
    count = len(request.seeds)
    if given:
        encoded = check_embeds(manifest, given, NEGATIVE_EMBEDS)
        return replace(request, guiding=Guiding(scale, None, _each(encoded, count, request.num_images_per_prompt), nag))
    negatives = None
    if negative_prompt is not None:
        texts = np.array(check_prompts(manifest, negative_prompt, "negative_prompt"), dtype=object)
        negatives = _each({"negative_prompt": texts}, count, request.num_images_per_prompt)["negative_prompt"].tolist()
    return replace(request, guiding=Guiding(scale, negatives, nag=nag))


def guiding_inputs(
    manifest: Manifest,
    batch: int,
    scale: float | None = None,
    nulls: Conditions | Callable[[], Conditions] | None = None,
) -> Conditions:
    """What guides a batch, beside its conditions (`redif_sdk.runtimes.guided`).

    Args:
        manifest: The student's manifest.
        batch: Number of images.
        scale: None: the student's own.
        nulls: The null conditions, with one row or `batch`, or what makes them if they are needed.

    Returns:
        Arrays by name; none for a student whose graphs take no guidance.
    """
    kind = manifest.guidance_at_run_time
    if kind is None:
        return {}
    chosen = manifest.default_guidance if scale is None else scale
    found: Conditions = {GUIDANCE_SCALE: np.full((batch,), chosen, dtype=np.float32)}
    if kind == "classifier-free" and is_guiding(chosen):
        rows = nulls() if callable(nulls) else nulls or {}
        found |= {NULL + name: np.broadcast_to(value, (batch, *value.shape[1:])) for name, value in rows.items()}
    return found


def own_nulls(manifest: Manifest, encode: Callable[[list[str]], Conditions]) -> Conditions:
    """The null condition of a student with classifier-free guidance, for one image; `encode` encodes prompts."""
    guidance = manifest.network.guidance
    assert guidance is not None
    if manifest.text is None:
        return {"class_labels": np.array([guidance.null_class], dtype=np.int64)}
    if guidance.null_zeros:
        specs = manifest.condition_tensors
        return {spec.name: np.zeros([1, *map(int, spec.shape[1:])], spec.dtype) for spec in specs}
    return encode([guidance.null_prompt or ""])


def _scale(value: Any, name: str = "guidance_scale") -> float:
    """A guidance scale."""
    try:
        if isinstance(value, bool | np.bool_):
            raise TypeError
        scale = float(value)
    except (TypeError, ValueError):
        scale = math.nan
    if not 0 <= scale < math.inf:
        raise InvalidRequest(f"{name} is {value!r:.30}; give a number from 0 on (0 and 1 mean no guidance)")
    return scale


def _each(negatives: Conditions, count: int, per_prompt: int) -> Conditions:
    """A row of the negatives for each of `count` images, from one, one a prompt, or one an image."""
    given = len(next(iter(negatives.values())))
    if given == 1:
        return {name: np.repeat(value, count, axis=0) for name, value in negatives.items()}
    if given * per_prompt == count:
        return {name: np.repeat(value, per_prompt, axis=0) for name, value in negatives.items()}
    if given != count:
        prompts = count // per_prompt
        raise InvalidRequest(f"{given} negative prompts for {prompts} prompts; give one, or one for each prompt")
    return negatives


def _check_fixed(manifest: Manifest, guidance_scale: float | None, negative: str) -> None:
    """Of a student whose guidance is in its graphs, or which has none: its own scale is accepted, no other."""
    guidance, embedded = manifest.network.guidance, manifest.network.embedded_guidance
    again = "export it again to give one" if guidance or embedded is not None else "leave it out"
    if negative:
        reason = (
            f"it runs without guidance, at {manifest.network.calls_per_step} network call a step (redif export --nag "
            "makes a graph that takes it)"
            if guidance is None
            else "its negative prompt is fixed in its graphs"
        )
        raise InvalidRequest(f"{negative} is not supported by {manifest.name}: {reason}; {again}")
    own = [guidance.scale] if guidance else [0.0, 1.0] if embedded is None else [embedded]
    if guidance_scale is not None and guidance_scale not in own:
        choice = f"use {own[0]:g}, or {again}" if own[0] else "it runs without guidance; leave it out"
        raise InvalidRequest(f"guidance_scale={guidance_scale!r:.30} is not supported by {manifest.name}: {choice}")
