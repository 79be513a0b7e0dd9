"""A network behind one signature, ``(x, t, condition) -> f``, with or without guidance, for all families.

A condition is an index here, of a class, a prompt or a user's own arrays (`rows` says why); `Denoiser` turns it into
the named tensors that the network takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from redif_sdk.artifact.records import Guidance
from redif_sdk.models.copies import sharing
from redif_sdk.models.families import all_anew, call_network
from redif_sdk.models.hollow import is_streamed, original, to_train
from redif_sdk.models.rows import Rows
from redif_sdk.models.scales import check_takes_scale, places_of, scales_of, with_scale_input

Predict = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def guided(predict: Predict, guidance: Guidance | None, x: Tensor, t: Tensor, condition: Tensor | None) -> Tensor:
    """The output (B, C, H, W) of ``predict`` under classifier-free guidance, by one call on a doubled batch.

    Without ``guidance`` or ``condition``, the plain output.
    """
    if guidance is None or not guidance.is_on or condition is None:
        return predict(x, t, condition)
    null = torch.full_like(condition, guidance.null_class)
    asked, unasked = predict(torch.cat([x, x]), torch.cat([t, t]), torch.cat([condition, null])).chunk(2)
    mixed: Tensor = guidance.mix(asked, unasked)
    return mixed


def guided_each(predict: Predict, guidance: Guidance, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
    """As :func:`guided`, each image by the scale that its condition has (`redif_sdk.models.scales`)."""
    null = torch.full_like(condition, guidance.null_class)
    both = torch.cat([places_of(condition), null])
    asked, unasked = predict(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
    return unasked + scales_of(condition, guidance.scale).view(-1, 1, 1, 1) * (asked - unasked)


def in_micro_batches(predict: Predict, size: int, x: Tensor, t: Tensor, condition: Tensor | None) -> Tensor:
    """The output (B, C, H, W) of ``predict``, called on at most ``size`` images at once; 0: on all of them."""
    if not size or len(x) <= size:
        return predict(x, t, condition)
    conditions: Iterable[Tensor | None] = [None] * len(x) if condition is None else condition.split(size)
    parts = zip(x.split(size), t.split(size), conditions, strict=condition is not None)
    return torch.cat([predict(*part) for part in parts])


def tensor_of(output: Any) -> Tensor:
    """The tensor of a network's output: itself, its ``.sample``, or its first element."""
    if isinstance(output, Tensor):
        return output
    found: Tensor = output.sample if hasattr(output, "sample") else output[0]
    return found


class Denoiser(nn.Module):
    """A network behind one signature: ``(x (B, C, H, W), t (B,) float32, condition (B,) int64 or None) -> f``.

    ``f`` is the first C channels of the network's output (networks that learn their variance return 2C).

    Args:
        network: The network.
        diffusers_call: Whether the network is diffusers'; otherwise it is called as ``network(x, t, condition)``, where
            the condition is None, classes (B,) int64, or of ``rows`` a dictionary of their tensors (B, ...) by name.
        guidance: ``f`` is the guided output, at two calls of the network.
        rows: The condition is an index of these: encoded prompts, or a user's own arrays.
        embedded_guidance: The guidance scale that the network takes as an input (Flux dev, LCM, a student of a range),
            where a condition has none of its own (`redif_sdk.models.scales`).
        guidance_range: The scales that it was trained on; None: not known.
        scale: Pixels a latent on each side.
        inpainting: The network also takes a mask and a masked image; here it paints the whole image anew.

    Attributes:
        micro_batch: The images that the network takes at once; 0: all of them.
        recompute: Activations are not kept for the backward pass, but computed again.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        diffusers_call: bool,
        guidance: Guidance | None = None,
        rows: Rows | None = None,
        embedded_guidance: float | None = None,
        guidance_range: tuple[float, float] | None = None,
        scale: int = 1,
        inpainting: bool = False,
    ) -> None:
        super().__init__()
        self.network = network
        self.inpainting = inpainting
        self.diffusers_call = diffusers_call
        self.guidance = guidance
        self.rows = rows
        self.embedded_guidance = embedded_guidance
        self.guidance_range = guidance_range
        self.scale = scale
        self.micro_batch = 0
        self.recompute = False

    def forward(self, x: Tensor, t: Tensor, condition: Tensor | None) -> Tensor:
        """f (B, C, H, W), guided if there is guidance."""
        return in_micro_batches(self._part, self.micro_batch, x, t, condition)

    def _part(self, x: Tensor, t: Tensor, condition: Tensor | None) -> Tensor:
        """f of one micro-batch."""
        if not (self.recompute and torch.is_grad_enabled()):
            return guided(self._call, self.guidance, x, t, condition)
        f: Tensor = checkpoint(guided, self._call, self.guidance, x, t, condition, use_reentrant=False)
        return f

    def _call(self, x: Tensor, t: Tensor, condition: Tensor | None) -> Tensor:
        if not self.diffusers_call:
            given = condition if condition is None or self.rows is None else self.rows(condition)
            return tensor_of(self.network(x, t, given))[:, : x.shape[1]]
        conditions: dict[str, Tensor] = {}
        told: float | Tensor | None = self.embedded_guidance
        if condition is not None:
            places = places_of(condition)
            conditions = {"class_labels": places} if self.rows is None else self.rows(places)
            told = None if self.embedded_guidance is None else scales_of(condition, self.embedded_guidance)
        if self.inpainting:
            conditions = conditions | all_anew(x)
        with self._half(x):
            return call_network(self.network, x, t, conditions, told, self.scale)

    def _half(self, x: Tensor) -> AbstractContextManager[object]:
        """Of frozen weights in half precision under float32 latents: autocast to their dtype."""
        dtype = next(self.network.parameters()).dtype
        if dtype == x.dtype or dtype not in (torch.float16, torch.bfloat16):
            return nullcontext()
        return torch.autocast(x.device.type, dtype)


@dataclass(frozen=True)
class StudentOf:
    """Makes students of a network of diffusers.

    Attributes:
        network: The teacher's own.
        options: Those of `Denoiser`.
    """

    network: nn.Module
    options: Mapping[str, Any] = field(default_factory=dict)

    def over(self, low: float, high: float, default: float) -> StudentOf:
        """Makes students that take a guidance scale from ``low`` to ``high``; ``default`` where none is given.

        Raises:
            UnsupportedModel: The network has no input for the scale, and cannot be given one.
        """
        check_takes_scale(self.network)
        return replace(self, options={**self.options, "embedded_guidance": default, "guidance_range": (low, high)})

    def __call__(self) -> Denoiser:
        """A student whose weights are copies in float32, to be trained."""
        return Denoiser(self._ready(to_train(self.network)), diffusers_call=True, **self.options)

    def frozen(self) -> Denoiser:
        """A student with the network's own weights, which are not to be changed: adapters may be put beside them."""
        shared = self.network if is_streamed(self.network) else sharing(self.network.requires_grad_(False))
        return Denoiser(self._ready(shared), diffusers_call=True, **self.options)

    def _ready(self, network: nn.Module) -> nn.Module:
        """``network``, a copy, with an input for the guidance scale where its students take one."""
        made: nn.Module = with_scale_input(network) if self.options.get("guidance_range") else network
        return made


def inner_of(network: nn.Module) -> nn.Module:
    """The network itself, without the signature that is wrapped around it, and as it was before it was streamed."""
    return original(network.network if isinstance(network, Denoiser) else network)
