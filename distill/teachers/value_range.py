"""The range of a teacher's values: given, or measured on its outputs; and images mapped from it to [-1, 1].

diffusers' own pipelines have images in [-1, 1]. A function may be a model of anything: fluxes, temperatures, levels.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from redif_sdk.artifact.records import Postprocess
from redif_sdk.errors import InvalidRequest, UnsupportedModel

if TYPE_CHECKING:
    from typing import Self

__all__ = ["UNIT", "InRange", "checked_range", "lost_beyond", "measured_range", "say_what_is_cut", "to_unit"]

UNIT = (-1.0, 1.0)
_log = logging.getLogger(__name__)
DECODE_BATCH = 64  # latents at once
LOST = 1e-2  # share of the variance that a cut to [-1, 1] may cost values that are said to lie there
CUT = 0.1  # share of the variance that is lost where a range was given, from which on it is said
NARROW = 0.25  # values that span less than so much are not in [-1, 1], although they lie there
LEVEL, AT_ENDS = 0.05, 0.05  # values of [0, 1] end so near to 0 and 1, and so many of them lie so near


class InRange:
    """Latents as images in a value range: a part of `redif_sdk.distill.teachers.base.Teacher`.

    Attributes:
        range_known: off: the range was not given, and is measured on outputs.
        clipped: off: what it makes has no range that is seen, as latents that are rewarded undecoded.
        micro_batch: latents that are decoded at once; 0: with a gradient all, without one `DECODE_BATCH`. Of micro
            batches the activations are not kept for the backward pass, but computed again.
    """

    postprocess: Postprocess
    decode: nn.Module | None
    range_known: bool
    clipped: bool
    micro_batch: int

    def images(self, latents: Tensor) -> Tensor:
        """Latents (B, C, H, W) -> images (B, C', H', W'), unclamped, in the value range of ``postprocess``.

        Differentiable where the latents are."""
        if self.decode is not None:
            decode = self.decode.to(latents.device)
            if torch.is_grad_enabled() and latents.requires_grad:
                if not self.micro_batch:
                    images: Tensor = decode(latents)
                    return images
                parts = latents.split(self.micro_batch)
                return torch.cat([checkpoint(decode, part, use_reentrant=False) for part in parts])
            with torch.no_grad():
                return torch.cat([decode(part) for part in latents.split(self.micro_batch or DECODE_BATCH)])
        factor = self.postprocess.pixel_shuffle
        return F.pixel_shuffle(latents, factor) if factor > 1 else latents

    def latents_of(self, images: Tensor) -> Tensor:
        """The inverse of :meth:`images` (a permutation)."""
        factor = self.postprocess.pixel_shuffle
        return F.pixel_unshuffle(images, factor) if factor > 1 else images

    def in_range(self, value_range: Sequence[float] | None) -> Self:
        """The same with images in ``value_range`` (low, high); None: as it is.

        Raises:
            InvalidRequest: the range is not two finite numbers that rise.
        """
        if value_range is None:
            return self
        given = checked_range(value_range)
        teacher: Any = self  # a frozen dataclass
        changed: Self = replace(
            teacher, postprocess=self.postprocess.model_copy(update={"value_range": given}), range_known=True
        )
        return changed

    def ranged_by(self, latents: Tensor) -> Self:
        """The same with a known value range: where none was given, that of the outputs ``latents`` (N, C, H, W).

        Raises:
            UnsupportedModel: outputs that are not finite.
        """
        return self if self.range_known else self.in_range(measured_range(self.images(latents)))

    @property
    def amplitude(self) -> float:
        """What 1 is in latents, for errors and for settings in units of x0: half the value range; 1 where they are
        decoded."""
        low, high = self.postprocess.value_range
        return 1.0 if self.decode is not None else (high - low) / 2

    def unit_images(self, latents: Tensor) -> Tensor:
        """:meth:`images`, unclamped, with the value range mapped to [-1, 1]. Differentiable where the latents are."""
        return to_unit(self.images(latents), self.postprocess.value_range)

    def as_latents(self) -> Self:
        """The same with its latents as images, undecoded and unclamped: for rewards in latents.

        Pixels are still mapped from their value range to [-1, 1].
        """
        value_range = UNIT if self.decode is not None else self.postprocess.value_range
        teacher: Any = self
        changed: Self = replace(teacher, decode=None, postprocess=Postprocess(value_range=value_range), clipped=False)
        return changed

    def seen(self, latents: Tensor) -> Tensor:
        """What a user sees of ``latents`` (B, C, H, W): images (B, C', H', W') in [-1, 1]."""
        images = self.unit_images(latents)
        return images.clamp(-1, 1) if self.clipped else images


def checked_range(value_range: Any) -> tuple[float, float]:
    """(low, high) as floats.

    Raises:
        InvalidRequest: not two finite numbers that rise.
    """
    try:
        low, high = (float(value) for value in ([] if isinstance(value_range, str) else value_range))
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"value_range is {value_range!r:.100}; give two numbers, as in (-1, 1)") from error
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise InvalidRequest(f"value_range is ({low:g}, {high:g}); give two finite numbers, the lower one first")
    return low, high


def to_unit(images: Tensor, value_range: Sequence[float]) -> Tensor:
    """``images`` with ``value_range`` mapped to [-1, 1], unclamped; of [-1, 1] they are returned as they are."""
    low, high = value_range
    return images if (low, high) == UNIT else (images - (low + high) / 2) / ((high - low) / 2)


def lost_beyond(images: Tensor, value_range: Sequence[float]) -> float:
    """The share of the values' variance that is lost where they are cut to ``value_range``."""
    low, high = value_range
    values = images.double()
    lost, variance = (values - values.clamp(low, high)).square().mean(), values.var()
    return float(lost / variance) if variance > 0 else float(lost > 0)


def say_what_is_cut(teacher: InRange, latents: Tensor) -> None:
    """Log a warning where a good part of the outputs ``latents`` (N, C, H, W) lies beyond the value range."""
    if teacher.decode is not None:
        return
    share = lost_beyond(teacher.images(latents), teacher.postprocess.value_range)
    if share > CUT:
        (low, high), (least, largest) = teacher.postprocess.value_range, (float(latents.min()), float(latents.max()))
        _log.warning(
            "the teacher's outputs reach from %.3g to %.3g, and images are cut to %g to %g: errors beyond do not "
            "count; give value_range (--value-range LOW HIGH) if that is not meant",
            least,
            largest,
            low,
            high,
        )


def measured_range(images: Tensor) -> tuple[float, float]:
    """The value range of a teacher whose outputs are ``images`` (N, C, H, W).

    [-1, 1] where they fill it and a cut to it costs them next to nothing; [0, 1] where they end there; else from the
    least value to the largest, rounded outwards to a thousandth of the span or so.

    Raises:
        UnsupportedModel: they are not finite.
    """
    low, high = float(images.min()), float(images.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise UnsupportedModel("the teacher's samples are not finite; check its network and its noise schedule")
    if abs(low) <= LEVEL and abs(high - 1) <= LEVEL:
        at_ends = ((images - 0.5).abs() >= 0.5 - LEVEL).double().mean()
        if at_ends >= AT_ENDS:
            return 0.0, 1.0
    if high - low >= NARROW and lost_beyond(images, UNIT) <= LOST:
        return UNIT
    if high - low <= 1e-6 * max(abs(low), abs(high), 1e-30):  # one value: there is nothing to measure
        return UNIT if abs(low) <= 1 else (low - 1.0, low + 1.0)
    digits = 2 - math.floor(math.log10(high - low))
    step = 10.0**-digits
    return round(math.floor(low / step) * step, digits), round(math.ceil(high / step) * step, digits)
