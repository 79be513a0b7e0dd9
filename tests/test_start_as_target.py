"""Reinforcement from a start whose own outputs are the targets: no call of the teacher, and a leash to where it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from redif_sdk.cli.main import app, main
from redif_sdk.distill import DistillConfig, Student, Teacher, distill
from redif_sdk.distill.presets import resolve
from redif_sdk.distill.rewards.batch import Batch
from redif_sdk.distill.student import sample_pool
from redif_sdk.distill.training.estimate import estimate
from redif_sdk.errors import InvalidRequest

SMALL: dict[str, Any] = {"num_inference_steps": 2, "pool_size": 32, "batch_size": 8, "group_size": 4, "updates": 6}
OWN: dict[str, Any] = {**SMALL, "targets": "start", "warm_start": 0.0, "schedule_updates": 0, "keep": "last"}


def bright(batch: Batch) -> Tensor:
    return batch.images.mean((1, 2, 3))


@pytest.fixture(scope="module")
def start(teacher_folder: Path) -> Student:
    settings = {name: value for name, value in SMALL.items() if name != "group_size"}
    return distill(teacher_folder, DistillConfig(method="regression", **settings), progress=False)


def outputs(student: Student) -> Tensor:
    with torch.no_grad():
        noise = torch.randn(16, *student.teacher.shape, generator=torch.Generator().manual_seed(3))
        return student.policy().sample(noise, student.teacher.labels(np.arange(16)))


def test_a_reward_moves_the_start_and_regression_holds_it(teacher_folder: Path, start: Student) -> None:
    """Without a call of the teacher; what the pool took of the student is in its budget."""
    before = {name: value.clone() for name, value in start.network.state_dict().items()}
    far = []
    for weight in (0.0, 100.0):
        config = DistillConfig(**OWN, reward=bright, regression_weight=weight)
        student = distill(teacher_folder, config, start=start, progress=False)
        far.append(float((outputs(student) - outputs(start)).square().mean()))
        assert student.distillation is not None
        budget = student.distillation.budget
        assert budget.teacher_calls == 0
        assert budget.student_calls == 32 * 2 + 80  # the pool, and six updates
        assert student.distillation.configuration["targets"] == "start"
        assert not student.worse
    assert far[1] < far[0] / 4
    assert all(torch.equal(value, before[name]) for name, value in start.network.state_dict().items())


def test_targets_are_the_outputs_of_the_start(teacher_folder: Path, start: Student, tmp_path: Path) -> None:
    """So its error is 0 before the first update; the teacher's targets are further off."""
    for targets, error in (("start", 0.0), ("teacher", None)):
        config = DistillConfig(**{**OWN, "targets": targets}, reward=bright)
        student = distill(teacher_folder, config, start=start, folder=tmp_path / targets, progress=False)
        assert student.distillation is not None
        checks = student.distillation.checks
        assert checks is not None
        assert (checks.start.error < 1e-9) == (error == 0.0)


def test_what_has_nothing_to_learn_from_a_start_is_refused(teacher_folder: Path, start: Student) -> None:
    with pytest.raises(InvalidRequest, match=r"targets is start, whose outputs make the pool; give the start too"):
        distill(teacher_folder, DistillConfig(**OWN, reward=bright))
    with pytest.raises(InvalidRequest, match="so the pool is made in the run; give distill the start"):
        sample_pool(Teacher.load(teacher_folder), DistillConfig(**OWN, reward=bright))
    with pytest.raises(InvalidRequest, match=r"the reward pixel compares with the teacher's image"):
        distill(teacher_folder, DistillConfig(**OWN, reward="pixel"), start=start)
    with pytest.raises(InvalidRequest, match="the method regression has nothing to learn from the start's own outputs"):
        DistillConfig.checked(num_inference_steps=2, method="regression", targets="start")
    with pytest.raises(InvalidRequest, match="whose outputs the student gives already; set warm_start to 0"):
        DistillConfig.checked(**{**OWN, "warm_start": 0.5})


def test_presets_leave_out_what_follows_the_teacher() -> None:
    """Unless it is asked for: then it is refused, not ignored."""
    asked = {"num_inference_steps": 2, "targets": "start", "reward": bright}
    for text in (False, True):
        config = resolve(asked, name="fast", text=text)
        assert (config.get("warm_start"), config.get("segments"), config.get("calibration")) == (0, 0, 0)
    assert resolve({**asked, "method": "draft"}, name="fast").get("warm_start", 0) == 0
    with pytest.raises(InvalidRequest, match="set warm_start to 0"):
        resolve({**asked, "warm_start": 0.3}, name="fast")


def test_the_estimate_knows_that_no_teacher_is_called(teacher_folder: Path) -> None:
    teacher = Teacher.load(teacher_folder).at_steps(100)
    own, teachers = (
        estimate(teacher, DistillConfig(**{**OWN, "targets": targets}, reward=bright), 1000, pool_is_there=False)
        for targets in ("start", "teacher")
    )
    assert own.pool_seconds < teachers.pool_seconds / 5


def test_the_command_line_refuses_a_missing_start_before_it_measures_anything(tmp_path: Path) -> None:
    options = ["--steps", "2", "--set", "targets=start", "--reward", "mmd", "-o", str(tmp_path / "out"), "--dry-run"]
    result = CliRunner().invoke(app, ["distill", "no such teacher", *options])
    assert "give the start too (start=, --start)" in str(result.exception)


def test_from_the_command_line_it_is_one_option(
    teacher_folder: Path,
    start: Student,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    start.save_pretrained(tmp_path / "start")
    options = "--set targets=start --warm-start 0 --schedule-updates 0 --pool-size 32 --batch-size 8 --group-size 4"
    arguments = ["redif", "distill", str(teacher_folder), "--steps", "2", "--updates", "2", "--reward", "mmd"]
    arguments += ["--start", str(tmp_path / "start"), "-o", str(tmp_path / "out"), *options.split()]
    monkeypatch.setattr("sys.argv", arguments)
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr().err
    assert not ended.value.code, said
    assert "32 pairs (64 student calls), then at most 2 updates of redif" in said
    assert "student's outputs" in said
    assert (tmp_path / "out" / "redif.json").is_file()
