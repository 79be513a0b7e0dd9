"""SGMD, score gradient matching distillation (arXiv 2605.30116): the Fisher divergence between the fake score and the
teacher's, followed through the fake score's input, with one slow update of the fake score for each of the student.

The gradient is DMD's direction under the transposed Jacobian of the fake score, so it vanishes where the posterior is
sure. A correction of weight lambda puts the sample itself in place of a share of the fake score's estimate, which takes
out that share of its lag.

Otherwise than the authors' code: the correction's share is clamped to 1, and its level is sigma / (alpha + sigma), a
flow's; a warm start by regression (``warm_start``) may come first; ``regression_weight`` is 0 unless asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from redif_sdk.distill.compute import random as draws
from redif_sdk.distill.context import Context
from redif_sdk.distill.methods.protocol import Loss
from redif_sdk.distill.methods.regression import to_target
from redif_sdk.distill.methods.score import ScoreMethod
from redif_sdk.distill.options import SgmdOptions
from redif_sdk.distill.pool import Pairs
from redif_sdk.distill.rewards.fake_score import FakeScore


class Sgmd(ScoreMethod):
    """Score gradient matching."""

    name = "sgmd"

    def __init__(self) -> None:
        super().__init__()
        self.learnt = 0.0  # the fake score's last loss

    def matched(self, context: Context, fake: FakeScore, batch: Pairs, generator: torch.Generator) -> Iterator[Loss]:
        """step_delta (L_Fisher + lambda L_NR) + regression_weight |x - teacher|^2, x the clean estimate of a row that
        is drawn for the batch; then, after the student's step, the fake score learns on fresh samples of it."""
        options, policy = context.config.options_as(SgmdOptions), context.policy
        end = int(torch.randint(0, policy.num_inference_steps, (), generator=generator))
        output = policy.simulated(end, batch.noise, batch.condition)
        loss = options.step_delta * fake.fisher(output, batch.condition, generator, options.correction)
        figures = {"fake_loss": self.learnt}
        if options.regression_weight:
            residual, figures["mse"] = to_target(context, output, batch.target, options.huber)
            loss = loss + options.regression_weight * residual
        yield loss, figures
        with torch.no_grad():
            noise = draws.normal(batch.noise.shape, generator, batch.noise.device)
            fresh = policy.sample(noise, batch.condition)
        for _ in range(options.fake_updates):
            self.learnt = fake.learn(fresh, batch.condition, generator)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "learnt": self.learnt}

    def load_state_dict(self, state: dict[str, Any], context: Context) -> None:
        self.learnt = state["learnt"]
        super().load_state_dict(state, context)
