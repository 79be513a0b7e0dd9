"""The protocol of a reward, of one that is learnt beside the student, and what such a one may see of the run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from redif_sdk.distill.config import DistillConfig
from redif_sdk.distill.policy import Meter
from redif_sdk.distill.pool import Pairs
from redif_sdk.distill.rewards.batch import Batch
from redif_sdk.distill.teachers.base import Teacher

__all__ = ["LearningReward", "Reward", "RewardContext", "name_of"]


class Reward(Protocol):
    """A `Batch` of N images -> (N,) float32: higher is better, and no gradient is needed.

    It may give a map (N, h, w) of any size instead, whose mean is the reward: then same-state groups credit each place
    for the actions around it, which is a far better estimate. Its attribute ``reach`` (0 if absent) says how far from a
    changed pixel the map can change, in pixels. Or it gives several scores or maps by name: each is normalised over its
    group as a reward of its own is, with the reward's weight, times its own of the attribute ``weights`` (1), and
    ``reach`` may be a mapping too.

    A function of ``(images, targets, condition)``, as in a `Batch`, is a reward too.

    A reward that is learnt beside the student is a :class:`LearningReward`. With the attribute ``space`` =
    "latents" it is given latents, unclamped, in place of images. With ``local`` it judges around the outputs that it
    learnt from in this update, and nothing else. With ``paired`` it compares with the teacher's image of the same
    noise, so it cannot judge a group of several. With ``grouped`` it is given each target once, where images are
    groups of as many, one after the other.
    """

    def __call__(self, batch: Batch, /) -> Tensor | Mapping[str, Tensor]: ...


class RewardContext(Protocol):
    """What a reward that learns may see of the run; `redif_sdk.distill.context.Context` is one."""

    @property
    def teacher(self) -> Teacher:
        """The teacher, already guided."""

    @property
    def config(self) -> DistillConfig:
        """All settings of the run."""

    @property
    def meter(self) -> Meter:
        """Where calls of the teacher, and of networks of the student's size, are counted."""

    @property
    def device(self) -> torch.device:
        """Where images and targets are."""

    def judged(self, latents: Tensor) -> Tensor:
        """What rewards are given for ``latents`` (B, C, H, W): images in [-1, 1], or the latents themselves."""

    def charge(self, operations: float) -> None:
        """Count an auxiliary network's floating-point ``operations``, in forward calls of the student."""


@runtime_checkable
class LearningReward(Protocol):
    """A reward that is learnt beside the student."""

    def __call__(self, batch: Batch, /) -> Tensor | Mapping[str, Tensor]: ...

    def learn(
        self, context: RewardContext, outputs: Tensor, batch: Pairs, generator: torch.Generator
    ) -> dict[str, float]:
        """Called once an update, before it judges. Returns figures for the log.

        Args:
            outputs: the student's latents (B, C, H, W) for ``batch``, without a gradient.
            generator: of the CPU; the same on every process.
        """

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must keep."""

    def load_state_dict(self, state: dict[str, Any], context: RewardContext) -> None:
        """Take it back."""


def name_of(reward: Reward) -> str:
    """What a reward is called in logs and manifests."""
    return str(getattr(reward, "name", None) or getattr(reward, "__name__", type(reward).__name__))
