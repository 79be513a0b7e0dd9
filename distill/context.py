"""What a method may see of the run: one `Context`, made by the training loop."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from redif_sdk.distill.compute import random as draws
from redif_sdk.distill.config import DistillConfig
from redif_sdk.distill.policy import Meter, StudentPolicy
from redif_sdk.distill.pool import Pairs
from redif_sdk.distill.rewards.advantage import Advantage
from redif_sdk.distill.teachers.asking import Asked
from redif_sdk.distill.teachers.base import Teacher

__all__ = ["Context"]

T = TypeVar("T")


@dataclass
class Context:
    """The student, the teacher, the pool, the rewards and the settings.

    A method that calls the teacher, or another network than the policy's own, adds that to ``meter``.

    Attributes:
        bounds: where latents are pixels, the range to which images are clamped.
        unit: floating-point operations of the student's network on one image.
    """

    policy: StudentPolicy
    teacher: Teacher
    pairs: Pairs
    advantage: Advantage
    config: DistillConfig
    bounds: tuple[float, float] | None = None
    unit: float = math.inf
    judge: Advantage | None = None

    @property
    def device(self) -> torch.device:
        """Where student, rewards and batches are."""
        return self.pairs.noise.device

    @property
    def amplitude(self) -> float:
        """What 1 is in latents, for errors and for settings in units of x0 (`Teacher.amplitude`)."""
        return self.teacher.amplitude

    @property
    def meter(self) -> Meter:
        """What the run has spent so far."""
        return self.policy.meter

    def asked(self, batch: Pairs) -> Asked:
        """What a batch's images are to show: its prompts or class names, and the network's tensors by name."""
        return self.teacher.asked(batch.condition)

    def images(self, latents: Tensor) -> Tensor:
        """What a user would see of ``latents`` (B, C, H, W): (B, C', H', W') in [-1, 1].

        The clamp passes gradients, so that a pixel beyond the range can come back.
        """
        images = self.teacher.unit_images(latents)
        return images + (images.clamp(-1, 1) - images).detach()

    def judged(self, latents: Tensor) -> Tensor:
        """What the rewards are given for ``latents`` (B, C, H, W): images in [-1, 1], or the latents themselves."""
        return self.advantage.images(latents)

    def charge(self, operations: float) -> None:
        """Count an auxiliary network's floating-point ``operations``, in the student's own forward calls."""
        self.meter.auxiliary_calls += operations / self.unit

    def count_judged(self, images: int) -> None:
        """Count ``images`` that a reward judged."""
        self.meter.reward_calls += images

    def once(self, make: Callable[[], T], *, together: bool = False) -> T:
        """What ``make`` returns, computed by the first process for all of them; its cost is shared on their meters.

        So what a run learns once (times, a basis) is the same on every process, whatever a reward answers elsewhere.

        Args:
            make: as for `redif_sdk.distill.compute.random.from_first`.
            together: it calls a sharded network, so every process must call it.
        """
        if draws.world() == 1:
            return make()
        before = replace(self.meter)

        def counted() -> tuple[T, Meter]:
            return make(), self.meter.since(before)

        value, spent = draws.from_first(counted, together=together)
        self.meter.charge_share(before, spent, 1 if together else draws.world())
        return value
