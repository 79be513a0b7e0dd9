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
from redif_sdk.distill.methods.protocol import Loss, Method
from redif_sdk.distill.methods.regression import Regression, error, visible_residual
from redif_sdk.distill.options import DmdOptions
from redif_sdk.distill.pool import Pairs
from redif_sdk.distill.rewards.discriminator import Discriminator
from redif_sdk.distill.rewards.fake_score import FakeScore


class Dmd(Method):
    """Distribution matching, after a warm start by regression. ``fake`` and ``discriminator`` are made when it ends."""

    name = "dmd"
    rewarded = False

    def __init__(self) -> None:
        self.warm_up = Regression()
        self.fake: FakeScore | None = None
        self.discriminator: Discriminator | None = None

    def _begin(self, context: Context) -> FakeScore:
        if self.fake is None:
            self.fake = FakeScore.make(context)
            if context.config.options_as(DmdOptions).gan_weight:
                self.discriminator = Discriminator.make(context.teacher, context.config.seed, context.device)
        return self.fake

    def losses(self, context: Context, batch: Pairs, progress: float, generator: torch.Generator) -> Iterator[Loss]:
        """<g, x> with g = (fake_x0 - real_x0) / mean |x - real_x0| (eqs. 7 and 8 of DMD) + gan_weight * softplus(-D(x))
        + regression_weight |x - teacher|^2."""
        options = context.config.options_as(DmdOptions)
        if progress < options.warm_start:
            yield from self.warm_up.losses(context, batch, progress, generator)
            return
        fake = self._begin(context)
        output = context.policy.sample(batch.noise, batch.condition, options.backprop_last_k)
        matching, fake_loss = fake.matching(output, batch.condition, generator, options.fake_updates)
        residual = visible_residual(output, batch.target, context.bounds, context.amplitude)
        loss = options.step_delta * matching + options.regression_weight * error(residual, options.huber)
        figures = {"mse": residual.detach().pow(2).mean().item(), "fake_loss": fake_loss}
        if self.discriminator is not None:
            figures |= self.discriminator.learn(context, output.detach(), batch, generator)
            fooled = self.discriminator(context.images(output), output.detach(), batch.condition).mean()
            loss = loss - options.gan_weight * fooled
        yield loss, figures

    def state_dict(self) -> dict[str, Any]:
        return {
            "fake": None if self.fake is None else self.fake.state_dict(),
            "discriminator": None if self.discriminator is None else self.discriminator.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any], context: Context) -> None:
        if state["fake"] is not None:
            self._begin(context).load_state_dict(state["fake"])
        if state["discriminator"] is not None and self.discriminator is not None:
            self.discriminator.load_state_dict(state["discriminator"], context)
