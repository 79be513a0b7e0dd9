"""Begin a teacher that sees every pixel with the weights of one that saw ``pixel_unshuffle(2)`` of the images.

The trunk of the old network (16 x 16, 8 x 8 and 4 x 4 places) becomes the lower levels of the new one; the level at
full resolution above it is new. What a trunk has learnt of objects and classes took most of its training.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import UNet2DModel
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor

from redif_sdk.errors import InvalidRequest


def _old_name(name: str) -> str | None:
    """The place in the old network of a weight of the new one; None: the new level has no counterpart."""
    if not name.startswith("down_blocks."):
        return name
    _, level, rest = name.split(".", 2)
    return f"down_blocks.{int(level) - 1}.{rest}" if int(level) else None


def _first_time_layer(weight: Tensor, bias: Tensor, features: int) -> tuple[Tensor, Tensor]:
    """The first layer of the time embedding, for fewer sinusoids: least squares over all 1,000 times, with a penalty,
    because the slowest ones are nearly straight lines and would cancel each other at weights of a million."""
    times = torch.arange(1000)
    before, after = (
        get_timestep_embedding(times, count, flip_sin_to_cos=True, downscale_freq_shift=0).double()
        for count in (weight.shape[1], features)
    )
    wanted = before @ weight.double().T + bias.double()
    after = torch.cat([after, torch.ones(len(times), 1, dtype=torch.float64)], 1)
    found = torch.linalg.solve(after.T @ after + torch.eye(features + 1, dtype=torch.float64), after.T @ wanted)
    return found[:-1].T.float().contiguous(), found[-1].float()


@torch.no_grad()
def grow(network: UNet2DModel, folder: Path) -> int:
    """Copy what fits from the teacher in ``folder``; returns how many weights were copied.

    Raises:
        InvalidRequest: the folder's network is no trunk of ``network``.
    """
    old = UNet2DModel.from_pretrained(folder / "unet").state_dict()
    new = network.state_dict()
    copied = 0
    for name, weight in new.items():
        source = _old_name(name)
        if source in old and old[source].shape == weight.shape:
            weight.copy_(old[source])
            copied += weight.numel()
    if copied < sum(w.numel() for w in new.values()) // 2:
        raise InvalidRequest(f"{folder}: less than half of the weights have a place in the network that is to be grown")
    first = "time_embedding.linear_1"
    weight, bias = _first_time_layer(old[f"{first}.weight"], old[f"{first}.bias"], new[f"{first}.weight"].shape[1])
    new[f"{first}.weight"].copy_(weight)
    new[f"{first}.bias"].copy_(bias)
    return copied
