"""Consistency distillation as LCM has it (Luo et al. 2023, arXiv 2310.04378, Algorithm 1; Song et al. 2023).

One network, every time: its clean image at a point of the teacher's path must be its clean image one teacher step
further on. The clean image is parameterised so that it is the state itself at time 0 (eq. 9 there, with LCM's
constants). Sampling is consistency multistep: K - 1 times the estimate is noised anew. Clean data are the pool's
outputs; the teacher steps with DDIM on its own grid, its guidance included.

Otherwise than the paper: targets are one step of that grid apart, without LCM's skipping of 20 times.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from redif_sdk.distill.compute import random as draws
from redif_sdk.distill.compute.lora import apart, load_trained, trained, twin
from redif_sdk.distill.context import Context
from redif_sdk.distill.methods.protocol import Loss, Method
from redif_sdk.distill.methods.regression import error
from redif_sdk.distill.options import ConsistencyOptions
from redif_sdk.distill.pool import Pairs
from redif_sdk.distill.teachers.denoising import clean_at, estimated, levels
from redif_sdk.sampling.table import StepTable

EMA = 0.95  # of the network that gives the target, LCM's
SIGMA_DATA, TIMESTEP_SCALING = 0.5, 10.0  # of the boundary condition, LCM's


class Consistency(Method):
    """Consistency distillation. ``target`` is the moving average of the student that gives the target."""

    name = "consistency"
    rewarded = False
    paired = True

    def __init__(self) -> None:
        self.target: nn.Module | None = None

    def draws_noise(self, num_inference_steps: int) -> bool:
        """Consistency multistep noises each clean image anew."""
        return num_inference_steps > 1

    def prepare(self, context: Context) -> None:
        """The student samples by the consistency table, on the trailing grid of K times."""
        policy = context.policy
        if policy.num_inference_steps > 1:
            times = [round(float(t)) for t in policy.table.timesteps]
            kind = context.teacher.prediction_type
            policy.table = StepTable.consistency(context.teacher.schedule, times, prediction_type=kind)
        policy.table = _bounded(policy.table)
        self.target = twin(policy.network)

    def losses(self, context: Context, batch: Pairs, progress: float, generator: torch.Generator) -> Iterator[Loss]:
        """d(f_theta(x_n+1, t_n+1), f_theta-(x^_n, t_n)), x^_n one DDIM step of the teacher from x_n+1 (eq. 13); at the
        last step the target is x^_n itself, which is the boundary condition f(x, 0) = x."""
        teacher, meter = context.teacher, context.policy.meter
        huber = context.config.options_as(ConsistencyOptions).huber
        assert self.target is not None
        slow, fast = apart(self.target, context.policy.network)
        torch._foreach_lerp_(slow, [weight.data for weight in fast], 1 - EMA)
        fine = teacher.table(teacher.num_inference_steps)
        times = torch.tensor([round(float(t)) for t in fine.timesteps]).to(context.device)
        row = draws.integers(0, len(times), len(batch), generator, times.device)
        t = times[row]
        alpha, sigma = levels(teacher, t)
        x = alpha * batch.target + sigma * draws.normal(batch.target.shape, generator, batch.target.device)
        with torch.no_grad():
            meter.teacher_calls += len(x) * teacher.calls_per_step
            real = clean_at(teacher, t, x, teacher(x, t.float(), batch.condition))
            last = row == len(times) - 1
            after = torch.where(last, times[row], times[(row + 1).clamp_max(len(times) - 1)])
            alpha_after, sigma_after = levels(teacher, after)
            moved = alpha_after * real + sigma_after * (x - alpha * real) / sigma.clamp_min(1e-6)
            meter.student_calls += len(x)
            wanted = _clean(self.target, context, after, moved, batch.condition)
            wanted = torch.where(last.view(-1, 1, 1, 1), real, wanted)
        meter.gradient_samples += len(x)
        residual = (_clean(context.policy.network, context, t, x, batch.condition) - wanted) / context.amplitude
        yield error(residual, huber), {"mse": residual.detach().pow(2).mean().item()}

    def state_dict(self) -> dict[str, Any]:
        return {"target": None if self.target is None else trained(self.target)}

    def load_state_dict(self, state: dict[str, Any], context: Context) -> None:
        if state["target"] is not None:
            self.target = twin(context.policy.network)
            load_trained(self.target, state["target"])


def _clean(network: nn.Module, context: Context, t: Tensor, x: Tensor, condition: Tensor | None) -> Tensor:
    clean = estimated(network, context.teacher, t, x, condition, context.config.precision)
    skip, out = (part.view(-1, 1, 1, 1) for part in boundary(t.double()))
    return (skip * x + out * clean).float()


def boundary(t: Tensor) -> tuple[Tensor, Tensor]:
    """c_skip and c_out at times t: f(x, t) = c_skip x + c_out x0, which is x at time 0."""
    scaled = TIMESTEP_SCALING * t
    size = scaled**2 + SIGMA_DATA**2
    return SIGMA_DATA**2 / size, scaled / size.sqrt()


def _bounded(table: StepTable) -> StepTable:
    """The same sampler with f in place of the clean image: p' = c_skip + c_out p, q' = c_out q."""
    rows = table.rows.astype(np.float64)
    skip, out = (part.numpy() for part in boundary(torch.from_numpy(rows[:, 0])))
    rows[:, 1], rows[:, 2] = skip + out * rows[:, 1], out * rows[:, 2]
    return replace(table, rows=rows.astype(np.float32))
