"""Distillation methods by name. One file a method, one protocol, so that they compete on equal terms.

The trainer owns the loop, the optimiser and the budget; a method only turns a batch of pairs into losses.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from redif_sdk.distill.config import DistillConfig
from redif_sdk.distill.policy import StudentPolicy
from redif_sdk.distill.pool import Pairs
from redif_sdk.distill.rewards import Advantage
from redif_sdk.distill.teachers.base import Teacher
from redif_sdk.errors import InvalidRequest

__all__ = ["METHODS", "Context", "Method", "make_method", "method_names"]

Loss = tuple[Tensor, dict[str, float]]


@dataclass
class Context:
    """What a method may see: the student, the teacher, the pool, the rewards and the settings.

    Whoever calls the teacher, or another network than the policy's own, adds that to ``policy.meter``. ``bounds``:
    where latents are pixels, the range to which pictures are clamped.
    """

    policy: StudentPolicy
    teacher: Teacher
    pairs: Pairs
    advantage: Advantage
    config: DistillConfig
    bounds: tuple[float, float] | None = None
    unit: float = math.inf  # floating-point operations of the student's network on one image

    @property
    def device(self) -> torch.device:
        """Where student, rewards and batches are."""
        return self.pairs.noise.device

    def images(self, latents: Tensor) -> Tensor:
        """What a user would see, in [-1, 1]; the clamp passes gradients, so that a pixel beyond it can come back."""
        images = self.teacher.images(latents)
        return images + (images.clamp(-1, 1) - images).detach()

    def charge(self, operations: float) -> None:
        """Put an auxiliary network's ``operations`` on the meter, in the student's own forward calls."""
        self.policy.meter.auxiliary_calls += operations / self.unit


class Method(ABC):
    """``losses`` yields (loss, figures for the log); the trainer takes one optimiser step for each yield.

    ``rewarded``: whether it follows the rewards that the settings name; where not, none of them is made.
    """

    name: str
    rewarded: bool

    def prepare(self, context: Context) -> None:  # noqa: B027  most methods have nothing to prepare
        """Once, before the first update (not after a resume)."""

    @abstractmethod
    def losses(self, context: Context, batch: Pairs, progress: float, generator: torch.Generator) -> Iterator[Loss]:
        """``progress`` in [0, 1): the share of the budget that is spent; ``generator`` depends on the update alone."""

    def finish(self, context: Context, student: StudentPolicy) -> None:  # noqa: B027
        """Once, after the last update, with the EMA student, whose table it may replace."""

    def reserve(self, context: Context) -> float:
        """The forward-equivalents that `finish` will spend."""
        return 0.0

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must keep."""
        return {}

    def load_state_dict(self, state: dict[str, Any], context: Context) -> None:  # noqa: B027
        """Take it back."""


#: The class of each method, in the module of its name, which is imported when it is asked for.
METHODS = {
    "redif": "ReDiF",
    "regression": "Regression",
    "progressive": "Progressive",
    "dmd2": "Dmd2",
    "consistency": "Consistency",
    "draft": "Draft",
    "grpo": "Grpo",
}


def method_names() -> list[str]:
    return sorted(METHODS)


def make_method(name: str) -> Method:
    if name not in METHODS:
        raise InvalidRequest(f"unknown method {name!r}; known: {', '.join(method_names())}")
    method: Method = getattr(import_module(f"{__name__}.{name}"), METHODS[name])()
    return method
