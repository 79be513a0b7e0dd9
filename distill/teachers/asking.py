"""What a teacher is asked for: classes, prompts, or a user's own arrays, by index."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from redif_sdk.artifact.records import ArrayCondition, Condition, TextCondition
from redif_sdk.errors import InvalidRequest
from redif_sdk.models.condition_data import ConditionData
from redif_sdk.models.prompts import Prompts
from redif_sdk.models.rows import Rows
from redif_sdk.models.scales import places_of, scales_at, with_scales

__all__ = ["Asked", "Asking"]


@dataclass(frozen=True)
class Asked:
    """What images were asked for, in every form that it has.

    Attributes:
        index: (N,) int64, what networks and policies are called with: classes, or places among the teacher's prompts or
            arrays; None: nothing, the teacher is unconditional.
        teacher: whose they are; None: not known, then they are classes without names.
    """

    index: Tensor | None
    teacher: Asking | None = None

    @property
    def prompts(self) -> list[str] | None:
        """The prompt of each image; None: they were not made from prompts."""
        prompts = None if self.teacher is None else self.teacher.prompts
        if prompts is None or self.index is None:
            return None
        return [prompts.text(place) for place in self.index.tolist()]

    @property
    def class_labels(self) -> list[int] | None:
        """The class of each image; None: they were not made from classes."""
        if self.index is None or (self.teacher is not None and self.teacher.rows is not None):
            return None
        return [int(label) for label in self.index.tolist()]

    @property
    def class_names(self) -> list[str] | None:
        """The name of each image's class; None: the classes have none."""
        kind = None if self.teacher is None else self.teacher.condition
        names = kind.class_names if isinstance(kind, Condition) else None
        return None if names is None or self.index is None else [names[label] for label in self.index.tolist()]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What the network takes of each: tensors (N, ...) by name, such as ``class_labels``, encoded prompts, or the
        arrays that the teacher is conditioned on."""
        if self.index is None:
            return {}
        if self.teacher is not None and self.teacher.rows is not None:
            return self.teacher.rows(self.index)
        return {"class_labels": self.index}


class Asking:
    """Conditions by index: a part of `redif_sdk.distill.teachers.base.Teacher`.

    Attributes:
        condition: what kind they are; None: it is unconditional.
        prompts: of a text-to-image teacher: a condition is a prompt's place among them.
        data: of a teacher on a user's own arrays: a condition is a row of these.
        guidance_range: the guidance scales that conditions have, each its own; None: none has one.
    """

    name: str
    condition: Condition | TextCondition | ArrayCondition | None
    prompts: Prompts | None
    data: ConditionData | None
    guidance_range: tuple[float, float] | None

    @property
    def rows(self) -> Rows | None:
        """What an index of a condition stands for: encoded prompts, or arrays; None: for a class, or nothing."""
        return self.data if self.prompts is None else self.prompts

    @property
    def num_conditions(self) -> int:
        """How many classes, prompts or rows there are to ask for; 0: it is unconditional."""
        if self.rows is not None:
            return len(self.rows)
        return self.condition.num_classes if isinstance(self.condition, Condition) else 0

    def ask(self, asked: Sequence[str] | Mapping[str, ArrayLike]) -> Tensor:
        """The condition (B,) int64 for any prompts, or arrays (B, ...) by name, whether this teacher is distilled on
        them or not.

        Raises:
            InvalidRequest: it does not take these, or one of them cannot be asked for.
        """
        if isinstance(asked, Mapping):
            if self.data is None:
                raise InvalidRequest(f"{self.name} takes no arrays; see Teacher.from_callable(conditions=...)")
            return self.data.ask(asked)
        if self.prompts is None:
            wanted = "arrays by name" if self.data is not None else "classes" if self.condition else "noise"
            raise InvalidRequest(f"{self.name} takes no prompts; give it {wanted}")
        return self.prompts.ask(asked)

    def asked(self, condition: Tensor | None) -> Asked:
        """What a condition (B,) int64 stands for: prompts, class names, and tensors by name."""
        return Asked(None if condition is None else places_of(condition), self)

    def labels(self, index: np.ndarray) -> Tensor | None:
        """The condition of pool entry ``index``: classes, prompts or rows in turn, so that every batch of indices is
        balanced; with a guidance scale each where there is a range of them."""
        if not self.num_conditions:
            return None
        places = torch.as_tensor(index % self.num_conditions).long()
        return places if self.guidance_range is None else with_scales(places, scales_at(index, *self.guidance_range))
