"""Train and evaluate every method on the same terms.

``python -m benchmarks.distillation.run [--data ...] [--steps ...] [-o FOLDER]``. A cell is (data, method, K, seed,
kind of budget). Each is one JSON file, so an interrupted run continues, and two may share one folder. All methods start
from the teacher's weights, see the same pool, and end at the same number of forward-equivalents (``--budget``), or
after the seconds (``--kind seconds``) that `regression` takes for it. Those are measured just before in the same
process, since machines and their load differ. The pool's cost is the same for all and is printed separately.
`settings.yaml` has each method's settings, chosen on the validation protocol (other noises, other feature networks).
Nothing was tuned on the test protocol.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from diffusers import DPMSolverMultistepScheduler
from filelock import FileLock, Timeout
from PIL import Image

from benchmarks.distillation.judges import Panel, sheet
from redif_sdk.artifact.atomic import atomic_write
from redif_sdk.distill import DistillConfig, Teacher
from redif_sdk.distill import pool as pairs
from redif_sdk.distill.compute.device import cpu_has_bf16
from redif_sdk.distill.evaluation.arena import outputs
from redif_sdk.distill.methods import method_names
from redif_sdk.distill.pool.pairs import pairs_of
from redif_sdk.distill.presets import preset
from redif_sdk.distill.training.loop import Trainer
from redif_sdk.results import document

HERE = Path(__file__).parent
UNTRAINED = ("ddim", "dpm-solver++")
UNTRAINED_STEPS = (1, 2, 4, 8, 16)
VALIDATION_SEED = 1  # of the pool's noises; the test's are the held-out ones of the deployer's slots
KINDS = ("forward_equivalents", "seconds")


@dataclass(frozen=True)
class Cell:
    data: str
    method: str
    steps: int
    seed: int | None  # None: untrained
    kind: str = KINDS[0]

    @property
    def name(self) -> str:
        if self.seed is None:
            return f"{self.data}-{self.method}-{self.steps}"
        return f"{self.data}-{self.kind}-{self.method}-{self.steps}-{self.seed}"


@dataclass(frozen=True)
class Scale:
    """The size of the benchmark. ``budget``: forward-equivalents a student. ``unpaired``: images of a contender, and
    least of the teacher for other noises, between which the test's unpaired figures are."""

    budget: float = 24_000
    pool: int = 4096
    samples: int = 2000
    unpaired: int = 5120
    judge_updates: int = 1000
    clocked: int = 24  # updates of regression from which the budget's seconds are extrapolated


SMOKE = Scale(budget=1000, pool=64, samples=32, unpaired=40, judge_updates=5, clocked=2)


def common(file: Path = HERE / "settings.yaml") -> dict[str, Any]:
    """The settings of all methods."""
    found: dict[str, Any] = yaml.safe_load(file.read_text())["all"]
    return found


def settings_of(method: str, steps: int, file: Path = HERE / "settings.yaml") -> dict[str, Any]:
    """The method's settings at K steps: its preset's (except the length), its own, then those for this K."""
    everything = yaml.safe_load(file.read_text())
    own = everything["methods"].get(method, {})
    recipe = preset(own["preset"], steps) if "preset" in own else {}
    chosen: dict[str, Any] = {
        **everything["all"],
        **recipe,
        **own.get("settings", {}),
        **own.get("steps", {}).get(steps, {}),
    }
    return {name: value for name, value in chosen.items() if name not in ("method", "num_inference_steps", "updates")}


def ddim(teacher: Teacher, steps: int, arena: pairs.Pairs) -> torch.Tensor:
    """Latents (N, C, H, W) of the teacher under DDIM."""
    return outputs(lambda noise, condition: teacher.sample(noise, condition, steps), arena)


def dpm_solver(teacher: Teacher, steps: int, arena: pairs.Pairs) -> torch.Tensor:
    """Latents (N, C, H, W) of the teacher under diffusers' DPM-Solver++(2M), trailing times."""
    products = torch.from_numpy(teacher.schedule.alphas.copy()) ** 2
    betas = 1 - products / torch.cat([torch.ones(1, dtype=products.dtype), products[:-1]])

    def sample(noise: torch.Tensor, condition: torch.Tensor | None) -> torch.Tensor:
        scheduler = DPMSolverMultistepScheduler(
            trained_betas=betas.numpy(),
            num_train_timesteps=len(betas),
            prediction_type=teacher.prediction_type,
            algorithm_type="dpmsolver++",
            solver_order=2,
            timestep_spacing="trailing",
            final_sigmas_type="zero",
        )
        scheduler.set_timesteps(steps)
        x = noise * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            f = teacher(x, torch.full((len(x),), float(t)), condition)
            x = scheduler.step(f, t, x).prev_sample
        return x

    return outputs(sample, arena)


class Comparison:
    """One data set's teacher, pool and panel, loaded when first needed."""

    def __init__(self, data: str, protocol: str, scale: Scale, cache: Path, teacher: str | None) -> None:
        self.data, self.scale = data, scale
        self.teacher = Teacher.load(teacher or data)
        self.pool, self.pool_calls = pairs.get(self.teacher, scale.pool, "train")
        tuned, _ = pairs.get(self.teacher, scale.samples, "train", seed=VALIDATION_SEED)
        self.held, others, self.fresh = tuned, self.pool.target, None
        if protocol == "test":
            self.held, _ = pairs.get(self.teacher, scale.samples, "held_out")
            others = torch.cat([others, tuned.target])  # for noises of which no contender is judged on one
            more = torch.empty(max(scale.unpaired - scale.samples, 0), 0)
            self.fresh = pairs_of(self.teacher, more, "held_out", 0, low=scale.samples) if len(more) else None
        target = self.teacher.images(self.held.target)
        self.panel = Panel.of(
            protocol,
            data,
            target,
            cache,
            others=self.teacher.images(others),
            conditions=self.held.condition,
            judge_updates=scale.judge_updates,
        )

    def seconds(self, steps: int) -> float:
        """The seconds that regression takes for the budget at K steps, measured now."""
        settings = settings_of("regression", steps) | {"updates": self.scale.clocked}
        config = DistillConfig.checked(num_inference_steps=steps, method="regression", **settings)
        meter = Trainer(self.teacher, config, self.pool).run().meter
        return meter.seconds * self.scale.budget / meter.forward_equivalents

    def run(
        self, cell: Cell, extra: dict[str, Any] | None = None, alone: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], Any]:
        """Train and evaluate one cell; returns its row and its first images as one image.

        ``extra`` lies over the method's settings, ``alone`` is in their place.
        """
        if cell.seed is None:
            budget, settings = {}, {}
            make = partial(ddim if cell.method == "ddim" else dpm_solver, self.teacher, cell.steps)
        else:
            settings = settings_of(cell.method, cell.steps) if alone is None else common() | alone
            settings |= extra or {}
            by_time = cell.kind == "seconds"
            spend = {"seconds": self.seconds(cell.steps)} if by_time else {"forward_equivalents": self.scale.budget}
            config = DistillConfig.checked(
                **{"num_inference_steps": cell.steps, "method": cell.method, "seed": cell.seed, **settings, **spend}
            )
            policy = Trainer(self.teacher, config, self.pool).run()
            meter = policy.meter
            budget = asdict(meter) | {"forward_equivalents": meter.forward_equivalents, "pool_calls": self.pool_calls}
            settings |= {"timesteps": [float(t) for t in policy.table.timesteps]}
            make = partial(outputs, policy.sample, slices=policy.table.noise_slices)
        images = self.teacher.images(make(self.held))
        fresh = None if self.fresh is None else self.teacher.images(make(self.fresh))
        row = {
            **asdict(cell),
            "network_calls": cell.steps * (self.teacher.calls_per_step if cell.seed is None else 1),
            "num_samples": len(self.held),
            "num_unpaired": len(self.held) + (0 if self.fresh is None else len(self.fresh)),
            "budget": budget,
            "settings": settings,
            **self.panel.judge(images, fresh),
        }
        return row, sheet(images, min(40, len(images)))


def cells(asked: argparse.Namespace) -> Iterator[Cell]:
    """The cells, seed by seed, so that an interrupted run has whole tables of fewer seeds."""
    for data in asked.data:
        if not asked.no_untrained:
            yield from (Cell(data, method, steps, None) for steps in UNTRAINED_STEPS for method in UNTRAINED)
        for kind in asked.kind:
            for seed in asked.seeds:
                methods = [
                    m for m in asked.methods if kind == KINDS[0] or m != "regression"
                ]  # its seconds are the budget of all methods
                yield from (Cell(data, method, steps, seed, kind) for steps in asked.steps for method in methods)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", nargs="+", default=["fashion-mnist", "emoji"])
    parser.add_argument("--teacher", help="A teacher's folder, in place of the shipped one of that data set.")
    parser.add_argument("--methods", nargs="+", default=method_names())
    parser.add_argument("--steps", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--kind", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--protocol", choices=("test", "validation"), default="test")
    parser.add_argument("--budget", type=float, default=None, help="Forward-equivalents a student.")
    parser.add_argument("--samples", type=int, default=None, help="Held-out noises to evaluate on.")
    parser.add_argument("--set", dest="extra", default="{}", help="validation: YAML that overrides settings.yaml.")
    parser.add_argument("--settings", help="validation: YAML in place of the method's own in settings.yaml.")
    parser.add_argument("--tag", default="", help="validation: prefix of the cells' names.")
    parser.add_argument("--smoke", action="store_true", help="Everything, at a toy budget.")
    parser.add_argument("--no-untrained", action="store_true")
    parser.add_argument("-o", "--output", type=Path, default=HERE / "results")
    asked = parser.parse_args(arguments)
    scale = SMOKE if asked.smoke else Scale()
    scale = replace(scale, budget=asked.budget or scale.budget, samples=asked.samples or scale.samples)
    cache = Path(os.environ.get("REDIF_CACHE", "build/benchmarks"))
    extra = yaml.safe_load(asked.extra)
    alone = None if asked.settings is None else yaml.safe_load(asked.settings)
    if (extra or alone is not None) and asked.protocol == "test":
        parser.error("--set is for the validation protocol: nothing is tuned on the test's")
    asked.output.mkdir(parents=True, exist_ok=True)
    comparisons: dict[str, Comparison] = {}
    for cell in cells(asked):
        path = asked.output / f"{asked.tag}{cell.name}.json"
        if path.is_file():
            continue
        try:
            with FileLock(cache / f"{path.stem}.lock", timeout=0):
                if path.is_file():
                    continue
                if cell.data not in comparisons:
                    comparisons[cell.data] = Comparison(cell.data, asked.protocol, scale, cache, asked.teacher)
                    drawn = sheet(comparisons[cell.data].panel.target)
                    Image.fromarray(drawn).save(asked.output / f"{cell.data}-teacher.png", optimize=True)
                began = time.monotonic()
                row, picture = comparisons[cell.data].run(cell, extra, alone)
        except Timeout:
            continue  # another process computes it
        how: dict[str, Any] = {"threads": torch.get_num_threads(), "scale": asdict(scale)}
        how |= {"precision": "bf16" if cpu_has_bf16() else "fp32"}
        written = document("benchmarks/distillation", [row], **how)
        if cell.seed == 0 and asked.protocol == "test":  # docs/results.md shows it
            Image.fromarray(np.asarray(picture)).save(path.with_suffix(".png"), optimize=True)
        atomic_write(path, (json.dumps(written, indent=1) + "\n").encode())
        first, second = row["judged"]
        print(
            f"{path.stem}: FD {first['fd_teacher']:.2f}, gain {first['fd_teacher_gain']:.2f} ({first['gain']}), "
            f"unsharp {first['fd_teacher_unsharp']:.2f}, mse {row['mse']:.4f}, HF {row['high_frequency']:.2f}, "
            f"recall {first['recall']:.2f}, {time.monotonic() - began:.0f} s; {second['features']}: "
            f"FD {second['fd_teacher']:.2f}, gain {second['fd_teacher_gain']:.2f} ({second['gain']})",
            flush=True,
        )


if __name__ == "__main__":
    main()
