"""Does a quickstart's ``results.json`` keep its bounds? ``python benchmarks/quickstart_bounds.py [FILE ...]``.

Bounds on the students' Frechet distance to the teacher's samples and on the paired error, relative to untrained DDIM,
raw and (times 1.15) after the gain control. For ``redif quickstart --text``: K = 4 against DDIM at 8 steps and K = 2
against DDIM at 4, the teacher guided, raw and after the gain control. Prints each bound with its figure; exits 1 if one
is missed. ``--json OUT`` keeps a short summary of all runs, such as one for each seed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

GAIN_SLACK = 1.15  # of a bound, after the gain control
FIGURES = ("estimator", "reward", "fd_teacher", "fd_teacher_gain", "gain", "mse", "precision", "recall", "budget")


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


def summary(results: dict[str, Any]) -> dict[str, Any]:
    """One run in short: its seed, seconds and bounds, each with its value, bound and whether it is kept."""
    students = [row for row in results["rows"] if row["method"] not in ("teacher", "ddim")]
    asked = text_bounds if results["command"] == "quickstart --text" else bounds
    return {
        "seed": students[0]["seed"],
        "date": results["date"],
        "machine": results["machine"],
        "seconds": results["seconds"],
        "seconds_by_part": results["seconds_by_part"],
        "stopped": results.get("stopped", {}),
        "students": [{key: row.get(key) for key in ("num_inference_steps", *FIGURES)} for row in students],
        "bounds": [
            {"what": what, "value": value, "bound": bound, "kept": value <= bound}
            for what, value, bound in asked(results["rows"])
        ],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="*", type=Path, default=[Path("build/quickstart/results.json")])
    parser.add_argument("--json", type=Path, help="Write all runs in short to this file.")
    asked = parser.parse_args(arguments)
    runs = [summary(json.loads(path.read_text())) for path in asked.files]
    for run in runs:
        print(f"seed {run['seed']}: {run['seconds']:.0f} s")
        for bound in run["bounds"]:
            value, most = bound["value"], bound["bound"]
            kept = "kept  " if bound["kept"] else "MISSED"
            print(f"{kept} {bound['what']}: {value:.4g} <= {most:.4g} ({value / most:.2f} of the bound)")
    if asked.json:
        asked.json.write_text(json.dumps({"runs": runs}, indent=1) + "\n")
    return 0 if all(bound["kept"] for run in runs for bound in run["bounds"]) else 1


if __name__ == "__main__":
    sys.exit(main())
