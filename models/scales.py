"""A guidance scale for each image: how it travels with the condition, and how a network takes it.

A student that is distilled over a range of scales takes w as an input (Meng et al. 2023, arXiv 2210.03142, section 3.1;
Luo et al. 2023, arXiv 2310.04378, section 4.3): its embedding, projected, is added to that of the time.

A condition is one number to methods, pools and caches, and stays one: the class or the prompt's place in the lower 32
bits, and above them the bits of w as a float32. No bits: no scale of its own.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from redif_sdk.errors import UnsupportedModel
from redif_sdk.sampling.noise import philox4x32

__all__ = [
    "check_takes_scale",
    "places_of",
    "scales_at",
    "scales_of",
    "takes_scale",
    "with_scale_input",
    "with_scales",
]

WIDTH = 256  # of the scale's embedding, LCM's
_PLACES = (1 << 32) - 1
_SLOT = (1 << 32) - 1  # of the scales' random numbers: no noise is drawn there


def with_scales(places: Tensor, scales: Tensor) -> Tensor:
    """Conditions (B,) int64 of classes or prompts (B,) int64, with the guidance scale (B,) of each, above 0."""
    return places | (scales.to(torch.float32).contiguous().view(torch.int32).long() << 32)


def places_of(condition: Tensor) -> Tensor:
    """The classes or the places of prompts (B,) int64 of conditions (B,)."""
    return condition & _PLACES


def scales_of(condition: Tensor, default: float) -> Tensor:
    """The guidance scales (B,) float32 of conditions (B,); ``default`` where one has none."""
    bits = condition >> 32
    return torch.where(bits > 0, bits.to(torch.int32).view(torch.float32), default)


def scales_at(index: np.ndarray, low: float, high: float) -> Tensor:
    """The scales (N,) float32 of the entries ``index`` (N,) of a pool: uniform in [low, high), a function of the entry
    alone."""
    entries = np.asarray(index, dtype=np.uint64)
    counter = np.zeros((len(entries), 4), dtype=np.uint32)
    counter[:, 1] = _SLOT
    counter[:, 2], counter[:, 3] = entries & np.uint64(_PLACES), entries >> np.uint64(32)
    words = philox4x32(counter, np.zeros(2, dtype=np.uint32))[:, 0]
    return torch.from_numpy((low + (high - low) * (words / 2.0**32)).astype(np.float32))


def takes_scale(network: Any) -> bool:
    """Whether a network of diffusers takes the guidance scale as an input."""
    config = getattr(network, "config", {})
    return bool(config.get("guidance_embeds")) or config.get("time_cond_proj_dim") is not None


def check_takes_scale(network: nn.Module) -> None:
    """Raise UnsupportedModel unless a network takes the guidance scale, or can be given an input for it."""
    if not takes_scale(network) and not _has_room(network):
        raise UnsupportedModel(
            f"a {type(network).__name__} cannot learn a range of guidance scales: its class in diffusers has no input "
            "for the scale, so plain diffusers would load the student without it; UNet2DConditionModel (Stable "
            "Diffusion, SDXL) and networks that take the scale already (LCM, Flux dev) can. Leave guidance_range out, "
            "and choose one guidance_scale"
        )


def with_scale_input(network: Any) -> Any:
    """``network`` with an input for the guidance scale (``time_cond_proj_dim``); itself, where it has one.

    The new weights are zero, so it computes what it did before, at any scale. The module is changed.
    """
    if takes_scale(network):
        return network
    first = network.time_embedding.linear_1
    made = nn.Linear(WIDTH, first.in_features, bias=False, device=first.weight.device, dtype=first.weight.dtype)
    nn.init.zeros_(made.weight)
    network.time_embedding.cond_proj = made.requires_grad_(first.weight.requires_grad)
    left = [name for name in network.config.get("_use_default_values", []) if name != "time_cond_proj_dim"]
    network.register_to_config(time_cond_proj_dim=WIDTH, _use_default_values=left)
    return network


def _has_room(network: nn.Module) -> bool:
    """Whether diffusers' class has an optional input of the scale."""
    return any(kind.__name__ == "UNet2DConditionModel" for kind in type(network).__mro__)
