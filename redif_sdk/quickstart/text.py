"""``redif quickstart --text``: the main job on prompts. Distil the mini Stable Diffusion, export, verify, draw, report.

What it shares with the quickstart on classes (the bar, the tables, the report's page) is in `quickstart.py` and
`report.py`; it imports ``distill`` and ``export`` when it runs.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from redif_sdk.artifact.atomic import atomic_write
from redif_sdk.card.record import quality_rows, record, speed_rows
from redif_sdk.card.render import read_card, user_sections
from redif_sdk.errors import InvalidRequest
from redif_sdk.pipeline import FastPipeline
from redif_sdk.quickstart.images import GATE, SPEED_ROUNDS, Reporter, summarise
from redif_sdk.quickstart.report import Sheet, grid, render, strip
from redif_sdk.results import document, write_json

if TYPE_CHECKING:
    from redif_sdk.distill.student import Student
    from redif_sdk.distill.teachers.base import Teacher

TEACHER = "mini-sd"
PROMPT = "red heart"
PROMPTS_FILE = "prompts.json"  # beside the teacher: what its card's grid shows
SHEET_SEED = 7
COLUMNS = 10

SHARES, OTHERS = {1: 0.3, 2: 0.4, 4: 0.6}, 0.6  # K -> share of the minutes
#: Over the preset "best"; chosen as docs/text-to-image.md says.
SETTINGS: dict[str, Any] = {
    "learning_rate": 4e-4,
    "schedule_updates": 20,
    "segments": 0.7,
    "warm_start": 0.85,
    "regression_last_k": 0,
    "step_delta": 0.4,
    "reward_space": "latents",
    "reward": "texture",
    "calibration": 0,
}
POOL, POOL_MINUTES, LARGEST_POOL = 2048, 10, 8192  # pairs for each ten minutes: a small pool would be learnt by heart


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
) -> dict[str, Any]:
    """Run the whole job into ``output``; returns the contents of ``results.json``.

    ``trained``: nothing is distilled here; the students are those that lie beside the teacher.

    Raises:
        InvalidRequest: a number of steps below 1, no minutes to train in, no such teacher, or no student beside it.
        ParityError: an exported student does not compute what torch computes.
    """
    from redif_sdk.distill.evaluation.arena import Arena
    from redif_sdk.distill.shipped.students import shipped_student
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
    model = Teacher.load(teacher)
    if model.prompts is None:
        raise InvalidRequest(f"{teacher} draws no prompts; give a text-to-image teacher, or leave --text out")
    shipped = {count: shipped_student(model, count) for count in steps} if trained else {}
    with report.part("teacher: outputs, judge"):
        arena = Arena.of(model, num_samples)
    for count, student in shipped.items():
        student.save_pretrained(output / f"student-{count}", overwrite=True)
    students = shipped or _distil(model, output, steps, minutes, updates, seed, report)
    verification: list[dict[str, Any]] = []
    with report.part("export and verify"):
        original = output / "teacher"
        import_pipeline(model, original, [model.num_inference_steps, *steps], overwrite=True)
        export(original, runtimes=GATE)
        for count in steps:
            manifest = export(output / f"student-{count}", runtimes=GATE)
            verification += [{"student": f"student-{count}", **row} for row in manifest.verification]
    with report.part("evaluate") as show:
        rows = [arena.teacher_row()]
        for place, count in enumerate(steps):
            for more in dict.fromkeys((count, 2 * count)):
                if all(row["num_inference_steps"] != more or row["method"] != "ddim" for row in rows):
                    rows.append(arena.ddim_row(more))
            rows.append(arena.student_row(students[count], count))
            show((place + 1) / len(steps), {})
        floor = arena.floor()
    with report.part("draw and time"):
        pipelines = {count: FastPipeline.from_pretrained(output / f"student-{count}") for count in steps}
        reference = FastPipeline.from_pretrained(original)
        prompts = shown_prompts(model)
        sheets = _sheets(reference, pipelines, prompts, model.num_inference_steps)
        speed = _speed(reference, pipelines, model.num_inference_steps)
        for count, pipe in pipelines.items():
            hearts = pipe(PROMPT, num_images_per_prompt=4, seed=seed, output_type="uint8").images
            strip(hearts).save(output / f"student-{count}.png")
    for count in steps:
        own = [row for row in speed if row["contender"] in ("teacher", f"student-{count}")]
        record(output / f"student-{count}", [*quality_rows(rows, count), *speed_rows(own)])
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
    )
    write_json(output / "results.json", results)
    for sheet in sheets:
        grid(sheet, prompts, COLUMNS).save(output / f"prompts-{sheet.steps}.png", optimize=True)
    shown = [Sheet(sheet.steps, [(title, images[:COLUMNS]) for title, images in sheet.rows]) for sheet in sheets]
    atomic_write(output / "report.html", render(results, shown).encode())
    summarise(report, results, output, steps[-1])
    return results


def shown_prompts(teacher: Teacher) -> list[str]:
    """The prompts of the teacher's grid, held-out compositions among them; else the first that it is distilled on."""
    if teacher.folder is not None and (teacher.folder / PROMPTS_FILE).is_file():
        entries = json.loads((teacher.folder / PROMPTS_FILE).read_text())
        return [entry if isinstance(entry, str) else str(entry["prompt"]) for entry in entries]
    assert teacher.prompts is not None
    return teacher.prompts.texts[:60]


def _distil(
    teacher: Teacher,
    output: Path,
    steps: Sequence[int],
    minutes: float,
    updates: int | None,
    seed: int,
    report: Reporter,
) -> dict[int, Student]:
    from redif_sdk.distill import pool
    from redif_sdk.distill.compute.device import chosen_device
    from redif_sdk.distill.presets import resolve
    from redif_sdk.distill.student import distill

    shares = {count: SHARES.get(count, OTHERS) for count in sorted(steps, reverse=True)}
    size = min(LARGEST_POOL, POOL * math.ceil(minutes / POOL_MINUTES))
    with report.part("teacher: the pool") as show:
        done = 0

        def made(count: int) -> None:
            nonlocal done
            done += count
            show(done / size, {})

        pairs, _ = pool.get(teacher, size, "train", device=chosen_device("auto"), path=True, on_batch=made)
    students: dict[int, Student] = {}
    before: Student | None = None  # each begins with the weights of the one of more steps
    for count, share in shares.items():
        budget = {"seconds": 60 * minutes * share / sum(shares.values())} | ({"updates": updates} if updates else {})
        asked = {"num_inference_steps": count, "seed": seed, "pool_size": size, **SETTINGS, **budget}
        config = resolve(asked, name="best")
        with report.part(f"redif: student of {count} step(s)") as show:
            students[count] = before = distill(teacher, config, start=before, pairs=pairs, on_progress=show)
            students[count].save_pretrained(output / f"student-{count}", overwrite=True)
    return students


def _pictures(pipe: FastPipeline, prompts: Sequence[str], steps: int) -> NDArray[np.uint8]:
    """Picture i from seed (SHEET_SEED, i), a few prompts at a time."""
    parts = []
    for low in range(0, len(prompts), COLUMNS):
        part = list(prompts[low : low + COLUMNS])
        seeds = [(SHEET_SEED, low + place) for place in range(len(part))]
        parts.append(pipe(part, seed=seeds, num_inference_steps=steps, output_type="uint8").images)
    return np.concatenate(parts)


def _sheets(
    reference: FastPipeline, pipelines: dict[int, FastPipeline], prompts: Sequence[str], teacher_steps: int
) -> list[Sheet]:
    whole = _pictures(reference, prompts, teacher_steps)
    calls = reference.manifest.network.calls_per_step
    return [
        Sheet(
            steps=count,
            rows=[
                (f"teacher: {teacher_steps * calls} calls", whole),
                (f"DDIM: {count * calls} calls", _pictures(reference, prompts, count)),
                (f"student: {count} call{'s' * (count > 1)}", _pictures(pipe, prompts, count)),
            ],
        )
        for count, pipe in pipelines.items()
    ]


def _speed(
    reference: FastPipeline, pipelines: dict[int, FastPipeline], teacher_steps: int, batches: Sequence[int] = (1, 8)
) -> list[dict[str, Any]]:
    """Seconds from prompt to pictures of each contender, all of them exported and interleaved. Medians."""
    contenders = [("teacher", teacher_steps, reference)]
    contenders += [(f"student-{count}", count, pipe) for count, pipe in pipelines.items()]
    rows: list[dict[str, Any]] = []
    for batch in batches:
        times: dict[str, list[float]] = {name: [] for name, _, _ in contenders}
        for repeat in range(SPEED_ROUNDS + 1):
            for name, count, pipe in contenders:
                began = time.perf_counter()
                pipe(PROMPT, num_images_per_prompt=batch, seed=0, num_inference_steps=count)
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
