"""The README's main job, end to end: distil the shipped teacher, export, verify, generate, evaluate, report.

It only strings together what the other commands do one by one, and imports ``distill`` and ``export`` when it runs.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from redif_sdk.artifact.atomic import atomic_write
from redif_sdk.bench.interleave import interleave
from redif_sdk.card.record import quality_rows, record, speed_rows
from redif_sdk.card.render import read_card
from redif_sdk.card.sections import user_sections
from redif_sdk.errors import InvalidRequest, WorseThanStart
from redif_sdk.pipeline import FastPipeline
from redif_sdk.progress import Progress, Show
from redif_sdk.quickstart.report import Sheet, poster, render, strip
from redif_sdk.results import document, write_json
from redif_sdk.sampling.noise import noise

if TYPE_CHECKING:
    from redif_sdk.distill.config import DistillConfig
    from redif_sdk.distill.evaluation.arena import Arena
    from redif_sdk.distill.pool import Pairs
    from redif_sdk.distill.student import Student
    from redif_sdk.distill.teachers.base import Teacher

#: The engine that the gate looks at, and that the report times; `redif verify` looks at all that are here.
GATE = ("onnxruntime",)
TEACHER = "fashion-mnist"
SHEET_SEED = 7  # of the images in the report: neither a training nor a judging noise
SHEET_IMAGES = 20
SPEED_ROUNDS = 5
PREVIEW = 10  # images of a student that was just trained


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
    preset: str = "fast",
) -> dict[str, Any]:
    """Run the whole job into ``output``; returns the contents of ``results.json``.

    Args:
        output: folder of the students, the report and the results; what is in it is overwritten.
        steps: num_inference_steps of the students to make.
        minutes: limit on all of the training. It is there for slow machines: a student that it cuts says so.
        updates: of each student, in place of the preset's.
        num_samples: held-out noises to judge on.
        seed: of every draw.
        rebuild_bank: sample the teacher anew.
        quiet: print nothing.
        preset: "fast", "balanced" or "best", as in ``redif distill --preset``.

    Raises:
        InvalidRequest: a number of steps below 1, no minutes to train in, or an unknown preset.
        ParityError: an exported student does not compute what torch computes.
    """
    steps = checked_steps(output, steps, minutes)
    report, began = Progress(quiet), time.monotonic()
    say_plan(report, TEACHER, steps, preset, minutes)
    from redif_sdk.distill import pool  # imports torch, which takes seconds
    from redif_sdk.distill.evaluation.arena import Arena
    from redif_sdk.distill.teachers.base import Teacher

    # Students of four and more steps are nearly the teacher: seconds of training, and there is something to look at.
    order = sorted(steps, key=lambda count: (count < 4, count))
    configs = plan(order, preset, seed=seed, updates=updates)
    output.mkdir(parents=True, exist_ok=True)
    teacher = Teacher.load(TEACHER)
    with report.stage("teacher: outputs, judge"):
        arena = Arena.of(teacher, num_samples, rebuild=rebuild_bank)
    pairs, _ = pool.get(teacher, configs[steps[0]].pool_size, "train", rebuild=rebuild_bank)
    students = distil(teacher, configs, output, 60 * minutes, pairs, report)
    with report.stage("export and verify"):
        verification = exported_with_teacher(teacher, output, steps)
    with report.stage("evaluate") as show:
        rows = _evaluate(arena, students, steps, show)
    with report.stage("generate and time"):
        pipelines = {count: FastPipeline.from_pretrained(output / f"student-{count}") for count in steps}
        reference = FastPipeline.from_pretrained(output / "teacher")
        sheets = _sheets(reference, pipelines, teacher.num_inference_steps)
        speed = speed_of(reference, pipelines, teacher.num_inference_steps, _call)
        for count, pipe in pipelines.items():
            images = pipe(class_labels=list(range(10)), seed=seed, output_type="uint8").images
            strip(images).save(output / f"student-{count}.png")
    record_rows(output, steps, rows, speed)
    results = document(
        "quickstart",
        rows,
        speed=speed,
        verification=verification,
        seconds=round(time.monotonic() - began, 1),
        seconds_by_part=report.seconds,
        fd_teacher_floor=arena.floor(),
        preset=preset,
        stopped={f"student-{count}": student.stopped for count, student in students.items() if student.stopped},
    )
    write_json(output / "results.json", results)
    poster(sheets).save(output / "samples.png", optimize=True)
    atomic_write(output / "report.html", render(results, sheets).encode())
    summarise(report, results, output, steps[-1])
    return results


def say_plan(report: Progress, teacher: str, steps: Sequence[int], preset: str, minutes: float) -> None:
    """What will be done, before anything that takes time."""
    counts = ", ".join(map(str, steps))
    report.say(f"{teacher}: students of {counts} step(s), preset {preset}, at most {minutes:g} min of training")


def checked_steps(output: Path, steps: Sequence[int], minutes: float) -> list[int]:
    """``steps`` sorted, each once, after all has been checked that can be before the work.

    Raises:
        InvalidRequest: a number of steps below 1, no minutes to train in, or a card whose sections are malformed.
    """
    if not steps or any(count < 1 for count in steps):
        raise InvalidRequest(f"steps must be whole numbers from 1 up, not {list(steps)}")
    if minutes <= 0:
        raise InvalidRequest(f"minutes must be above 0, not {minutes:g}")
    for count in steps:
        user_sections(read_card(output / f"student-{count}") or "")  # malformed ones are refused before the work
    return sorted(set(steps))


def record_rows(
    output: Path, steps: Sequence[int], rows: Sequence[dict[str, Any]], speed: Sequence[dict[str, Any]]
) -> None:
    """Put quality and speed into the manifests and cards of ``output``'s students."""
    for count in steps:
        own = [row for row in speed if row["contender"] in ("teacher", f"student-{count}")]
        record(output / f"student-{count}", [*quality_rows(rows, count), *speed_rows(own)])


def plan(
    steps: Sequence[int], preset: str, *, seed: int = 0, updates: int | None = None, text: bool = False
) -> dict[int, DistillConfig]:
    """num_inference_steps -> settings: exactly those of ``redif distill --preset PRESET --steps K``.

    Args:
        steps: num_inference_steps of the students.
        preset: "fast", "balanced" or "best".
        seed: of every draw.
        updates: of each student, in place of the preset's.
        text: the teacher is a text-to-image model.
    """
    from redif_sdk.distill.presets import resolve

    given = {"seed": seed} | ({"updates": updates} if updates else {})
    return {count: resolve({**given, "num_inference_steps": count}, name=preset, text=text) for count in steps}


def distil(
    teacher: Teacher,
    configs: dict[int, DistillConfig],
    output: Path,
    seconds: float,
    pairs: Pairs,
    report: Progress,
) -> dict[int, Student]:
    """A student for each of ``configs``, in their order, each from the weights of the one before; saved and shown.

    Args:
        teacher: what they are distilled from.
        configs: num_inference_steps -> settings.
        output: their folders, ``student-K``, and images, ``student-K.png``, go here.
        seconds: limit on all of the training; each gets the share of what is left that its cost is of what is left.
        pairs: the pool.
        report: shows the progress.
    """
    from redif_sdk.distill.student import distill

    costs = {count: (config.updates or 1) * config.batch_size * (count + 2) for count, config in configs.items()}
    students: dict[int, Student] = {}
    before: Student | None = None
    for count, config in configs.items():
        began, share = time.monotonic(), costs[count] / sum(costs[other] for other in configs if other not in students)
        limited = config.model_copy(update={"seconds": max(1.0, seconds * share)})
        with report.stage(f"redif: student of {count} step(s)") as show:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", WorseThanStart)  # said below
                before = students[count] = distill(teacher, limited, start=before, pairs=pairs, on_progress=show)
            before.save_pretrained(output / f"student-{count}", overwrite=True)
        seconds -= time.monotonic() - began
        if before.stopped:
            report.say(f"WARNING: student-{count}: {before.stopped} (--minutes)")
        if before.worse or before.note:
            report.say(f"WARNING: student-{count}: {before.worse or before.note}")
        strip(before.images(config.seed, PREVIEW)).save(output / f"student-{count}.png")
        report.say(f"first images of student-{count}: {output / f'student-{count}.png'}")
    return students


def exported_with_teacher(teacher: Teacher, output: Path, steps: Sequence[int]) -> list[dict[str, Any]]:
    """Export ``output``'s students, and the teacher beside them for comparison; returns the rows of their checks.

    Raises:
        ParityError: an exported network does not compute what torch computes.
    """
    from redif_sdk.distill.student import import_pipeline
    from redif_sdk.export import export

    original = output / "teacher"
    import_pipeline(teacher, original, [teacher.num_inference_steps, *steps], overwrite=True)
    export(original, runtimes=GATE)
    return exported(output, [f"student-{count}" for count in steps])


def exported(output: Path, names: Iterable[str]) -> list[dict[str, Any]]:
    """Export the students in ``output`` of these names; returns the rows of their checks.

    Raises:
        ParityError: an exported network does not compute what torch computes.
    """
    from redif_sdk.export import export

    rows: list[dict[str, Any]] = []
    for name in names:
        rows += [{"student": name, **row} for row in export(output / name, runtimes=GATE).verification]
    return rows


def _evaluate(arena: Arena, students: dict[int, Student], steps: Sequence[int], show: Show) -> list[dict[str, Any]]:
    baselines = sorted({1, 2, 4, *steps})
    rows = [arena.teacher_row()]
    for done, count in enumerate(baselines):
        rows.append(arena.ddim_row(count))
        show((done + 1) / (len(baselines) + len(steps)))
    for done, count in enumerate(steps):
        rows.append(arena.student_row(students[count], count))
        show((done + 1 + len(baselines)) / (len(baselines) + len(steps)))
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


def speed_of(
    reference: FastPipeline,
    pipelines: dict[int, FastPipeline],
    teacher_steps: int,
    call: Callable[[FastPipeline, int, int], Callable[[], object]],
    batches: Sequence[int] = (1, 8),
) -> list[dict[str, Any]]:
    """Rows of seconds for the teacher and its students, interleaved at each batch size; medians.

    Args:
        call: makes of a pipeline, its steps and a batch size what is timed.
    """
    contenders = {"teacher": (reference, teacher_steps)}
    contenders |= {f"student-{count}": (pipe, count) for count, pipe in pipelines.items()}
    rows: list[dict[str, Any]] = []
    for batch in batches:
        calls = {name: call(pipe, steps, batch) for name, (pipe, steps) in contenders.items()}
        rows += _timed_rows(contenders, calls, batch)
    return rows


def _call(pipe: FastPipeline, steps: int, batch: int) -> Callable[[], object]:
    return partial(pipe.generate_array, _noise(pipe, batch), np.arange(batch) % 10, steps)


def _timed_rows(
    contenders: Mapping[str, tuple[FastPipeline, int]], calls: Mapping[str, Callable[[], object]], batch: int
) -> list[dict[str, Any]]:
    """Time `calls` in interleaved rounds: one row per (pipeline, steps), with medians and ratios to "teacher"."""
    turns = interleave(calls, SPEED_ROUNDS)
    medians = {name: statistics.median(seconds for turn in found for seconds in turn) for name, found in turns.items()}
    return [
        {
            "contender": name,
            "runtime": pipe.runtime_info["runtime"],
            "precision": pipe.runtime_info["precision"],
            "num_inference_steps": count,
            "network_calls": count * pipe.manifest.network.calls_per_step,
            "batch": batch,
            "seconds_median": medians[name],
            "seconds_per_image": medians[name] / batch,
            "images_per_second": batch / medians[name],
            "ratio": medians["teacher"] / medians[name],
            "ratio_to": "teacher",
        }
        for name, (pipe, count) in contenders.items()
    ]


def summarise(report: Progress, results: dict[str, Any], output: Path, most: int) -> None:
    """The table, the seconds, and where to look."""
    from redif_sdk.distill.evaluation.arena import print_table

    if not report.quiet:
        print_table(results["rows"])
    report.say(f"{results['seconds']:.0f} s in all; open {output / 'report.html'}")
    report.say(f"try it in a page: redif demo {output / f'student-{most}'} --teacher {output / 'teacher'}")
