"""The experiment of rewards that see prompts: what is judged was never trained on, and its arms are what they say."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor

from benchmarks.distillation.render import END
from benchmarks.reinforcement import judge, show, transfer
from benchmarks.reinforcement.run import HERE, Cell
from redif_sdk.distill import pool
from redif_sdk.distill.config import DistillConfig, applicable
from redif_sdk.distill.teachers.base import Teacher
from zoo import captions
from zoo.captions import Captioned, Subject
from zoo.judge_text import CaptionJudges
from zoo.score_text import STYLE


@pytest.fixture(scope="module")
def data() -> Captioned:
    """Ten subjects in three styles; one image is held out."""
    draw = np.random.default_rng(0)
    subjects = tuple(Subject(f"thing {k // 3}") for k in range(30))
    held = np.zeros(30, bool)
    held[4] = True
    images = draw.integers(0, 255, (30, 3, 64, 64), dtype=np.uint8)
    return Captioned(images, subjects, tuple(captions.STYLES) * 10, tuple("abcdefghij") * 3, ("Symbols",) * 30, held)


def test_what_is_judged_is_left_out_of_training(data: Captioned) -> None:
    """Of one subject every prompt, of each other one the prompts of one style."""
    left_out = judge.LeftOut.of(data)
    assert left_out == judge.LeftOut.of(data)
    assert len(left_out.subjects) == 1
    assert len(left_out.prompts) == 9
    names = {f"thing {k}" for k in range(10)}
    assert {name for name, _ in left_out.prompts} == names - left_out.subjects
    assert ("thing 1", data.styles[4]) not in left_out.prompts  # a composition that no teacher saw, already
    phrases = [*(f", {phrase}" for phrase in captions.STYLES.values()), " in noto style", ""]
    prompts = [name + phrase for name in sorted(names) for phrase in phrases]
    conditions = torch.arange(50).repeat(2)
    noise = torch.randn(100, 1, 2, 2)
    part = judge.training_part(pool.Pairs(noise, noise, conditions), left_out.allowed(prompts))
    assert part.condition is not None
    trained = {prompts[place] for place in part.condition.tolist()}
    assert names - {STYLE.sub("", prompt) for prompt in trained} == left_out.subjects
    for name, style in left_out.prompts:
        assert name in trained
        assert f"{name}, {captions.STYLES[style]}" not in trained
        assert (f"{name} in noto style" in trained) == (style != "Noto")


def test_the_panel_judges_those_alone_and_every_figure_is_there(data: Captioned) -> None:
    teacher = Teacher.load("mini-sd")
    panel = judge.Panel(teacher, data, CaptionJudges(data, updates=2), _Scorer(), ["thing 1"], count=4)
    left_out = judge.LeftOut.of(data)
    assert {(data.subjects[place].name, data.styles[place]) for place in panel.places} <= left_out.prompts
    seen: list[int] = []

    def sample(noise: Tensor, condition: Tensor) -> Tensor:
        seen.append(len(noise))
        return 0.1 * noise

    found = panel.full(sample)
    assert found["prompts"] == 4
    assert {"top1", "score", "fd_real", "spread", "grid", "fine_energy"} <= found.keys()
    assert found["held_out"]["top1"] >= 0
    assert found["new_subjects"]["prompts"] == 3  # one subject, three styles
    assert found["trained_on"]["prompts"] == 4
    assert sum(seen) == 4 + 4 + 4 * judge.NOISES + judge.HELD_OUT_NOISES + 3
    again = panel.quick(sample, 4)
    assert again["top1"] == found["top1"]  # the same noises at every look


class _Scorer:
    """In the place of the trained one."""

    def score(self, descriptions: Tensor, prompts: list[str], names: list[str]) -> Tensor:
        return torch.zeros(len(prompts))

    def ranks(self, descriptions: Tensor, names: list[str], styles: list[str], known: list[str]) -> Tensor:
        return torch.zeros(len(names), dtype=torch.int64)


def test_agreement_is_within_prompts() -> None:
    """A scorer that only knows which prompts are easy agrees in nothing that a group can learn from."""
    draw = torch.Generator().manual_seed(0)
    theirs, easy = torch.randn(500, 8, generator=draw), 9 * torch.randn(500, 1, generator=draw)
    noise = torch.randn(500, 8, generator=draw)
    assert transfer.agreement(2 * theirs + easy, theirs) == pytest.approx(1)
    assert abs(transfer.agreement(noise + easy, theirs + easy)) < 0.05
    assert transfer.agreement(theirs + noise, theirs) == pytest.approx(0.5**0.5, abs=0.03)


def test_every_arm_has_settings_that_are_read() -> None:
    found = yaml.safe_load((HERE / "arms.yaml").read_text())
    assert {"critic", "trajectory", "same-state", "draft", "best-of-n", "regression", "random"} <= found["arms"].keys()
    for name, own in found["arms"].items():
        settings = {**found["all"], **own}
        config = DistillConfig.checked(num_inference_steps=2, **applicable(settings))
        assert config.keep == "last", name
    assert Cell("teacher, best of 8", 2, 0).name == "teacher-best-of-8-2-0"


def test_cells_are_shown_as_a_table_curves_and_a_grid(tmp_path: Path) -> None:
    """Seeds as their mean, untrained rows first, and nothing outside the two lines is touched."""
    cells, page = tmp_path / "cells", tmp_path / "docs" / "results" / "page.md"
    cells.mkdir(), page.parent.mkdir(parents=True)
    own = {"top1": 0.5, "top5": 0.7, "scorer_top1": 0.4, "score": -4.0, "fd_real": 1000.0, "spread": 38.0, "grid": 2.0}
    own |= {"new_subjects": {"top1": 0.3}, "held_out": {"top1": 0.6}, "steps": 2}
    point = {"forward_equivalents": 9.0, "reward_calls": 3, "top1": 0.4, "scorer_top1": 0.3, "prompts": 300}
    trained = {"curve": [point], "budget": {"forward_equivalents": 5000.0, "reward_calls": 70}}
    for name, row in {
        "teacher-2-0": {"arm": "teacher", "seed": 0, **own},
        "same-state-2-0": {"arm": "same-state", "seed": 0, **own, **trained, "top1": 0.45},
        "same-state-2-1": {"arm": "same-state", "seed": 1, **own, **trained, "top1": 0.47},
    }.items():
        (cells / f"{name}.json").write_text(json.dumps({"rows": [row]}))
        Image.new("RGB", (20 * 4, 8), "red").save(cells / f"{name}.png")
    (cells / "prompts.txt").write_text("red heart, noto style\n" * 40)
    page.write_text(f"before\n{show.START}old\n{END}after\n")
    show.main([str(cells), "-o", str(page)])
    text = page.read_text()
    assert text.startswith("before\n"), text
    assert text.endswith("after\n")
    assert "old" not in text
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert [line.split(" | ")[0] for line in lines] == ["| K = 2", "|---|" + 13 * "---|", "| teacher", "| same-state"]
    shares = "| same-state | 46.0 % (2.0) | 70.0 % | 40.0 % | -4.00 |  | 30.0 % | 60.0 % |"
    assert f"{shares} 1,000 | 38.0 | 2.0 | 5,000 | 70 | 2 |" in lines
    assert (tmp_path / "docs" / "images" / "reinforcement-2.svg").is_file()
    with Image.open(tmp_path / "docs" / "images" / "reinforcement-2.png") as grid:
        assert grid.height == 2 * (52 + 2 * 4 + 6)  # two lines of the sheet, prompts, teacher and arm in each
        assert 0 in np.asarray(grid.convert("L").crop((150, 0, grid.width, 40)))  # the prompts
    of_four = show.table([*show.read(cells), {"arm": "draft", "seed": 0, **own, **trained, "steps": 4}], 4)
    assert [line.split(" | ")[0] for line in of_four.splitlines()[2:]] == ["| teacher", "| draft"]
