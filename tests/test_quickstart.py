"""The main job in small: real teacher, real training, export, verification, pictures and the report."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from redif_sdk import FastPipeline
from redif_sdk.artifact.folder import StudentFolder
from redif_sdk.card.render import read_card, render_over
from redif_sdk.distill import Teacher, load_student, pool, presets
from redif_sdk.distill.evaluation import arena as arena_module
from redif_sdk.distill.evaluation.arena import Arena, evaluate_folder
from redif_sdk.distill.evaluation.judged import JUDGED_FILE, read_judged, write_judged
from redif_sdk.distill.measures.features import embed
from redif_sdk.distill.measures.reference import read_reference
from redif_sdk.errors import InvalidRequest
from redif_sdk.export import samples
from redif_sdk.export.verify import summary, verify
from redif_sdk.quickstart import images
from redif_sdk.quickstart.images import quickstart
from redif_sdk.results import label

# the quality row of docs/design.md
QUALITY = {"data", "teacher", "method", "num_inference_steps", "network_calls", "seed", "fd_teacher", "fd_teacher_gain"}
QUALITY |= {
    "fd_teacher_std",
    "fd_real",
    "kd_teacher",
    "mse",
    "precision",
    "recall",
    "features",
    "num_samples",
    "budget",
}


def shorten(patch: pytest.MonkeyPatch) -> None:
    """What is learnt once, and timed, takes longer than two updates."""
    patch.setitem(presets.RECIPE, "schedule_updates", 0)
    patch.setitem(presets.RECIPE, "calibration", 0)
    patch.setattr(images, "SPEED_ROUNDS", 1)
    patch.setattr(images, "SHEET_IMAGES", 10)  # of the teacher's 100 network calls each
    patch.setattr(samples, "ROWS", 1)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quickstart") / "out"
    with pytest.MonkeyPatch.context() as patch:
        shorten(patch)
        quickstart(folder, steps=[2, 1], minutes=1, updates=2, num_samples=32, seed=0, rebuild_bank=False, quiet=True)
    return folder


def test_the_shipped_bank_is_the_teacher_s_own_output() -> None:
    """The bank saves sampling, not honesty: a few entries, computed anew, are within a level of what is shipped."""
    teacher = Teacher.load("fashion-mnist")
    for split in ("train", "held_out"):
        bank = pool.shipped(teacher, 2, split)
        assert bank is not None
        anew = teacher.images(pool.compute(teacher, 2, split).target).clamp(-1, 1)
        assert float((anew - teacher.images(bank.target)).abs().max()) <= 1.5 / 127.5


def test_the_shipped_teacher_is_small_and_has_what_the_main_job_needs() -> None:
    teacher = Teacher.load("fashion-mnist")
    assert teacher.folder is not None
    files = [path for path in teacher.folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files) <= 12_000_000
    for split, count in pool.PIXEL_BANK_SIZES.items():
        assert pool.shipped(teacher, count, split) is not None
    real = read_reference(teacher.folder)
    assert real is not None
    assert np.allclose(real.covariance, real.covariance.T)
    figures = json.loads((teacher.folder / "figures.json").read_text())
    assert figures["classifier_accuracy"] >= 0.90
    assert figures["class_agreement"] >= 0.95
    assert max(figures["nyquist"]) <= 3  # from there on a grid is seen
    assert figures["fd_real"] <= 5.7


def test_what_was_judged_when_the_teacher_was_published_is_not_judged_again(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = Teacher.load("fashion-mnist")
    for call in ("few_steps", "sample"):
        monkeypatch.setattr(Teacher, call, lambda *_, **__: pytest.fail("the teacher was called"))
    monkeypatch.setattr(arena_module, "embed", lambda *_: pytest.fail("images were embedded"))
    arena = Arena.of(teacher, 2000)
    rows = [arena.teacher_row(), *(arena.ddim_row(steps) for steps in (1, 2, 4))]
    assert [(row["method"], row["num_inference_steps"]) for row in rows] == [
        ("teacher", 50),
        ("ddim", 1),
        ("ddim", 2),
        ("ddim", 4),
    ]
    assert all(set(row) >= QUALITY and row["num_samples"] == 2000 for row in rows)
    assert arena.floor() == pytest.approx(0.93, abs=0.02)


def test_the_kept_features_are_the_judges_own() -> None:
    teacher = Teacher.load("fashion-mnist")
    kept, few = read_judged(teacher), pool.shipped(teacher, 16, "held_out")
    assert kept is not None
    assert few is not None
    torch.testing.assert_close(kept.features[:16], embed(teacher.images(few.target)), atol=2e-3, rtol=1e-3)
    arena = Arena.of(teacher, 16)
    assert arena.ddim_row(1)["num_samples"] == 16, "rows over all noises are of no use here"


@pytest.mark.slow
def test_the_kept_rows_are_what_is_measured() -> None:
    teacher = Teacher.load("fashion-mnist")
    kept, arena = read_judged(teacher), Arena.of(teacher, 2000)
    assert kept is not None
    anew = dataclasses.replace(arena, judged=None).ddim_row(1)
    for name, value in (kept.row("ddim", 1) or {}).items():
        assert anew[name] == (pytest.approx(value, rel=1e-3) if isinstance(value, float) else value)


def test_judged_figures_of_another_teacher_are_not_taken(tmp_path: Path) -> None:
    teacher = dataclasses.replace(Teacher.load("fashion-mnist"), folder=tmp_path)
    row = {"method": "ddim", "num_inference_steps": 1}
    write_judged(teacher, torch.ones(4, 3), [row], 1.5, tmp_path / JUDGED_FILE)
    kept = read_judged(teacher)
    assert kept is not None
    assert (kept.row("ddim", 1), kept.row("ddim", 2), kept.floor, kept.features.shape) == (row, None, 1.5, (4, 3))
    assert read_judged(teacher.guided(3.0)) is None
    (tmp_path / JUDGED_FILE).write_bytes(b"PK damaged")
    with pytest.raises(InvalidRequest, match=r"judged\.npz cannot be read"):
        read_judged(teacher)


def test_a_broken_bank_is_named(tmp_path: Path) -> None:
    import shutil

    teacher = Teacher.load("fashion-mnist")
    assert teacher.folder is not None
    copy = Path(shutil.copytree(teacher.folder, tmp_path / "copy"))
    data = (copy / pool.BANK_FILE).read_bytes()
    (copy / pool.BANK_FILE).write_bytes(data[: len(data) // 2])
    with pytest.raises(InvalidRequest, match="--rebuild-bank"):
        pool.get(Teacher.load(copy), 4, "train")


def test_the_results_hold_every_field_and_contender(finished: Path) -> None:
    results = json.loads((finished / "results.json").read_text())
    assert {"schema", "command", "date", "versions", "machine", "rows"} <= set(results)
    contenders = [(row["method"], row["num_inference_steps"]) for row in results["rows"]]
    assert contenders == [
        ("teacher", 50),
        ("ddim", 1),
        ("ddim", 2),
        ("ddim", 4),
        ("redif", 1),
        ("redif", 2),
    ]
    for row in results["rows"]:
        assert set(row) >= QUALITY
    assert results["rows"][0]["fd_teacher"] == pytest.approx(0, abs=1e-3)
    calls = {(row["method"], row["num_inference_steps"]): row["network_calls"] for row in results["rows"]}
    assert (calls["teacher", 50], calls["ddim", 2], calls["redif", 2]) == (100, 4, 2)  # guidance doubles the teacher's
    assert {row["contender"] for row in results["speed"]} == {"teacher", "student-1", "student-2"}


def test_a_students_row_says_how_it_was_made(finished: Path) -> None:
    results = json.loads((finished / "results.json").read_text())
    *baselines, _, student = results["rows"]
    assert (student["method"], student["estimator"], student["reward"]) == ("redif", "same-state", "bands")
    assert all(row["estimator"] is None and row["reward"] is None for row in baselines)
    assert "student: redif (same-state, bands)" in (finished / "report.html").read_text()
    assert label(baselines[0]) == "teacher"


def test_a_students_images_are_there_as_soon_as_it_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the clock cuts the run; and these are the images that its exported graph makes."""
    import redif_sdk.export

    class NotYetError(Exception):
        pass

    def refuse(*_: object, **__: object) -> None:
        raise NotYetError

    shorten(monkeypatch)
    monkeypatch.setattr(redif_sdk.export, "export", refuse)
    settings = {"updates": None, "num_samples": 16, "seed": 0, "rebuild_bank": False, "quiet": False}
    with pytest.raises(NotYetError):
        quickstart(tmp_path, steps=[1], minutes=0.02, **settings)
    shown = np.asarray(Image.open(tmp_path / "student-1.png"))
    assert shown.shape == (28, 280)
    assert StudentFolder(tmp_path / "student-1").manifest.distillation is not None


def test_the_report_needs_nothing_beside_it(finished: Path) -> None:
    page = (finished / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 6
    assert not re.search(r"(src|href)=\"(?!data:|#)", page)


def test_the_students_verify_and_run(finished: Path) -> None:
    for steps in (1, 2):
        folder = finished / f"student-{steps}"
        assert steps == 1 or summary(verify(folder)) == ""  # one network as the other
        pipe = FastPipeline.from_pretrained(folder)
        out = pipe("Dress", seed=3)
        assert out.images[0].size == (28, 28)
        assert (finished / f"student-{steps}.png").is_file()


def test_the_students_hold_their_own_figures(finished: Path) -> None:
    """Quality and speed of that student, beside the teacher and untrained DDIM; the card is up to date."""
    for steps in (1, 2):
        manifest = StudentFolder(finished / f"student-{steps}").manifest
        figures = [row.get("method") or row["contender"] for row in manifest.metrics]
        assert figures == ["teacher", *["ddim"] * 3, "redif", *["teacher", f"student-{steps}"] * 2]
        assert manifest.metrics[4]["num_inference_steps"] == steps
        assert all(row["machine"] for row in manifest.metrics[5:])
        text = read_card(finished / f"student-{steps}") or ""
        assert f"| **this student (redif)** | {steps} | {steps} |" in text
        assert text == render_over(manifest, text)


def test_the_exported_student_is_the_judged_one(finished: Path) -> None:
    """What was judged in torch and what is deployed are the same pictures."""
    student, pipe = load_student(finished / "student-2"), FastPipeline.from_pretrained(finished / "student-2")
    held = pool.pool_noise((1, 28, 28), 8, "held_out")
    labels = torch.arange(8)
    with torch.no_grad():
        latents = student.policy().sample(held, labels)
    torch_levels = ((student.teacher.images(latents).clamp(-1, 1) + 1) * 127.5).round()[:, 0].numpy()
    served = pipe.generate_array(held[None].numpy(), labels.numpy())[..., 0]
    assert np.abs(torch_levels - served).max() <= 1


def test_eval_judges_a_folder(finished: Path) -> None:
    rows = evaluate_folder(finished / "student-1", "fashion-mnist", 24)
    assert [(row["method"], row["network_calls"]) for row in rows] == [("teacher", 100), ("ddim", 2), ("redif", 1)]
    assert all(row["fd_real"] > 0 for row in rows)


@pytest.mark.slow
def test_quickstart_runs_again_over_its_own_output(finished: Path) -> None:
    before = (finished / "student-1" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    quickstart(finished, steps=[1], minutes=1, updates=2, num_samples=16, seed=0, rebuild_bank=False, quiet=True)
    after = (finished / "student-1" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    assert before == after
