"""DMD2 (Yin et al. 2024, arXiv 2405.14867): distribution matching without regression.

The fake score learns ``fake_updates`` times for each update of the student (two time-scales). The student is trained at
a row that is drawn for the batch, on states that its own earlier rows made (backward simulation), along fake minus real
and against a classifier on the fake score's features, which tells noised outputs from noised real images.

Otherwise than the paper: real images are the teacher's outputs in the pool, which is all that a run has; the classifier
has one logit a place; the fake score's loss has this project's weight, min(SNR, 5).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from redif_sdk.distill.context import Context
from redif_sdk.distill.methods.protocol import Loss, Method
from redif_sdk.distill.methods.regression import Regression
from redif_sdk.distill.options import Dmd2Options
from redif_sdk.distill.pool import Pairs
from redif_sdk.distill.rewards.fake_score import FakeScore


class Dmd2(Method):
    """DMD2. ``fake`` is made in the first update after the warm start."""

    name = "dmd2"
    rewarded = False

    def __init__(self) -> None:
        self.warm_up = Regression()
        self.fake: FakeScore | None = None

    def _begin(self, context: Context) -> FakeScore:
        if self.fake is None:
            classifies = context.config.options_as(Dmd2Options).gan_weight > 0
            self.fake = FakeScore.make(context, classifies=classifies)
        return self.fake

    def losses(self, context: Context, batch: Pairs, progress: float, generator: torch.Generator) -> Iterator[Loss]:
        """<g, x> + gan_weight softplus(-D(noised x)), x the clean estimate of a row, g of eqs. 7 and 8 of DMD."""
        options, policy = context.config.options_as(Dmd2Options), context.policy
        if progress < options.warm_start:
            yield from self.warm_up.losses(context, batch, progress, generator)
            return
        fake = self._begin(context)
        row = int(torch.randint(0, policy.num_inference_steps, (), generator=generator))
        output = policy.simulated(row, batch.noise, batch.condition)
        real = batch.target if fake.classifier is not None else None
        seen, losses = output.detach(), []
        for _ in range(options.fake_updates):
            weight = options.guidance_weight
            losses.append(fake.learn(seen, batch.condition, generator, real=real, weight_of_real=weight))
        direction = fake.difference(seen, batch.condition, generator)
        loss = (direction * output).mean() / context.amplitude
        if fake.classifier is not None:
            loss = loss + options.gan_weight * fake.fooled(output, batch.condition, generator)
        yield loss, {"fake_loss": sum(losses) / len(losses)}

    def state_dict(self) -> dict[str, Any]:
        return {"fake": None if self.fake is None else self.fake.state_dict()}

    def load_state_dict(self, state: dict[str, Any], context: Context) -> None:
        if state["fake"] is not None:
            self._begin(context).load_state_dict(state["fake"])
