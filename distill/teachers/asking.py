"""What a teacher is asked for: classes, prompts, or a user's own arrays, by index."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from redif_sdk.artifact.records import ArrayCondition, Condition, TextCondition
from redif_sdk.errors import InvalidRequest
from redif_sdk.models.condition_data import ConditionData
from redif_sdk.models.prompts import Prompts
from redif_sdk.models.rows import Rows

__all__ = ["Asking"]


class Asking:
    """Conditions by index: a part of `redif_sdk.distill.teachers.base.Teacher`.

    Attributes:
        condition: what kind they are; None: it is unconditional.
        prompts: of a text-to-image teacher: a condition is a prompt's place among them.
        data: of a teacher on a user's own arrays: a condition is a row of these.
    """

    name: str
    condition: Condition | TextCondition | ArrayCondition | None
    prompts: Prompts | None
    data: ConditionData | None

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

    def labels(self, index: np.ndarray) -> Tensor | None:
        """The condition of pool entry ``index``: classes, prompts or rows in turn, so that every batch of indices is
        balanced."""
        return torch.as_tensor(index % self.num_conditions).long() if self.num_conditions else None
