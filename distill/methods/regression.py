"""Regression through the rollout: the squared error of the student's final output to the teacher's.

The plain supervised baseline (Luhman and Luhman 2021, "Knowledge distillation in iterative generative models", with K
calls in place of one), and the warm start of ReDiF.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from redif_sdk.distill.methods import Context, Loss
from redif_sdk.distill.pairs import Pairs


class Regression:
    name = "regression"

    def prepare(self, context: Context) -> None:
        """Nothing to prepare: the untrained table and the teacher's weights are the start."""

    def losses(self, context: Context, batch: Pairs, progress: float, generator: torch.Generator) -> Iterator[Loss]:
        output = context.policy.sample(batch.noise, batch.condition)
        loss = ((output - batch.target) ** 2).mean()
        yield loss, {"mse": loss.item()}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any], context: Context) -> None:
        """Holds no state."""
