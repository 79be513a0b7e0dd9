"""The README's tables from a quickstart's ``results.json``: ``python benchmarks/readme_table.py FILE``, in Markdown."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

NAMES = {"teacher": "teacher", "ddim": "DDIM, untrained"}


def quality(rows: list[dict[str, Any]]) -> list[str]:
    real = any(row["fd_real"] is not None for row in rows)  # there are statistics of real pictures
    keys = ("fd_teacher", "fd_teacher_gain", "fd_teacher_std", *(("fd_real",) if real else ()))
    titles = ["steps", "calls", "FD to teacher", "best gain", "std match", *(["FD to real"] if real else [])]
    titles += ["paired MSE", "precision", "recall"]
    lines = ["| | " + " | ".join(titles) + " |", "|" + "---|" * (len(titles) + 1)]
    for row in rows:
        bold = "" if row["method"] in NAMES else "**"
        name = NAMES.get(row["method"], f"**student ({row['method']})**")
        distances = [row[key] for key in keys]
        cells = [f"{bold}{distances[0]:.2f}{bold}", *(f"{value:.2f}" for value in distances[1:])]
        cells += [f"{row['mse']:.4f}", f"{row['precision']:.2f}", f"{row['recall']:.2f}"]
        lines.append(f"| {name} | {row['num_inference_steps']} | {row['network_calls']} | " + " | ".join(cells) + " |")
    return lines


def speed(rows: list[dict[str, Any]]) -> list[str]:
    lines = ["| | calls | batch | seconds an image | times faster than the teacher |", "|---|---|---|---|---|"]
    for row in rows:
        cells = (row["contender"], row["network_calls"], row["batch"], f"{row['seconds_per_image']:.4f}")
        lines.append("| " + " | ".join(map(str, cells)) + f" | {row['ratio']:.1f} |")
    return lines


def main() -> None:
    path = Path(sys.argv[1] if len(sys.argv) > 1 else "build/quickstart/results.json")
    results = json.loads(path.read_text())
    print("\n".join([*quality(results["rows"]), "", *speed(results["speed"])]))
    machine = results["machine"]
    print(f"\n{results['seconds']:.0f} s on {machine['processor']}, {machine['cores']} cores; {results['date']}")
    floor = results["fd_teacher_floor"]
    print(f"floor {'unknown' if floor is None else f'{floor:.2f}'}; parts {results['seconds_by_part']}")


if __name__ == "__main__":
    main()
