"""Does a run end better than it began? How a student stands on held-out pairs, and which weights a run ends with.

docs/design.md (Never worse in silence) says why an error and a reward decide together.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from redif_sdk.artifact.records import CheckFigures, Checks

__all__ = ["Keeper", "Standing", "Verdict", "energy_errors", "squared_errors", "unrelated"]

SURELY = 2.0  # standard errors of a mean difference that is no chance
MARGIN = 0.01  # share of an error that is too little to speak of
FACTOR = 1.5  # an error that is so many times larger is larger, whatever its spread
LARGEST = 1e30  # what stands for infinity and NaN

Measure = Literal["squared", "energy"]


def _finite(values: Tensor) -> Tensor:
    return values.double().cpu().nan_to_num(LARGEST, LARGEST, -LARGEST).clamp(-LARGEST, LARGEST)


def squared_errors(residual: Tensor) -> Tensor:
    """Of residuals (N, C, H, W) each image's mean square: (N,) float64, finite."""
    return _finite(residual.double().square().flatten(1).mean(1))


def energy_errors(output: Tensor, target: Tensor) -> Tensor:
    """Each output's part of half the energy distance of two sets (N, C, H, W): (N,) float64, finite.

    For samplers that draw noise of their own, whose outputs are not paired with the teacher's (Szekely and Rizzo 2013).
    """
    ours, theirs = (_finite(part).clamp(-1e15, 1e15).flatten(1) for part in (output, target))
    among = torch.cdist(theirs, theirs).mean() / 2
    own = torch.cdist(ours, theirs).mean(1) - torch.cdist(ours, ours).mean(1) / 2
    return _finite((own - among) / math.sqrt(ours.shape[1]))


def unrelated(target: Tensor, measure: Measure, amplitude: float) -> float:
    """The error between one image of the teacher and another one of its own."""
    apart = (target - target.roll(1, 0)) / amplitude
    square = float(squared_errors(apart).mean())
    return square if measure == "squared" else math.sqrt(square)


@dataclass(frozen=True)
class Standing:
    """How a student stands after ``update`` updates; 0: untrained.

    Attributes:
        errors: (N,) float64, of each held-out pair.
        rewards: (N,) float64, the run's own; None: it has none that stays the same through the run.
    """

    update: int
    errors: Tensor
    rewards: Tensor | None

    @property
    def error(self) -> float:
        """The mean error."""
        return float(self.errors.mean())

    @property
    def reward(self) -> float | None:
        """The mean reward."""
        return None if self.rewards is None else float(self.rewards.mean())

    def further_off(self, other: Standing, apart: float) -> bool:
        """Whether the error is larger by more than chance. ``apart``: that between unrelated images."""
        rise = self.errors - other.errors
        if float(rise.mean()) <= MARGIN * abs(other.error):
            return False
        return _surely(rise) or self.error > max(FACTOR * other.error, apart / 10)

    def less_rewarded(self, other: Standing) -> bool:
        """Whether the reward is lower by more than chance, or there is none."""
        return self.rewards is None or other.rewards is None or _surely(other.rewards - self.rewards)

    def figures(self) -> CheckFigures:
        """For the manifest and the log."""
        return CheckFigures(update=self.update, error=max(0.0, self.error), reward=self.reward)

    def state_dict(self) -> dict[str, Any]:
        return {"update": self.update, "errors": self.errors, "rewards": self.rewards}


def _surely(rise: Tensor) -> bool:
    mean = float(rise.mean())
    return mean > 0 and mean > SURELY * (float(rise.std()) / math.sqrt(len(rise)) if len(rise) > 1 else 0.0)


@dataclass(frozen=True)
class Verdict:
    """What a run's checks say of its end.

    Attributes:
        worse: the run ended worse than its untrained start: one sentence; empty: it did not.
        note: another sentence that must be said, such as that earlier weights are kept.
    """

    checks: Checks
    worse: str
    note: str


@dataclass
class Keeper:
    """Remembers how a run began, its best check with the weights of it, and its last check.

    Attributes:
        aimed: the error is the method's own aim; otherwise it may rise from an earlier check on purpose.
        leashed: the targets are the start's own outputs, so that every change is an error, and no fault.
        apart: the error between unrelated images of the teacher.
        weights, table: of the best check, on the CPU; None: of the start.
    """

    aimed: bool
    leashed: bool = False
    apart: float = math.inf
    start: Standing | None = None
    end: Standing | None = None
    best: Standing | None = None
    weights: dict[str, Any] | None = None
    table: dict[str, Any] | None = None

    def begin(self, standing: Standing) -> None:
        """The untrained student's."""
        self.start = self.end = self.best = standing

    def look(self, standing: Standing, weights: Callable[[], dict[str, Any]], table: dict[str, Any]) -> None:
        """A check's; the weights are copied if it is the best so far."""
        self.end = standing
        if self._better(standing):
            self.best, self.table = standing, table
            self.weights = {name: value.detach().cpu().clone() for name, value in weights().items()}

    def _better(self, now: Standing) -> bool:
        """Of checks that are not worse than the start: the highest reward, or without one the least error."""
        assert self.best is not None
        if self.worse_than_start(now):
            return False
        if now.reward is None or self.best.reward is None:
            return self.leashed or now.error < self.best.error
        return now.reward > self.best.reward or (self.best is self.start and now.error < self.best.error)

    def worse_than_start(self, now: Standing) -> bool:
        """Both figures are worse; or the images have no more to do with the teacher's, whatever their reward."""
        assert self.start is not None
        if not now.further_off(self.start, self.apart):
            return False
        rewarded = now.rewards is not None and self.start.rewards is not None
        return ((rewarded or not self.leashed) and now.less_rewarded(self.start)) or now.error > self.apart

    def reverts(self) -> bool:
        """Whether earlier weights are better than the last: than the start's, or on both figures than the best's."""
        if self.end is None or self.best is None or self.end.update == self.best.update:
            return False
        if self.worse_than_start(self.end):
            return True
        comparable = self.aimed or self.best.rewards is not None
        return comparable and self.end.further_off(self.best, self.apart) and self.end.less_rewarded(self.best)

    def verdict(self, kept: int, measure: Measure, pairs: int, held_out: bool, cost: float) -> Verdict:
        """``kept``: the update whose weights the student has."""
        assert self.start is not None
        assert self.end is not None
        assert self.best is not None
        worse = self.worse_than_start(self.end)
        checks = Checks(
            pairs=pairs,
            held_out=held_out,
            measure=measure,
            start=self.start.figures(),
            end=self.end.figures(),
            best=self.best.figures(),
            kept=kept,
            worse=worse,
            forward_equivalents=round(cost, 3),
        )
        said, note = "", ""
        now = "the last weights are kept" if kept == self.end.update else _kept(kept)
        if worse:
            said = f"the run ended worse than its untrained start ({self._figures(self.start)}); {now}"
            if kept == self.end.update:
                said += "; lower learning_rate, or set keep to best"
            else:
                said += "; lower learning_rate"
        elif kept != self.end.update:
            note = f"the run's best check was an earlier one ({self._figures(self.best)}); {now}"
        elif not self.leashed and self.end.further_off(self.start, self.apart):
            note = f"its images are further from the teacher's than untrained ones ({self._figures(self.start)})"
        return Verdict(checks, said, note)

    def record(self) -> dict[str, Any]:
        """The figures of start, best and last check, for the log."""
        standings = {"start": self.start, "best": self.best, "end": self.end}
        return {name: then.figures().model_dump() for name, then in standings.items() if then is not None}

    def _figures(self, then: Standing) -> str:
        assert self.end is not None
        said = f"error {then.error:.3g}, at the end {self.end.error:.3g}"
        if then.reward is not None and self.end.reward is not None:
            said += f"; reward {then.reward:.3g}, at the end {self.end.reward:.3g}"
        return said

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must keep."""
        standings = {name: getattr(self, name) for name in ("start", "end", "best")}
        kept = {name: None if value is None else value.state_dict() for name, value in standings.items()}
        return {**kept, "weights": self.weights, "table": self.table}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it back."""
        for name in ("start", "end", "best"):
            value = state[name]
            if value is not None:
                rewards = None if value["rewards"] is None else value["rewards"].cpu()
                setattr(self, name, Standing(value["update"], value["errors"].cpu(), rewards))
        if self.start is not None and self.best is not None and self.best.update == self.start.update:
            self.best = self.start
        self.weights, self.table = state["weights"], state["table"]
        if self.weights is not None:
            self.weights = {name: value.cpu() for name, value in self.weights.items()}


def _kept(update: int) -> str:
    return f"the weights of update {update:,} are kept" if update else "the untrained weights of the start are kept"
