"""Existing pipelines as students, without training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from redif_sdk.artifact.manifest import Manifest
from redif_sdk.distill.compute.device import chosen_device
from redif_sdk.distill.pool import compute
from redif_sdk.distill.student.base import Student
from redif_sdk.distill.student.decision import check_teacher
from redif_sdk.distill.teachers.base import Teacher
from redif_sdk.distill.teachers.own_scheduler import own_table
from redif_sdk.errors import InvalidRequest
from redif_sdk.models.denoiser import Denoiser

RANGED_ON = 32  # outputs on which the value range of a function is measured


def import_pipeline(
    source: Any,
    output: str | Path,
    steps: Sequence[int],
    *,
    guidance_scale: float | None = None,
    prompts: Sequence[str] | None = None,
    height: int | None = None,
    width: int | None = None,
    value_range: tuple[float, float] | None = None,
    variant: str | None = None,
    overwrite: bool = False,
) -> Manifest:
    """Any existing pipeline as a student, as it is: its weights, its guidance, and a table for each of ``steps``.

    Nothing is trained; a guided pipeline still makes two network calls a step. The tables are those of the pipeline's
    own scheduler where a table can say what it does (LCM, Euler, Euler ancestral, DDIM, flow matching), else DDIM with
    trailing spacing. ``guidance_scale`` replaces the pipeline's own: few-step pipelines are made for 1.
    ``value_range``: (low, high) of its images; None: diffusers' own [-1, 1], of a function the range of its outputs.
    ``prompts``: examples of what a text-to-image pipeline can draw, for its page and its check. ``variant``: of the
    weights in a folder, such as fp16.

    The pipeline itself is never changed.

    Raises:
        InvalidRequest: no steps, prompts that are missing, or a folder that exists already.
        UnsupportedModel: what `export` would refuse, and what cannot be sampled.
    """
    if not steps:
        raise InvalidRequest("no number of steps is given; name at least one, e.g. --steps 4")
    for count in steps:
        if count < 1:
            raise InvalidRequest(f"steps must be at least 1, not {count}")
    options = {"prompts": prompts, "height": height, "width": width, "value_range": value_range, "variant": variant}
    teacher = Teacher.load(source, **{name: value for name, value in options.items() if value is not None})
    if guidance_scale is not None:
        teacher = teacher.guided(guidance_scale)
    check_teacher(teacher, chosen_device("auto"))
    if not teacher.range_known:
        teacher = teacher.ranged_by(compute(teacher, RANGED_ON, "train").target)
    counts = list(dict.fromkeys(steps))
    own = [own_table(teacher, count) for count in counts]
    tables = [table or teacher.table(count) for table, count in zip(own, counts, strict=True)]
    network = teacher.make_student()
    if isinstance(network, Denoiser):
        network.guidance = teacher.guidance
    student = Student(teacher, network, tables, teacher.name)
    if None not in own and teacher.pipeline is not None:
        student.scheduler = teacher.pipeline.scheduler
    return student.save_pretrained(output, overwrite=overwrite)
