"""Is a teacher called as it should be: does it answer, with numbers, and twice the same?"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from redif_sdk.distill.teachers.base import Teacher
from redif_sdk.errors import RedifError, UnsupportedModel, first_line

__all__ = ["CALL_ERRORS", "check_deterministic", "differ"]


def differ(first: Tensor, second: Tensor) -> bool:
    """Whether two outputs differ by more than rounding, as kernels of a GPU may."""
    return not float((first - second).abs().max()) <= 1e-4 * float(first.abs().max())


#: What a network raises for inputs that it does not take.
CALL_ERRORS = (RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError)


def check_deterministic(teacher: Teacher, device: torch.device | str = "cpu") -> None:
    """A teacher whose output for one input changes cannot be paired with a student.

    Args:
        device: where it is called: the device that samples the pool.

    Raises:
        RedifError: two calls on equal inputs differ, or hold NaN, or it cannot be called.
    """
    x = torch.randn((2, *teacher.shape), generator=torch.Generator().manual_seed(0)).to(device)
    labels = teacher.labels(np.arange(2))
    t = torch.full((2,), len(teacher.schedule) / 2, device=device)
    condition = None if labels is None else labels.to(device)
    try:
        first, second = teacher(x, t, condition), teacher(x, t, condition)
    except torch.OutOfMemoryError:
        raise
    except CALL_ERRORS as error:
        given = f"x {tuple(x.shape)}, t (2,) and {'no condition' if condition is None else 'a condition'}"
        raise UnsupportedModel(
            f"the teacher {teacher.name} cannot be called with {given}: {first_line(error)}"
        ) from error
    if not torch.isfinite(first).all():
        raise RedifError(f"the teacher {teacher.name} gives NaN or infinite values for noise; check its weights")
    if differ(first, second):
        raise RedifError(
            f"the teacher {teacher.name} gives two outputs for one input; switch its dropout or noise off: "
            "pairs need a deterministic teacher"
        )
