"""The options of the command line, in this process: settings, lists, help, completion and mistakes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from importlib.metadata import packages_distributions, requires, version
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from typer.testing import CliRunner

from redif_sdk.artifact.folder import StudentFolder
from redif_sdk.cli import main as cli
from redif_sdk.cli.eval import own_teacher
from redif_sdk.cli.missing import EXTRA_OF, explain_missing
from redif_sdk.cli.terminal import listed, numbers, sizes_of
from redif_sdk.distill.config import DistillConfig, setting_names
from redif_sdk.errors import InvalidRequest

DRY = ["distill", "fashion-mnist", "-o", "nowhere", "--dry-run"]


def run(*arguments: str, **more: Any) -> Any:
    return CliRunner().invoke(cli.app, list(arguments), env={"COLUMNS": "100", "TERMINAL_WIDTH": "100"}, **more)


@pytest.fixture
def resolved(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., DistillConfig]:
    """The config that ``redif distill`` would run with these options."""
    from redif_sdk.cli import distill

    configs: list[DistillConfig] = []
    monkeypatch.setattr(distill, "_dry_run", lambda teacher, config, *rest: configs.append(config))
    monkeypatch.chdir(tmp_path)

    def resolve(*arguments: str) -> DistillConfig:
        result = run(*DRY, *arguments)
        assert result.exit_code == 0, (result.output, result.exception)
        return configs[-1]

    return resolve


# -- settings ---------------------------------------------------------------------------------------------------------

#: The options that `redif distill` had as parameters of its own before there was --set.
FORMER = {
    "--pool-size": ("pool_size", "64", 64),
    "--batch-size": ("batch_size", "16", 16),
    "--learning-rate": ("learning_rate", "1e-4", 1e-4),
    "--estimator": ("estimator", "pathwise", "pathwise"),
    "--reward-space": ("reward_space", "latents", "latents"),
    "--warm-start": ("warm_start", "0.5", 0.5),
    "--segments": ("segments", "0.25", 0.25),
    "--step-delta": ("step_delta", "0.3", 0.3),
    "--exploration": ("exploration", "0.06", 0.06),
    "--exploration-rank": ("exploration_rank", "0", 0),
    "--group-size": ("group_size", "8", 8),
    "--lora-rank": ("lora_rank", "4", 4),
    "--seed": ("seed", "7", 7),
    "--checkpoint-seconds": ("checkpoint_seconds", "5", 5.0),
    "--early-stop": ("early_stop", "3", 3),
    "--tracker": ("tracker", "tensorboard", "tensorboard"),
}


@pytest.mark.parametrize("option", FORMER)
def test_every_former_option_of_distill_is_still_accepted(option: str, resolved: Callable[..., DistillConfig]) -> None:
    name, text, value = FORMER[option]
    assert resolved(option, text).get(name) == value
    assert resolved(f"{option}={text}").get(name) == value
    if name not in ("lora_rank", "seed"):  # --set is for those without a parameter of their own, and for these too
        assert resolved("--set", f"{name}={text}").get(name) == value


def test_settings_by_hand_are_over_the_file_and_flags_need_no_value(
    resolved: Callable[..., DistillConfig], tmp_path: Path
) -> None:
    (tmp_path / "run.yaml").write_text("preset: fast\nexploration: 0.5\nseed: 3\n")
    config = resolved("--config", "run.yaml", "--shard", "--set", "reward={texture: 1, pixel: 0.5}", "--huber", "0.2")
    assert (config.shard, config.seed, config.get("exploration"), config.get("huber")) == (True, 3, 0.5, 0.2)
    assert config.get("reward") == {"texture": 1, "pixel": 0.5}
    with pytest.warns(DeprecationWarning, match="'anchor' is now called 'regression_weight'"):
        assert resolved("--set", "anchor=0.25").get("regression_weight") == 0.25


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--set", "exploring=1"], "unknown setting 'exploring'; did you mean 'exploration'"),
        (["--set", "exploration"], "--set is 'exploration'; give NAME=VALUE"),
        (["--set", "exploration=[1"], "--set exploration: '[1' is not a YAML value"),
        (["--set", "exploration=0.1", "--exploration", "0.2"], "exploration is given twice"),
        (["--seed", "1", "--set", "seed=1"], "seed is given twice"),
        (["--exploration"], "--exploration needs a value"),
        (["--exploring", "1"], "--exploring"),
        (["--method", "regression", "--exploration", "0.1"], "the method regression does not read exploration"),
        (["--set", "clip_mean_shift=0.1"], "the method redif with the estimator same-state does not read clip_mean"),
        (["--preset", "quick"], "unknown preset 'quick'; known: fast, balanced, best"),
    ],
)
def test_a_wrong_setting_is_named(arguments: list[str], said: str) -> None:
    result = run(*DRY, *arguments)
    assert result.exit_code != 0
    assert said in f"{result.output} {result.exception}"


def test_every_setting_is_listed_with_what_it_means() -> None:
    result = run("distill", "--list-settings")
    assert result.exit_code == 0
    for name in setting_names():
        (line,) = [line for line in result.output.splitlines() if line.startswith(f"  {name} ")] or [""]
        assert len(line) > 35 or name in ("method", "estimator"), name


def test_a_dry_run_prints_settings_that_make_the_same_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, teacher_folder: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    asked = ["distill", str(teacher_folder), "-o", "nowhere", "--dry-run", "--reward", "pixel", "--updates", "5"]
    result = run(*asked, "--batch-size", "4", "--pool-size", "8")
    assert result.exit_code == 0, (result.output, result.exception)
    settings = yaml.safe_load(result.output)
    assert DistillConfig(**settings).model_dump() == settings


# -- lists ------------------------------------------------------------------------------------------------------------


def test_lists_are_repeated_or_have_commas_or_both() -> None:
    for given in (["1,2", "4"], ["1", "2", "4"], ["1, 2,4"], ["1,2,2", "1", "4"]):
        assert numbers("--steps", given) == [1, 2, 4]
    assert (listed(None), numbers("--sm", None), sizes_of(None)) == ([], [], [])
    assert listed(["fp32,fp16", "int8"]) == ["fp32", "fp16", "int8"]
    assert sizes_of(["28x28,56x28", "14x14"]) == [(28, 28), (56, 28), (14, 14)]
    for wrong in ("two", "1.5", "1;2"):
        with pytest.raises(InvalidRequest, match=r"--steps is .*as in 1,8"):
            numbers("--steps", [wrong])


@pytest.mark.parametrize("given", [["--steps", "3,2"], ["--steps", "3", "--steps", "2"]])
def test_import_takes_its_steps_both_ways(given: list[str], teacher_folder: Path, tmp_path: Path) -> None:
    result = run("import", str(teacher_folder), "-o", str(tmp_path / "student"), *given)
    assert result.exit_code == 0, result.exception
    assert StudentFolder(tmp_path / "student").manifest.supported_steps == [3, 2]


# -- help -------------------------------------------------------------------------------------------------------------


def test_the_version() -> None:
    assert run("--version").output == f"redif {version('redif-sdk')}\n"


@cache
def overview() -> str:
    return run("--help").output


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_fits_on_two_screens_and_every_option_says_what_it_is(name: str) -> None:
    result = run(name, "--help")
    assert result.exit_code == 0
    assert len(result.output.splitlines()) <= 80
    command = typer.main.get_command(cli.app).commands[name]  # type: ignore[attr-defined]
    for parameter in command.params:
        assert len(getattr(parameter, "help", None) or "") > 8, f"{name}: {parameter.name}"
    assert "picture" not in result.output.lower()
    first = next(line for line in overview().splitlines() if line.startswith(f"  {name} "))
    assert not first.endswith("..."), "the first line of the help is cut"


def test_completion_needs_no_torch() -> None:
    """What a shell runs at every press of the tabulator key."""
    words = {"_REDIF_COMPLETE": "complete_bash", "COMP_WORDS": "redif dis", "COMP_CWORD": "1"}
    code = "import sys; sys.argv[0] = 'redif'; from redif_sdk.cli.main import main\ntry:\n    main()\nfinally:\n    "
    code += "assert not {'torch', 'diffusers', 'transformers'} & set(sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **words}, capture_output=True, text=True, timeout=120
    )
    assert (done.stdout.split(), done.stderr) == (["distill"], "")


def test_generate_takes_the_long_name_of_n(tiny_student: Path, tmp_path: Path) -> None:
    file = tmp_path / "sheet.png"
    result = run("generate", str(tiny_student), "c", "--num-images", "2", "-o", str(file), "--json", "-")
    assert result.exit_code == 0, result.exception
    assert len(json.loads(result.stdout)["rows"]) == 2


# -- mistakes ---------------------------------------------------------------------------------------------------------


def test_a_users_own_module_that_misses_another_is_named_not_our_extras(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_reward.py").write_text("\nimport no_such_package_of_mine\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError) as caught:
        import my_reward  # type: ignore[import-not-found]  # noqa: F401
    said = explain_missing(caught.value)
    assert "redif-sdk[" not in said
    assert "'no_such_package_of_mine'" in said
    assert f"{tmp_path / 'my_reward.py'} imports in line 2" in said
    assert explain_missing(ModuleNotFoundError("no peft", name="peft.tuners")) == (
        'peft is not installed; pip install "redif-sdk[distill]"'
    )


def test_the_hints_name_extras_that_bring_the_module() -> None:
    """Every optional package that is installed here has a hint, and the hint an extra that requires it."""
    providers: dict[str, list[str]] = {}
    for module, names in packages_distributions().items():
        for name in names:
            providers.setdefault(_normal(name), []).append(module)
    extras: dict[str, set[str]] = {}
    for line in requires("redif-sdk") or []:
        name, _, rest = line.partition(";")
        for extra in re.findall(r"extra == ['\"]([\w-]+)['\"]", rest):
            if extra not in ("dev", "all"):
                extras.setdefault(_normal(re.split(r"[^\w.-]", name)[0]), set()).add(extra)
    for package, brought_by in extras.items():
        for module in set(providers.get(package, [])) & set(EXTRA_OF):
            assert set(EXTRA_OF[module].split(",")) <= brought_by, module
        assert not providers.get(package) or set(providers[package]) & set(EXTRA_OF), f"{package} has no hint"


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_eval_judges_against_the_students_own_teacher(teacher_folder: Path, tmp_path: Path) -> None:
    student = tmp_path / "student"
    assert (
        run("import", str(teacher_folder), "-o", str(student), "--steps", "2", "--guidance-scale", "2").exit_code == 0
    )
    with pytest.raises(InvalidRequest, match=r"cannot be loaded .*give it with --against TEACHER"):
        own_teacher(student)
    here = Path.cwd()
    try:
        os.chdir(teacher_folder.parent)
        teacher = own_teacher(student)
        assert teacher.fingerprint
        assert teacher.guidance is not None
        assert teacher.guidance.scale == 2.0
        manifest = json.loads((student / "redif.json").read_text())
    finally:
        os.chdir(here)
    assert manifest["teacher"]["id"] == teacher_folder.name
