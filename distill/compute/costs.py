"""What a call costs, in operations that torch counts: auxiliary networks are charged in the student's own calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["counted", "flops"]

T = TypeVar("T")


def counted(call: Callable[..., T], *arguments: object) -> tuple[T, float]:
    """``call(*arguments)``, and the floating-point operations of its matrix products and convolutions."""
    with FlopCounterMode(display=False) as counter:
        value = call(*arguments)
    return value, float(counter.get_total_flops())


@torch.no_grad()
def flops(call: Callable[..., object], *arguments: object) -> float:
    """Floating-point operations of matrix products and convolutions in ``call(*arguments)``, whose value is dropped."""
    return counted(call, *arguments)[1]
