"""The fake score: a diffusion model of what the student makes now, and how its denoising differs from the teacher's.

Distribution matching (Yin et al. 2024, arXiv 2311.18828 and 2405.14867) moves the student's outputs along the
difference of two scores at noised outputs. `dmd`, `dmd2`, `cdm` and `sgmd` use it as a gradient, the reward
"distribution" as a reward. For DMD2 a classifier sits on its features: is a noised image the student's, or real?
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from redif_sdk.distill.compute import random as draws
from redif_sdk.distill.compute.device import autocast
from redif_sdk.distill.compute.lora import load_trained, trained
from redif_sdk.distill.config import DistillConfig
from redif_sdk.distill.options import FakeScoreOptions
from redif_sdk.distill.policy import Meter
from redif_sdk.distill.rewards.classifier import Classifier
from redif_sdk.distill.rewards.protocol import RewardContext
from redif_sdk.distill.teachers.base import Teacher
from redif_sdk.distill.teachers.denoising import clean_at, estimated, levels, noised
from redif_sdk.distill.teachers.large import network_to_train

SIGMA_MIN = 0.02  # of a flow, by which SGMD's correction is divided


@dataclass
class FakeScore:
    """From the teacher's own weights, with an optimiser of its own. Every network call goes to ``meter``.

    Attributes:
        config: of the run: its learning rate; the rank of adapters, where the student is trained by these; precision.
        classifies: there is a `classifier` on its features.
    """

    teacher: Teacher
    meter: Meter
    config: DistillConfig
    device: torch.device
    classifies: bool = False
    network: nn.Module = field(init=False)
    classifier: Classifier | None = field(init=False, default=None)
    optimizer: torch.optim.Optimizer = field(init=False)

    def __post_init__(self) -> None:
        self.network = network_to_train(self.teacher, self.config).to(self.device).eval()
        rate = self.config.options_as(FakeScoreOptions).fake_learning_rate
        weights = [weight for weight in self.network.parameters() if weight.requires_grad]
        if self.classifies:
            self.classifier = Classifier.on(self.network, self.teacher, self.config.seed, self.device)
            weights += self.classifier.parameters()
        self.optimizer = torch.optim.AdamW(weights, lr=rate, betas=(0.0, 0.999), weight_decay=0.0)

    @classmethod
    def make(cls, context: RewardContext, *, classifies: bool = False) -> FakeScore:
        """With the settings of a run."""
        return cls(context.teacher, context.meter, context.config, context.device, classifies)

    def learn(
        self,
        outputs: Tensor,
        condition: Tensor | None,
        generator: torch.Generator,
        *,
        real: Tensor | None = None,
        weight_of_real: float = 0.0,
    ) -> float:
        """One update: denoise the student's ``outputs`` (B, C, H, W), |x0 - x|^2 weighted by min(SNR, 5).

        Args:
            real: images (B, C, H, W) that the classifier learns to tell from the outputs, both noised.
            weight_of_real: of the classifier's loss, softplus(-D(real)) + softplus(D(output)).
        """
        t, x = noised(self.teacher, outputs, generator)
        self.meter.gradient_samples += len(x)
        with torch.enable_grad():
            clean = self._clean(t, x, condition)
            alpha, sigma = levels(self.teacher, t)
            weight = (alpha / sigma.clamp_min(1e-6)).pow(2).clamp_max(5.0)
            loss: Tensor = (weight * ((clean - outputs) / self.teacher.amplitude).pow(2)).mean()
            self.optimizer.zero_grad()
            whole = loss
            if real is not None:
                real_logits, made_logits = (self._logits(part, condition, generator) for part in (real, outputs))
                told = F.softplus(-real_logits).mean() + F.softplus(made_logits).mean()
                whole = loss + weight_of_real * told
            whole.backward()
        weights = self.optimizer.param_groups[0]["params"]
        draws.average_gradients(weights)
        torch.nn.utils.clip_grad_norm_(weights, self.config.grad_clip)
        self.optimizer.step()
        return loss.item()

    def fooled(self, outputs: Tensor, condition: Tensor | None, generator: torch.Generator) -> Tensor:
        """<d, x> for ``outputs`` x with their graph: its gradient is that of softplus(-D(noised x)), the student's loss
        against the classifier (section 4.3 of DMD2)."""
        seen = outputs.detach().requires_grad_()
        with self._frozen(), torch.enable_grad():
            loss = F.softplus(-self._logits(seen, condition, generator)).mean()
            (along,) = torch.autograd.grad(loss, seen)
        followed: Tensor = (along * outputs).sum()
        return followed

    def _logits(self, images: Tensor, condition: Tensor | None, generator: torch.Generator) -> Tensor:
        """The classifier's logits (B, L) of noised ``images``, high where it takes them for real."""
        assert self.classifier is not None
        t, x = noised(self.teacher, images, generator)
        self.meter.gradient_samples += len(x)
        with autocast(x.device.type, self.config.precision):
            return self.classifier(lambda: self.network(x, t.float(), condition))

    @contextmanager
    def _frozen(self) -> Iterator[None]:
        """Its weights get no gradients."""
        weights = self.optimizer.param_groups[0]["params"]
        for weight in weights:
            weight.requires_grad_(False)
        try:
            yield
        finally:
            for weight in weights:
                weight.requires_grad_(True)

    @torch.no_grad()
    def difference(
        self,
        outputs: Tensor,
        condition: Tensor | None,
        generator: torch.Generator,
        *,
        teacher: Teacher | None = None,
        floor: float = 0.0,
    ) -> Tensor:
        """(fake x0 - real x0) / mean |x - real x0| at noised ``outputs`` (eqs. 7 and 8 of DMD): (B, C, H, W).

        Args:
            teacher: whose score is the real one; None: the run's.
            floor: of the mean that is divided by, in units of x0.
        """
        t, x = noised(self.teacher, outputs, generator)
        self.meter.student_calls += len(x)
        real, scale = self._real(teacher or self.teacher, t, x, outputs, condition, floor)
        return (self._clean(t, x, condition) - real) / scale

    def fisher(
        self, outputs: Tensor, condition: Tensor | None, generator: torch.Generator, correction: float
    ) -> Tensor:
        """<d, x> for ``outputs`` x with their graph: its gradient is that of |fake x0 - real x0|^2 / (2 mean |x - real
        x0|) through the fake score's input, plus ``correction`` times SGMD's term (eq. 22 of arXiv 2605.30116).

        With mu the fake estimate, m the real one, n the mean, and the share c = correction n / sigma, clamped to 1, the
        whole is J' [(1 - c) mu + c x - m] / n.
        """
        seen = outputs.detach().requires_grad_()
        with self._frozen(), torch.enable_grad():
            t, x = noised(self.teacher, seen, generator)
            real, scale = self._real(self.teacher, t, x.detach(), outputs.detach(), condition, 0.0)
            self.meter.gradient_samples += len(x)
            fake = self._clean(t, x, condition)
            alpha, sigma = levels(self.teacher, t)
            share = (correction * scale / (sigma / (alpha + sigma)).clamp_min(SIGMA_MIN)).clamp_max(1.0)
            direction = (((1 - share) * fake + share * seen - real) / scale).detach()
            (along,) = torch.autograd.grad((direction * fake).mean(), seen)
        followed: Tensor = (along * outputs).sum() / self.teacher.amplitude
        return followed

    @torch.no_grad()
    def _real(
        self, teacher: Teacher, t: Tensor, x: Tensor, outputs: Tensor, condition: Tensor | None, floor: float
    ) -> tuple[Tensor, Tensor]:
        """The teacher's x0 at x, and mean |outputs - x0| of each sample, (B, 1, 1, 1)."""
        self.meter.teacher_calls += len(x) * teacher.calls_per_step
        real = clean_at(teacher, t, x, teacher(x, t.float(), condition))
        least = max(1e-6, floor * teacher.amplitude)
        return real, (outputs - real).abs().flatten(1).mean(1).clamp_min(least).view(-1, 1, 1, 1)

    def matching(
        self,
        outputs: Tensor,
        condition: Tensor | None,
        generator: torch.Generator,
        updates: int,
        *,
        real: Tensor | None = None,
        weight_of_real: float = 0.0,
    ) -> tuple[Tensor, float]:
        """<g, x> for ``outputs`` x with their graph, g being the `difference` after ``updates`` updates on them: its
        gradient is DMD's. And the fake score's mean loss. ``real``, ``weight_of_real``: as for :meth:`learn`."""
        detached = outputs.detach()
        learnt = [
            self.learn(detached, condition, generator, real=real, weight_of_real=weight_of_real) for _ in range(updates)
        ]
        along = (self.difference(detached, condition, generator) * outputs).mean() / self.teacher.amplitude
        return along, sum(learnt) / updates

    def _clean(self, t: Tensor, x: Tensor, condition: Tensor | None) -> Tensor:
        return estimated(self.network, self.teacher, t, x, condition, self.config.precision)

    def state_dict(self) -> dict[str, Any]:
        classifier = None if self.classifier is None else self.classifier.state_dict()
        return {"fake": trained(self.network), "classifier": classifier, "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        load_trained(self.network, state["fake"])
        if self.classifier is not None:
            self.classifier.load_state_dict(state["classifier"])
        self.optimizer.load_state_dict(state["optimizer"])
