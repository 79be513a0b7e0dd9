"""The tables of ``docs/performance.md`` in Markdown: ``python benchmarks/performance_table.py [FILE]``."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from redif_sdk.bench.plot import TITLES

Rows = list[dict[str, Any]]


def _table(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads), *(f"| {' | '.join(line)} |" for line in lines)]


def _number(value: float | None, digits: int = 3) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if abs(value) >= 10 ** (digits - 1) else f"{value:.{digits}g}"


def _name(row: dict[str, Any]) -> str:
    title = TITLES.get(row["contender"], row["contender"])
    if row["contender"] == "teacher":
        title = f"teacher in diffusers ({row['network_calls']} calls)"
    return f"**{title}**" if row["contender"].startswith("fastpipeline") else title


def speed(rows: Rows) -> list[str]:
    """The contenders on one network at one batch size, fastest first."""
    heads = ("", "engine", "precision", "ms", "p95", "images/s", "times torch eager", "10-90 %", "of the peak")
    lines = []
    for row in sorted(rows, key=lambda row: row["seconds_median"]):
        share = "" if row["share_of_peak"] is None else f"{100 * row['share_of_peak']:.0f} %"
        times = [1e3 * row["seconds_median"], 1e3 * row["seconds_p95"], row["images_per_second"]]
        spread = f"{_number(row['ratio_low'])}-{_number(row['ratio_high'])}"
        figures = [*map(_number, times), f"{_number(row['ratio'])}", spread, share]
        lines.append([_name(row), row["runtime"], row["precision"], *figures])
    return _table(heads, lines)


def overhead(rows: Rows) -> list[str]:
    """FastPipeline's own time a call, on top of its engine's."""
    heads = (
        "network",
        "engine",
        "precision",
        "batch",
        "over its engine, us",
        "share",
        "instant engine, us",
        "noise, us",
        "PIL, us",
    )
    lines = []
    for row in rows:
        if row["overhead_seconds"] is not None and row["contender"] == "fastpipeline":
            own = [_number(1e6 * row["overhead_seconds"]), f"{100 * row['overhead_share']:.1f} %"]
            own.append(_number(1e6 * row["overhead_alone_seconds"]))
            beside = [_number(1e6 * row["noise_seconds"]), _number(1e6 * row["output_seconds"])]
            lines.append([row["student"], row["runtime"], row["precision"], str(row["batch"]), *own, *beside])
    return _table(heads, lines)


def cold(rows: Rows) -> list[str]:
    """Seconds to the first image, and peak memory, in fresh processes."""
    measured = [row for row in rows if row["peak_memory_mb"] is not None]
    diffusers = next((row["cold_start_seconds"] for row in measured if row["contender"] == "diffusers-eager"), None)
    heads = ("", "engine", "precision", "batch", "first image, s", "runs", "times sooner", "peak memory, MB")
    lines = []
    for row in measured:
        seconds = row["cold_start_seconds"]
        sooner = None if seconds is None or diffusers is None else diffusers / seconds
        figures = [_number(seconds), str(row["cold_start_runs"] or ""), _number(sooner), _number(row["peak_memory_mb"])]
        lines.append([_name(row), row["runtime"], row["precision"], str(row["batch"]), *figures])
    return _table(heads, lines)


def sizes(rows: Rows) -> list[str]:
    """Installed size, with the largest packages."""
    lines = [
        [
            row["contender"],
            _number(row["installed_mb"]),
            ", ".join(f"{k} {_number(v)}" for k, v in row["largest"].items()),
        ]
        for row in rows
    ]
    return _table(("installed", "MB", "largest"), lines)


def skipped(rows: Rows) -> list[str]:
    """What was not measured, with the reason; without duplicates."""
    found = {
        f"- {_name(row)} ({row['runtime']}, {row['precision']}): {row['skipped']}" for row in rows if row["skipped"]
    }
    return sorted(found)


def main() -> None:
    path = Path(sys.argv[1] if len(sys.argv) > 1 else "docs/results/performance.json")
    results = json.loads(path.read_text())
    rows, machine = results["rows"], results["machine"]
    parts = {name: [row for row in rows if row["part"] == name] for name in ("student", "unet", "cold", "sizes")}
    timed = [*parts["student"], *parts["unet"]]
    lines = [f"{machine['processor']}, {machine['cores']} cores, {machine['system']}; {results['date'][:10]}."]
    for name in dict.fromkeys(row["student"] for row in timed):
        for batch in sorted({row["batch"] for row in timed}):
            group = [r for r in timed if r["student"] == name and r["batch"] == batch and r["seconds_median"]]
            if group:
                lines += ["", f"{name}, {group[0]['num_inference_steps']} steps, batch {batch}:", "", *speed(group)]
    for title, table in (("Overhead", overhead(timed)), ("Fresh processes", cold(parts["cold"]))):
        lines += ["", f"{title}:", "", *table]
    lines += ["", "Installed:", "", *sizes(parts["sizes"]), "", "Not measured:", "", *skipped(timed)]
    for name, about in (entry for part in results["parts"].values() for entry in part["students"].items()):
        peaks = ", ".join(f"{p} {_number(v)}" for p, v in about["gemm_peak_gflop_per_second"].items())
        lines += ["", f"{name}: {_number(about['gflop_per_image_call'])} GFLOP a call; peak GFLOP/s: {peaks}."]
    print("\n".join(lines))


if __name__ == "__main__":
    main()
