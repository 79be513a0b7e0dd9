"""The estimator of ReDiF's reinforcement phase that learns a critic of the reward (`rewards/critic.py`).

G images of each prompt, which begin at one noise or each at its own, are judged by the rewards. The critic learns which
of a group were better, and the student's mean moves along the critic's gradient: the deterministic policy gradient
(Silver et al. 2014, theorem 1). The step is as long as the critic deserves: ``step_delta`` times its agreement with the
rewards on images it had not seen. An untrained critic, or one that the student has learnt to fool, is not followed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from redif_sdk.distill.context import Context
from redif_sdk.distill.methods.estimators import at_length, check_drift, different_starts, matching_term
from redif_sdk.distill.methods.protocol import Loss
from redif_sdk.distill.methods.regression import to_target
from redif_sdk.distill.options import CriticOptions
from redif_sdk.distill.policy import Exploration
from redif_sdk.distill.pool import Pairs
from redif_sdk.distill.rewards.critic import Critic, Judged
from redif_sdk.distill.rewards.fake_score import FakeScore

TRUSTED = 0.1  # the least agreement at which the critic is followed: what a hundred images show by chance


@dataclass
class CriticGroups:
    """Losses of one batch of pairs."""

    context: Context
    exploration: Exploration
    critic: Critic
    fake: FakeScore | None = None  # for the term of distribution matching

    def losses(self, batch: Pairs, generator: torch.Generator, check: bool) -> Iterator[Loss]:
        """One loss: -2 <d, x> + regression_weight |x - teacher|^2, d being the critic's direction at an rms of
        ``step_delta`` times its agreement; none of it while that is below ``TRUSTED``. In a ``dmd_fraction`` of the
        updates with DMD's term."""
        options, policy = self.context.config.options_as(CriticOptions), self.context.policy
        starts, condition = self._starts(batch, generator)
        trusted = self.critic.agreement > TRUSTED
        with torch.set_grad_enabled(trusted or check or options.regression_weight > 0 or self.fake is not None):
            output = policy.sample(starts, condition, options.backprop_last_k)
        if check:
            with torch.no_grad():
                again = policy.sample(starts, condition)
            check_drift(again, output, options.step_delta * self.context.amplitude)
        figures = self.context.advantage.learn(self.context, output[: len(batch)], batch, generator)
        figures |= self.critic.see(self._judged(output.detach(), batch, generator), generator)
        loss = 0 * next(weight for weight in policy.network.parameters() if weight.requires_grad).sum()
        if trusted:
            along = self.critic.gradient(output, condition, generator)
            direction, figures["direction_rms"] = at_length(along, options.step_delta * max(0.0, self.critic.agreement))
            loss = loss - 2 * (direction * output).mean() / self.context.amplitude
        residual, figures["mse"] = to_target(self.context, output[: len(batch)], batch.target, options.huber)
        matching, learnt = matching_term(self.fake, options, output, condition, generator)
        yield loss + options.regression_weight * residual + matching, figures | learnt

    def _starts(self, batch: Pairs, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        """The initial noises: the pool's (B, ...); with different ones in a group G B of them, the pool's first."""
        options = self.context.config.options_as(CriticOptions)
        if options.group_noise == "same":
            return batch.noise, batch.condition
        condition = None if batch.condition is None else batch.condition.repeat(options.group_size)
        return different_starts(batch, options.group_size, generator), condition

    def _judged(self, outputs: Tensor, batch: Pairs, generator: torch.Generator) -> Judged:
        """The outputs with exploration, G of each of the batch, and the rewards' advantages."""
        options, shape = self.context.config.options_as(CriticOptions), tuple(batch.noise.shape)
        xi = self.exploration.draw(options.group_size, shape, generator)
        actions = outputs.unflatten(0, (-1, len(batch))) + options.exploration * self.context.amplitude * xi
        advantage = self.context.advantage(actions, batch.target, batch.condition)
        return Judged(actions.transpose(0, 1).contiguous(), advantage.T.contiguous(), batch.condition)
