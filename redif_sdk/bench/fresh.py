"""What a fresh process needs until its first images: seconds from its start, and peak memory.

A program is run as ``python -c``, reports when its images are finished, and then its peak memory. It is not
imported here.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from redif_sdk.bench.rounds import Contender, Fresh, Workload
from redif_sdk.errors import RuntimeUnavailable

__all__ = ["COLD_RUNS", "Start", "cold_starts", "start"]

COLD_RUNS = 5

# VmHWM is this program's own peak; ru_maxrss starts with the parent's after fork and exec.
_EPILOGUE = """
print("ready", flush=True)
def _peak():
    try:
        with open("/proc/self/status") as status:
            for line in status:
                if line.startswith("VmHWM"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
print(_peak(), flush=True)
"""


class Start(NamedTuple):
    """Seconds from starting the process to its images, and peak memory in bytes (None: not known)."""

    seconds: float
    peak_memory: int | None


def start(program: Fresh, inputs: Path, label: str) -> Start:
    """Run `program` once. `inputs`: the generator's inputs as an .npz file. RuntimeUnavailable if it fails."""
    asked = json.dumps({**program.asked, "inputs": str(inputs)})
    command = [sys.executable, "-c", program.source + _EPILOGUE, asked]
    with tempfile.TemporaryFile("w+") as complaints:
        began = time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=complaints, text=True) as process:
            assert process.stdout is not None
            said = process.stdout.readline()
            seconds = time.perf_counter() - began
            rest = process.stdout.read()
        if process.returncode != 0 or said != "ready\n":
            complaints.seek(0)
            last = (complaints.read().strip().splitlines() or ["no message"])[-1]
            raise RuntimeUnavailable(f"{label} failed in a fresh process: {last}")
    peak = rest.strip().splitlines()[-1]
    return Start(seconds, None if peak == "None" else int(peak))


def cold_starts(
    contenders: Sequence[Contender],
    work: Workload,
    *,
    runs: int = COLD_RUNS,
    say: Callable[[str], object] = lambda message: None,
) -> dict[str, dict[str, Any]]:
    """By a contender's label: cold_start_seconds, their number, and peak_memory_mb (medians), or why there are none.

    Files are in the system's cache: one run before is not counted, where there are several. The runs of all contenders
    are interleaved. With `runs` 0 only the memory is measured, in one run.
    """
    programs, failed = _programs(contenders, work)
    found: dict[str, list[Start]] = {label: [] for label in programs}
    with tempfile.TemporaryDirectory() as folder:
        inputs = Path(folder) / "inputs.npz"
        np.savez(inputs, **work.graph_inputs(work.noise))  # type: ignore[arg-type] # numpy: one of these may be allow_pickle
        for index in range(runs + 1):
            for label, program in programs.items():
                if label in failed or index > min(runs, program.runs or runs):
                    continue
                say(f"batch {work.batch}: fresh process {index + 1}/{runs + 1}: {label}")
                try:
                    found[label].append(start(program, inputs, label))
                except RuntimeUnavailable as error:
                    failed[label] = str(error)
    figures = {label: _figures(starts, runs) for label, starts in found.items() if label not in failed}
    return figures | {label: {"skipped": reason} for label, reason in failed.items()}


def _programs(contenders: Sequence[Contender], work: Workload) -> tuple[dict[str, Fresh], dict[str, str]]:
    """The program of every contender that has one, by label, and why some have none for this workload."""
    programs: dict[str, Fresh] = {}
    failed: dict[str, str] = {}
    for contender in contenders:
        if contender.fresh is not None:
            try:
                programs[contender.label] = contender.fresh(work)
            except RuntimeUnavailable as error:
                failed[contender.label] = str(error)
    return programs, failed


def _figures(starts: Sequence[Start], runs: int) -> dict[str, Any]:
    counted = starts[1:] or starts
    peaks = [start.peak_memory for start in counted if start.peak_memory is not None]
    memory = {"peak_memory_mb": statistics.median(peaks) / 2**20 if peaks else None}
    if not runs:
        return memory
    seconds = statistics.median(start.seconds for start in counted)
    return memory | {"cold_start_seconds": seconds, "cold_start_runs": len(counted)}
