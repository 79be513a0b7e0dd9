"""Tables of README.md and docs/results.md from a quickstart: ``python benchmarks/readme_table.py [FILE]``.

FILE is a ``results.json`` of ``redif quickstart`` (default: build/quickstart/results.json). Prints, in Markdown, the
README's short table, then the full quality and speed tables, then what the run took.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from redif_sdk.results import label

NAMES = {"teacher": "teacher", "ddim": "DDIM, untrained"}


def name_of(row: dict[str, Any]) -> str:
    """The name of a row's sampler; students are bold."""
    return NAMES.get(row["method"], f"**student: {label(row)}**")


def bold(row: dict[str, Any], text: str) -> str:
    """``text``, bold in a student's row."""
    return text if row["method"] in NAMES else f"**{text}**"


def short(rows: list[dict[str, Any]], speed_rows: list[dict[str, Any]]) -> list[str]:
    """The README's table: distance, recall, and the speed at batch 1 of those that were timed."""
    ratios = {row["contender"]: row["ratio"] for row in speed_rows if row["batch"] == 1}
    lines = ["| | steps | NFE | FD to teacher | recall | times faster than the teacher (batch 1) |"]
    lines.append("|---|---|---|---|---|---|")
    for row in rows:
        contender = "teacher" if row["method"] == "teacher" else f"student-{row['num_inference_steps']}"
        ratio = None if row["method"] == "ddim" else ratios.get(contender)
        cells = [name_of(row), str(row["num_inference_steps"]), str(row["network_calls"])]
        cells += [bold(row, f"{row['fd_teacher']:.2f}"), f"{row['recall']:.2f}"]
        lines.append(f"| {' | '.join(cells)} | " + (f"{ratio:.1f} |" if ratio is not None else "|"))
    return lines


def quality(rows: list[dict[str, Any]]) -> list[str]:
    """Distances raw and under the two controls, paired error, precision and recall."""
    real = any(row["fd_real"] is not None for row in rows)  # there are statistics of real images
    keys = ("fd_teacher", "fd_teacher_gain", "fd_teacher_std", *(("fd_real",) if real else ()))
    titles = ["steps", "NFE", "FD to teacher", "best gain", "std match", *(["FD to real"] if real else [])]
    titles += ["paired MSE", "precision", "recall"]
    lines = ["| | " + " | ".join(titles) + " |", "|" + "---|" * (len(titles) + 1)]
    for row in rows:
        distances = [row[key] for key in keys]
        cells = [bold(row, f"{distances[0]:.2f}"), *(f"{value:.2f}" for value in distances[1:])]
        cells += [f"{row['mse']:.4f}", f"{row['precision']:.2f}", f"{row['recall']:.2f}"]
        steps = f"| {name_of(row)} | {row['num_inference_steps']} | {row['network_calls']} | "
        lines.append(steps + " | ".join(cells) + " |")
    return lines


def speed(rows: list[dict[str, Any]]) -> list[str]:
    """Seconds an image and the ratio to the teacher, at each batch size."""
    lines = ["| | NFE | batch | seconds an image | times faster than the teacher |", "|---|---|---|---|---|"]
    for row in rows:
        cells = (row["contender"], row["network_calls"], row["batch"], f"{row['seconds_per_image']:.4f}")
        lines.append("| " + " | ".join(map(str, cells)) + f" | {row['ratio']:.1f} |")
    return lines


def main() -> None:
    path = Path(sys.argv[1] if len(sys.argv) > 1 else "build/quickstart/results.json")
    results = json.loads(path.read_text())
    rows, timed = results["rows"], results["speed"]
    print("\n".join([*short(rows, timed), "", *quality(rows), "", *speed(timed)]))
    machine = results["machine"]
    print(f"\n{results['seconds']:.0f} s on {machine['processor']}, {machine['cores']} cores; {results['date']}")
    floor = results["fd_teacher_floor"]
    print(f"floor {'unknown' if floor is None else f'{floor:.2f}'}; parts {results['seconds_by_part']}")


if __name__ == "__main__":
    main()
