"""What is looked at before a run and while it lasts: is the student deterministic, does it improve, is it hacked?"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from redif_sdk.distill.context import Context
from redif_sdk.distill.measures.distances import precision_recall
from redif_sdk.distill.policy import StudentPolicy
from redif_sdk.distill.teachers.base import Teacher, two_calls_differ
from redif_sdk.errors import UnsupportedModel

__all__ = ["Watch", "check", "check_student", "held_back", "sampled"]

CHECK_PAIRS = 192  # pool entries on which a run is watched
HELD_BACK_FACTOR = 8  # a pool of at least so many times CHECK_PAIRS keeps them from training


@torch.no_grad()
def check_student(network: nn.Module, teacher: Teacher, device: torch.device) -> None:
    """In evaluation mode, in which it trains, the student must give one output for one input.

    Else the mean that was rolled out and the mean that is updated are two functions, and ratios and directions are of
    neither.

    Raises:
        UnsupportedModel: two calls on equal inputs differ, e.g. by dropout that evaluation mode does not switch off.
    """
    x = torch.randn((2, *teacher.shape), generator=torch.Generator().manual_seed(0)).to(device)
    t, labels = torch.full((2,), len(teacher.schedule) / 2, device=device), teacher.labels(np.arange(2))
    condition = None if labels is None else labels.to(device)
    if not two_calls_differ(lambda: network(x, t, condition)):
        return
    live = [name for name, part in network.named_modules() if "Dropout" in type(part).__name__ and part.training]
    where = f" (dropout is on in {', '.join(live[:3])})" if live else ""
    raise UnsupportedModel(
        f"the student gives two outputs for one input in evaluation mode{where}; switch its dropout or noise off"
    )


def held_back(pool_size: int) -> int:
    """How many of a pool's first entries are kept from training, so that checks are of unseen ones."""
    return CHECK_PAIRS if pool_size >= HELD_BACK_FACTOR * CHECK_PAIRS else 0


@torch.no_grad()
def sampled(context: Context, network: nn.Module, count: int) -> tuple[Tensor, Tensor]:
    """The latents (N, C, H, W) of ``network`` on the pool's first ``count`` entries, and the teacher's."""
    pool = context.pairs[: min(count, len(context.pairs))]
    policy = StudentPolicy(network, context.policy.table, context.teacher.schedule)
    slices = policy.table.noise_slices
    return policy.sample(pool.slices(slices) if slices > 1 else pool.noise, pool.condition), pool.target


@torch.no_grad()
def check(context: Context, network: nn.Module) -> dict[str, float]:
    """Reward, paired error, contrast and recall of ``network`` on the pool's first entries; the meter counts nothing.

    ``contrast`` is the output's standard deviation over the teacher's. ``recall``: in a reward's features, if one has
    any, else in pixels.
    """
    spent = context.meter.auxiliary_calls
    output, target = sampled(context, network, CHECK_PAIRS)
    advantage = context.advantage
    embed = next((r.embed for r, _ in advantage.rewards if hasattr(r, "embed")), lambda images: images.flatten(1))
    _, recall = precision_recall(embed(advantage.images(output)), embed(advantage.images(target)))
    able = any(not getattr(reward, "local", False) for reward, _ in advantage.rewards)
    wrong = ((output - target) ** 2).mean().item()
    condition = context.pairs[: len(target)].condition
    reward = advantage.score(output, target, condition) if able else -wrong
    context.meter.auxiliary_calls = spent
    return {
        "reward": reward,
        "check_mse": wrong,
        "contrast": (output.std() / target.std()).item(),
        "recall": recall,
    }


@dataclass
class Watch:
    """Compares a run's checks: warns of reward hacking, and ends the run after ``early_stop`` idle ones (0: never)."""

    early_stop: int
    stopped: str = ""  # why the run ended before its budget did
    _last: dict[str, float] | None = field(default=None)
    _best: float = -math.inf
    _stale: int = 0

    def look(self, now: dict[str, float]) -> dict[str, str]:
        """What the log says of a check: ``warning`` where recall falls while the reward rises, ``stopped`` at the end.

        A check is idle if its reward is no better than the best so far, or if it looks hacked.
        """
        before, self._last = self._last, now
        hacked = before is not None and now["reward"] > before["reward"] and now["recall"] < before["recall"] - 0.1
        better = now["reward"] > self._best and not hacked
        self._stale = 0 if better else self._stale + 1
        if better:
            self._best = now["reward"]
        if self.early_stop and self._stale >= self.early_stop:
            why = "the reward rises while recall falls" if hacked else "the reward rises no more"
            self.stopped = f"{why}: {self._stale} checks in a row; the budget was not spent"
        said = {"warning": "recall falls while the reward rises: reward hacking?"} if hacked else {}
        return said | ({"stopped": self.stopped} if self.stopped else {})

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must keep."""
        return {"last": self._last, "best": self._best, "stale": self._stale, "stopped": self.stopped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it back."""
        self._last, self._best, self._stale = state["last"], state["best"], state["stale"]
        self.stopped = state["stopped"]
