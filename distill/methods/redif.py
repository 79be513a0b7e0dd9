"""ReDiF (arXiv 2512.22802): the student's denoising trajectory is a policy, the reward its agreement with the teacher.

Three phases: the *schedule policy* learns the step table's times with the network frozen; *regression* through the
rollout warms the network up; *reinforcement* follows the reward, with one of the estimators (`estimators`). At the end
the table's output gain may be learnt too (``calibration``): averages over what is uncertain lose contrast.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from redif_sdk.distill.compute.lora import load_trained, trained, twin
from redif_sdk.distill.compute.parallel import is_sharded
from redif_sdk.distill.context import Context
from redif_sdk.distill.methods.critic import CriticGroups
from redif_sdk.distill.methods.estimators import SameStateGroups, TrajectoryGroups
from redif_sdk.distill.methods.gain import gain_cost, learn_gain
from redif_sdk.distill.methods.protocol import Loss, Method
from redif_sdk.distill.methods.regression import Regression
from redif_sdk.distill.methods.times import images_an_update, learn_times, teacher_as_policy
from redif_sdk.distill.options import CriticOptions, PathwiseOptions, SameStateOptions, TrajectoryOptions
from redif_sdk.distill.policy import Exploration, StudentPolicy
from redif_sdk.distill.pool import Pairs
from redif_sdk.distill.rewards.critic import Critic
from redif_sdk.distill.rewards.fake_score import FakeScore
from redif_sdk.sampling.table import StepTable

TIMES_SHARE = 0.2  # of a budget of forward-equivalents or of seconds, at most, goes into the times
RESIDUALS = 512  # pairs whose residuals shape the exploration


def _options(context: Context) -> SameStateOptions | PathwiseOptions | TrajectoryOptions | CriticOptions:
    options = context.config.options
    assert isinstance(options, SameStateOptions | PathwiseOptions | TrajectoryOptions | CriticOptions)
    return options


class ReDiF(Method):
    """ReDiF in its three phases. What the third needs (``exploration`` to ``critic``) is made when it begins."""

    name = "redif"
    rewarded = True

    def __init__(self) -> None:
        self.warm_up = Regression()
        self.exploration: Exploration | None = None
        self.reference: nn.Module | None = None
        self.fake: FakeScore | None = None
        self.critic: Critic | None = None

    def prepare(self, context: Context) -> None:
        """The schedule policy, in as many updates as `TIMES_SHARE` pays for. K = 1 has no times to learn.

        A guided teacher judges times itself, at all its calls a step: the student's network does not know guidance yet.
        """
        updates, teacher, policy = _options(context).schedule_updates, context.teacher, context.policy
        calls = policy.num_inference_steps * (1 if teacher.guidance is None else teacher.calls_per_step)
        if budget := context.config.forward_equivalents:
            image = calls + context.advantage.decoding(context.pairs.target) / context.unit
            updates = min(updates, int(TIMES_SHARE * budget / (images_an_update() * image)))
        if not updates or policy.num_inference_steps == 1:
            return
        judged = policy if teacher.guidance is None else teacher_as_policy(teacher, policy.table)
        seconds = TIMES_SHARE * (context.config.seconds or math.inf)
        together = judged is policy and is_sharded(policy.network)

        def learn() -> StepTable:
            seed = context.config.seed
            table = learn_times(judged, context.pairs, context.advantage, updates, seed, seconds, together=together)
            if judged is not policy:
                policy.meter.teacher_calls += judged.meter.student_calls * teacher.calls_per_step
            return table

        policy.table = context.once(learn, together=together)

    def losses(self, context: Context, batch: Pairs, progress: float, generator: torch.Generator) -> Iterator[Loss]:
        """Of the phase that ``progress`` is in: regression, or the estimator's."""
        if progress < _options(context).warm_start:
            yield from self.warm_up.losses(context, batch, progress, generator)
            return
        first = self.exploration is None
        if first:
            self._begin(context)
        assert self.exploration is not None
        if self.critic is not None:
            judged = CriticGroups(context, self.exploration, self.critic, self.fake)
            yield from judged.losses(batch, generator, check=first)
        elif _options(context).estimator != "trajectory":
            groups = SameStateGroups(context, self.exploration, self.fake)
            yield from groups.losses(batch, generator, check=first)
        else:
            yield from TrajectoryGroups(context, self.exploration, self.reference).losses(batch, generator, check=first)

    def finish(self, context: Context, student: StudentPolicy) -> None:
        """The schedule policy once more: the gain of the table's last row."""
        if count := _options(context).calibration:
            gain = context.once(lambda: learn_gain(context, student, count))
            student.table = student.table.with_gain(gain)

    def reserve(self, context: Context) -> float:
        """What learning the gain costs."""
        return gain_cost(context, _options(context).calibration)

    def _begin(self, context: Context) -> None:
        """The exploration of the reinforcement phase, from the residuals that the warm start left."""
        pool, options = context.pairs[: min(RESIDUALS, len(context.pairs))], _options(context)
        elements = pool.noise[0].numel()
        rank = options.exploration_rank if isinstance(options, SameStateOptions | TrajectoryOptions) else 0
        trajectory = isinstance(options, TrajectoryOptions)
        if rank:

            def explore() -> Exploration:
                with torch.no_grad():
                    parts = [pool[low : low + 128] for low in range(0, len(pool), 128)]
                    outputs = torch.cat([context.policy.sample(part.noise, part.condition) for part in parts])
                white_part = 0.5 if trajectory else 0.0
                # where the targets are the start's own there is no residual yet: the directions in which outputs differ
                shape = outputs if context.config.targets == "start" else pool.target - outputs
                return Exploration.structured(shape, rank, white_part).to("cpu")

            made = context.once(explore, together=is_sharded(context.policy.network))
            self.exploration = made.to(context.device)
        else:
            self.exploration = Exploration.white(elements, context.device)
        if isinstance(options, TrajectoryOptions):
            if options.kl:
                self.reference = twin(context.policy.network)
        elif options.dmd_weight:
            self.fake = FakeScore.make(context)
        if isinstance(options, CriticOptions):
            self.critic = Critic(context)

    def state_dict(self) -> dict[str, Any]:
        explored, reference = self.exploration, self.reference
        return {
            "exploration": None if explored is None else (explored.basis, explored.scales, explored.tau),
            "reference": None if reference is None else trained(reference),
            "fake": None if self.fake is None else self.fake.state_dict(),
            "critic": None if self.critic is None else self.critic.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any], context: Context) -> None:
        if state["exploration"] is not None:
            basis, scales, tau = state["exploration"]
            self.exploration = Exploration(basis, scales, tau)
        if state["reference"] is not None:
            self.reference = twin(context.policy.network)
            load_trained(self.reference, state["reference"])
        if state["fake"] is not None:
            self.fake = FakeScore.make(context)
            self.fake.load_state_dict(state["fake"])
        if state.get("critic") is not None:
            self.critic = Critic(context)
            self.critic.load_state_dict(state["critic"])
