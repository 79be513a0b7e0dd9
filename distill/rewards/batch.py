"""What a reward is given: images, what the teacher made of the same noises, and what was asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from inspect import Parameter, signature
from typing import Any

from torch import Tensor

from redif_sdk.distill.teachers.asking import Asked
from redif_sdk.distill.teachers.base import Teacher

__all__ = ["Batch", "asked_of", "positional"]


@dataclass(frozen=True)
class Batch:
    """N images to judge.

    Attributes:
        images: (N, C, H, W) float32 in [-1, 1]: what a user would see. Latents, unclamped, for a reward in their space.
        targets: the teacher's of the same noises, of the same shape; each once for a reward that is ``grouped``.
        condition: (N,) int64: classes, or places among the teacher's prompts or arrays; None: unconditional.
        teacher: whose prompts and classes they are; None: not known.
        guidance_scales: (N,) float32, of the teacher's images, where each has its own; None: all have the teacher's.
    """

    images: Tensor
    targets: Tensor
    condition: Tensor | None = None
    teacher: Teacher | None = None
    guidance_scales: Tensor | None = None

    def __len__(self) -> int:
        return len(self.images)

    @property
    def asked(self) -> Asked:
        """What the images were to show, in every form that it has."""
        return Asked(self.condition, self.teacher)

    @property
    def prompts(self) -> list[str] | None:
        """The prompt of each image; None: they were not made from prompts."""
        return self.asked.prompts

    @property
    def class_labels(self) -> list[int] | None:
        """The class of each image; None: they were not made from classes."""
        return self.asked.class_labels

    @property
    def class_names(self) -> list[str] | None:
        """The name of each image's class; None: the classes have none."""
        return self.asked.class_names

    @property
    def conditions(self) -> dict[str, Tensor]:
        """What the network takes of each image's condition: tensors (N, ...) by name, such as ``class_labels``, or the
        arrays that the teacher is conditioned on."""
        return self.asked.tensors


def asked_of(reward: Callable[..., Any], batch: Batch) -> Any:
    """What ``reward`` says of ``batch``: it takes a `Batch`, or is a function of images, targets and condition."""
    if positional(reward) == 3:
        return reward(batch.images, batch.targets, batch.condition)
    return reward(batch)


def positional(reward: Callable[..., Any]) -> int:
    """How many arguments a reward must be given; 0: any number, or it cannot be told."""
    try:
        parameters = signature(reward).parameters.values()
    except (TypeError, ValueError):  # of C, or with no signature to be found
        return 0
    kinds = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
    return sum(part.kind in kinds and part.default is Parameter.empty for part in parameters)
