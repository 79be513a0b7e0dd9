"""DRaFT (Clark et al. 2023, arXiv 2309.17400): ascend the reward's own gradient through the rollout.

White-box: every reward must be differentiable. It is the control arm of ReDiF: the same rewards, rollout and regression
term, so that what is left between the two is what reinforcement itself contributes.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from redif_sdk.distill.context import Context
from redif_sdk.distill.methods.protocol import Loss, Method
from redif_sdk.distill.methods.regression import Regression, to_target
from redif_sdk.distill.options import DraftOptions
from redif_sdk.distill.pool import Pairs


class Draft(Method):
    """The reward's own gradient through the rollout, after a warm start by regression."""

    name = "draft"
    rewarded = True

    def __init__(self) -> None:
        self.warm_up = Regression()

    def prepare(self, context: Context) -> None:
        """Raises InvalidRequest for a reward without a gradient, before anything is trained."""
        if any(getattr(reward, "local", False) for reward, _ in context.advantage.rewards):
            return  # those that judge what they learnt from alone have a gradient
        probe = context.pairs[:2]
        context.advantage.gradient(probe.target + 0.1, probe.target, probe.condition)

    def losses(self, context: Context, batch: Pairs, progress: float, generator: torch.Generator) -> Iterator[Loss]:
        """-sum_i w_i r_i(x_0(theta)) / s_i + regression_weight |x_0 - teacher|^2.

        s_i is the gradient's rms, so that weights mean the same for every reward (the paper has one reward and tunes
        its learning rate).
        """
        options = context.config.options_as(DraftOptions)
        if progress < options.warm_start:
            yield from self.warm_up.losses(context, batch, progress, generator)
            return
        output = context.policy.sample(batch.noise, batch.condition, options.backprop_last_k)
        learnt = context.advantage.learn(context, output, batch, generator)
        gradient = context.advantage.gradient(output.detach(), batch.target, batch.condition)
        residual, mse = to_target(context, output, batch.target, options.huber)
        # <gradient, output> has the reward's gradient with respect to the weights, by the chain rule
        loss = (
            options.regression_weight * residual
            - 2 * options.step_delta * (gradient * output).mean() / context.amplitude
        )
        yield loss, {"mse": mse, **learnt}
