"""Distillation methods by name. One file a method, one protocol, so that they compete on equal terms.

The trainer owns the loop, the optimiser and the budget; a method only turns a batch of pairs into losses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from redif_sdk.distill.config import DistillConfig
from redif_sdk.distill.pairs import Pairs
from redif_sdk.distill.policy import StudentPolicy
from redif_sdk.distill.rewards import Advantage
from redif_sdk.distill.teacher import Teacher
from redif_sdk.errors import InvalidRequest

__all__ = ["METHODS", "Context", "Method", "make_method", "method_names"]

Loss = tuple[Tensor, dict[str, float]]


@dataclass
class Context:
    """What a method may see: the student, the teacher, the pool, the rewards and the settings.

    Whoever calls the teacher, or another network than the policy's own, adds that to ``policy.meter``. ``bounds``:
    where latents are pixels, the range to which pictures are clamped.
    """

    policy: StudentPolicy
    teacher: Teacher
    pairs: Pairs
    advantage: Advantage
    config: DistillConfig
    bounds: tuple[float, float] | None = None


class Method(Protocol):
    """``losses`` yields (loss, figures for the log); the trainer takes one optimiser step for each yield."""

    name: str

    def prepare(self, context: Context) -> None:
        """Once, before the first update (not after a resume)."""

    def losses(self, context: Context, batch: Pairs, progress: float, generator: torch.Generator) -> Iterator[Loss]:
        """``progress`` in [0, 1): the share of the budget that is spent; ``generator`` depends on the update alone."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any], context: Context) -> None: ...


def _redif() -> Method:
    from redif_sdk.distill.methods.redif import ReDiF

    return ReDiF()


def _regression() -> Method:
    from redif_sdk.distill.methods.regression import Regression

    return Regression()


def _progressive() -> Method:
    from redif_sdk.distill.methods.progressive import Progressive

    return Progressive()


def _draft() -> Method:
    from redif_sdk.distill.methods.draft import Draft

    return Draft()


def _grpo() -> Method:
    from redif_sdk.distill.methods.grpo import Grpo

    return Grpo()


def _dmd2() -> Method:
    from redif_sdk.distill.methods.dmd2 import Dmd2

    return Dmd2()


METHODS: dict[str, Callable[[], Method]] = {
    "redif": _redif,
    "regression": _regression,
    "progressive": _progressive,
    "dmd2": _dmd2,
    "draft": _draft,
    "grpo": _grpo,
}


def method_names() -> list[str]:
    return sorted(METHODS)


def make_method(name: str) -> Method:
    if name not in METHODS:
        raise InvalidRequest(f"unknown method {name!r}; known: {', '.join(method_names())}")
    return METHODS[name]()
