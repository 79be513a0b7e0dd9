"""Do the measured speeds keep their bounds? ``python benchmarks/performance_bounds.py [FILE]``.

Prints each bound with its figure and batch: kept, MISSED or not measured. Exits 1 if one is missed.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

FASTER = {1: 4.0, 8: 3.0}  # than torch eager in fp32, by batch
TEACHER = 80.0  # times faster than the teacher, at 2 steps and batch 1
COLD = 8.0  # times sooner than diffusers, until the first image
SIZE = 0.2  # of what torch + diffusers take on the disk
OVERHEAD_SHARE, OVERHEAD_SECONDS = 0.03, 100e-6  # of FastPipeline over its engine: either one is enough

Rows = list[dict[str, Any]]


class Bound(NamedTuple):
    """`value` must be at least `bound` (at most, if `least` is False); None was not measured."""

    what: str
    value: float | None
    bound: float
    least: bool = True

    @property
    def kept(self) -> bool:
        return self.value is not None and (self.value >= self.bound if self.least else self.value <= self.bound)


def _one(rows: Rows, contender: str, **wanted: Any) -> dict[str, Any] | None:
    found = [row for row in rows if row["contender"] == contender]
    return next((row for row in found if all(row.get(key) == value for key, value in wanted.items())), None)


def _faster(fast: dict[str, Any], slow: dict[str, Any] | None) -> float | None:
    """How many times faster, the median of the rounds' own ratios."""
    if slow is None or not slow["round_seconds"] or not fast["round_seconds"]:
        return None
    pairs = zip(fast["round_seconds"], slow["round_seconds"], strict=True)
    return statistics.median(theirs / ours for ours, theirs in pairs)


def _speed(rows: Rows, name: str, batch: int) -> Iterator[Bound]:
    """The bounds of one network at one batch size."""
    group = [row for row in rows if row.get("student") == name and row["batch"] == batch and row["seconds_median"]]
    auto = _one(group, "fastpipeline-auto")
    if auto is None:
        return
    where = f"{name}, batch {batch}"
    eager = _one(group, "torch-eager", precision="fp32")
    yield Bound(f"{where}: auto against torch eager in fp32, times", _faster(auto, eager), FASTER[batch])
    rivals = [row for row in group if row["contender"] in ("onnxruntime", "openvino", "openvino-stepped")]
    rivals += [row for row in group if row["contender"] == "torch-compile" and row["precision"] == "bf16"]
    if rivals:
        best = min(rivals, key=lambda row: row["seconds_median"])
        allowed = 1 + max(OVERHEAD_SHARE, OVERHEAD_SECONDS / best["seconds_median"])
        title = f"{best['contender']} in {best['precision']}"
        yield Bound(f"{where}: auto against the best rival, {title}, times", _faster(auto, best), 1 / allowed)
    spent = auto["overhead_seconds"]
    allowed = max(OVERHEAD_SECONDS, OVERHEAD_SHARE * auto["seconds_median"])
    yield Bound(f"{where}: FastPipeline over its engine, us", 1e6 * spent, 1e6 * allowed, least=False)
    teacher = _one(group, "teacher")
    if teacher is not None and batch == 1 and auto["num_inference_steps"] == 2:
        yield Bound(f"{where}: auto against the teacher in diffusers, times", _faster(auto, teacher), TEACHER)


def bounds(rows: Rows) -> list[Bound]:
    """Every bound with its figure."""
    timed = [row for row in rows if row["part"] in ("student", "unet")]
    names = dict.fromkeys(row["student"] for row in timed)
    found = [bound for name in names for batch in FASTER for bound in _speed(timed, name, batch)]
    cold = [row for row in rows if row["part"] == "cold" and row["cold_start_seconds"] is not None]
    ours, theirs = _one(cold, "fastpipeline-auto"), _one(cold, "diffusers-eager")
    sooner = theirs["cold_start_seconds"] / ours["cold_start_seconds"] if ours and theirs else None
    found.append(Bound("batch 1: first image of auto against diffusers, times sooner", sooner, COLD))
    small, large = _one(rows, "redif-sdk[cpu]"), _one(rows, "torch + diffusers")
    share = small["installed_mb"] / large["installed_mb"] if small and large else None
    found.append(Bound("installed redif-sdk[cpu] as a share of torch + diffusers", share, SIZE, least=False))
    return found


def check(path: Path) -> int:
    """Print every bound; 1 if one is missed."""
    found = bounds(json.loads(path.read_text())["rows"])
    for bound in found:
        if bound.value is None:
            print(f"not measured: {bound.what}")
            continue
        sign = ">=" if bound.least else "<="
        print(f"{'kept  ' if bound.kept else 'MISSED'} {bound.what}: {bound.value:.4g} {sign} {bound.bound:.4g}")
    return int(any(bound.value is not None and not bound.kept for bound in found))


if __name__ == "__main__":
    sys.exit(check(Path(sys.argv[1] if len(sys.argv) > 1 else "docs/results/performance.json")))
