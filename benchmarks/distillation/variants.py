"""What in `redif` matters: its chosen settings with one thing changed, on the validation protocol.

    OMP_NUM_THREADS=1 python -m benchmarks.distillation.variants [--steps 2 4] [--seeds 0] [-o FOLDER] [--show]

Each run is one JSON file; what is there is not run again. ``--show`` prints the table. Nothing of it goes into the
comparison of methods, whose settings are of a search that is equal for all (search.py).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.distillation import run

HERE = Path(__file__).parent
VARIANTS: dict[str, dict[str, Any]] = {
    "as chosen": {},
    "half of the updates explore before the last step": {"intermediate_step_fraction": 0.5},
    "all updates explore before the last step": {"intermediate_step_fraction": 1.0},
    "groups of 16": {"group_size": 16},
    "groups of 128": {"group_size": 128},
    "exploration .03": {"exploration": 0.03},
    "exploration .12": {"exploration": 0.12},
    "exploration of rank 40": {"exploration_rank": 40},
    "reward texture": {"reward": "texture"},
    "reward bands and distribution": {"reward": "bands+distribution"},
    "a quarter of the learning rate": {"learning_rate": 0.0005},
    "times of the teacher": {"schedule_updates": 0},
}


def place(output: Path, variant: str, steps: int, seed: int) -> Path:
    """The file of a run on Fashion-MNIST."""
    cell = run.Cell("fashion-mnist", "redif", steps, seed)
    return output / f"{tag(variant)}{cell.name}.json"


def tag(variant: str) -> str:
    return f"{variant.replace(' ', '-').replace('.', '')}-"


def table(output: Path, steps: int, seeds: list[int]) -> list[str]:
    """Markdown: means over the seeds that are there."""
    lines = [
        f"| K = {steps} | Lite1, raw / gain | classifier, raw / gain | fine detail | coverage | spread | seeds |",
        "|---|---|---|---|---|---|---|",
    ]
    for variant in VARIANTS:
        files = [path for seed in seeds if (path := place(output, variant, steps, seed)).is_file()]
        rows = [json.loads(path.read_text())["rows"][0] for path in files]
        if not rows:
            continue
        shown = []
        for judge in (1, 0):
            raw, gain = (mean(r["judged"][judge][f"fd_teacher{of}"] for r in rows) for of in ("", "_gain"))
            shown.append(f"{raw:.2f} / {gain:.2f}")
        shown.append(f"{mean(r['fine_energy'] for r in rows):.2f}")
        shown += [f"{mean(r['judged'][1][name] for r in rows):.2f}" for name in ("coverage", "spread")]
        lines.append(f"| {variant} | {' | '.join(shown)} | {len(rows)} |")
    return lines


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("-o", "--output", type=Path, default=HERE / "variants")
    parser.add_argument("--show", action="store_true", help="print the table of what is there")
    asked, more = parser.parse_known_args(arguments)
    if asked.show:
        print("\n".join("\n".join(table(asked.output, steps, asked.seeds)) + "\n" for steps in asked.steps))
        return
    always = ["--protocol", "validation", "--data", "fashion-mnist", "--methods", "redif", "--no-untrained"]
    for seed in asked.seeds:
        for steps in asked.steps:
            for variant in asked.variants:
                which = ["--kind", "forward_equivalents", "--steps", str(steps), "--seeds", str(seed)]
                changed = ["--set", json.dumps(VARIANTS[variant]), "--tag", tag(variant), "-o", str(asked.output)]
                run.main([*always, *which, *changed, *more])


if __name__ == "__main__":
    main()
