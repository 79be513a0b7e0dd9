"""The same search for every method: four settings at each K, on the validation protocol of one data set, with one seed.

    python -m benchmarks.distillation.search [--methods ...] [--data fashion-mnist] [--choose]

`grids.yaml` has the settings; each run is one JSON file, so a search that was cut goes on, and two may share a folder.
``--choose`` prints what is best at each K by the Frechet distance to the teacher under the best gain, its ratio to the
method's lowest averaged over both validation networks, and writes it into `settings.yaml`. What was chosen on one data
set is taken for the other.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import yaml

from benchmarks.distillation import run
from redif_sdk.artifact.atomic import atomic_write

STEPS = (1, 2, 4)
TRIES = 4
HERE = Path(__file__).parent


def grids(file: Path = HERE / "grids.yaml") -> dict[str, list[dict[str, Any]]]:
    """The settings that are tried, by method: as many for each."""
    found: dict[str, list[dict[str, Any]]] = yaml.safe_load(file.read_text())
    if unequal := [method for method, tries in found.items() if len(tries) != TRIES]:
        raise SystemExit(f"{file} has not {TRIES} settings for {', '.join(unequal)}")
    return found


def search(methods: list[str], data: str, output: Path, more: list[str]) -> None:
    """Run what is not there yet."""
    tries = grids()
    for place in range(TRIES):
        for method in methods:
            run.main(
                [
                    *(
                        "--protocol",
                        "validation",
                        "--data",
                        data,
                        "--methods",
                        method,
                        "--seeds",
                        "0",
                        "--no-untrained",
                    ),
                    *("--kind", "forward_equivalents", "--steps", *map(str, STEPS), "--tag", f"{place}-"),
                    *("--settings", json.dumps(tries[method][place]), "-o", str(output), *more),
                ]
            )


def choose(methods: list[str], data: str, output: Path) -> dict[str, dict[int, dict[str, Any]]]:
    """The best settings by method and K.

    Raises:
        SystemExit: a run is missing.
    """
    tries, chosen = grids(), {}
    for method in methods:
        chosen[method] = {}
        for steps in STEPS:
            distances = [_distances(output, data, method, steps, place) for place in range(TRIES)]
            lowest = [min(column) for column in zip(*distances, strict=True)]
            scores = [
                math.prod(value / least for value, least in zip(row, lowest, strict=True)) ** (1 / len(row))
                for row in distances
            ]
            best = scores.index(min(scores))
            chosen[method][steps] = tries[method][best]
            shown = "; ".join(", ".join(f"{value:.3g}" for value in row) for row in distances)
            print(f"{method}, K = {steps}: {tries[method][best]} (of {shown})", flush=True)
    return chosen


def _distances(output: Path, data: str, method: str, steps: int, place: int) -> list[float]:
    """The distances of a run in both networks, under the best gain."""
    path = output / f"{place}-{run.Cell(data, method, steps, 0).name}.json"
    if not path.is_file():
        raise SystemExit(f"{path} is missing; run the search to its end first")
    (row,) = json.loads(path.read_text())["rows"]
    return [max(float(judged["fd_teacher_gain"]), 1e-9) for judged in row["judged"]]


def write_settings(chosen: dict[str, dict[int, dict[str, Any]]], file: Path) -> None:
    """Put what was chosen into `settings.yaml`, in place of what it had for these methods."""
    everything = yaml.safe_load(file.read_text())
    for method, by_steps in chosen.items():
        everything["methods"][method] = {"steps": {steps: dict(found) for steps, found in by_steps.items()}}
    head = "# Chosen on the validation protocol by search.py, twelve runs a method. `steps`: settings at that K.\n"
    atomic_write(file, (head + yaml.safe_dump(everything, sort_keys=False)).encode())


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=HERE / "searched")
    parser.add_argument("--data", default="fashion-mnist")
    parser.add_argument("--methods", nargs="+", default=list(grids()))
    parser.add_argument("--choose", action="store_true", help="print the best settings, and write them down")
    parser.add_argument("--settings-file", type=Path, default=HERE / "settings.yaml", help="where --choose writes")
    asked, more = parser.parse_known_args(arguments)
    if asked.choose:
        write_settings(choose(asked.methods, asked.data, asked.output), asked.settings_file)
    else:
        search(asked.methods, asked.data, asked.output, more)


if __name__ == "__main__":
    main()
