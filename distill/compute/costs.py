"""What a call costs, in multiply-adds that torch counts: auxiliary networks are charged in the student's own calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["flops"]


@torch.no_grad()
def flops(call: Callable[..., Any], *arguments: Any) -> float:
    """Floating-point operations of matrix products and convolutions in ``call(*arguments)``."""
    with FlopCounterMode(display=False) as counter:
        call(*arguments)
    return float(counter.get_total_flops())
