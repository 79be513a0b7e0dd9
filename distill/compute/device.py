"""Where training computes, and which dtype is fast there."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from contextlib import AbstractContextManager, nullcontext

import torch

from redif_sdk.errors import RuntimeUnavailable

VARIABLE = "REDIF_CPU_BF16"
PROBE = "import torch; a = torch.ones(64, 64, dtype=torch.bfloat16); assert (a @ a)[0, 0] == 64"


@functools.cache
def cpu_has_bf16() -> bool:
    """Whether the CPU has AMX, and torch's bfloat16 runs on it: tried once, in a process of its own.

    On some virtual machines that report AMX, torch dies of an illegal instruction. Without AMX, bfloat16 is 15 times
    slower than float32 where it is emulated; with AVX512-BF16 it was 1.4 times slower on one processor, and 1.5 (one
    thread) to 1.9 times (two) faster on another. ``REDIF_CPU_BF16`` (0 or 1) says it beforehand.
    """
    said = os.environ.get(VARIABLE)
    if said is None:
        works = (
            torch.cpu._is_amx_tile_supported()
            and not subprocess.run([sys.executable, "-c", PROBE], capture_output=True, check=False).returncode
        )
        said = os.environ[VARIABLE] = "1" if works else "0"  # for the processes that this one starts
    return said == "1"


def has_bf16(device: str) -> bool:
    """Whether a kind of device, cpu or cuda, computes in bfloat16 itself."""
    if device == "cpu":
        return cpu_has_bf16()
    return device != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


def autocast(device: str = "cpu", precision: str = "auto") -> AbstractContextManager[object]:
    """bfloat16 autocast for bf16, and for auto where the hardware has it; else nothing."""
    if precision == "bf16" or (precision == "auto" and has_bf16(device)):
        return torch.autocast(device, torch.bfloat16)
    return nullcontext()


def chosen_device(name: str) -> torch.device:
    """auto: this process's GPU where there is one, else the CPU.

    Raises:
        RuntimeUnavailable: a GPU is named, and torch sees none.
    """
    kind, _, _ = name.partition(":")
    if kind == "cuda" and not torch.cuda.is_available():
        raise RuntimeUnavailable("torch sees no CUDA GPU; install a build of torch with CUDA, or train on the cpu")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()}"
    return torch.device(name)
