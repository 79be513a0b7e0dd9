"""Which dtype this machine multiplies fast, in training."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def cpu_has_bf16() -> bool:
    """Whether the CPU multiplies bfloat16 in hardware. Without AMX or AVX512-BF16 it is emulated, 15 times slower."""
    return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


def autocast(device: str = "cpu") -> AbstractContextManager[object]:
    """bfloat16 autocast where the hardware has it, else nothing."""
    if device != "cpu" or cpu_has_bf16():
        return torch.autocast(device, torch.bfloat16)
    return nullcontext()
