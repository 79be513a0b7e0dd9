"""Reinforcement by a reward that sees the prompt, against its controls, on the mini Stable Diffusion.

    python -m zoo.score_text -o build/scorer --judges build/reinforcement/judges-7-8-4895.safetensors
    python -m benchmarks.reinforcement.run [--arms ...] [--steps 2 4] [--seeds 0] [--budget N] [-o FOLDER]

The first command trains the reward, another network than the judge, and keeps the judge for the second.
A cell is (arm, K, seed), one JSON file with its curve over forward-equivalents and judged images; what is there is not
run again, and a cell that was cut goes on from its checkpoint. Untrained rows: the teacher, the shipped student, each
also with the best of N images by the scorer, and DDIM at K. `arms.yaml` has the settings. Every arm that trains has
the same budget of forward-equivalents: decoding, the scorer's network where it is in this process, the critic's, and
the teacher's calls of best-of-n among them. A scorer behind HTTP computes elsewhere: `reward_calls` counts its images.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from torch import Tensor

from benchmarks.distillation.judges import sheet
from benchmarks.reinforcement.judge import AT_ONCE, LeftOut, Panel, Sample, training_part
from redif_sdk.artifact.atomic import atomic_write
from redif_sdk.distill import DistillConfig, Teacher, pool
from redif_sdk.distill.config import applicable
from redif_sdk.distill.policy import StudentPolicy
from redif_sdk.distill.pool import Pairs
from redif_sdk.distill.rewards.batch import Batch
from redif_sdk.distill.shipped.students import shipped_student
from redif_sdk.distill.student.distilling import made_student
from redif_sdk.distill.training.loop import Trainer
from redif_sdk.results import document
from zoo import captions, score_text
from zoo.judge_text import JUDGES, CaptionJudges, describe

HERE = Path(__file__).parent
WORK = Path("build/reinforcement")
POOL = 2048
BEST_OF = 8  # images at inference
SHOWN = 60  # images in a sheet
PROMPTS = "prompts.txt"  # of the sheets, beside the cells
NOISES = 4  # of each prompt that a reward judges
UNTRAINED = ("teacher", f"teacher, best of {BEST_OF}", "start", f"start, best of {BEST_OF}", "ddim", "ddim, unguided")


@dataclass(frozen=True)
class Cell:
    arm: str
    steps: int
    seed: int

    @property
    def name(self) -> str:
        return f"{self.arm.replace(', ', '-').replace(' ', '-')}-{self.steps}-{self.seed}"


@contextmanager
def served(scorer: Path) -> Iterator[str]:
    """The scorer behind ``redif serve-reward``, on a free port of this machine: its address."""
    command = [str(Path(sys.executable).with_name("redif")), "serve-reward", "zoo/score_text.py:score", "--port", "0"]
    environment = os.environ | {"REDIF_SCORER": str(scorer.resolve())}
    process = subprocess.Popen(command, env=environment, cwd=HERE.parent.parent, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        said = process.stdout.readline()
        addresses = [word for word in said.split() if word.startswith("http")]
        if not addresses:
            raise SystemExit(f"the scorer in {scorer} is not served; what the command said is above")
        yield addresses[0]
    finally:
        process.terminate()
        process.wait(30)


def _descriptions(data: captions.Captioned) -> Tensor:
    """The judge's view of the real images, which takes minutes: kept beside the runs."""
    kept = WORK / f"descriptions-{len(data)}.npy"
    if not kept.is_file():
        found = describe(torch.tensor(data.images).float() / 127.5 - 1)
        buffer = io.BytesIO()
        np.save(buffer, found.numpy())
        WORK.mkdir(parents=True, exist_ok=True)
        atomic_write(kept, buffer.getvalue())
    return torch.from_numpy(np.load(kept))


class Experiment:
    """Teacher, pool, judge and scorer, loaded once.

    Attributes:
        budget: forward-equivalents of every arm.
        checks: points of its curve, each judged on ``seen`` prompts.
    """

    def __init__(
        self,
        scorer: Path,
        data_dir: str | None,
        prompts: int,
        *,
        budget: float = 0.0,
        checks: int = 1,
        seen: int = 300,
    ) -> None:
        self.teacher = Teacher.load("mini-sd")
        self.data = captions.load(data_dir)
        self.scorer, self.names = score_text.load(str(scorer))
        self.panel = Panel(self.teacher, self.data, self.judges(JUDGES), self.scorer, self.names, prompts)
        whole, _ = pool.get(self.teacher, POOL, "train")
        assert self.teacher.prompts is not None
        every = [self.teacher.prompts.text(place) for place in range(self.teacher.num_conditions)]
        self.allowed = LeftOut.of(self.data).allowed(every)
        self.pairs = training_part(whole, self.allowed)
        self.budget, self.checks, self.seen = budget, checks, seen

    def judges(self, seeds: range) -> CaptionJudges:
        """The judge of these seeds, trained once."""
        kept = WORK / f"judges-{seeds[0]}-{len(seeds)}-{len(self.data)}.safetensors"
        return CaptionJudges(self.data, descriptions=_descriptions(self.data), seeds=seeds, kept=kept)

    def white_box(self, batch: Batch) -> Tensor:
        """The scorer with its gradient."""
        assert batch.prompts is not None
        return self.scorer.score(score_text.describe(batch.images, rounded=False), batch.prompts, self.names)

    def chance(self, batch: Batch) -> Tensor:
        """A reward that says nothing."""
        return torch.randn(len(batch))

    def untrained(self, cell: Cell) -> tuple[dict[str, Any], Tensor]:
        """A contender that is not trained here, and its first images."""
        start, draw = self.policy(cell.steps).sample, torch.Generator().manual_seed(BEST_OF)
        samples: dict[str, Sample] = {
            "teacher": self.teachers,
            "ddim": lambda noise, condition: self.teacher.sample(noise, condition, cell.steps),
            f"teacher, best of {BEST_OF}": partial(self.best, self.teachers, draw),
            "start": start,
            f"start, best of {BEST_OF}": partial(self.best, start, draw),
            "ddim, unguided": self.policy(cell.steps, "ddim").sample,
        }
        sample = samples[cell.arm]
        return {**asdict(cell), **self.panel.full(sample)}, self.first_images(sample)

    def first_images(self, sample: Sample) -> Tensor:
        """What ``sample`` draws for ``shown``, from the same noises for all."""
        return self.panel.images(sample, self.shown, 0)

    @cached_property
    def shown(self) -> list[str]:
        """The first ``SHOWN`` prompts that are judged: those of the sheets."""
        return [self.data.prompt(place) for place in self.panel.places[:SHOWN]]

    def policy(self, steps: int, start: str = "shipped") -> StudentPolicy:
        """What an arm begins with: the shipped student, or ("ddim") the teacher's network at so many steps of DDIM, one
        call each, so without guidance: an imported few-step pipeline."""
        if start == "ddim":
            network, table = self.teacher.make_student(), self.teacher.table(steps)
        else:
            student = shipped_student(self.teacher, steps)
            network, table = student.network, student.tables[0]
        return StudentPolicy(network, table, self.teacher.schedule, exact=True)

    def teachers(self, noise: Tensor, condition: Tensor) -> Tensor:
        """The teacher's outputs at its own number of steps."""
        return self.teacher.sample(noise, condition, self.teacher.num_inference_steps)

    def best(self, sample: Sample, draw: torch.Generator, noise: Tensor, condition: Tensor) -> Tensor:
        """The scorer's favourite of ``BEST_OF`` outputs of ``sample`` for each condition, the first from ``noise``, the
        others from noises of ``draw``."""
        more = torch.randn(BEST_OF - 1, *noise.shape, generator=draw)
        return self._favourites(sample, torch.cat([noise[None], more]), condition)[1]

    @torch.no_grad()
    def own_pairs(self, start: StudentPolicy) -> tuple[Pairs, float]:
        """``NOISES`` noises for every prompt that arms may train on, in any order, with the start's own outputs as
        targets: so that regression is a leash to the start. And what they cost."""
        draw = torch.Generator().manual_seed(POOL)
        places = torch.tensor(self.allowed).repeat(NOISES)
        places = places[torch.randperm(len(places), generator=draw)]
        noise = torch.randn(len(places), *self.teacher.shape, generator=draw)
        parts = zip(noise.split(AT_ONCE), places.split(AT_ONCE), strict=True)
        targets = torch.cat([start.sample(*part) for part in parts])
        return Pairs(noise, targets, places), float(len(places) * start.num_inference_steps)

    @torch.no_grad()
    def _favourites(self, sample: Sample, noises: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        """Of the outputs of ``sample`` from ``noises`` (N, B, C, H, W), the scorer's favourite for each condition: its
        noise, and itself, (B, C, H, W) each."""
        prompts = self.teacher.asked(condition).prompts
        assert prompts is not None
        outputs = torch.stack([sample(noise, condition) for noise in noises])
        seen = [score_text.describe(self.teacher.images(output)) for output in outputs]
        chosen = torch.stack([self.scorer.score(part, prompts, self.names) for part in seen]).argmax(0)
        places = torch.arange(len(condition))
        return noises[chosen, places], outputs[chosen, places]

    def best_pairs(self, budget: float, count: int) -> tuple[Pairs, float]:
        """As many pairs as a quarter of the budget pays for, each the best of ``count`` of a prompt; and their cost."""
        each = count * self.teacher.num_inference_steps * self.teacher.calls_per_step
        wanted = min(len(self.pairs), int(budget / 4 / each))
        parts = []
        for low in range(0, wanted, AT_ONCE):
            condition = self.pairs[slice(low, min(low + AT_ONCE, wanted))].condition
            assert condition is not None
            draw = torch.Generator().manual_seed(low)
            noises = torch.randn(count, len(condition), *self.teacher.shape, generator=draw)
            parts.append((*self._favourites(self.teachers, noises, condition), condition))
        noise, target, condition = (torch.cat(column) for column in zip(*parts, strict=True))
        return Pairs(noise, target, condition), float(wanted * each)

    def trained(self, cell: Cell, address: str, folder: Path) -> tuple[dict[str, Any], Tensor]:
        """An arm, and its first images."""
        found = yaml.safe_load((HERE / "arms.yaml").read_text())
        settings: dict[str, Any] = {**found["all"], **found["arms"][cell.arm]}
        shown, spent, pairs = dict(settings), 0.0, self.pairs
        budget = settings.pop("budget", self.budget)
        start = self.policy(cell.steps, settings.pop("start", "shipped"))
        if "best_of" in settings:
            pairs, spent = self.best_pairs(budget, settings["best_of"])
        rewards = {"scorer": address, "scorer in process": self.white_box, "chance": self.chance}
        if "reward" in settings:
            settings["reward"] = rewards[settings["reward"]]
            pairs, spent = self.own_pairs(start)
        config = DistillConfig.checked(
            num_inference_steps=cell.steps,
            seed=cell.seed,
            forward_equivalents=budget - spent,
            **applicable(settings),
        )
        trainer = Trainer(self.teacher, config, pairs, folder, start.network, start.table)
        curve_file = folder / "curve.json"
        curve: list[dict[str, Any]] = json.loads(curve_file.read_text()) if curve_file.is_file() else []

        def on_progress(share: float, figures: dict[str, float]) -> None:
            if share * self.checks < len(curve) + 1 and share < 1:
                return
            policy = StudentPolicy(trainer.ema, trainer.context.policy.table, self.teacher.schedule, exact=True)
            quick = self.panel.quick(policy.sample, self.seen)
            meter = trainer.meter
            curve.append({
                "forward_equivalents": spent + meter.forward_equivalents, "reward_calls": meter.reward_calls,
                "updates": trainer.update, "seconds": meter.seconds, **quick,
                **{name: value for name, value in figures.items() if name.startswith("critic")},
            })  # fmt: skip
            folder.mkdir(parents=True, exist_ok=True)
            atomic_write(curve_file, json.dumps(curve).encode())
            print(cell.name, {name: round(value, 4) for name, value in curve[-1].items()}, flush=True)

        trainer.on_progress = on_progress
        student = trainer.run(resume=True)
        made_student(trainer, student, config, len(pairs)).save_pretrained(folder / "student", overwrite=True)
        judged = self.panel.full(student.sample)
        return {
            **asdict(cell), **judged, "curve": curve, "settings": shown,
            "budget": asdict(trainer.meter) | {"forward_equivalents": spent + trainer.meter.forward_equivalents},
        }, self.first_images(student.sample)  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    found = yaml.safe_load((HERE / "arms.yaml").read_text())
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", default=[*UNTRAINED, *found["arms"]])
    parser.add_argument("--steps", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--budget", type=float, default=300_000, help="Forward-equivalents of an arm without its own.")
    parser.add_argument("--checks", type=int, default=6, help="Points of the curve.")
    parser.add_argument("--seen", type=int, default=300, help="Prompts that a point of the curve is judged on.")
    parser.add_argument("--prompts", type=int, default=1000, help="Prompts that the end is judged on.")
    parser.add_argument("--scorer", type=Path, default=Path("build/scorer"))
    parser.add_argument("--data-dir", default=None)
    parser.add_argument("-o", "--output", type=Path, default=HERE / "results")
    asked = parser.parse_args(arguments)
    asked.output.mkdir(parents=True, exist_ok=True)
    experiment: Experiment | None = None
    with served(asked.scorer) as address:
        for steps in asked.steps:
            for seed in asked.seeds:
                for arm in asked.arms:
                    cell = Cell(arm, steps, seed)
                    path = asked.output / f"{cell.name}.json"
                    if path.is_file() or (arm in UNTRAINED and seed):
                        continue
                    if experiment is None:
                        experiment = Experiment(
                            asked.scorer,
                            asked.data_dir,
                            asked.prompts,
                            budget=asked.budget,
                            checks=asked.checks,
                            seen=asked.seen,
                        )
                        atomic_write(asked.output / PROMPTS, ("\n".join(experiment.shown) + "\n").encode())
                    began = time.monotonic()
                    if arm in UNTRAINED:
                        row, images = experiment.untrained(cell)
                    else:
                        row, images = experiment.trained(cell, address, WORK / cell.name)
                    Image.fromarray(sheet(images, SHOWN)).save(path.with_suffix(".png"), optimize=True)
                    row["wall_seconds"] = time.monotonic() - began
                    written = document("benchmarks/reinforcement", [row], threads=torch.get_num_threads())
                    atomic_write(path, (json.dumps(written, indent=1) + "\n").encode())
                    print(cell.name, {k: row[k] for k in ("top1", "top5", "fd_real", "spread", "grid")}, flush=True)


if __name__ == "__main__":
    main()
