"""Where settings come from, what a run would cost, and when it ends before its budget."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import yaml
from torch import Tensor
from typer.testing import CliRunner

from redif_sdk.cli.main import app
from redif_sdk.distill import pool
from redif_sdk.distill.config import RENAMED, DistillConfig
from redif_sdk.distill.presets import UPDATES, as_yaml, preset, read, resolve
from redif_sdk.distill.teachers.base import Teacher
from redif_sdk.distill.training.estimate import estimate
from redif_sdk.distill.training.log import LOG
from redif_sdk.distill.training.loop import Trainer
from redif_sdk.errors import InvalidRequest
from redif_sdk.quickstart.images import plan
from tests.gaussian import make_teacher


@pytest.fixture
def teacher() -> Teacher:
    return make_teacher()


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8])
def test_every_preset_is_a_valid_run_and_longer_than_the_one_before(steps: int) -> None:
    lengths = [DistillConfig.checked(**preset(name, steps)).updates for name in UPDATES]
    assert lengths == sorted(lengths)
    assert resolve({"num_inference_steps": steps}, name="fast").num_inference_steps == steps


def test_what_is_given_by_hand_is_over_the_file_is_over_the_preset(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("preset: fast\nlearning_rate: 0.5\nseed: 7\n")
    made = resolve({"seed": 9, "num_inference_steps": 2}, file=file)
    assert (made.seed, made.learning_rate, made.get("reward"), made.batch_size) == (9, 0.5, "bands", 32)
    assert made.updates == preset("fast", 2)["updates"]
    assert resolve({"seconds": 5.0}, file=file).updates is None  # one budget takes the place of another
    assert resolve({}, file=file, name="best").updates == preset("best", 4)["updates"]
    again = tmp_path / "again.yaml"
    again.write_text(as_yaml(made))
    assert resolve({}, file=again) == made


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("- 1\n", "holds a list"),
        ("learning_rat: 1\n", "unknown setting 'learning_rat'; did you mean 'learning_rate'"),
        ("a: [\n", "is not YAML"),
        ("!!python/object/apply:os.system ['true']\n", "is not YAML"),
    ],
)
def test_a_wrong_file_is_named(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(InvalidRequest, match=said):
        read(file)
    with pytest.raises(InvalidRequest, match="unknown preset 'quick'; known: fast, balanced, best"):
        preset("quick", 1)


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_a_former_name_of_a_setting_is_accepted_with_a_warning(tmp_path: Path, old: str, new: str) -> None:
    estimator = "trajectory" if new == "clip_mean_shift" else "same-state"
    wanted, by_hand = DistillConfig.checked(estimator=estimator, **{new: 1}), 0.5
    if new.endswith("last_k"):
        by_hand = 2
    with pytest.warns(DeprecationWarning, match=f"'{old}' is now called '{new}'"):
        assert DistillConfig(estimator=estimator, **{old: 1}) == wanted
    file = tmp_path / "run.yaml"
    file.write_text(f"estimator: {estimator}\n{old}: 1\n")
    with pytest.warns(DeprecationWarning, match=f"'{old}' is now called '{new}'"):
        assert resolve({}, file=file) == wanted
    with pytest.warns(DeprecationWarning, match=old):  # by hand, under its old name, over the file's new one
        assert getattr(resolve({old: by_hand}, file=file), new) == by_hand
    with (
        pytest.warns(DeprecationWarning, match=old),
        pytest.raises(InvalidRequest, match=f"{old} and {new} are one setting"),
    ):
        DistillConfig.checked(**{old: 1, new: 1})


def test_a_former_value_of_a_setting_is_accepted_with_a_warning() -> None:
    with pytest.warns(DeprecationWarning, match="supervision='per_step'"):
        assert DistillConfig(method="regression", supervision="trajectory").supervision == "per_step"


@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize("name", ["fast", "balanced", "best"])
def test_the_quickstarts_settings_are_those_of_distill_with_the_same_preset(name: str, text: bool) -> None:
    made = plan([1, 2, 4], name, seed=3, text=text)
    for steps, config in made.items():
        assert config == resolve({"num_inference_steps": steps, "seed": 3}, name=name, text=text)
        assert (config.method, config.estimator, config.reward) == (
            "redif",
            "same-state",
            "texture" if text else "bands",
        )
        assert config.updates
        assert config.seconds is None
    assert plan([2], name, updates=7, text=text)[2].updates == 7


def test_the_clock_bends_no_path_and_says_that_it_cut(teacher: Teacher) -> None:
    """Beside a budget of updates seconds are a limit alone: phases and learning rate do not see them."""
    settings = {"num_inference_steps": 1, "method": "regression", "batch_size": 8, "pool_size": 64}
    pairs = pool.get(teacher, 64, "train")[0]
    shown: list[float] = []
    run = Trainer(
        teacher,
        DistillConfig.checked(**settings, updates=5000, seconds=0.2),
        pairs,
        on_progress=lambda done, figures: shown.append(done),
    )
    run.run()
    assert 0 < run.update < 5000
    assert shown == [pytest.approx((place + 1) / 5000) for place in range(run.update)]
    assert f"the clock cut the run at {run.update} of 5000 updates" in run.stopped
    whole = Trainer(teacher, DistillConfig.checked(**settings, updates=2, seconds=600), pairs)
    whole.run()
    assert whole.stopped == ""


def test_a_dry_run_prints_the_settings_and_the_cost_and_writes_nothing(tmp_path: Path) -> None:
    output, report = tmp_path / "student", tmp_path / "report.json"
    asked = ["distill", "fashion-mnist", "-o", str(output), "--preset", "fast", "--steps", "1", "--dry-run"]
    # small, since an update of each phase is made
    result = CliRunner().invoke(app, [*asked, "--batch-size", "4", "--json", str(report)])
    assert result.exit_code == 0, result.output
    settings = yaml.safe_load(result.output)
    assert (settings["num_inference_steps"], settings["batch_size"], settings["reward"]) == (1, 4, "bands")
    assert settings["updates"] == preset("fast", 1)["updates"]
    (row,) = json.loads(report.read_text())["rows"]
    assert row["pool_seconds"] == 0  # it is shipped
    assert row["training_seconds"] > 0
    assert row["forward_equivalents"] > 200 * 4 * 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json"]


def test_the_estimate_of_segments_has_the_teachers_path_and_keeps_nothing(
    teacher: Teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REDIF_CACHE", str(tmp_path))
    config = DistillConfig.checked(num_inference_steps=2, reward="pixel", updates=30, batch_size=8, segments=0.5)
    made = estimate(dataclasses.replace(teacher, fingerprint="named"), config, 64, pool_is_there=True)
    assert made.pool_seconds > 0  # the pairs are at hand, the states are not
    assert list(tmp_path.iterdir()) == []


def test_the_estimate_counts_what_the_run_then_spends(teacher: Teacher) -> None:
    config = DistillConfig.checked(num_inference_steps=2, method="regression", updates=30, batch_size=16, pool_size=64)
    expected = estimate(teacher, config, 64, pool_is_there=False)
    run = Trainer(teacher, config, pool.get(teacher, 64, "train")[0])
    run.run()
    assert expected.forward_equivalents == pytest.approx(run.meter.forward_equivalents, rel=0.01)
    assert expected.updates == 30
    assert expected.pool_seconds > 0


def hopeless(images: Tensor, targets: Tensor, condition: Tensor | None) -> Tensor:
    """It falls with every call, however good the pictures are."""
    hopeless.calls += 1  # type: ignore[attr-defined]
    return images.mean((1, 2, 3)) - hopeless.calls  # type: ignore[attr-defined]


def test_a_run_that_gets_no_better_ends_early_and_says_so(teacher: Teacher, tmp_path: Path) -> None:
    hopeless.calls = 0  # type: ignore[attr-defined]
    settings = {"num_inference_steps": 1, "reward": hopeless, "updates": 100, "batch_size": 8, "pool_size": 64}
    config = DistillConfig.checked(**settings, check_every=5, log_every=5, early_stop=2, group_size=4)
    run = Trainer(teacher, config, pool.get(teacher, 64, "train")[0], tmp_path)
    run.run()
    assert run.update == 15  # the first check is the best one
    assert "rises no more: 2 checks" in run.stopped
    assert json.loads((tmp_path / LOG).read_text().splitlines()[-1])["stopped"] == run.stopped


def test_tensorboard_has_the_figures_and_the_pictures(teacher: Teacher, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = {"num_inference_steps": 1, "updates": 10, "batch_size": 8, "pool_size": 64}
    config = DistillConfig.checked(**settings, check_every=5, log_every=5, tracker="tensorboard", method="regression")
    Trainer(teacher, config, pool.get(teacher, 64, "train")[0], tmp_path / "run").run()
    (folder,) = {path.parent for path in tmp_path.rglob("events.out.tfevents.*") if path.parent.name == "run"}
    events = EventAccumulator(str(folder)).Reload()
    assert {"mse", "loss", "recall"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("loss")] == [5, 10]
    assert events.Tags()["images"] == ["student over teacher"]
