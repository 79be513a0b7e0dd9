"""``redif quickstart --text``: the main job on prompts. Distil the mini Stable Diffusion, export, verify, draw, report.

What it shares with the quickstart on classes (the bar, the tables, the report's page) is in `quickstart.py` and
`report.py`; it imports ``distill`` and ``export`` when it runs.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from redif_sdk.artifact.atomic import atomic_write
from redif_sdk.errors import InvalidRequest
from redif_sdk.pipeline import FastPipeline
from redif_sdk.progress import Progress, Show
from redif_sdk.quickstart.images import (
    checked_steps,
    distil,
    exported_with_teacher,
    plan,
    record_rows,
    say_plan,
    speed_of,
    summarise,
)
from redif_sdk.quickstart.reinforced import reinforced
from redif_sdk.quickstart.report import Sheet, grid, render, strip
from redif_sdk.results import document, write_json

if TYPE_CHECKING:
    from redif_sdk.distill.config import DistillConfig
    from redif_sdk.distill.evaluation.arena import Arena
    from redif_sdk.distill.student import Student
    from redif_sdk.distill.teachers.base import Teacher

TEACHER = "mini-sd"
PROMPT = "red heart"
PROMPTS_FILE = "prompts.json"  # beside the teacher: what its card's grid shows
SHEET_SEED = 7
COLUMNS = 10


def text_quickstart(
    output: Path,
    *,
    steps: Sequence[int],
    minutes: float,
    updates: int | None,
    num_samples: int,
    seed: int,
    quiet: bool,
    teacher: str = TEACHER,
    trained: bool = False,
    preset: str = "fast",
) -> dict[str, Any]:
    """Run the whole job into ``output``; returns the contents of ``results.json``.

    Args:
        output, steps, minutes, updates, num_samples, seed, quiet, preset: as of the quickstart on classes.
        teacher: a shipped text-to-image teacher, or a folder.
        trained: nothing is distilled here; the students are those that lie beside the teacher.

    Raises:
        InvalidRequest: a number of steps below 1, no minutes to train in, an unknown preset, no such teacher, or no
            student beside it.
        ParityError: an exported student does not compute what torch computes.
    """
    steps = checked_steps(output, steps, minutes)
    report, began = Progress(quiet), time.monotonic()
    say_plan(report, teacher, steps, preset, minutes)
    from redif_sdk.distill.shipped.students import shipped_student
    from redif_sdk.distill.teachers.base import Teacher

    # each begins with the weights of the one of more steps
    configs = plan(sorted(steps, reverse=True), preset, seed=seed, updates=updates, text=True)
    output.mkdir(parents=True, exist_ok=True)
    model = Teacher.load(teacher)
    if model.prompts is None:
        raise InvalidRequest(f"{teacher} draws no prompts; give a text-to-image teacher, or leave --text out")
    shipped = {count: shipped_student(model, count) for count in steps} if trained else {}
    with report.stage("teacher: outputs, judge"):
        arena = _arena(model, num_samples)
    for count, student in shipped.items():
        student.save_pretrained(output / f"student-{count}", overwrite=True)
    students = shipped or _distil(model, configs, output, minutes, report)
    with report.stage("export and verify"):
        verification = exported_with_teacher(model, output, steps)
    with report.stage("reinforced by a reward that sees the prompt"):
        third = reinforced(model, steps, output, trained=trained)
        verification += third.verification if third else []
    with report.stage("evaluate") as show:
        rows = _evaluate(arena, students, steps, show)
        floor = arena.floor()
    with report.stage("draw and time"):
        pipelines = {count: FastPipeline.from_pretrained(output / f"student-{count}") for count in steps}
        reference = FastPipeline.from_pretrained(output / "teacher")
        prompts = shown_prompts(model)
        sheets = _sheets(reference, pipelines, prompts, model.num_inference_steps)
        act = third.sheet(sheets[0].rows[0], partial(_of_prompts, prompts)) if third else None
        speed = speed_of(reference, pipelines, model.num_inference_steps, _call)
        _save_strips(pipelines, seed, output)
    record_rows(output, steps, rows, speed)
    seconds = round(time.monotonic() - began, 1)
    results = document(
        "quickstart --text",
        rows,
        speed=speed,
        verification=verification,
        seconds=seconds,
        seconds_by_part=report.seconds,
        fd_teacher_floor=floor,
        prompts=prompts,
        trained=trained,
        preset=preset,
        reinforced=third.record() if third else None,
        stopped={f"student-{count}": student.stopped for count, student in students.items() if student.stopped},
    )
    _write(output, results, sheets, act, prompts)
    summarise(report, results, output, steps[-1])
    if third:
        report.say(third.said())
    return results


def _arena(teacher: Teacher, num_samples: int) -> Arena:
    """The judge, on prompts that nothing was trained on."""
    from redif_sdk.distill.evaluation.arena import Arena, on_held_out  # imports torch, which takes seconds

    judged, which = on_held_out(teacher)
    arena = Arena.of(judged, num_samples)
    arena.prompts = which
    return arena


def _save_strips(pipelines: dict[int, FastPipeline], seed: int, output: Path) -> None:
    for count, pipe in pipelines.items():
        images = pipe(PROMPT, num_images_per_prompt=4, seed=seed, output_type="uint8").images
        strip(images).save(output / f"student-{count}.png")


def _write(
    output: Path, results: dict[str, Any], sheets: Sequence[Sheet], act: Sheet | None, prompts: Sequence[str]
) -> None:
    """The results, a grid of all prompts for each student and for the third act, and the report."""
    write_json(output / "results.json", results)
    for sheet in sheets:
        grid(sheet, prompts, COLUMNS).save(output / f"prompts-{sheet.steps}.png", optimize=True)
    if act is not None:
        grid(act, prompts, COLUMNS).save(output / f"reinforced-{act.steps}.png", optimize=True)
    page = render(results, [_begin(sheet) for sheet in sheets], _begin(act) if act else None)
    atomic_write(output / "report.html", page.encode())


def _begin(sheet: Sheet) -> Sheet:
    """What the page shows of a sheet."""
    return Sheet(sheet.steps, [(title, images[:COLUMNS]) for title, images in sheet.rows])


def _evaluate(arena: Arena, students: dict[int, Student], steps: Sequence[int], show: Show) -> list[dict[str, Any]]:
    """The teacher, and for each K untrained DDIM at K and 2 K steps and the student, on the arena's prompts."""
    rows = [arena.teacher_row()]
    for place, count in enumerate(steps):
        for more in dict.fromkeys((count, 2 * count)):
            if all(row["num_inference_steps"] != more or row["method"] != "ddim" for row in rows):
                rows.append(arena.ddim_row(more))
        students[count].use_rows(arena.teacher.rows)
        rows.append(arena.student_row(students[count], count))
        show((place + 1) / len(steps))
    return rows


def shown_prompts(teacher: Teacher) -> list[str]:
    """The prompts of the teacher's grid, held-out compositions among them; else the first that it is distilled on."""
    if teacher.folder is not None and (teacher.folder / PROMPTS_FILE).is_file():
        entries = json.loads((teacher.folder / PROMPTS_FILE).read_text())
        return [entry if isinstance(entry, str) else str(entry["prompt"]) for entry in entries]
    assert teacher.prompts is not None
    return teacher.prompts.texts[:60]


def _distil(
    teacher: Teacher, configs: dict[int, DistillConfig], output: Path, minutes: float, report: Progress
) -> dict[int, Student]:
    from redif_sdk.distill import pool
    from redif_sdk.distill.compute.device import chosen_device

    size = max(config.pool_size for config in configs.values())
    with report.stage("teacher: the pool") as show:
        done = 0

        def made(count: int) -> None:
            nonlocal done
            done += count
            show(done / size)

        pairs, _ = pool.get(teacher, size, "train", device=chosen_device("auto"), path=True, on_batch=made)
    return distil(teacher, configs, output, 60 * minutes, pairs, report)


def _of_prompts(prompts: Sequence[str], pipe: FastPipeline, steps: int) -> NDArray[np.uint8]:
    """Image i from seed (SHEET_SEED, i), a few prompts at a time."""
    parts = []
    for low in range(0, len(prompts), COLUMNS):
        part = list(prompts[low : low + COLUMNS])
        seeds = [(SHEET_SEED, low + place) for place in range(len(part))]
        parts.append(pipe(part, seed=seeds, num_inference_steps=steps, output_type="uint8").images)
    return np.concatenate(parts)


def _sheets(
    reference: FastPipeline, pipelines: dict[int, FastPipeline], prompts: Sequence[str], teacher_steps: int
) -> list[Sheet]:
    whole = _of_prompts(prompts, reference, teacher_steps)
    calls = reference.manifest.network.calls_per_step
    return [
        Sheet(
            steps=count,
            rows=[
                (f"teacher: {teacher_steps * calls} calls", whole),
                (f"DDIM: {count * calls} calls", _of_prompts(prompts, reference, count)),
                (f"student: {count} call{'s' * (count > 1)}", _of_prompts(prompts, pipe, count)),
            ],
        )
        for count, pipe in pipelines.items()
    ]


def _call(pipe: FastPipeline, steps: int, batch: int) -> Callable[[], object]:
    """From prompt to images."""
    return partial(pipe, PROMPT, num_images_per_prompt=batch, seed=0, num_inference_steps=steps)
