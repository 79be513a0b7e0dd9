"""Teachers that are guided by a scale of its own for each image, so that a student learns a range of scales."""

from __future__ import annotations

from dataclasses import replace

from redif_sdk.distill.config import check_range
from redif_sdk.distill.teachers.base import Teacher
from redif_sdk.errors import UnsupportedModel
from redif_sdk.models.denoiser import StudentOf
from redif_sdk.models.hollow import is_streamed

__all__ = ["guided_over"]


def guided_over(teacher: Teacher, low: float, high: float) -> Teacher:
    """``teacher`` with a guidance scale for each image, from ``low`` to ``high``; its student takes the scale as an
    input (Meng et al. 2023, arXiv 2210.03142, section 3.1).

    `Teacher.labels` draws the scales, uniformly. What is asked for without one has the teacher's own scale, or the
    middle of the range where that lies outside.

    Raises:
        InvalidRequest: no range, or the teacher cannot be guided.
        UnsupportedModel: the student's network cannot take the scale.
    """
    if teacher.guidance_range == (low, high):
        return teacher
    check_range(low, high)
    own = teacher.guidance_scale
    default = own if low <= own <= high and own != 1 else (low + high) / 2
    made = teacher.guided(default)
    if not isinstance(teacher.make_student, StudentOf) or is_streamed(teacher.make_student.network):
        raise UnsupportedModel(
            f"the student of {teacher.name} is no copy of a network of diffusers, so it cannot be given an input for "
            "the guidance scale; leave guidance_range out"
        )
    return replace(made, guidance_range=(low, high), make_student=teacher.make_student.over(low, high, default))
