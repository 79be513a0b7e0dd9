"""Five methods on the mini Stable Diffusion, judged on prompts that nothing was trained on.

    OMP_NUM_THREADS=1 python -m benchmarks.distillation.text [--methods ...] [--steps 2 4] [--budget N] [-o FOLDER]

A cell is (method, K), one JSON file; what is there is not run again. All methods have the same prompts, pool and budget
of forward-equivalents. Their settings are those that the search chose on Fashion-MNIST, with what the text presets say
over them for all methods alike (`settings_for_text`); none was searched on text. The judge: EfficientNet-Lite0's
features, which give no reward, on the compositions that the teacher's folder holds out.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from benchmarks.distillation.run import settings_of
from redif_sdk.artifact.atomic import atomic_write
from redif_sdk.distill import DistillConfig, Teacher, distill
from redif_sdk.distill.compute.device import cpu_has_bf16
from redif_sdk.distill.config import applicable
from redif_sdk.distill.evaluation.arena import Arena, on_held_out
from redif_sdk.distill.presets import RECIPE, TEXT, TEXT_POOL
from redif_sdk.results import document

METHODS = ("regression", "redif", "dmd2", "cdm", "sgmd")
HERE = Path(__file__).parent
UNTRAINED = {2: (2, 4), 4: (4, 8)}


def settings_for_text(method: str, steps: int) -> dict[str, Any]:
    """What was chosen on images of classes, changed for text as the presets change it."""
    chosen = settings_of(method, steps)
    more = {name: value for name, value in TEXT.items() if name not in ("learning_rate", "warm_start", "segments")}
    chosen |= more | {"learning_rate": chosen["learning_rate"] * TEXT["learning_rate"] / RECIPE["learning_rate"]}
    if method == "regression":
        chosen["segments"] = TEXT["segments"]
    elif "warm_start" in chosen:
        chosen |= {"warm_start": TEXT["warm_start"], "segments": TEXT["segments"]}
    return applicable(chosen | {"method": method})


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="mini-sd")
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--steps", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--budget", type=float, default=48_000, help="Forward-equivalents a student.")
    parser.add_argument("--pool", type=int, default=TEXT_POOL["fast"])
    parser.add_argument("--samples", type=int, default=2000, help="Held-out noises to evaluate on.")
    parser.add_argument("-o", "--output", type=Path, default=HERE / "text")
    asked = parser.parse_args(arguments)
    asked.output.mkdir(parents=True, exist_ok=True)
    teacher = Teacher.load(asked.teacher)
    arena: Arena | None = None

    def write(name: str, row: dict[str, Any]) -> None:
        how: dict[str, Any] = {"threads": torch.get_num_threads(), "precision": "bf16" if cpu_has_bf16() else "fp32"}
        written = document("benchmarks/distillation text", [row], **how)
        atomic_write(asked.output / f"{name}.json", (json.dumps(written, indent=1) + "\n").encode())
        shown = ("fd_teacher", "fd_teacher_gain", "fd_unpaired", "mse", "coverage", "spread", "grid", "fine_energy")
        print(name, {figure: round(row[figure], 4) for figure in shown if row[figure] is not None}, flush=True)

    for steps in asked.steps:
        jobs: dict[str, Any] = {f"ddim-{count}": count for count in UNTRAINED.get(steps, (steps,))}
        jobs |= {f"{method}-{steps}": method for method in asked.methods}
        for name, job in jobs.items():
            if (asked.output / f"{name}.json").is_file():
                continue
            if arena is None:
                judged, which = on_held_out(teacher)
                arena = Arena.of(judged, asked.samples)
                arena.prompts = which
            if isinstance(job, int):
                write(name, arena.ddim_row(job))
                continue
            settings = settings_for_text(job, steps)
            config = DistillConfig.checked(
                num_inference_steps=steps, forward_equivalents=asked.budget, pool_size=asked.pool, **settings
            )
            student = distill(teacher, config)
            student.use_rows(arena.teacher.rows)
            write(name, arena.student_row(student, steps) | {"settings": settings})


if __name__ == "__main__":
    main()
