"""The whole benchmark at a toy budget: `make bench-distill-smoke` runs this file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.distillation import black_box, judges, overhead, render, run, search, text, variants
from redif_sdk.distill import DistillConfig
from redif_sdk.distill.evaluation.datasets import data_folder
from redif_sdk.distill.measures.distances import Judge
from redif_sdk.distill.methods import gain, method_names, times
from redif_sdk.errors import InvalidRequest

BUDGET = 200  # forward-equivalents a student: a few updates of every method
BATCH = 8


def data_is_here() -> bool:
    try:
        data_folder("fashion-mnist")
    except InvalidRequest:
        return False
    return True


def test_every_method_has_settings_that_are_valid() -> None:
    for method in method_names():
        for steps in (1, 2, 4):
            settings = run.settings_of(method, steps)
            run.DistillConfig.checked(num_inference_steps=steps, method=method, **settings)
            named = json.dumps(settings.get("reward", ""))
            assert "lpips" not in named, "EfficientNet-Lite0 judges here, so it gives no reward"


def test_the_search_is_equal_for_all_and_its_settings_are_valid() -> None:
    tries = search.grids()
    assert sorted(tries) == sorted(method_names())
    for method, each in tries.items():
        for settings in each:
            for steps in search.STEPS:
                run.DistillConfig.checked(num_inference_steps=steps, method=method, **(run.common() | settings))


def test_the_search_chooses_by_both_networks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """At K = 1 the third is best in neither network, and best in their mean; a run that is missing is named."""
    distances = {1: [(1.0, 9.0), (8.0, 2.0), (1.5, 2.5), (9.0, 9.0)], 2: [(1.0, 1.0)] * 4, 4: [(2.0, 2.0)] * 4}
    for steps, each in distances.items():
        for place, pair in enumerate(each):
            row = {"judged": [{"fd_teacher_gain": value} for value in pair]}
            name = run.Cell("fashion-mnist", "regression", steps, 0).name
            (tmp_path / f"{place}-{name}.json").write_text(json.dumps({"rows": [row]}))
    settings = tmp_path / "settings.yaml"
    settings.write_text("all: {batch_size: 32}\nmethods: {regression: {settings: {huber: 9}}, redif: {preset: best}}\n")
    asked = ["-o", str(tmp_path), "--choose", "--settings-file", str(settings), "--methods", "regression"]
    search.main(asked)
    assert "regression, K = 1" in capsys.readouterr().out
    tries = search.grids()["regression"]
    assert run.settings_of("regression", 1, settings) == {"batch_size": 32, **tries[2]}
    assert run.settings_of("regression", 2, settings) == {"batch_size": 32, **tries[0]}
    (tmp_path / "3-fashion-mnist-forward_equivalents-regression-4-0.json").unlink()
    with pytest.raises(SystemExit, match=r"3-fashion-mnist.*is missing"):
        search.main(asked)


def test_controls_restore_what_they_should() -> None:
    """A contender that is the teacher's image, faded, is at 0 under the gain; a blurred one gains from unsharp."""
    draw = torch.Generator().manual_seed(0)
    target = torch.rand(64, 1, 8, 8, generator=draw) * 1.2 - 0.6
    reference = judges.Reference("pixels", Judge(target, lambda images: images.flatten(1)))
    faded = reference.row(target / 1.1)
    assert faded["gain"] == pytest.approx(1.1)
    assert faded["fd_teacher_gain"] < 1e-3 < faded["fd_teacher"]
    blurred = judges.unsharp(target, -0.3)
    assert judges.high_frequency(blurred) < 0.8 * judges.high_frequency(target)
    sharpened = reference.row(blurred)
    assert sharpened["fd_teacher_unsharp"] < 0.8 * sharpened["fd_teacher_gain"]
    assert sharpened["unsharp"] > 0


def test_unpaired_figures_are_of_all_noises() -> None:
    draw = torch.Generator().manual_seed(0)
    images = torch.rand(400, 1, 4, 4, generator=draw) * 1.2 - 0.6
    target, others, fresh = images[:50], images[50:250], images[250:]
    reference = judges.Reference("pixels", Judge(target, lambda of: of.flatten(1), others=lambda: others))
    alone, more = reference.row(target), reference.row(target, fresh)
    assert more["fd_unpaired"] < 0.8 * alone["fd_unpaired"]  # both are samples of one distribution
    assert more["coverage"] > alone["coverage"]
    assert more["fd_teacher"] == alone["fd_teacher"]
    wrong = reference.row(target, -fresh - 0.5)
    assert wrong["fd_unpaired"] > 2 * more["fd_unpaired"]


@pytest.mark.parametrize("method", text.METHODS)
@pytest.mark.parametrize("steps", [2, 4])
def test_settings_of_the_comparison_on_text(method: str, steps: int) -> None:
    """They are ones that the method takes, and all methods change in the same way."""
    settings = text.settings_for_text(method, steps)
    assert DistillConfig.checked(num_inference_steps=steps, **settings).method == method
    chosen = run.settings_of(method, steps)
    assert settings["learning_rate"] == pytest.approx(chosen["learning_rate"] / 5)
    if "warm_start" in settings:
        assert settings["warm_start"] >= settings["segments"] > 0


@pytest.mark.parametrize("steps", [2, 4])
def test_variants_of_redif_are_settings_that_it_takes(steps: int) -> None:
    for variant, changed in variants.VARIANTS.items():
        settings = run.settings_of("redif", steps) | changed
        config = DistillConfig.checked(num_inference_steps=steps, method="redif", **settings)
        assert all(config.get(name) == value for name, value in changed.items() if name != "reward"), variant


def test_variants_are_shown_with_what_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = cell("redif", 0, 0.5, steps=2) | {"fine_energy": 0.8}
    row["judged"] = [judged | {"coverage": 0.7, "spread": 0.9} for judged in row["judged"]]
    variants.place(tmp_path, "groups of 16", 2, 0).write_text(json.dumps({"rows": [row]}))
    variants.main(["--show", "-o", str(tmp_path)])
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| groups")]
    assert shown == ["| groups of 16 | 0.50 / 0.50 | 0.50 / 0.50 | 0.80 | 0.70 | 0.90 | 1 |"]


def test_nothing_is_tuned_on_the_test_protocol(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run.main(["--set", "{learning_rate: 1}", "-o", str(tmp_path)])
    assert "nothing is tuned on the test" in capsys.readouterr().err


def cell(method: str, seed: int | None, distance: float, steps: int = 1) -> dict[str, Any]:
    judged = {f"fd_teacher{control}": distance for control in ("", "_gain", "_unsharp", "_std")}
    judged |= {"kd_teacher": distance / 50, "fd_real": 9.0, "precision": 0.8, "recall": 0.7}
    budget = {} if seed is None else {"forward_equivalents": 500.0, "seconds": 9.0}
    row = {"data": "made-up", "method": method, "steps": steps, "seed": seed, "kind": "forward_equivalents"}
    return row | {"judged": [judged, judged], "mse": 0.02, "high_frequency": 0.9, "budget": budget, "network_calls": 2}


def test_the_tables_mark_the_best_and_what_overlaps_it(tmp_path: Path) -> None:
    cells = [cell("near", seed, 5.0 + 0.3 * seed) for seed in (0, 1, 2)]
    cells += [cell("best", seed, 4.9 + 0.2 * seed) for seed in (0, 1, 2)]
    cells += [cell("behind", seed, 6.0) for seed in (0, 1)] + [cell("ddim", None, 1.0)]
    for index, row in enumerate(cells):
        (tmp_path / f"{index}.json").write_text(json.dumps({"rows": [row]}))
    page = tmp_path / "docs" / "results.md"
    page.parent.mkdir()
    page.write_text(f"# Ours\n\nbefore\n{render.START}old\n{render.END}after\n")
    render.main([str(tmp_path), "-o", str(page)])
    text = page.read_text()
    assert text.startswith("# Ours\n\nbefore\n")
    assert text.endswith("after\n")
    lines = {line.split(" | ")[0].strip("| "): line for line in text.splitlines() if line.startswith("| ")}
    assert "**5.10 (0.40)**" in lines["best"]
    assert "**5.30 (0.60)**" in lines["near"]  # their seeds overlap
    assert "**" not in lines["behind"]
    assert lines["behind"].endswith("| 2 |")
    summary = [line for line in text.splitlines() if line.count(" / ") == 2]
    assert [line.split(" | ")[0] for line in summary[:3]] == ["| best", "| near", "| behind"]  # the best first
    assert summary[0].endswith("5.10 / - |")
    assert (page.parent / "images" / "methods-made-up-forward_equivalents.svg").is_file()
    render.main([str(tmp_path), "-o", str(page)])
    assert page.read_text() == text


def test_where_a_curve_reaches_a_level() -> None:
    curve = [(100.0, 9.0), (400.0, 5.0), (800.0, 5.5), (1600.0, 3.0)]
    assert overhead.crossing(curve, 9.5) == 100
    assert overhead.crossing(curve, 7.0) == pytest.approx(200)  # half way down, on a log scale of cost
    assert overhead.crossing(curve, 5.0) == pytest.approx(400)
    assert overhead.crossing(curve, 2.0) is None


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # inside diffusers' scheduler
@pytest.mark.skipif(not data_is_here(), reason="the data set fashion-mnist is not installed")
def test_the_whole_benchmark_at_a_toy_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("REDIF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(run, "UNTRAINED_STEPS", (1, 2))
    chosen = run.settings_of

    def small(*given: Any) -> dict[str, Any]:
        settings = chosen(*given) | {"batch_size": BATCH}
        return settings | ({"calibration": BATCH} if "calibration" in settings else {})

    monkeypatch.setattr(run, "settings_of", small)
    # what redif learns once, its times and its gain, would cost more than the budget, and leave no update
    monkeypatch.setattr(times, "GROUP", 2)
    monkeypatch.setattr(times, "BATCH", 2)
    monkeypatch.setattr(gain, "FIT_UPDATES", 2)
    asked = ["--smoke", "--budget", str(BUDGET), "--data", "fashion-mnist", "--seeds", "0", "-o", str(tmp_path / "out")]
    asked_two = [*asked, "--steps", "2", "--kind", "forward_equivalents"]
    run.main([*asked, "--steps", "1"])
    run.main(asked_two)
    rows = {}
    for path in sorted((tmp_path / "out").glob("*.json")):
        written = json.loads(path.read_text())
        (rows[path.stem],) = written["rows"]
        assert path.with_suffix(".png").is_file() == (rows[path.stem]["seed"] == 0)
    assert len(rows) == 2 * 2 + 3 * len(method_names()) - 1  # at equal seconds regression is not run again
    at_equal_cost = [row for row in rows.values() if row["kind"] == "forward_equivalents" and row["seed"] == 0]
    for row in at_equal_cost:
        assert row["budget"]["forward_equivalents"] >= BUDGET
        assert row["budget"]["updates"] > 0
        assert row["budget"]["pool_calls"] == run.SMOKE.pool * 100
    for row in rows.values():
        assert [judged["features"] for judged in row["judged"]] == ["efficientnet-lite0-32px", "classifier-2"]
        for judged in row["judged"]:
            assert judged["fd_teacher_unsharp"] <= judged["fd_teacher_gain"] <= judged["fd_teacher"]
    ddim, solver = rows["fashion-mnist-ddim-1"], rows["fashion-mnist-dpm-solver++-1"]
    assert ddim["mse"] == pytest.approx(solver["mse"], rel=1e-3)  # of first order, they are one sampler
    assert ddim["network_calls"] == 2  # guided
    render.main([str(tmp_path / "out"), "-o", str(tmp_path / "results.md")])
    assert "### fashion-mnist, equal seconds" in (tmp_path / "results.md").read_text()
    capsys.readouterr()
    assert (tmp_path / "out" / "fashion-mnist-teacher.png").is_file()
    assert (tmp_path / "images" / "methods-fashion-mnist-forward_equivalents.png").is_file()
    capsys.readouterr()
    run.main(asked_two)  # again: everything is there
    assert capsys.readouterr().out == ""


@pytest.mark.slow
@pytest.mark.skipif(not data_is_here(), reason="the data set fashion-mnist is not installed")
def test_a_black_box_is_followed_and_draft_refuses_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The experiment with a reward behind HTTP at a toy budget: it runs to the plot, and says why draft cannot."""
    monkeypatch.setattr(gain, "FIT_UPDATES", 2)
    small = [
        "--align",
        "400",
        "--updates",
        "1",
        "--anchors",
        "1",
        "--weights",
        "0",
        "2",
        "--pool",
        "64",
        "--samples",
        "16",
    ]
    black_box.main([*small, "-o", str(tmp_path / "found.json"), "--plot", str(tmp_path / "plot.svg")])
    written = json.loads((tmp_path / "found.json").read_text())
    assert [row["contender"] for row in written["rows"]] == [
        *("the teacher", "aligned", "regression goes on"),
        *(black_box.ALONE, black_box.BESIDE, black_box.BESIDE),
    ]
    assert all(row["jpeg_bytes"] > 300 for row in written["rows"])
    assert "has no gradient; use the estimator same-state" in written["draft"]
    assert (tmp_path / "plot.svg").is_file()
