"""Distribution matching as a reward: how far an action goes the way in which the teacher's density rises.

DMD's direction (fake score minus real score, `fake_score.py`) is taken once for an update, at the student's outputs; an
action a is worth <real x0 - fake x0, a - output> at each place. So the groups of ReDiF cost no further network calls,
and what DMD follows as a gradient is here one black-box number a place among other rewards.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from redif_sdk.distill.options import FakeScoreOptions
from redif_sdk.distill.pool import Pairs
from redif_sdk.distill.rewards.batch import Batch
from redif_sdk.distill.rewards.fake_score import FakeScore
from redif_sdk.distill.rewards.protocol import RewardContext
from redif_sdk.errors import InvalidRequest


class DistributionReward:
    """A map (B, h, w) on latents. It learns from every update's outputs, and then judges actions around them alone."""

    name = "distribution"
    space = "latents"
    reach = 0
    local = True  # judges only images near those it learnt from in this update

    def __init__(self) -> None:
        self.fake: FakeScore | None = None
        self.outputs: Tensor | None = None
        self.rise: Tensor | None = None

    def learn(
        self, context: RewardContext, outputs: Tensor, batch: Pairs, generator: torch.Generator
    ) -> dict[str, float]:
        """``fake_updates`` updates of the fake score on ``outputs`` (B, C, H, W), then the direction there."""
        fake, count = self._begin(context), context.config.options_as(FakeScoreOptions).fake_updates
        learnt = [fake.learn(outputs, batch.condition, generator) for _ in range(count)]
        self.outputs, self.rise = outputs, -fake.difference(outputs, batch.condition, generator)
        return {"fake_loss": sum(learnt) / count}

    def _begin(self, context: RewardContext) -> FakeScore:
        if self.fake is None:
            self.fake = FakeScore.make(context)
        return self.fake

    def __call__(self, batch: Batch) -> Tensor:
        if self.outputs is None or self.rise is None or len(batch) % len(self.outputs):
            raise InvalidRequest("the reward distribution judges actions around the outputs it learnt from alone")
        repeats = (len(batch) // len(self.outputs), 1, 1, 1)
        return (self.rise.repeat(repeats) * (batch.images - self.outputs.repeat(repeats))).sum(1)

    def state_dict(self) -> dict[str, Any]:
        return {"fake": None if self.fake is None else self.fake.state_dict()}

    def load_state_dict(self, state: dict[str, Any], context: RewardContext) -> None:
        if state["fake"] is not None:
            self._begin(context).load_state_dict(state["fake"])
