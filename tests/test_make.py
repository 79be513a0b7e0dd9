"""`make test`: one part that fails neither hides nor skips the next, and is not forgotten."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TOOL = '#!/bin/sh\necho "$(basename "$0") $*" >>"$(dirname "$0")/said"\n{end}\n'


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not here")
@pytest.mark.parametrize("failing", ["tests/attacks", "-n auto", "ruff check", "nothing"])
def test_every_part_runs_whatever_one_says(tmp_path: Path, failing: str) -> None:
    tools = tmp_path / "venv" / "bin"
    tools.mkdir(parents=True)
    (tmp_path / "tests" / "attacks").mkdir(parents=True)
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("python", "ruff", "mypy", "lint-imports"):
        ends = 'case "$(basename "$0") $*" in *"--ignore tests/attacks"*) last=yes;; esac\n'
        if failing == "tests/attacks":
            ends += 'case "$last $*" in yes*) exit 0;; *" tests/attacks"*) exit 1;; esac'
        else:
            ends += f'case "$(basename "$0") $*" in *"{failing}"*) exit 1;; esac'
        (tools / name).write_text(TOOL.format(end=ends))
        (tools / name).chmod(0o755)
    ready = tmp_path / "venv" / ".ready"
    ready.touch()
    os.utime(ready, (time.time() + 3600,) * 2)
    command = ["make", "test", f"VENV={tmp_path}/venv"]
    variables = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, check=False)
    said = (tools / "said").read_text()
    assert "ruff check" in said
    assert "-n auto" in said
    assert [line for line in said.splitlines() if line.endswith(" tests/attacks") and "--ignore" not in line], said
    assert (done.returncode == 0) == (failing == "nothing"), done.stdout + done.stderr
