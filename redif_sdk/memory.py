"""How much memory a process may still take, and how an amount of it is written."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

__all__ = ["free_memory", "gib"]


def free_memory() -> int | None:
    """Bytes that can be had without swapping, within the limits of a container; None: not known on this system."""
    found: list[int] = []
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        found.append(1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]))
    with suppress(OSError, ValueError):  # "max" where there is no limit
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        found.append(max(0, limit - used))
    return min(found, default=None)


def gib(size: float) -> str:
    """Bytes as a number of GiB, for messages."""
    return f"{size / 2**30:.1f} GiB"
