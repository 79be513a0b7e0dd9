"""Does a quickstart's ``results.json`` keep its bounds? ``python benchmarks/quickstart_bounds.py FILE``.

Bounds on the students' Frechet distance to the teacher's samples and on the paired error, relative to untrained DDIM,
raw and (times 1.15) after the gain control. For ``redif quickstart --text``: K = 4 against DDIM at 8 steps and K = 2
against DDIM at 4, the teacher guided, raw and after the gain control. Prints each bound with its figure; exits 1 if one
is missed.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

GAIN_SLACK = 1.15  # of a bound, after the gain control


def bounds(rows: list[dict[str, Any]]) -> list[tuple[str, float, float]]:
    """(what, value, bound) for every bound."""
    students = {row["num_inference_steps"]: row for row in rows if row["method"] == "redif"}
    ddim = {row["num_inference_steps"]: row for row in rows if row["method"] == "ddim"}
    found = []
    for key, slack in (("fd_teacher", 1.0), ("fd_teacher_gain", GAIN_SLACK)):
        one, two = students[1][key], students[2][key]
        found.append((f"{key}: student-2 against .35 DDIM-2", two, slack * 0.35 * ddim[2][key]))
        found.append((f"{key}: student-2 against DDIM-4", two, slack * ddim[4][key]))
        found.append((f"{key}: student-1 against .5 DDIM-2", one, slack * 0.5 * ddim[2][key]))
    found.append(("paired mse: student-2 against .5 DDIM-2", students[2]["mse"], 0.5 * ddim[2]["mse"]))
    return found


def text_bounds(rows: list[dict[str, Any]]) -> list[tuple[str, float, float]]:
    """The bounds of text to image: a student of K calls is nearer than the guided teacher's DDIM of 4 K calls."""
    found = {(row["method"], row["num_inference_steps"]): row for row in rows}
    return [
        (f"{key}: student-{steps} against DDIM-{2 * steps}", found["redif", steps][key], found["ddim", 2 * steps][key])
        for key in ("fd_teacher", "fd_teacher_gain")
        for steps in (4, 2)
    ]


def main() -> int:
    path = Path(sys.argv[1] if len(sys.argv) > 1 else "build/quickstart/results.json")
    results, missed = json.loads(path.read_text()), 0
    asked = text_bounds if results["command"] == "quickstart --text" else bounds
    for what, value, bound in asked(results["rows"]):
        kept = value <= bound
        missed += not kept
        print(f"{'kept  ' if kept else 'MISSED'} {what}: {value:.4g} <= {bound:.4g} ({value / bound:.2f} of the bound)")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
