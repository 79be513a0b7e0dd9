"""``redif quickstart --text`` end to end on a tiny Stable Diffusion: students, pictures, figures and the page."""

from __future__ import annotations

import json
from pathlib import Path

import markupsafe
import numpy as np
import pipelines
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from redif_sdk import FastPipeline
from redif_sdk.artifact.records import Budget, Distillation
from redif_sdk.cli.main import app
from redif_sdk.distill import presets
from redif_sdk.distill.evaluation.arena import evaluate_folder
from redif_sdk.distill.shipped.students import keep
from redif_sdk.distill.student import Student
from redif_sdk.distill.teachers.base import Teacher
from redif_sdk.quickstart import images

HELD_OUT = ["purple square", "orange circle"]  # in no prompt that students are distilled on


JUDGED = {"prompts": 1000, "teacher": 0.412, "before": 0.41, "after": 0.443}


def shipped(teacher: Teacher, place: Path) -> None:
    """A student of two steps beside the teacher, and one that was reinforced: other weights."""
    table, made = teacher.table(2), Distillation(method="redif", seed=0, budget=Budget())
    student = Student(teacher, teacher.make_student(), [table], "tiny", distillation=made)
    student.save_pretrained(place / "start")
    keep(place / "start", teacher)
    with torch.no_grad():
        for weight in student.inner.conv_out.parameters():
            weight.mul_(0.5)
    student.save_pretrained(place / "start", overwrite=True)
    keep(place / "start", teacher, JUDGED)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("text")
    teacher = pipelines.tiny_sd(place / "teacher")
    about = json.loads((teacher / "redif_teacher.json").read_text()) | {"held_out": HELD_OUT}
    (teacher / "redif_teacher.json").write_text(json.dumps(about))
    shipped(Teacher.load(teacher), place)
    options = ["--steps", "2", "--updates", "3", "--minutes", "2", "--num-samples", "24", "--quiet"]
    command = ["quickstart", "--text", "--teacher", str(teacher), "-o", str(place / "out"), *options]
    with pytest.MonkeyPatch.context() as patch:  # the tiny pipeline has no bank: less to sample, and no times to learn
        patch.setitem(presets.TEXT_POOL, "fast", 64)
        patch.setitem(presets.TEXT, "schedule_updates", 0)
        patch.setattr(images, "SPEED_ROUNDS", 1)
        result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    return place / "out"


def test_it_leaves_a_student_that_draws_prompts(done: Path) -> None:
    pipe = FastPipeline.from_pretrained(done / "student-2")
    pictures = pipe("red heart", num_images_per_prompt=2, seed=0, output_type="uint8").images
    assert pictures.shape == (2, 16, 16, 3)
    with Image.open(done / "student-2.png") as opened:
        strip = np.asarray(opened)
    assert np.array_equal(strip[:, :16], pictures[0]), "the strip shows what the same seed gives again"


def test_its_results_have_the_teacher_ddim_and_the_student(done: Path) -> None:
    results = json.loads((done / "results.json").read_text())
    rows = {(row["method"], row["num_inference_steps"]): row for row in results["rows"]}
    assert set(rows) == {("teacher", 4), ("ddim", 2), ("ddim", 4), ("redif", 2)}
    assert rows["ddim", 4]["network_calls"] == 8, "the teacher is guided"
    assert rows["redif", 2]["network_calls"] == 2
    assert all(row["passed"] for row in results["verification"])
    assert {row["contender"] for row in results["speed"]} == {"teacher", "student-2"}
    assert results["prompts"] == pipelines.PROMPTS


def test_it_is_judged_on_prompts_that_nothing_was_trained_on(done: Path) -> None:
    results = json.loads((done / "results.json").read_text())
    assert {row["prompts"] for row in results["rows"]} == {"held out"}
    assert "of prompts held out of all training" in " ".join((done / "report.html").read_text().split())
    rows = evaluate_folder(done / "student-2", done.parent / "teacher", 24, baselines=False, unpaired=False)
    ours, theirs = (next(row for row in found if row["method"] == "redif") for found in (results["rows"], rows))
    assert ours["mse"] == pytest.approx(theirs["mse"], rel=1e-3), "redif eval judges on the same"
    trained = evaluate_folder(
        done / "student-2", done.parent / "teacher", 24, baselines=False, unpaired=False, trained_prompts=True
    )
    assert trained[-1]["mse"] != pytest.approx(theirs["mse"], rel=1e-3)


def test_its_third_act_shows_the_shipped_student_before_and_after_reinforcement(done: Path) -> None:
    results = json.loads((done / "results.json").read_text())
    assert results["reinforced"] == {
        "num_inference_steps": 2,
        "before": "before-2",
        "after": "reinforced-2",
        **JUDGED,
    }
    page = " ".join((done / "report.html").read_text().split())
    assert "in 41.0 % of its images before and 44.3 % after; the teacher has 41.2 % (1,000 prompts" in page
    before, after = (
        FastPipeline.from_pretrained(done / name)("red heart", seed=0, output_type="uint8").images
        for name in ("before-2", "reinforced-2")
    )
    assert np.abs(before.astype(int) - after).max() > 2
    assert {"before-2", "reinforced-2"} < {row["student"] for row in results["verification"]}
    with Image.open(done / "reinforced-2.png") as opened, Image.open(done / "prompts-2.png") as first:
        assert opened.size == first.size, "three rows: the teacher, before, after"


def test_its_page_and_grid_show_the_prompts(done: Path) -> None:
    page = (done / "report.html").read_text()
    assert "student: 2 calls" in page
    assert "the same noise and prompt." in page
    assert f"The prompts: {'; '.join(pipelines.PROMPTS)}." in page
    assert str(markupsafe.escape("pipe('red heart', seed=0)")) in page
    assert "class_labels" not in page
    assert "FD to real" not in page
    with Image.open(done / "prompts-2.png") as opened:
        assert opened.width > 200
        assert opened.height > 3 * 16


@pytest.mark.slow
def test_students_that_come_with_the_teacher_are_judged_and_not_trained(done: Path, tmp_path: Path) -> None:
    teacher = done.parent / "teacher"
    keep(done / "student-2", Teacher.load(teacher))
    options = ["--steps", "2", "--trained", "--num-samples", "24", "--quiet"]
    command = ["quickstart", "--text", "--teacher", str(teacher), "-o", str(tmp_path / "out"), *options]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert not any(part.startswith("redif") for part in results["seconds_by_part"])
    ours, theirs = (
        FastPipeline.from_pretrained(folder / "student-2")("red heart", seed=0, output_type="uint8").images
        for folder in (tmp_path / "out", done)
    )
    assert np.abs(ours.astype(int) - theirs).max() <= 2, "half precision is all that was lost"


def test_trained_students_are_of_prompts() -> None:
    result = CliRunner().invoke(app, ["quickstart", "--trained"])
    assert "add --text" in str(result.exception)
