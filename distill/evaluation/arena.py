"""Contenders against the teacher, as rows: what ``redif eval``, the quickstart and the benchmarks report.

Who is judged, on which noises, and what a row holds; the distances themselves are in `redif_sdk.distill.measures`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from redif_sdk.artifact.records import ArrayCondition, Condition, TextCondition
from redif_sdk.distill import pool
from redif_sdk.distill.compute.device import chosen_device
from redif_sdk.distill.evaluation.datasets import load
from redif_sdk.distill.evaluation.judged import Judged, read_judged
from redif_sdk.distill.measures.distances import Judge, Statistics
from redif_sdk.distill.measures.features import embed, name_of
from redif_sdk.distill.measures.reference import read_reference
from redif_sdk.distill.student import Student, load_student
from redif_sdk.distill.teachers.adapters import drawing
from redif_sdk.distill.teachers.base import Teacher
from redif_sdk.errors import InvalidRequest
from redif_sdk.results import label

_log = logging.getLogger(__name__)
OnProgress = Callable[[float, str], object]
FEWEST = 1_500  # samples below which a distance in 1,280 features says more of their number than of the images
JUDGE_REWARDS = {"lpips"}  # rewards by the judge's own network
Sampler = Callable[[Tensor, Tensor | None], Tensor]


@torch.no_grad()
def outputs(sample: Sampler, pairs: pool.Pairs, batch_size: int = 100, *, slices: int = 1) -> Tensor:
    """What ``sample``, a policy's or a teacher's, makes of every pair's noise: latents (N, C, H, W) float32.

    ``slices``: of noise, for a policy whose table draws between its rows (`StepTable.noise_slices`).
    """
    parts = [pairs[low : low + batch_size] for low in range(0, len(pairs), batch_size)]
    return torch.cat([sample(part.slices(slices) if slices > 1 else part.noise, part.condition) for part in parts])


@dataclass
class Arena:
    """One teacher, its held-out pairs, one judge: every contender meets the same. All are on the pairs' device."""

    teacher: Teacher
    pairs: pool.Pairs
    judge: Judge
    judged: Judged | None = None  # what came with the teacher, over exactly these noises
    prompts: str | None = None  # of a text-to-image teacher: which they are

    @classmethod
    def of(
        cls,
        teacher: Teacher,
        num_samples: int,
        *,
        rebuild: bool = False,
        unpaired: bool = True,
        data: str | None = None,
        device: torch.device | str = "cpu",
    ) -> Arena:
        """The arena of a teacher, on ``num_samples`` held-out noises.

        Args:
            rebuild: sample the teacher for every pair, whatever the bank and the cache hold.
            unpaired: compare with as many of the teacher's images for other noises too: those of the training pool,
                which are sampled where neither a bank nor the cache has them.
            data: the data set of real images; None: the statistics that lie beside the teacher, if there are any.
            device: where the teacher samples, contenders are sampled, and features are taken.

        Raises:
            InvalidRequest: too few samples, or a teacher whose images the judge cannot see.
        """
        if num_samples < 16:
            raise InvalidRequest(f"num_samples must be at least 16, not {num_samples}")
        channels = teacher.postprocess.channels(teacher.latents.channels)
        if channels not in (1, 3):
            raise InvalidRequest(
                f"{teacher.name} has images of {channels} channels; the judge sees grey and colour alone"
            )
        real = read_reference(teacher.folder) if teacher.folder else None
        if data is not None:
            real = Statistics.of(embed(torch.tensor(load(data, "test").images).float() / 127.5 - 1))
        pairs = pool.get(teacher, num_samples, "held_out", rebuild=rebuild, device=device)[0].to(device)
        teacher = teacher.ranged_by(pairs.target)
        judged = None if rebuild else read_judged(teacher)
        known = judged.features[:num_samples].to(device) if judged and len(judged.features) >= num_samples else None
        ranged = teacher

        def others() -> Tensor:
            found = pool.get(ranged, num_samples, "train", device=device)[0]
            return ranged.unit_images(found.target.to(device))

        target = teacher.unit_images(pairs.target)
        judge = Judge(target, embed, real, known, others if unpaired else None, pairs.places)
        whole = judged is not None and len(judged.features) == num_samples and data is None
        return cls(teacher, pairs, judge, judged if whole else None)

    def floor(self) -> float | None:
        """Frechet distance between two sets of the teacher's own samples, of other noises, of this size."""
        if self.judged is not None:
            return self.judged.floor
        return None if self.judge.others is None else self.judge.to_others(self.judge.reference)

    def row(
        self,
        method: str,
        steps: int,
        latents: Tensor,
        *,
        calls_per_step: int = 1,
        seed: int | None = None,
        budget: dict[str, Any] | None = None,
        estimator: str | None = None,
        reward: str | None = None,
    ) -> dict[str, Any]:
        """One row of the quality table for a contender's ``latents`` (N, C, H, W), in the order of the pairs.

        How the contender was made may be given.
        """
        quality = self.judge.quality(self.teacher.unit_images(latents))
        return {
            "data": self.teacher.extra.get("name", self.teacher.name),
            "teacher": self.teacher.name,
            "method": method,
            "estimator": estimator,
            "reward": reward,
            "num_inference_steps": steps,
            "network_calls": steps * calls_per_step,
            "seed": seed,
            **quality.row(),
            "rewarded_by_judge": bool(JUDGE_REWARDS & set((reward or "").split("+"))),
            "features": name_of(self.judge.target),
            "num_samples": len(self.pairs),
            "prompts": self.prompts,
            "budget": budget or {},
        }

    def teacher_row(self) -> dict[str, Any]:
        """The teacher against itself: zeros, but for the distance to real images. Known if it came with the teacher."""
        steps = self.teacher.num_inference_steps
        if self.judged is not None and (known := self.judged.row("teacher", steps)):
            return known | self.judge.seen()
        return self.row("teacher", steps, self.pairs.target, calls_per_step=self.teacher.calls_per_step)

    def ddim_row(self, steps: int) -> dict[str, Any]:
        """The teacher itself, its guidance included, with DDIM at ``steps``: untrained. Known if it came with it."""
        if self.judged is not None and (known := self.judged.row("ddim", steps)):
            return known
        latents = outputs(partial(self.teacher.few_steps, num_inference_steps=steps), self.pairs)
        return self.row("ddim", steps, latents, calls_per_step=self.teacher.calls_per_step)

    def student_row(self, student: Student, steps: int) -> dict[str, Any]:
        """A student at ``steps``; its network is moved to the arena's device."""
        made = student.distillation
        student.network.to(self.pairs.noise.device)
        return self.row(
            made.method if made else "ddim",
            steps,
            outputs(student.policy(steps).sample, self.pairs, slices=student.policy(steps).table.noise_slices),
            calls_per_step=student.calls_per_step,
            seed=made.seed if made else None,
            budget=made.budget.model_dump() if made else None,
            estimator=student.estimator,
            reward="+".join(made.rewards) if made and made.rewards else None,
        )


def on_held_out(teacher: Teacher) -> tuple[Teacher, str]:
    """A text-to-image teacher on the prompts that its folder holds out, or where it names none on its own; and which
    these are."""
    new = teacher.extra.get("held_out")
    return (drawing(teacher, new), "held out") if new else (teacher, "trained on")


def evaluate_folder(
    folder: Path,
    against: str | Path | Teacher,
    num_samples: int,
    *,
    data: str | None = None,
    unpaired: bool = True,
    baselines: bool = True,
    prompts: Sequence[str] | None = None,
    trained_prompts: bool = False,
    device: str = "auto",
    on_progress: OnProgress = lambda done, note: None,
) -> list[dict[str, Any]]:
    """Rows for every step table of a student folder, the teacher, and untrained DDIM at the same steps.

    Args:
        against: the teacher: a shipped one's name, a folder or a Hub id.
        data: the data set of real images; None: the statistics beside the teacher.
        unpaired: whether contenders are compared with the teacher's images for other noises too.
        baselines: whether untrained DDIM is judged too.
        prompts: of a text-to-image teacher, in place of those that its folder holds out (``held_out`` in
            ``redif_teacher.json``), or else of those that students were trained on.
        trained_prompts: take the latter in any case.
        device: cpu, cuda or cuda:N; auto: the device that training takes, a GPU if there is one.
        on_progress: called with the share that is done, and what is judged next.

    Raises:
        ManifestError, IntegrityError: the folder is no student.
        InvalidRequest: teacher and student do not make the same images, or the student did not learn the teacher's
            guidance scale.
        RuntimeUnavailable: the device is not there.
    """
    if num_samples < FEWEST:
        _log.warning(
            "distances of %d samples are too large: compare them at equal numbers only, or take 2000", num_samples
        )
    place = chosen_device(device)
    more = {} if prompts is None else {"prompts": prompts}
    student, teacher = load_student(folder), Teacher.load(against, **more)
    if student.teacher.shape != teacher.shape or not _same_conditions(student.teacher.condition, teacher.condition):
        raise InvalidRequest(
            f"{folder} and the teacher {teacher.name} do not make the same images; give its own teacher"
        )
    which = None if teacher.prompts is None else "given" if prompts is not None else "trained on"
    if which == "trained on" and not trained_prompts:
        teacher, which = on_held_out(teacher)
    student.use_rows(teacher.rows)
    student.use_guidance(teacher)
    if teacher.decode is None:
        teacher = teacher.in_range(student.teacher.postprocess.value_range)
    arena = Arena.of(teacher, num_samples, unpaired=unpaired, data=data, device=place)
    arena.prompts = which
    steps = [table.num_inference_steps for table in student.tables]
    jobs: list[tuple[str, Callable[[], dict[str, Any]]]] = [("teacher", arena.teacher_row)]
    for count in steps:
        if baselines:
            jobs.append((f"ddim at {count}", partial(arena.ddim_row, count)))
        jobs.append((f"student at {count}", partial(arena.student_row, student, count)))
    rows = []
    for done, (note, job) in enumerate(jobs):
        on_progress(done / len(jobs), note)
        rows.append(job())
    on_progress(1.0, "")
    return rows


Kind = Condition | TextCondition | ArrayCondition | None


def _same_conditions(ours: Kind, theirs: Kind) -> bool:
    """Whether a student and a teacher take the same conditions: equal classes, prompts that become equal tensors, or
    the same arrays."""
    if isinstance(ours, ArrayCondition) and isinstance(theirs, ArrayCondition):
        return ours.tensors == theirs.tensors
    if isinstance(ours, TextCondition) and isinstance(theirs, TextCondition):
        return (ours.tokenizers, ours.encoders, ours.tensors) == (theirs.tokenizers, theirs.encoders, theirs.tensors)
    return ours == theirs


#: The tables of the terminal, narrow enough for 80 characters: a title, and the columns after the method.
_TABLES = (
    (
        "FD: to the teacher's images",
        {
            "num_inference_steps": "steps",
            "network_calls": "calls",
            "fd_teacher": "FD",
            "fd_teacher_gain": "best\ngain",
            "fd_teacher_std": "std\nmatch",
            "fd_unpaired": "unpaired",
            "fd_real": "FD to\nreal",
            "mse": "paired\nMSE",
        },
    ),
    (
        "variety, and detail",
        {
            "num_inference_steps": "steps",
            "precision": "precision",
            "recall": "recall",
            "coverage": "coverage",
            "spread": "spread",
            "grid": "grid",
            "fine_energy": "fine\ndetail",
        },
    ),
)
_DIGITS = {"mse": 4} | dict.fromkeys(("precision", "recall", "coverage", "spread", "fine_energy"), 2)


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print rows of contenders as tables on the terminal."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console, first = Console(), rows[0]
    prompts = f" of prompts {first['prompts']}" if first.get("prompts") else ""
    for said, columns in _TABLES:
        title = f"{first['num_samples']} samples{prompts}, features {first['features']}; {said}"
        table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
        table.add_column("method")  # it may wrap where the terminal is narrow: figures stay whole
        for heading in columns.values():
            table.add_column(heading, justify="right", no_wrap=True)
        for row in rows:
            cells = []
            for key in columns:
                value = row.get(key)
                cells.append(f"{value:.{_DIGITS.get(key, 1)}f}" if isinstance(value, float) else str(value or "-"))
            table.add_row(label(row), *cells)
        console.print(table)
    for row in rows:
        if row.get("rewarded_by_judge"):
            console.print(
                f"{label(row)} was rewarded by the judge's own network: its distances flatter it", soft_wrap=True
            )
