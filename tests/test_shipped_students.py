"""The students that lie beside mini-sd: are they better than the guided teacher at twice their steps, and its own?"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pipelines
import pytest
import torch

from redif_sdk.distill import pool
from redif_sdk.distill.evaluation.arena import outputs
from redif_sdk.distill.presets import resolve
from redif_sdk.distill.shipped.students import keep, shipped_steps, shipped_student
from redif_sdk.distill.student import distill
from redif_sdk.distill.teachers.base import Teacher
from redif_sdk.errors import InvalidRequest

JUDGED = 96  # held-out noises


@pytest.fixture(scope="module")
def mini_sd() -> Teacher:
    return Teacher.load("mini-sd")


@pytest.mark.parametrize("steps", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_they_are_nearer_to_the_teacher_than_ddim_at_twice_the_steps(mini_sd: Teacher, steps: int) -> None:
    pairs, _ = pool.get(mini_sd, JUDGED, "held_out")
    student = shipped_student(mini_sd, steps)
    assert student.calls_per_step == 1
    assert student.distillation is not None
    assert student.distillation.method == "redif"
    ours = outputs(student.policy().sample, pairs)
    ddim = outputs(partial(mini_sd.few_steps, num_inference_steps=2 * steps), pairs)
    error, bound = (((latents - pairs.target) ** 2).mean().item() for latents in (ours, ddim))
    assert error < bound


def test_what_is_not_there_is_refused_with_what_is(mini_sd: Teacher) -> None:
    assert shipped_steps(mini_sd) == [2, 4]
    with pytest.raises(
        InvalidRequest, match=r"no student of 3 step\(s\) comes with mini-sd \(those of 2, 4 steps do\)"
    ):
        shipped_student(mini_sd, 3)
    with pytest.raises(InvalidRequest, match="of other guidance"):
        shipped_student(mini_sd.guided(5.0), 4)


def test_a_student_that_is_kept_comes_back_as_it_was(mini_sd: Teacher, tmp_path: Path) -> None:
    teacher = Teacher.load(pipelines.tiny_sd(tmp_path / "teacher"))
    asked = {"num_inference_steps": 2, "updates": 2, "pool_size": 32, "schedule_updates": 0, "calibration": 0}
    student = distill(teacher, resolve(asked, name="fast"))
    student.save_pretrained(tmp_path / "student")
    keep(tmp_path / "student", teacher)
    again = shipped_student(teacher, 2)
    pairs, _ = pool.get(teacher, 8, "held_out")
    assert torch.allclose(outputs(again.policy().sample, pairs), outputs(student.policy().sample, pairs), atol=0.02)
    assert again.distillation == student.distillation
    with pytest.raises(InvalidRequest, match="no distilled student of mini-sd"):
        keep(tmp_path / "student", mini_sd)
    (tmp_path / "teacher/students/2/student.json").write_text("{}")
    with pytest.raises(InvalidRequest, match="holds no student"):
        shipped_student(teacher, 2)
