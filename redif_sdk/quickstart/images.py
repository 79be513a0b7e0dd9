"""The README's main job, end to end: distil the shipped teacher, export, verify, generate, evaluate, report.

It only strings together what the other commands do one by one, and imports ``distill`` and ``export`` when it runs.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from redif_sdk.artifact.atomic import atomic_write
from redif_sdk.card.record import quality_rows, record, speed_rows
from redif_sdk.card.render import read_card, user_sections
from redif_sdk.errors import InvalidRequest
from redif_sdk.pipeline import FastPipeline
from redif_sdk.quickstart.report import Sheet, poster, render, strip
from redif_sdk.results import document, write_json
from redif_sdk.sampling.noise import noise

if TYPE_CHECKING:
    from redif_sdk.distill.evaluation.arena import Arena
    from redif_sdk.distill.student import Student
    from redif_sdk.distill.teachers.base import Teacher

#: The engine that the gate looks at, and that the report times; `redif verify` looks at all that are here.
GATE = ("onnxruntime",)
TEACHER = "fashion-mnist"
SHEET_SEED = 7  # of the pictures in the report: neither a training nor a judging noise
SHEET_IMAGES = 20
SPEED_ROUNDS = 5


@dataclass(frozen=True)
class Preset:
    """What one student costs.

    ``share``: of the minutes for training, when the machine is too slow for ``updates``. ``chained``: it begins with
    the weights of the student of fewer steps, else with the teacher's, which is near enough from four steps on.
    """

    updates: int
    share: float
    settings: dict[str, Any]
    chained: bool = True


#: The texture reward is differentiable, so its own gradient takes the place of the estimate (docs/results/rewards.md).
COMMON = {"reward": "texture", "estimator": "pathwise"}
FOUR = {
    "reward": {"texture": 1.0, "pixel": 1.0},  # the pixel error is what places four times well
    "learning_rate": 1e-3,
    "warm_start": 0.6,
    "step_delta": 2.0,
    "schedule_updates": 10,
}
PRESETS = {
    1: Preset(650, 0.45, {"learning_rate": 2e-3, "warm_start": 0.42, "step_delta": 5.0}),
    2: Preset(270, 0.38, {"learning_rate": 2e-3, "warm_start": 0.6, "step_delta": 3.0}),
    4: Preset(50, 0.17, FOUR, chained=False),
}


def _preset(steps: int, count: int) -> Preset:
    return PRESETS.get(steps, Preset(max(40, 700 // steps), 1 / count, FOUR, chained=False))


class Reporter:
    """Lines on the terminal while the job runs, and the seconds that each part took."""

    def __init__(self, quiet: bool) -> None:
        from rich.console import Console

        self.console = Console(stderr=True, quiet=quiet)
        self.seconds: dict[str, float] = {}

    @contextmanager
    def part(self, title: str) -> Iterator[Callable[[float, dict[str, float]], None]]:
        """One part of the job with a live bar; yields ``show(share done, figures)``."""
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        began = time.monotonic()
        columns = (
            TextColumn("{task.description:<34}"),
            BarColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=self.console) as progress:
            task = progress.add_task(title, total=1.0, note="")

            def show(done: float, figures: dict[str, float]) -> None:
                note = f"mse {figures['mse']:.4f}" if "mse" in figures else ""
                progress.update(task, completed=done, note=note)

            yield show
            progress.update(task, completed=1.0)
        self.seconds[title] = round(time.monotonic() - began, 1)


def quickstart(
    output: Path,
    *,
    steps: Sequence[int],
    minutes: float,
    updates: int | None,
    num_samples: int,
    seed: int,
    rebuild_bank: bool,
    quiet: bool,
) -> dict[str, Any]:
    """Run the whole job into ``output``; returns the contents of ``results.json``.

    Raises:
        InvalidRequest: a number of steps below 1, or no minutes to train in.
        ParityError: an exported student does not compute what torch computes.
    """
    from redif_sdk.distill.evaluation.arena import Arena
    from redif_sdk.distill.student import import_pipeline
    from redif_sdk.distill.teachers.base import Teacher
    from redif_sdk.export import export

    if not steps or any(count < 1 for count in steps):
        raise InvalidRequest(f"steps must be whole numbers from 1 up, not {list(steps)}")
    if minutes <= 0:
        raise InvalidRequest(f"minutes must be above 0, not {minutes:g}")
    steps = sorted(set(steps))
    for count in steps:
        user_sections(read_card(output / f"student-{count}") or "")  # malformed ones are refused before the work
    report, began = Reporter(quiet), time.monotonic()
    output.mkdir(parents=True, exist_ok=True)
    teacher = Teacher.load(TEACHER)
    with report.part("teacher: outputs, judge"):
        arena = Arena.of(teacher, num_samples, rebuild=rebuild_bank)
    students = _distil(teacher, output, steps, minutes, updates, seed, rebuild_bank, report)
    verification: list[dict[str, Any]] = []
    with report.part("export and verify"):
        original = output / "teacher"
        import_pipeline(teacher, original, [teacher.num_inference_steps, *steps], overwrite=True)
        export(original, runtimes=GATE)
        for count in steps:
            manifest = export(output / f"student-{count}", runtimes=GATE)
            verification += [{"student": f"student-{count}", **row} for row in manifest.verification]
    with report.part("evaluate") as show:
        rows = _evaluate(arena, students, steps, show)
        floor = arena.floor()
    with report.part("generate and time"):
        pipelines = {count: FastPipeline.from_pretrained(output / f"student-{count}") for count in steps}
        reference = FastPipeline.from_pretrained(original)
        sheets = _sheets(reference, pipelines, teacher.num_inference_steps)
        speed = _speed(reference, pipelines, teacher.num_inference_steps)
        for count, pipe in pipelines.items():
            pictures = pipe(class_labels=list(range(10)), seed=seed, output_type="uint8").images
            strip(pictures).save(output / f"student-{count}.png")
    for count in steps:
        own = [row for row in speed if row["contender"] in ("teacher", f"student-{count}")]
        record(output / f"student-{count}", [*quality_rows(rows, count), *speed_rows(own)])
    seconds = round(time.monotonic() - began, 1)
    results = document(
        "quickstart",
        rows,
        speed=speed,
        verification=verification,
        seconds=seconds,
        seconds_by_part=report.seconds,
        fd_teacher_floor=floor,
    )
    write_json(output / "results.json", results)
    poster(sheets).save(output / "samples.png", optimize=True)
    atomic_write(output / "report.html", render(results, sheets).encode())
    summarise(report, results, output, steps[-1])
    return results


def _distil(
    teacher: Teacher,
    output: Path,
    steps: Sequence[int],
    minutes: float,
    updates: int | None,
    seed: int,
    rebuild_bank: bool,
    report: Reporter,
) -> dict[int, Student]:
    """One student for each K, fewest steps first."""
    from redif_sdk.distill import pool
    from redif_sdk.distill.config import DistillConfig
    from redif_sdk.distill.student import distill

    pairs, _ = pool.get(teacher, DistillConfig().pool_size, "train", rebuild=rebuild_bank)
    presets = {count: _preset(count, len(steps)) for count in steps}
    whole = sum(preset.share for preset in presets.values())
    students: dict[int, Student] = {}
    for count, preset in presets.items():
        config = DistillConfig.checked(
            num_inference_steps=count,
            updates=updates or preset.updates,
            seconds=60 * minutes * preset.share / whole,
            seed=seed,
            **(COMMON | preset.settings),
        )
        before = students[max(students)] if students and preset.chained else None
        with report.part(f"redif: student of {count} step(s)") as show:
            students[count] = distill(teacher, config, start=before, pairs=pairs, on_progress=show)
            students[count].save_pretrained(output / f"student-{count}", overwrite=True)
    return students


def _evaluate(
    arena: Arena, students: dict[int, Student], steps: Sequence[int], show: Callable[[float, dict[str, float]], None]
) -> list[dict[str, Any]]:
    baselines = sorted({1, 2, 4, *steps})
    rows = [arena.teacher_row()]
    for done, count in enumerate(baselines):
        rows.append(arena.ddim_row(count))
        show((done + 1) / (len(baselines) + len(steps)), {})
    for done, count in enumerate(steps):
        rows.append(arena.student_row(students[count], count))
        show((done + 1 + len(baselines)) / (len(baselines) + len(steps)), {})
    return rows


def _noise(pipe: FastPipeline, count: int) -> NDArray[np.float32]:
    latents = pipe.manifest.latents
    return noise([(SHEET_SEED, i) for i in range(count)], (latents.channels, latents.height, latents.width))


def _title(name: str, pipe: FastPipeline, steps: int) -> str:
    calls = steps * pipe.manifest.network.calls_per_step
    return f"{name}: {calls} call{'s' * (calls > 1)}"


def _sheets(reference: FastPipeline, pipelines: dict[int, FastPipeline], teacher_steps: int) -> list[Sheet]:
    """For every K: the teacher, DDIM at K and the student, from the same noise, through the same runtime."""
    start, labels = _noise(reference, SHEET_IMAGES), np.arange(SHEET_IMAGES) % 10
    whole = reference.generate_array(start, labels, teacher_steps)
    return [
        Sheet(
            steps=count,
            rows=[
                (_title("teacher", reference, teacher_steps), whole),
                (_title("DDIM", reference, count), reference.generate_array(start, labels, count)),
                (_title("student", pipe, count), pipe.generate_array(start, labels, count)),
            ],
        )
        for count, pipe in pipelines.items()
    ]


def _speed(
    reference: FastPipeline, pipelines: dict[int, FastPipeline], teacher_steps: int, batches: Sequence[int] = (1, 8)
) -> list[dict[str, Any]]:
    """Seconds of each contender, interleaved: one round after another through all of them. Medians."""
    contenders = [("teacher", teacher_steps, reference)]
    contenders += [(f"student-{count}", count, pipe) for count, pipe in pipelines.items()]
    rows: list[dict[str, Any]] = []
    for batch in batches:
        start, labels = _noise(reference, batch), np.arange(batch) % 10
        times: dict[str, list[float]] = {name: [] for name, _, _ in contenders}
        for repeat in range(SPEED_ROUNDS + 1):
            for name, count, pipe in contenders:
                began = time.perf_counter()
                pipe.generate_array(start, labels, count)
                if repeat:  # the first round warms up
                    times[name].append(time.perf_counter() - began)
        slowest = statistics.median(times["teacher"])
        for name, count, pipe in contenders:
            median = statistics.median(times[name])
            rows.append(
                {
                    "contender": name,
                    "runtime": pipe.runtime_info["runtime"],
                    "precision": pipe.runtime_info["precision"],
                    "num_inference_steps": count,
                    "network_calls": count * pipe.manifest.network.calls_per_step,
                    "batch": batch,
                    "seconds_median": median,
                    "seconds_per_image": median / batch,
                    "images_per_second": batch / median,
                    "ratio": slowest / median,
                    "ratio_to": "teacher",
                }
            )
    return rows


def summarise(report: Reporter, results: dict[str, Any], output: Path, most: int) -> None:
    """The table, the seconds, and where to look."""
    from redif_sdk.distill.evaluation.arena import print_table

    if not report.console.quiet:
        print_table(results["rows"])
    report.console.print(f"{results['seconds']:.0f} s in all; open [bold]{output / 'report.html'}[/bold]")
    shown = output / f"student-{most}"
    report.console.print(f"try it in a page: redif demo {shown} --teacher {output / 'teacher'}", soft_wrap=True)
