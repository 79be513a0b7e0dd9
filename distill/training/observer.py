"""A run's checks: on which pairs they are made, what they remember, and with which weights the run ends."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from torch import nn

from redif_sdk.distill.compute import random as draws
from redif_sdk.distill.compute.lora import trained
from redif_sdk.distill.context import Context
from redif_sdk.distill.methods import Method
from redif_sdk.distill.policy import StudentPolicy
from redif_sdk.distill.pool import Pairs
from redif_sdk.distill.training.check import Seen, check, kept_apart
from redif_sdk.distill.training.standing import Keeper, Measure, Standing, Verdict, unrelated
from redif_sdk.sampling.table import StepTable

__all__ = ["Observer"]


class Observer:
    """Makes the checks of one run. Of processes that train together the first one looks and remembers.

    Attributes:
        first_table: the untrained student's.
        pairs: those of the checks, once `prepare` was called.
        keeper: what was seen.
        seen: images of the last look.
    """

    def __init__(self, context: Context, method: Method) -> None:
        self.context = context
        self.first_table = context.policy.table
        noisy = method.draws_noise(context.config.num_inference_steps)
        self.measure: Measure = "energy" if noisy else "squared"
        self.pairs: Pairs | None = None
        self.held_out = False
        self.keeper = Keeper(method.paired, context.config.targets == "start")
        self.seen: Seen | None = None
        self._calls = 0.0

    def prepare(self) -> float:
        """Get the pairs of the checks, once. Returns the seconds that it took; like the pool's they are no budget's."""
        began = time.monotonic()
        if self.pairs is None:
            self.pairs, self.held_out, self._calls = kept_apart(self.context)
            self.keeper.apart = unrelated(self.pairs.target, self.measure, self.context.amplitude)
        return time.monotonic() - began

    def look(
        self, network: nn.Module, update: int, table: StepTable | None = None
    ) -> tuple[dict[str, float], Standing]:
        """How ``network`` stands after ``update`` updates (`redif_sdk.distill.training.check.check`)."""
        self.prepare()
        assert self.pairs is not None
        energy = self.measure == "energy"
        figures, standing, self.seen = check(self.context, network, self.pairs, update, energy=energy, table=table)
        return figures, standing

    def captions(self, count: int) -> list[str]:
        """What the first ``count`` images of a check were to show: prompts, or classes by name or number; else none."""
        assert self.pairs is not None
        asked = self.context.asked(self.pairs[:count])
        return asked.prompts or asked.class_names or [f"class {label}" for label in asked.class_labels or []]

    def begin(self, network: nn.Module) -> dict[str, float]:
        """Look at the untrained student; figures for the log."""
        self.context.meter.check_calls += self._calls
        figures, standing = self.look(network, 0, self.first_table)
        self.keeper.begin(standing)
        return figures | {"error": standing.error}

    def note(self, network: nn.Module, update: int) -> dict[str, float]:
        """Look at the student, and remember it if it is the best so far; figures for the log."""
        figures, standing = self.look(network, update)
        self.keeper.look(standing, lambda: trained(network), self.context.policy.table.to_dict())
        return figures | {"error": standing.error}

    def chosen(self, update: int) -> tuple[int, dict[str, Any] | None, StepTable | None]:
        """The update whose weights the run ends with, and where that is not the last one, they and their table.

        No weights: those that the run began with.
        """
        if self.context.config.keep == "last" or not self.keeper.reverts():
            return update, None, None
        keeper = self.keeper
        assert keeper.best is not None
        table = self.first_table if keeper.table is None else StepTable.from_dict(keeper.table)
        return keeper.best.update, keeper.weights, table

    def finish(self, student: StudentPolicy, kept: int, finish: Callable[[], None]) -> None:
        """Let the method ``finish`` the student, and undo that where it makes it worse than the untrained start."""
        before = student.table
        finish()
        if student.table == before:
            return

        def worse() -> bool:
            _, standing = self.look(student.network, kept, student.table)
            undone = self.context.config.keep == "best" and self.keeper.worse_than_start(standing)
            if not undone and self.keeper.end is not None and kept == self.keeper.end.update:
                self.keeper.end = standing
            return undone

        if draws.from_first(worse):
            student.table = before

    def verdict(self, kept: int) -> Verdict:
        """How the run began and ended; ``kept``: the update whose weights the student has."""
        assert self.pairs is not None
        cost = self.context.meter.check_calls
        return self.keeper.verdict(kept, self.measure, len(self.pairs), self.held_out, cost)
