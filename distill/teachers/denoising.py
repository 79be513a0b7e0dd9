"""A teacher's noise levels at the times of its schedule, and the clean image that an output means there."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from redif_sdk.distill.compute import random as draws
from redif_sdk.distill.compute.device import autocast
from redif_sdk.distill.teachers.base import Teacher
from redif_sdk.errors import UnsupportedModel

T_MIN, T_MAX = 0.02, 0.98  # of the schedule: where scores are compared


def levels(teacher: Teacher, t: Tensor) -> tuple[Tensor, Tensor]:
    """alpha and sigma of the teacher's schedule at times t (B,) int64, each (B, 1, 1, 1).

    Raises:
        UnsupportedModel: EDM's network is not fed times of a schedule.
    """
    schedule = teacher.schedule
    if schedule.edm is not None:
        raise UnsupportedModel(
            f"{teacher.name} is fed EDM's noise levels, not times of a schedule; use redif, regression, draft or grpo"
        )
    alphas, sigmas = (torch.from_numpy(v.copy()).float().to(t.device) for v in (schedule.alphas, schedule.sigmas))
    return alphas[t].view(-1, 1, 1, 1), sigmas[t].view(-1, 1, 1, 1)


def random_times(
    teacher: Teacher, count: int, generator: torch.Generator, device: torch.device, *, upper: Tensor | None = None
) -> Tensor:
    """(count,) int64, uniform between T_MIN and T_MAX of the schedule, or ``upper`` (count,) where that is lower."""
    length = len(teacher.schedule)
    low, high = int(T_MIN * length), int(T_MAX * length)
    if upper is None:
        return draws.integers(low, high, count, generator, device)
    share = draws.integers(0, 1 << 24, count, generator, device).double() / (1 << 24)
    return low + (share * (upper.clamp(low + 1, high) - low)).long()


def noised(teacher: Teacher, x: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Times (B,), uniform between T_MIN and T_MAX of the schedule, and x noised to them."""
    t = random_times(teacher, len(x), generator, x.device)
    alpha, sigma = levels(teacher, t)
    return t, alpha * x + sigma * draws.normal(x.shape, generator, x.device)


def estimated(
    network: nn.Module, teacher: Teacher, t: Tensor, x: Tensor, condition: Tensor | None, precision: str
) -> Tensor:
    """The x0 that a network estimates of x (B, C, H, W) at times t (B,), float32; ``precision`` as of a run."""
    with autocast(x.device.type, precision):
        f = network(x, t.float(), condition)
    return clean_at(teacher, t, x, f.float())


def clean_at(teacher: Teacher, t: Tensor, x: Tensor, f: Tensor) -> Tensor:
    """x0 of a network's output f at times t, by the teacher's prediction type."""
    alpha, sigma = levels(teacher, t)
    kind = teacher.prediction_type
    if kind == "epsilon":
        return (x - sigma * f) / alpha.clamp_min(1e-4)
    if kind == "v_prediction":
        return alpha * x - sigma * f
    if kind == "score":
        return (x + sigma**2 * f) / alpha.clamp_min(1e-4)
    if kind == "flow":
        return x - sigma * f
    return f
