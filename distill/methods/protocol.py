"""The protocol of a method: one file a method, so that they compete on equal terms.

The training loop owns the optimiser, the averages and the budget; a method turns a batch of pairs into losses.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from redif_sdk.distill.context import Context
from redif_sdk.distill.policy import StudentPolicy
from redif_sdk.distill.pool import Pairs
from redif_sdk.sampling.table import StepTable

__all__ = ["Loss", "Method"]

Loss = tuple[Tensor, dict[str, float]]


class Method(ABC):
    """``losses`` yields (loss, figures for the log); the trainer takes one optimiser step for each yield.

    ``rewarded``: whether it follows the rewards that the settings name; where not, none of them is made. ``paired``:
    whether the error to the teacher's outputs is all that it lowers: then a run ends no further off than it ever was.
    """

    name: str
    rewarded: bool
    paired: bool = False

    def prepare(self, context: Context) -> None:  # noqa: B027  most methods have nothing to prepare
        """Once, before the first update (not after a resume)."""

    @abstractmethod
    def losses(self, context: Context, batch: Pairs, progress: float, generator: torch.Generator) -> Iterator[Loss]:
        """``progress`` in [0, 1): the share of the budget that is spent; ``generator`` depends on the update alone."""

    def finish(self, context: Context, student: StudentPolicy) -> None:  # noqa: B027
        """Once, after the last update, with the EMA student, whose table it may replace."""

    def cycle(self, context: Context, progress: float) -> float:
        """The share of its learning-rate cycle that is done at ``progress``, from which the rate falls by a cosine."""
        return progress

    def tables(self, context: Context, student: StudentPolicy) -> list[StepTable]:
        """The step tables that the student is saved with; the first is its default."""
        return [student.table]

    def draws_noise(self, num_inference_steps: int) -> bool:
        """Whether a student of so many steps draws noise between them, so that no output belongs to a teacher's."""
        return False

    def reserve(self, context: Context) -> float:
        """The forward-equivalents that `finish` will spend."""
        return 0.0

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must keep."""
        return {}

    def load_state_dict(self, state: dict[str, Any], context: Context) -> None:  # noqa: B027
        """Take it back."""
