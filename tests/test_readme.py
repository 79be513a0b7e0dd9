"""README.md and CONTRIBUTING.md: every block of code is run, as it stands, by a test of this file."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gaussian
import pytest
import torch
import typer
from PIL import Image
from typer.testing import CliRunner

from redif_sdk import FastPipeline
from redif_sdk.distill.methods.registry import METHODS
from redif_sdk.distill.rewards.batch import Batch

ROOT = Path(__file__).resolve().parent.parent
LONGEST = 90  # lines: one and a half screens
REDIF = f"exec {sys.executable} -c 'from redif_sdk.cli.main import main; main()'"
#: The first words of each block, and the test that runs it.
README = {"pip install": "test_install", "make quickstart": "test_make", "from redif_sdk import": "test_ten_lines"}
CONTRIBUTING = {
    "make test ": "test_targets",
    '"""Smooth images': "test_a_reward",
    '"""Regression by': "test_a_method",
    '"""The command ``redif steps': "test_a_command",
}


def blocks(page: str) -> list[str]:
    """The text of every fenced block."""
    return re.findall(r"^```\w*\n(.*?)^```$", (ROOT / page).read_text(encoding="utf-8"), re.M | re.S)


def block(page: str, start: str) -> str:
    (found,) = (text for text in blocks(page) if text.startswith(start))
    return found


@pytest.mark.parametrize(("page", "tested"), [("README.md", README), ("CONTRIBUTING.md", CONTRIBUTING)])
def test_every_block_has_a_test(page: str, tested: dict[str, str]) -> None:
    assert [next((s for s in tested if text.startswith(s)), text) for text in blocks(page)] == [*tested]
    assert {name for name in tested.values() if not callable(globals().get(name))} == set()


def test_the_readme_is_one_and_a_half_screens() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= LONGEST


def shell(text: str, cwd: Path, **variables: str) -> str:
    """What a block of commands prints; each of them must succeed."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "PYTHON"))}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", text],
        cwd=cwd,
        env=clean | variables,
        capture_output=True,
        text=True,
        timeout=1500,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow
def test_install(tmp_path: Path) -> None:
    """Into an empty environment, from the wheel of this checkout; third-party packages are left out."""
    copy = tmp_path / "checkout"
    ignored = shutil.ignore_patterns(".git", ".*_cache", ".hypothesis", ".venv", "__pycache__", "build", "dist")
    shutil.copytree(ROOT, copy, symlinks=True, ignore=ignored)
    shell(f"{sys.executable} -m build --no-isolation --wheel --outdir wheels checkout", tmp_path)
    shell(f"{sys.executable} -m venv environment", tmp_path)
    options = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path / "wheels"), "PIP_NO_DEPS": "1"}
    path = f"{tmp_path}/environment/bin{os.pathsep}{os.environ['PATH']}"
    said = shell(block("README.md", "pip install"), tmp_path, PATH=path, **options)
    assert "Successfully installed redif-sdk" in said
    assert "does not provide the extra" not in said
    assert (tmp_path / "environment/bin/redif").is_file()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("make") is None, reason="make is not here")
def test_make(tmp_path: Path) -> None:
    """`make quickstart` with small settings; of `make test`, which would run this again, that every part is run."""
    tools = tmp_path / "venv" / "bin"
    tools.mkdir(parents=True)
    (tmp_path / "tests" / "attacks").mkdir(parents=True)
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    small = "--steps 1 --updates 2 --num-samples 32 --quiet"
    (tools / "redif").write_text(f'#!/bin/sh\n{REDIF} "$@" {small}\n')
    for name in ("python", "ruff", "mypy", "lint-imports"):
        (tools / name).write_text('#!/bin/sh\necho "ran $(basename "$0") $*"\n')
    for tool in tools.iterdir():
        tool.chmod(0o755)
    (tmp_path / "venv/.ready").touch()
    os.utime(tmp_path / "venv/.ready", (time.time() + 3600,) * 2)
    text = block("README.md", "make quickstart")
    said = shell(text, tmp_path, PYTHONPATH=str(ROOT), MAKEFLAGS=f" -- VENV={tmp_path}/venv")
    assert (tmp_path / "build/quickstart/report.html").is_file()
    assert FastPipeline.from_pretrained(tmp_path / "build/quickstart/student-1")("Dress", seed=0).images
    for part in ("ran ruff check", "ran mypy", "ran lint-imports", "ran python -m pytest"):
        assert part in said


@pytest.mark.slow
def test_ten_lines(tmp_path: Path) -> None:
    """With two updates where the settings name no budget."""
    script = "from redif_sdk.distill import config\nconfig.DEFAULT_UPDATES = 2\n" + block("README.md", "from redif_sdk")
    script += "\nimage.save('dress.png')\nprint(student.distillation.budget.updates)\n"
    (tmp_path / "ten_lines.py").write_text(script)
    said = shell(f"{sys.executable} ten_lines.py", tmp_path, PYTHONPATH=str(ROOT))
    assert re.search(r"^2$", said, re.M)
    with Image.open(tmp_path / "dress.png") as image:
        assert image.size == (28, 28)


def test_targets() -> None:
    """Each command of CONTRIBUTING's first block is there; what they run is tested in test_make.py."""
    lines = [line.partition("#")[0].split() for line in block("CONTRIBUTING.md", "make test ").splitlines()]
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
    assert {words[1] for words in lines if words[0] == "make"} <= set(targets)
    assert [(ROOT / words[-1]).is_file() for words in lines if words[0] != "make"] == [True]


def defined(start: str) -> SimpleNamespace:
    """What a block of CONTRIBUTING defines."""
    names: dict[str, Any] = {}
    exec(compile(block("CONTRIBUTING.md", start), "CONTRIBUTING.md", "exec"), names)
    return SimpleNamespace(**names)


def test_a_reward() -> None:
    reward = defined('"""Smooth images').SmoothReward()
    flat, stripes = torch.zeros(1, 1, 4, 4), torch.tensor([-1.0, 1.0]).repeat(2).expand(1, 1, 4, 4)
    found = reward(Batch(torch.cat([flat, stripes]), torch.zeros(2, 1, 4, 4)))
    assert found.tolist() == [0.0, -2.0]


def test_a_method(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In place of regression, the trainer takes it as it stands, and it brings the error down."""
    method = defined('"""Regression by').Absolute
    monkeypatch.setitem(METHODS, "regression", method)
    run = gaussian.trainer(
        gaussian.make_teacher(), "regression", tmp_path, num_inference_steps=1, updates=60, learning_rate=1e-2
    )
    assert isinstance(run.method, method)
    run.run()
    checks = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines() if "check_mse" in line]
    assert checks[-1]["check_mse"] < checks[0]["check_mse"] / 2


def test_a_command(bare_student: Path) -> None:
    app = typer.Typer()
    app.command()(defined('"""The command ``redif steps').steps_command)
    done = CliRunner().invoke(app, [str(bare_student)])
    assert (done.exit_code, done.stdout) == (0, "2, 3\n"), done.output
