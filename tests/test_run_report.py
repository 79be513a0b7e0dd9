"""A run's report: its curves and the same images over time, in one page that loads nothing."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mixture import make_teacher
from PIL import Image
from test_report import Page
from typer.testing import CliRunner

from redif_sdk.cli.main import app
from redif_sdk.distill import pool
from redif_sdk.distill.config import DistillConfig
from redif_sdk.distill.training import report
from redif_sdk.distill.training.log import RunLog
from redif_sdk.distill.training.loop import Trainer
from redif_sdk.errors import InvalidRequest

SETTINGS: dict[str, Any] = {"num_inference_steps": 1, "batch_size": 8, "pool_size": 64}
CONFIG = DistillConfig.checked(
    **SETTINGS, reward="pixel", updates=6, check_every=2, log_every=1, group_size=4, schedule_updates=0, warm_start=0.0
)


def train(folder: Path, config: DistillConfig = CONFIG) -> Trainer:
    teacher = make_teacher()
    run = Trainer(teacher, config, pool.get(teacher, 64, "train")[0], folder)
    run.run()
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Trainer, Path]:
    folder = tmp_path_factory.mktemp("run") / "student.training"
    return train(folder), folder


def test_a_run_leaves_its_report(run: tuple[Trainer, Path]) -> None:
    _, folder = run
    page = Page((folder / "report.html").read_text())
    text = " ".join(page.texts)
    assert "script" not in page.tags
    assert all(link.startswith(("data:image/png;base64,", "#")) for link in page.links)
    assert page.tags.count("img") == 5  # four checks, and the teacher
    for title in ("Reward", "Error to the teacher", "Loss", "Recall", "Contrast", "Spread in a condition"):
        assert title in page.texts, title
    for axis in ("updates", "forward-equivalents", "images judged by rewards"):
        assert f"over {axis}" in text
    curves = page.tags.count("figure")
    assert page.tags.count("svg") == 3 * curves  # one over each axis
    assert "class 1" in page.texts
    assert "redif, 1 step, from callable (16 steps); reward pixel; seed 0" in text


def test_the_images_are_of_the_same_noises_and_conditions(run: tuple[Trainer, Path]) -> None:
    trainer, folder = run
    names = sorted(file.name for file in (folder / "images").iterdir())
    assert names == ["teacher.png", *(f"update-{update:08d}.png" for update in (0, 2, 4, 6))]
    strips = [np.asarray(Image.open(folder / "images" / name)) for name in names]
    assert {strip.shape for strip in strips} == {(4, 16 * 5 - 1, 2)}  # grey and alpha: a gap after each
    assert (strips[0][:, 4::5, 1] == 0).all()
    pairs = trainer.observer.pairs
    assert pairs is not None
    levels = ((trainer.teacher.seen(pairs.target[:16]) + 1) * 127.5).round()[:, 0].numpy()
    for place, tile in enumerate(levels):
        assert np.array_equal(strips[0][:, 5 * place : 5 * place + 4, 0], tile)
    about = json.loads((folder / "run.json").read_text())
    assert pairs.condition is not None
    assert about["captions"] == [f"class {label}" for label in pairs.condition[:16].tolist()]
    assert not np.array_equal(strips[1], strips[-1])


def test_images_that_rewards_judge_are_counted_without_those_of_checks(run: tuple[Trainer, Path]) -> None:
    rows = [json.loads(line) for line in (run[1] / "log.jsonl").read_text().splitlines()]
    counts = [row["budget"]["reward_calls"] for row in rows[1:]]
    assert counts == [8 * CONFIG.get("group_size") * update for update in range(1, 7)]


def test_what_a_log_says_is_text(run: tuple[Trainer, Path], tmp_path: Path) -> None:
    shutil.copytree(run[1], tmp_path, dirs_exist_ok=True)
    about = json.loads((tmp_path / "run.json").read_text())
    about |= {"captions": ["<script>alert(1)</script>"] * 16, "teacher": "<b>bold</b>"}
    (tmp_path / "run.json").write_text(json.dumps(about))
    with (tmp_path / "log.jsonl").open("a") as log:
        row = {"update": 7, "progress": 1, "judge": 0.5, "warning": "<i>grid</i>", "my_figure": 2.0}
        log.write(json.dumps(row) + "\n")
        log.write('{"update": 8, "prog')  # is being written
    page = Page(report.write_report(tmp_path).read_text())
    assert not {"script", "i"} & set(page.tags)
    assert "<b>bold</b>" in " ".join(page.texts)
    assert "<script>alert(1)</script>" in page.texts
    assert "Held-out judge" in page.texts
    assert "my figure" in page.texts
    assert "Update 7: <i>grid</i>" in " ".join(page.texts)


def test_the_command_writes_it_of_a_run_that_goes_on(run: tuple[Trainer, Path], tmp_path: Path) -> None:
    lines = (run[1] / "log.jsonl").read_text().splitlines()
    (tmp_path / "log.jsonl").write_text("\n".join(lines[:4]) + "\n")
    done = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert "done so far" in (tmp_path / "report.html").read_text()
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidRequest, match=r"holds no log\.jsonl; give the folder of a run"):
        report.write_report(tmp_path / "empty")


def test_a_resumed_run_forgets_the_images_of_updates_that_it_makes_again(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for update in (0, 2, 4):
        (tmp_path / "images" / f"update-{update:08d}.png").write_bytes(b"")
    RunLog(tmp_path, CONFIG, 2).close()
    assert sorted(file.name for file in (tmp_path / "images").iterdir()) == [
        "update-00000000.png",
        "update-00000002.png",
    ]
    RunLog(tmp_path, CONFIG, None).close()
    assert not list((tmp_path / "images").iterdir())


def test_a_run_does_not_fail_for_its_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(folder: Path) -> Path:
        raise InvalidRequest("charts need matplotlib")

    monkeypatch.setattr(report, "write_report", broken)
    with caplog.at_level(logging.WARNING):
        run = train(tmp_path, DistillConfig.checked(**SETTINGS, method="regression", updates=1))
    assert run.verdict is not None
    assert "there is no report of the run: charts need matplotlib" in caplog.text
