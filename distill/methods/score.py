"""What the methods that match scores have in common: a warm start by regression, and a fake score."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any

import torch

from redif_sdk.distill.context import Context
from redif_sdk.distill.methods.protocol import Loss, Method
from redif_sdk.distill.methods.regression import Regression
from redif_sdk.distill.options import WarmStarted
from redif_sdk.distill.pool import Pairs
from redif_sdk.distill.rewards.fake_score import FakeScore

__all__ = ["ScoreMethod"]


class ScoreMethod(Method):
    """A method that matches scores. ``fake`` is made in the first update after the warm start."""

    rewarded = False

    def __init__(self) -> None:
        self.warm_up = Regression()
        self.fake: FakeScore | None = None

    def make_fake(self, context: Context) -> FakeScore:
        """The fake score, with what else the method needs from then on."""
        return FakeScore.make(context)

    def begin(self, context: Context) -> FakeScore:
        """The fake score, made where there is none yet."""
        if self.fake is None:
            self.fake = self.make_fake(context)
        return self.fake

    def losses(self, context: Context, batch: Pairs, progress: float, generator: torch.Generator) -> Iterator[Loss]:
        """Of the warm start, then those of :meth:`matched`."""
        if progress < context.config.options_as(WarmStarted).warm_start:
            yield from self.warm_up.losses(context, batch, progress, generator)
        else:
            yield from self.matched(context, self.begin(context), batch, generator)

    @abstractmethod
    def matched(self, context: Context, fake: FakeScore, batch: Pairs, generator: torch.Generator) -> Iterator[Loss]:
        """The method's own losses for a batch."""

    def state_dict(self) -> dict[str, Any]:
        return {"fake": None if self.fake is None else self.fake.state_dict()}

    def load_state_dict(self, state: dict[str, Any], context: Context) -> None:
        if state["fake"] is not None:
            self.begin(context).load_state_dict(state["fake"])
