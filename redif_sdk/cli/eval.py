"""The command ``redif eval``. Torch is imported when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from redif_sdk.cli.terminal import Json, PromptFile, Quiet, StudentFolderArgument, TrainingDevice, teacher_options
from redif_sdk.errors import InvalidRequest, RedifError

if TYPE_CHECKING:
    from redif_sdk.distill.teachers.base import Teacher

__all__ = ["eval_command", "own_teacher"]

Against = Annotated[
    str | None,
    typer.Option(metavar="TEACHER", help="Teacher to compare with: a name or a folder; default: the student's own."),
]


def eval_command(
    student: StudentFolderArgument,
    against: Against = None,
    num_samples: Annotated[int, typer.Option(help="Held-out noises to judge on.")] = 2000,
    data: Annotated[str | None, typer.Option(help="Data set of real images to compare with: fashion-mnist.")] = None,
    unpaired: Annotated[
        bool,
        typer.Option(help="Also compare with the teacher's images of other noises, which are sampled if not kept."),
    ] = True,
    prompts: PromptFile = None,
    trained_prompts: Annotated[
        bool, typer.Option("--trained-prompts", help="Judge on prompts that were trained on, not on those held out.")
    ] = False,
    device: TrainingDevice = "auto",
    baselines: Annotated[bool, typer.Option(help="Also judge untrained DDIM at the same steps.")] = True,
    save: Annotated[
        bool, typer.Option("--save", help="Record the figures in the student's manifest and card.")
    ] = False,
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Judge a student against its teacher.

    Fréchet distances, controls, paired error, precision and recall, in features that gave no reward.
    """
    from redif_sdk.card.record import check_recordable, quality_rows, record
    from redif_sdk.distill.evaluation.arena import evaluate_folder, print_table
    from redif_sdk.progress import Progress
    from redif_sdk.results import document, write_json

    if save:
        check_recordable(student)
    teacher = against or own_teacher(student, prompts)
    progress = Progress(quiet)
    name = teacher if isinstance(teacher, str) else teacher.name
    progress.say(f"{student} against {name}: {num_samples} samples of each contender")
    with progress.stage("evaluate") as show:
        rows = evaluate_folder(
            student,
            teacher,
            num_samples,
            data=data,
            unpaired=unpaired,
            trained_prompts=trained_prompts or (against is None and prompts is not None),
            baselines=baselines,
            device=device,
            **({} if against is None else teacher_options(prompts)),
            on_progress=show,
        )
    if save:
        record(student, quality_rows(rows))
    if json:
        write_json(json, document("eval", rows))
    if not quiet and json != "-":
        print_table(rows)


def own_teacher(folder: Path, prompts: Path | None = None) -> Teacher:
    """The teacher that the student's manifest names, with the guidance that it was distilled with: one scale, or one of
    its own for each image, of the student's range.

    Raises:
        InvalidRequest: the manifest names no teacher, or one that cannot be loaded here, or was changed since.
    """
    from redif_sdk.artifact.folder import StudentFolder
    from redif_sdk.distill.teachers.base import Teacher
    from redif_sdk.distill.teachers.ranges import guided_over

    manifest = StudentFolder(folder).manifest
    origin = manifest.teacher
    if origin is None:
        raise InvalidRequest(f"the manifest of {folder} names no teacher; give one with --against TEACHER")
    try:
        teacher = Teacher.load(origin.id, **teacher_options(prompts))
    except RedifError as error:
        raise InvalidRequest(
            f"the teacher of {folder}, {origin.id!r}, cannot be loaded ({error}); give it with --against TEACHER"
        ) from error
    if origin.hash and teacher.fingerprint and origin.hash != teacher.fingerprint:
        raise InvalidRequest(
            f"{origin.id!r} is not the teacher that {folder} was made from: its files are others; give it with "
            "--against TEACHER"
        )
    if teacher.guidance_scale != origin.guidance_scale:
        teacher = teacher.guided(origin.guidance_scale)
    over = manifest.network.guidance_range
    return teacher if over is None else guided_over(teacher, *over)
