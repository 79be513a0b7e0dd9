"""The fake score: a diffusion model of what the student makes now, and how its denoising differs from the teacher's.

Distribution matching (Yin et al. 2024, arXiv 2311.18828 and 2405.14867) moves the student's outputs along the
difference of two scores at noised outputs. `dmd2` uses it as a gradient, the reward "distribution" as a reward.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from redif_sdk.distill.compute import random as draws
from redif_sdk.distill.compute.device import autocast
from redif_sdk.distill.compute.lora import load_trained, trained
from redif_sdk.distill.config import DistillConfig
from redif_sdk.distill.options import FakeScoreOptions
from redif_sdk.distill.policy import Meter
from redif_sdk.distill.rewards.protocol import RewardContext
from redif_sdk.distill.teachers.base import Teacher
from redif_sdk.distill.teachers.denoising import clean_at, levels, noised
from redif_sdk.distill.teachers.large import to_train


@dataclass
class FakeScore:
    """From the teacher's own weights, with an optimiser of its own. Every network call goes to ``meter``.

    Attributes:
        config: of the run: its learning rate; the rank of adapters, where the student is trained by these; precision.
    """

    teacher: Teacher
    meter: Meter
    config: DistillConfig
    device: torch.device
    network: nn.Module = field(init=False)
    optimizer: torch.optim.Optimizer = field(init=False)

    def __post_init__(self) -> None:
        self.network = to_train(self.teacher, self.config).to(self.device).eval()
        rate = self.config.options_as(FakeScoreOptions).fake_learning_rate
        weights = [weight for weight in self.network.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW(weights, lr=rate, betas=(0.0, 0.999), weight_decay=0.0)

    @classmethod
    def make(cls, context: RewardContext) -> FakeScore:
        """With the settings of a run."""
        return cls(context.teacher, context.meter, context.config, context.device)

    def learn(self, outputs: Tensor, condition: Tensor | None, generator: torch.Generator) -> float:
        """One update: denoise the student's ``outputs`` (B, C, H, W), |x0 - x|^2 weighted by min(SNR, 5)."""
        t, x = noised(self.teacher, outputs, generator)
        self.meter.gradient_samples += len(x)
        with torch.enable_grad():
            clean = self._clean(t, x, condition)
            alpha, sigma = levels(self.teacher, t)
            weight = (alpha / sigma.clamp_min(1e-6)).pow(2).clamp_max(5.0)
            loss: Tensor = (weight * ((clean - outputs) / self.teacher.amplitude).pow(2)).mean()
            self.optimizer.zero_grad()
            loss.backward()
        draws.average_gradients(self.network.parameters())
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.config.grad_clip)
        self.optimizer.step()
        return loss.item()

    @torch.no_grad()
    def difference(self, outputs: Tensor, condition: Tensor | None, generator: torch.Generator) -> Tensor:
        """(fake x0 - real x0) / mean |x - real x0| at noised ``outputs`` (eqs. 7 and 8 of DMD): (B, C, H, W)."""
        t, x = noised(self.teacher, outputs, generator)
        self.meter.teacher_calls += len(x) * self.teacher.calls_per_step
        self.meter.student_calls += len(x)
        real = clean_at(self.teacher, t, x, self.teacher(x, t.float(), condition))
        fake = self._clean(t, x, condition)
        scale = (outputs - real).abs().flatten(1).mean(1).clamp_min(1e-6).view(-1, 1, 1, 1)
        return (fake - real) / scale

    def matching(
        self, outputs: Tensor, condition: Tensor | None, generator: torch.Generator, updates: int
    ) -> tuple[Tensor, float]:
        """<g, x> for ``outputs`` x with their graph, g being the `difference` after ``updates`` updates on them: its
        gradient is DMD's. And the fake score's mean loss."""
        detached = outputs.detach()
        learnt = [self.learn(detached, condition, generator) for _ in range(updates)]
        along = (self.difference(detached, condition, generator) * outputs).mean() / self.teacher.amplitude
        return along, sum(learnt) / updates

    def _clean(self, t: Tensor, x: Tensor, condition: Tensor | None) -> Tensor:
        with autocast(x.device.type, self.config.precision):
            f = self.network(x, t.float(), condition)
        return clean_at(self.teacher, t, x, f.float())

    def state_dict(self) -> dict[str, Any]:
        return {"fake": trained(self.network), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        load_trained(self.network, state["fake"])
        self.optimizer.load_state_dict(state["optimizer"])
