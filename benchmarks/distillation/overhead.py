"""The cost of reinforcement: ``python -m benchmarks.distillation.overhead [--data ...] [--steps ...] [-o FOLDER]``.

`redif` runs at smaller budgets than `regression`, to find where it reaches the distance at which `regression` ends, in
forward-equivalents and in seconds of the same machine. Cells are kept in FOLDER, so an interrupted run continues. The
result is printed and written to ``docs/results/rl-overhead.json``.
"""

from __future__ import annotations

import argparse
import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.distillation import run
from redif_sdk.results import document, write_json

SHARES = (0.25, 0.375, 0.5, 0.75, 1.0)  # of regression's budget
CONTROLS = {"raw": "fd_teacher", "gain": "fd_teacher_gain"}


def cell(folder: Path, budget: float, asked: argparse.Namespace, data: str, method: str, steps: int) -> dict[str, Any]:
    own = folder / f"{budget:.0f}"
    common = ["--kind", run.KINDS[0], "--no-untrained", "--seeds", str(asked.seed), "-o", str(own)]
    run.main([*common, "--data", data, "--methods", method, "--steps", str(steps), "--budget", str(budget)])
    path = own / f"{run.Cell(data, method, steps, asked.seed).name}.json"
    row: dict[str, Any] = json.loads(path.read_text())["rows"][0]
    return row


def crossing(curve: list[tuple[float, float]], level: float) -> float | None:
    """The cost at which a falling curve of (cost, distance) reaches ``level``, interpolated on a log scale.

    None if it never does. For a curve that starts below ``level`` it is the first point, which is an upper bound.
    """
    if curve[0][1] <= level:
        return curve[0][0]
    for (cost, distance), (later, lower) in pairwise(curve):
        if lower <= level:
            share = (distance - level) / (distance - lower)
            return math.exp(math.log(cost) + share * (math.log(later) - math.log(cost)))
    return None


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", nargs="+", default=["fashion-mnist"])
    parser.add_argument("--steps", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--budget", type=float, default=run.Scale().budget)
    parser.add_argument("-o", "--output", type=Path, default=Path("build/overhead"))
    parser.add_argument("--report", type=Path, default=Path("docs/results/rl-overhead.json"))
    asked = parser.parse_args(arguments)
    rows = []
    for data in asked.data:
        for steps in asked.steps:
            base = cell(asked.output, asked.budget, asked, data, "regression", steps)
            tried = [cell(asked.output, share * asked.budget, asked, data, "redif", steps) for share in SHARES]
            row: dict[str, Any] = {"data": data, "steps": steps, "regression": base["budget"]["seconds"]}
            row["regression"] = {key: base["budget"][key] for key in ("forward_equivalents", "seconds")}
            row["redif"] = [{key: t["budget"][key] for key in ("forward_equivalents", "seconds")} for t in tried]
            for name, key in CONTROLS.items():
                level = row["regression"][f"fd_{name}"] = base["judged"][0][key]
                for figures, t in zip(row["redif"], tried, strict=True):
                    figures[f"fd_{name}"] = t["judged"][0][key]
                for cost in ("forward_equivalents", "seconds"):
                    curve = [(figures[cost], figures[f"fd_{name}"]) for figures in row["redif"]]
                    row[f"{cost}_to_reach_{name}"] = crossing(curve, level)
            rows.append(row)
            print(json.dumps(row), flush=True)
    write_json(asked.report, document("benchmarks/distillation/overhead", rows, budget=asked.budget))


if __name__ == "__main__":
    main()
