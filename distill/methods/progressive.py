"""Progressive distillation (Salimans and Ho 2022, arXiv 2202.00512, Algorithm 2): halve the steps again and again.

In a stage the student of n steps learns to do in one DDIM step what its teacher, of 2n steps, does in two; then it is
the next stage's teacher. The stages share the budget equally. Clean data are the teacher's own outputs in the pool.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from redif_sdk.distill.compute import random as draws
from redif_sdk.distill.compute.lora import load_trained, trained, twin
from redif_sdk.distill.context import Context
from redif_sdk.distill.methods.protocol import Loss, Method
from redif_sdk.distill.pool import Pairs
from redif_sdk.distill.teachers.denoising import levels
from redif_sdk.sampling.loop import run_steps
from redif_sdk.sampling.table import StepTable

#: (k, x (B, C, H, W), condition) -> x0 (B, C, H, W): the clean image at row k of a table.
Estimate = Callable[[int, Tensor, Tensor | None], Tensor]


def stage_steps(num_inference_steps: int, teacher_steps: int) -> list[int]:
    """The students' numbers of steps, stage by stage: K 2^m, ..., 2 K, K, the first at most half the teacher's."""
    stages = max(1, int(math.log2(max(2.0, teacher_steps / num_inference_steps))))
    return [num_inference_steps * 2**stage for stage in reversed(range(stages))]


class Progressive(Method):
    """Progressive distillation: stage by stage, half as many steps."""

    name = "progressive"
    rewarded = False
    paired = True

    def __init__(self) -> None:
        self.stage = -1
        self.parent: nn.Module | None = None  # the last stage's student; None: the teacher itself

    def losses(self, context: Context, batch: Pairs, progress: float, generator: torch.Generator) -> Iterator[Loss]:
        """max(SNR, 1) |x_theta(z_t) - x~|^2 (eq. 9), with x~ the clean image that two steps of the teacher mean."""
        stages = stage_steps(context.policy.num_inference_steps, context.teacher.num_inference_steps)
        stage = min(int(progress * len(stages)), len(stages) - 1)
        if stage != self.stage:
            self.stage = stage
            self.parent = twin(context.policy.network) if stage else None
        steps = stages[stage]
        student = replace(context.policy, table=context.teacher.table(steps))
        fine = context.teacher.table(2 * steps)
        k = int(torch.randint(0, steps, (), generator=generator))
        alpha, sigma = _level(student.table, k, context)
        z = alpha * batch.target + sigma * draws.normal(batch.target.shape, generator, batch.target.device)
        target = two_steps(z, k, fine, student.table, self._parent_of(context, fine), batch.condition)
        residual = (student.estimate(k, z, batch.condition) - target) / context.amplitude
        weight = max(1.0, (alpha / max(sigma, 1e-8)) ** 2)
        yield (
            weight * residual.pow(2).mean(),
            {
                "mse": residual.detach().pow(2).mean().item(),
                "steps": float(steps),
            },
        )

    def cycle(self, context: Context, progress: float) -> float:
        """The share of the stage that is done: each stage has a learning-rate cycle of its own."""
        stages = len(stage_steps(context.policy.num_inference_steps, context.teacher.num_inference_steps))
        return progress * stages - min(int(progress * stages), stages - 1)

    def _parent_of(self, context: Context, fine: StepTable) -> Estimate:
        """(k, x, condition) -> x0 of the stage's teacher at row k of the table of 2n rows; calls are counted."""
        meter = context.policy.meter
        if self.parent is not None:
            policy = replace(context.policy, network=self.parent, table=fine)
            return torch.no_grad()(policy.estimate)

        def estimate(k: int, x: Tensor, condition: Tensor | None) -> Tensor:
            meter.teacher_calls += len(x) * context.teacher.calls_per_step
            f = context.teacher(x, torch.full((len(x),), float(fine.timesteps[k]), device=x.device), condition)
            clean: Tensor = fine.clean(k, x, f)
            return clean

        return estimate

    def state_dict(self) -> dict[str, Any]:
        return {"stage": self.stage, "parent": None if self.parent is None else trained(self.parent)}

    def load_state_dict(self, state: dict[str, Any], context: Context) -> None:
        self.stage = state["stage"]
        if state["parent"] is not None:
            self.parent = twin(context.policy.network)
            load_trained(self.parent, state["parent"])


def two_steps(
    z: Tensor, k: int, fine: StepTable, coarse: StepTable, estimate: Estimate, condition: Tensor | None
) -> Tensor:
    """x~: the clean image from which row k of `coarse` goes where rows 2k and 2k + 1 of `fine` go from z.

    From x' = r x0 + s x with row k's own r and s: x~ = (z'' - s z) / r.
    """
    x = run_steps(fine, z, None, lambda row, x: estimate(row, x, condition), steps=range(2 * k, 2 * k + 2))
    _, _, _, r, s, _ = (float(value) for value in coarse.rows[k])
    return (x - s * z) / r


def _level(table: StepTable, k: int, context: Context) -> tuple[float, float]:
    """alpha and sigma at row k's time."""
    alpha, sigma = levels(context.teacher, torch.tensor([round(float(table.timesteps[k]))]))
    return float(alpha), float(sigma)
