"""The estimators of ReDiF's reinforcement phase.

*Same-state groups*: one network call at a state, G antithetic actions from it, each finished deterministically and
rewarded; the score direction moves the mean. *Pathwise*: the same step along the reward's own gradient, where it has
one. *Trajectory groups*: G whole noisy trajectories from one start, clipped ratios at every row (PPO, Schulman et al.
2017; group baseline as in GRPO, Shao et al. 2024).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from redif_sdk.distill.compute import random as draws
from redif_sdk.distill.context import Context
from redif_sdk.distill.methods.protocol import Loss
from redif_sdk.distill.methods.regression import to_target
from redif_sdk.distill.options import DistributionTerm, PathwiseOptions, SameStateOptions, Trajectories
from redif_sdk.distill.policy import Exploration
from redif_sdk.distill.pool import Pairs
from redif_sdk.distill.rewards.fake_score import FakeScore
from redif_sdk.errors import TrainingDiverged
from redif_sdk.sampling.loop import run_steps
from redif_sdk.sampling.table import StepTable

ONE_STEP = 0.1  # standard deviation, in units of x0, of an action of one step, which has no noise between steps


def check_drift(before: Tensor, after: Tensor, trust_region: float) -> None:
    """The mean that was rolled out and the mean that is updated must be one function: same shapes, no dropout.

    Raises:
        TrainingDiverged: their rms difference is over a tenth of the trust region.
    """
    drift = float((before.detach() - after.detach()).pow(2).mean().sqrt())
    if not drift < 0.1 * trust_region:
        raise TrainingDiverged(
            f"before the first update the mean already drifted by {drift:.3g} (allowed: {0.1 * trust_region:.3g}) "
            "between rollout and update; is dropout on, or the network not deterministic?"
        )


def score_direction(advantage: Tensor, xi: Tensor) -> Tensor:
    """g = (1/G) sum_g A_g xi_g, the score-function estimate of Sigma times the reward's gradient: (B, C, H, W).

    ``advantage`` is (G, B), or (G, B, H, W): then every place has its own.
    """
    weights = advantage[:, :, None, None, None] if advantage.dim() == 2 else advantage[:, :, None]
    direction = torch.zeros_like(xi[0])
    for weight, drawn in zip(weights, xi, strict=True):  # several times as fast as einsum
        direction.addcmul_(weight, drawn)
    return direction / len(xi)


def at_length(direction: Tensor, length: float) -> tuple[Tensor, float]:
    """The direction at an rms of ``length`` over the batch, and the rms that it had."""
    rms = draws.mean(direction.pow(2)).sqrt().clamp_min(1e-12)
    return length * direction / rms, rms.item()


def matching_term(
    fake: FakeScore | None,
    options: DistributionTerm,
    output: Tensor,
    condition: Tensor | None,
    generator: torch.Generator,
) -> tuple[Tensor, dict[str, float]]:
    """DMD's term for ``output``, weighted by ``dmd_weight``, in a ``dmd_fraction`` of the updates; else 0. Figures."""
    if fake is None or float(torch.rand((), generator=generator)) >= options.dmd_fraction:
        return output.new_zeros(()), {}
    matching, fake_loss = fake.matching(output, condition, generator, options.fake_updates)
    return options.dmd_weight * matching, {"fake_loss": fake_loss}


def different_starts(batch: Pairs, group_size: int, generator: torch.Generator) -> Tensor:
    """Noises (G B, C, H, W) of groups that begin each at its own: the first is the pool's, the others are drawn."""
    shape = (group_size - 1, *batch.noise.shape)
    more = draws.normal(shape, generator, batch.noise.device, dim=1).flatten(0, 1)
    return torch.cat([batch.noise, more])


@dataclass
class SameStateGroups:
    """Same-state groups, and the pathwise step: losses of one batch of pairs."""

    context: Context
    exploration: Exploration
    fake: FakeScore | None = None  # for the supervised term: distribution matching

    @property
    def options(self) -> SameStateOptions | PathwiseOptions:
        """The settings of the estimator."""
        options = self.context.config.options
        assert isinstance(options, SameStateOptions | PathwiseOptions)
        return options

    def losses(self, batch: Pairs, generator: torch.Generator, check: bool) -> Iterator[Loss]:
        """One loss: -2 <d, mu> + regression_weight |mu - teacher|^2; d is the score direction at an rms of
        ``step_delta``.

        In a ``dmd_fraction`` of the updates with DMD's term, weighted by ``dmd_weight``.
        """
        policy, options = self.context.policy, self.options
        rows, trusted = policy.num_inference_steps, options.step_delta * self.context.amplitude
        last = rows == 1 or isinstance(options, PathwiseOptions)
        if not last and isinstance(options, SameStateOptions):
            last = float(torch.rand((), generator=generator)) >= options.intermediate_step_fraction
        if last:
            mean = output = policy.sample(batch.noise, batch.condition, options.backprop_last_k)
            row, state = rows - 1, batch.noise
            if check:
                with torch.no_grad():
                    check_drift(policy.sample(batch.noise, batch.condition), mean, trusted)
        else:
            row = int(torch.randint(0, rows - 1, (), generator=generator))
            with torch.no_grad():
                state = policy.states(batch.noise, batch.condition)[row]
            mean = policy.estimate(row, state, batch.condition)
            output = policy.finish(row, state, mean, batch.condition)
            if check:
                with torch.no_grad():
                    check_drift(policy.estimate(row, state, batch.condition), mean, trusted)
        learnt = self.context.advantage.learn(self.context, output, batch, generator)
        direction, figures = self._direction(batch, row, state, mean.detach(), generator)
        figures |= learnt
        residual, mse = to_target(self.context, output, batch.target, options.huber)
        moved = (direction * mean).mean() / self.context.amplitude  # the direction's length is in units of x0
        loss = options.regression_weight * residual - 2 * moved
        matching, learnt = matching_term(self.fake, options, output, batch.condition, generator)
        yield loss + matching, {"mse": mse, **figures, **learnt}

    def _direction(
        self, batch: Pairs, row: int, state: Tensor, mean: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, float]]:
        policy, options = self.context.policy, self.options
        advantage_of, last = self.context.advantage, row == self.context.policy.num_inference_steps - 1
        if isinstance(options, PathwiseOptions):
            return self._step(advantage_of.gradient(mean, batch.target, batch.condition), {})
        xi = self.exploration.antithetic(options.group_size, tuple(mean.shape), generator)
        actions = mean + options.exploration * self.context.amplitude * xi
        if not last:
            with torch.no_grad():
                actions = torch.stack([policy.finish(row, state, action, batch.condition) for action in actions])
        before = advantage_of.dropped, advantage_of.groups
        advantage = advantage_of(actions, batch.target, batch.condition, by_place=last)
        dropped = (advantage_of.dropped - before[0]) / max(1, advantage_of.groups - before[1])
        return self._step(score_direction(advantage, xi), {"dropped_groups": dropped})

    def _step(self, direction: Tensor, figures: dict[str, float]) -> tuple[Tensor, dict[str, float]]:
        """The direction at the length of the trust region, an rms of ``step_delta`` over the batch."""
        moved, rms = at_length(direction, self.options.step_delta)
        return moved, {"direction_rms": rms, **figures}


@dataclass
class TrajectoryGroups:
    """Trajectory groups: losses of one batch of pairs. ``reference``: the network of the KL; None: no KL."""

    context: Context
    exploration: Exploration
    reference: nn.Module | None
    window: range | None = None  # the noisy rows; None: all. The others are deterministic, and have no ratio
    sde: StepTable | None = None  # whose noise the noisy rows have; None: `exploration` in each

    @property
    def table(self) -> StepTable:
        """The sampler of the means: in noisy rows the SDE's, whose noise is the exploration of the clean estimate."""
        table = self.context.policy.table
        if self.sde is None:
            return table
        rows = table.rows.copy()
        for row in self.rows:
            rows[row, :5] = self.sde.rows[row, :5]
        return replace(table, rows=rows)

    def explored(self, row: int) -> float:
        """The standard deviation of an action, in latents: what ``exploration`` says, or c / r of the SDE's row."""
        if self.sde is None:
            return float(self.context.config.get("exploration", ONE_STEP)) * self.context.amplitude
        return abs(float(self.sde.rows[row, 5] / self.sde.rows[row, 3]))

    def rollout(
        self, batch: Pairs, generator: torch.Generator
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor], Tensor]:
        """G trajectories: of the noisy rows the states, actions and means (G B, C, H, W); and the final output."""
        policy, options = self.context.policy, self.options
        if options.group_noise == "different":
            starts = different_starts(batch, options.group_size, generator)
        else:
            starts = batch.noise.repeat(options.group_size, 1, 1, 1)
        x = policy.start(starts)
        labels = None if batch.condition is None else batch.condition.repeat(options.group_size)
        states, actions, means = [], [], []

        def act(k: int, x: Tensor) -> Tensor:
            action = mean = policy.estimate(k, x, labels)
            if k in self.rows:
                xi = self.exploration.draw(options.group_size, tuple(batch.noise.shape), generator).flatten(0, 1)
                action = mean + self.explored(k) * xi
                states.append(x)
                actions.append(action)
                means.append(mean)
            return action

        with torch.no_grad():
            output = run_steps(self.table, x, None, act)
        return states, actions, means, output

    @property
    def options(self) -> Trajectories:
        """The settings of the estimator."""
        return self.context.config.options_as(Trajectories)

    @property
    def rows(self) -> range:
        """The noisy rows."""
        return range(self.context.policy.num_inference_steps) if self.window is None else self.window

    def losses(self, batch: Pairs, generator: torch.Generator, check: bool) -> Iterator[Loss]:
        """For every epoch one loss: PPO's clipped surrogate, averaged over rows, + KL + regression.

        The clip range of a log-probability averaged over D elements is ``clip_mean_shift / sqrt(D)``.
        """
        policy, options = self.context.policy, self.options
        advantage_of = self.context.advantage
        states, actions, means, output = self.rollout(batch, generator)
        group = options.group_size
        labels = None if batch.condition is None else batch.condition.repeat(group)
        with torch.no_grad():
            centre = output.unflatten(0, (group, -1)).mean(0)
        advantage_of.learn(self.context, centre, batch, generator)
        advantage = advantage_of(output.unflatten(0, (group, -1)), batch.target, batch.condition).flatten()
        clip = options.clip_mean_shift / math.sqrt(output[0].numel())
        for epoch in range(options.ppo_epochs):
            surrogate, kl, clipped = output.new_zeros(()), output.new_zeros(()), 0.0
            for k, x, action, old in zip(self.rows, states, actions, means, strict=True):
                mean = policy.estimate(k, x, labels)
                if check and epoch == 0:
                    check_drift(old, mean, options.clip_mean_shift * self.explored(k))
                new_log = self.exploration.log_prob(action, mean, self.explored(k))
                ratio = (new_log - self.exploration.log_prob(action, old, self.explored(k))).exp()
                bounded = ratio.clamp(1 - clip, 1 + clip)
                surrogate = surrogate - torch.minimum(ratio * advantage, bounded * advantage).mean()
                clipped += float((ratio.detach() != bounded.detach()).float().mean())
                if self.reference is not None:
                    kl = kl + self._kl(k, x, labels, mean)
            rows = len(self.rows)
            # means over D elements have gradients D times too small
            loss = output[0].numel() * (surrogate + options.kl * kl) / rows
            figures = {"clip_fraction": clipped / rows, "kl": float(kl.detach()) / rows}
            if options.regression_weight:
                output = policy.sample(batch.noise, batch.condition)
                residual, figures["mse"] = to_target(self.context, output, batch.target, options.huber)
                loss = loss + options.regression_weight * residual
            yield loss, figures

    def _kl(self, k: int, x: Tensor, labels: Tensor | None, mean: Tensor) -> Tensor:
        """KL to the reference policy, with its gradient, averaged over elements: |mu - mu_ref|^2 / (2 e^2) if white."""
        policy = self.context.policy
        assert self.reference is not None
        with torch.no_grad():
            current, policy.network = policy.network, self.reference
            try:
                wanted = policy.estimate(k, x, labels)
            finally:
                policy.network = current
        return -self.exploration.log_prob(wanted, mean, self.explored(k)).mean()
