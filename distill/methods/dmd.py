"""DMD (Yin et al. 2024, arXiv 2311.18828): match the teacher's distribution by the difference of two scores, held to
its paired outputs by regression.

A second network, the fake score, learns to denoise what the student makes; the student moves along fake minus real at
noised outputs of its whole rollout. Otherwise than the paper: ``fake_updates`` and a learning rate of the fake score's
own come from DMD2, a small discriminator on images can be added (``gan_weight``), and the regression term is squared or
pseudo-Huber error in place of LPIPS. `dmd2` is its successor as published.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from redif_sdk.distill.context import Context
from redif_sdk.distill.methods.protocol import Loss
from redif_sdk.distill.methods.regression import to_target
from redif_sdk.distill.methods.score import ScoreMethod
from redif_sdk.distill.options import DmdOptions
from redif_sdk.distill.pool import Pairs
from redif_sdk.distill.rewards.batch import Batch
from redif_sdk.distill.rewards.discriminator import Discriminator
from redif_sdk.distill.rewards.fake_score import FakeScore


class Dmd(ScoreMethod):
    """Distribution matching, after a warm start by regression. ``fake`` and ``discriminator`` are made when it ends."""

    name = "dmd"

    def __init__(self) -> None:
        super().__init__()
        self.discriminator: Discriminator | None = None

    def make_fake(self, context: Context) -> FakeScore:
        """And the discriminator, where it has a weight."""
        fake = FakeScore.make(context)
        if context.config.options_as(DmdOptions).gan_weight:
            self.discriminator = Discriminator.make(context.teacher, context.config.seed, context.device)
        return fake

    def matched(self, context: Context, fake: FakeScore, batch: Pairs, generator: torch.Generator) -> Iterator[Loss]:
        """<g, x> with g = (fake_x0 - real_x0) / mean |x - real_x0| (eqs. 7 and 8 of DMD) + gan_weight * softplus(-D(x))
        + regression_weight |x - teacher|^2."""
        options = context.config.options_as(DmdOptions)
        output = context.policy.sample(batch.noise, batch.condition, options.backprop_last_k)
        matching, fake_loss = fake.matching(output, batch.condition, generator, options.fake_updates)
        residual, mse = to_target(context, output, batch.target, options.huber)
        loss = options.step_delta * matching + options.regression_weight * residual
        figures = {"mse": mse, "fake_loss": fake_loss}
        if self.discriminator is not None:
            figures |= self.discriminator.learn(context, output.detach(), batch, generator)
            images = context.images(output)
            fooled = self.discriminator(Batch(images, images.detach(), batch.places)).mean()
            loss = loss - options.gan_weight * fooled
        yield loss, figures

    def state_dict(self) -> dict[str, Any]:
        discriminator = None if self.discriminator is None else self.discriminator.state_dict()
        return {**super().state_dict(), "discriminator": discriminator}

    def load_state_dict(self, state: dict[str, Any], context: Context) -> None:
        super().load_state_dict(state, context)
        if state["discriminator"] is not None and self.discriminator is not None:
            self.discriminator.load_state_dict(state["discriminator"], context)
