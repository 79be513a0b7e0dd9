"""DMD2 (Yin et al. 2024, arXiv 2405.14867): match the teacher's distribution by the difference of two scores.

A second network, the fake score, learns to denoise what the student makes, with updates and a learning rate of its own
(two time-scales); the student moves along fake minus real at noised outputs. `anchor` holds it to the teacher's paired
output as DMD (arXiv 2311.18828) does; the paper's discriminator is not here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from redif_sdk.distill.methods import Context, Loss
from redif_sdk.distill.methods.regression import Regression, error, visible_residual
from redif_sdk.distill.pairs import Pairs
from redif_sdk.distill.precision import autocast

T_MIN, T_MAX = 0.02, 0.98  # of the schedule: where the scores are compared


class Dmd2:
    name = "dmd2"

    def __init__(self) -> None:
        self.warm_up = Regression()
        self.fake: nn.Module | None = None
        self.optimizer: torch.optim.Optimizer | None = None

    def prepare(self, context: Context) -> None:
        """The fake score is made where it is first needed."""

    def _begin(self, context: Context) -> tuple[nn.Module, torch.optim.Optimizer]:
        """The fake score, from the teacher's own weights."""
        if self.fake is None or self.optimizer is None:
            self.fake = context.teacher.make_student().eval()
            rate = context.config.fake_learning_rate
            self.optimizer = torch.optim.AdamW(self.fake.parameters(), lr=rate, betas=(0.0, 0.999), weight_decay=0.0)
        return self.fake, self.optimizer

    def losses(self, context: Context, batch: Pairs, progress: float, generator: torch.Generator) -> Iterator[Loss]:
        """Generator: |x - sg(x - g)|^2 with g = (fake_x0 - real_x0) / mean |x - real_x0| (eqs. 7 and 8 of DMD)."""
        config = context.config
        if progress < config.warm_start:
            yield from self.warm_up.losses(context, batch, progress, generator)
            return
        fake, _ = self._begin(context)
        output = context.policy.sample(batch.noise, batch.condition)
        detached = output.detach()
        fake_loss = sum(self._learn(context, detached, batch.condition, generator) for _ in range(config.fake_updates))
        with torch.no_grad():
            t, x = noised(context, detached, generator)
            context.policy.meter.teacher_calls += len(x) * context.teacher.calls_per_step
            context.policy.meter.student_calls += len(x)
            real = clean_at(context, t, x, context.teacher(x, t.float(), batch.condition))
            with autocast(x.device.type):
                pretended = fake(x, t.float(), batch.condition)
            pretended = clean_at(context, t, x, pretended.float())
            scale = (detached - real).abs().flatten(1).mean(1).clamp_min(1e-6).view(-1, 1, 1, 1)
            gradient = (pretended - real) / scale
        residual = visible_residual(output, batch.target, context.bounds)
        loss = config.step_delta * (gradient * output).mean() + config.anchor * error(residual, config.huber)
        yield loss, {"mse": residual.detach().pow(2).mean().item(), "fake_loss": fake_loss / config.fake_updates}

    def _learn(self, context: Context, output: Tensor, condition: Tensor | None, generator: torch.Generator) -> float:
        """One update of the fake score: denoise the student's outputs, |x0 - x|^2 weighted by min(SNR, 5)."""
        fake, optimizer = self._begin(context)
        t, x = noised(context, output, generator)
        context.policy.meter.gradient_samples += len(x)
        with torch.enable_grad():
            with autocast(x.device.type):
                f = fake(x, t.float(), condition)
            clean = clean_at(context, t, x, f.float())
            alpha, sigma = levels(context, t)
            weight = (alpha / sigma.clamp_min(1e-6)).pow(2).clamp_max(5.0)
            loss: Tensor = (weight * (clean - output).pow(2)).mean()
            optimizer.zero_grad()
            loss.backward()
        torch.nn.utils.clip_grad_norm_(fake.parameters(), context.config.grad_clip)
        optimizer.step()
        return loss.item()

    def state_dict(self) -> dict[str, Any]:
        if self.fake is None or self.optimizer is None:
            return {"fake": None, "optimizer": None}
        return {"fake": self.fake.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any], context: Context) -> None:
        if state["fake"] is not None:
            fake, optimizer = self._begin(context)
            fake.load_state_dict(state["fake"])
            optimizer.load_state_dict(state["optimizer"])


def levels(context: Context, t: Tensor) -> tuple[Tensor, Tensor]:
    """alpha and sigma at times t (B,), each (B, 1, 1, 1)."""
    schedule = context.teacher.schedule
    alphas, sigmas = (torch.from_numpy(values.copy()).float() for values in (schedule.alphas, schedule.sigmas))
    return alphas[t].view(-1, 1, 1, 1), sigmas[t].view(-1, 1, 1, 1)


def noised(context: Context, x: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Times (B,), uniform between T_MIN and T_MAX of the schedule, and x noised to them."""
    length = len(context.teacher.schedule)
    t = torch.randint(int(T_MIN * length), int(T_MAX * length), (len(x),), generator=generator)
    alpha, sigma = levels(context, t)
    return t, alpha * x + sigma * torch.randn(x.shape, generator=generator)


def clean_at(context: Context, t: Tensor, x: Tensor, f: Tensor) -> Tensor:
    """x0 of the network's output f at times t, by the teacher's prediction type."""
    alpha, sigma = levels(context, t)
    kind = context.teacher.prediction_type
    if kind == "epsilon":
        return (x - sigma * f) / alpha.clamp_min(1e-4)
    if kind == "v_prediction":
        return alpha * x - sigma * f
    if kind == "score":
        return (x + sigma**2 * f) / alpha.clamp_min(1e-4)
    return f
