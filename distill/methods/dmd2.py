"""DMD2 (Yin et al. 2024, arXiv 2405.14867): distribution matching without regression.

The fake score learns ``fake_updates`` times for each update of the student (two time-scales). The student is trained at
a row that is drawn for the batch, on states that its own earlier rows made (backward simulation), along fake minus real
and against a classifier on the fake score's features, which tells noised outputs from noised real images.

Otherwise than the paper: real images are the teacher's outputs in the pool, which is all that a run has; the classifier
has one logit a place; the fake score's loss has this project's weight, min(SNR, 5).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from redif_sdk.distill.context import Context
from redif_sdk.distill.methods.protocol import Loss
from redif_sdk.distill.methods.score import ScoreMethod
from redif_sdk.distill.options import Dmd2Options
from redif_sdk.distill.pool import Pairs
from redif_sdk.distill.rewards.fake_score import FakeScore


class Dmd2(ScoreMethod):
    """DMD2."""

    name = "dmd2"

    def make_fake(self, context: Context) -> FakeScore:
        """With a classifier, unless it has no weight."""
        return FakeScore.make(context, classifies=context.config.options_as(Dmd2Options).gan_weight > 0)

    def matched(self, context: Context, fake: FakeScore, batch: Pairs, generator: torch.Generator) -> Iterator[Loss]:
        """<g, x> + gan_weight softplus(-D(noised x)), x the clean estimate of a row, g of eqs. 7 and 8 of DMD."""
        options, policy = context.config.options_as(Dmd2Options), context.policy
        row = int(torch.randint(0, policy.num_inference_steps, (), generator=generator))
        output = policy.simulated(row, batch.noise, batch.condition)
        real = batch.target if fake.classifier is not None else None
        loss, fake_loss = fake.matching(
            output,
            batch.condition,
            generator,
            options.fake_updates,
            real=real,
            weight_of_real=options.guidance_weight,
        )
        if fake.classifier is not None:
            loss = loss + options.gan_weight * fake.fooled(output, batch.condition, generator)
        yield loss, {"fake_loss": fake_loss}
