"""Kernel MMD as a reward (Gretton et al. 2012): the witness function between the teacher's bank and recent outputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from redif_sdk.distill.compute import random as draws
from redif_sdk.distill.pool import Pairs
from redif_sdk.distill.rewards.batch import Batch
from redif_sdk.distill.rewards.feature import FeatureReward
from redif_sdk.distill.rewards.protocol import RewardContext
from redif_sdk.distill.teachers.base import Teacher

BANK, RECENT = 1024, 512


class MmdReward:
    """mean_j k(f(x), f(teacher_j)) - mean_j k(f(x), f(student_j)), (B,): its rise lowers MMD^2 (their eq. 11).

    f: pooled features of the feature reward's own network, standardised by the bank's means and deviations; k: a
    sum of Gaussians at half, once and twice the median distance. The student's side is a queue of its last outputs.
    """

    name = "mmd"

    def __init__(self, features: FeatureReward, bank: Tensor) -> None:
        self.features = features
        self.mean, self.std = bank.mean(0), bank.std(0).clamp_min(1e-6)
        self.bank = (bank - self.mean) / self.std
        self.width = float(torch.cdist(self.bank[:256], self.bank[:256]).median())
        self.recent = self.bank[:0]

    @classmethod
    def fit(cls, teacher: Teacher, pairs: Pairs, seed: int) -> MmdReward:
        """With features trained on ``pairs``, and a bank of the first of the teacher's outputs in them."""
        features = FeatureReward.fit(teacher, pairs, seed)
        return cls(features, features.embed(teacher.seen(pairs.target[:BANK])))

    def _embed(self, images: Tensor) -> Tensor:
        pooled = self.features.network.features(images)[-1].mean((2, 3))
        return (pooled - self.mean) / self.std

    def _kernel(self, a: Tensor, b: Tensor) -> Tensor:
        squares = torch.cdist(a, b).pow(2) / (2 * self.width**2)
        return (torch.exp(-4 * squares) + torch.exp(-squares) + torch.exp(-squares / 4)).mean(1)

    def learn(
        self, context: RewardContext, outputs: Tensor, batch: Pairs, generator: torch.Generator
    ) -> dict[str, float]:
        """Put ``outputs`` into the queue."""
        with torch.no_grad():
            latest = draws.gathered(self._embed(context.judged(outputs)))
            self.recent = torch.cat([latest, self.recent])[:RECENT]
        return {}

    def __call__(self, batch: Batch) -> Tensor:
        ours = self._embed(batch.images)
        against = self._kernel(ours, self.recent) if len(self.recent) else 0.0
        return self._kernel(ours, self.bank) - against

    def state_dict(self) -> dict[str, Any]:
        return {"recent": self.recent}

    def load_state_dict(self, state: dict[str, Any], context: RewardContext) -> None:
        self.recent = state["recent"]
