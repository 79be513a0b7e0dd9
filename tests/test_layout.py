"""The sources as text: names, docstrings, links, and what no file may say.

Who may import whom is held by import-linter (`make lint`; the contracts are in pyproject.toml).
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import redif_sdk

ROOT = Path(__file__).resolve().parent.parent
LONGEST_FILE, LONGEST_FUNCTION = 450, 80  # lines
ROOMS = ("redif_sdk", "models", "distill", "export", "demo")


def modules(room: str) -> list[Path]:
    """The room's own modules; in redif_sdk without the linked rooms."""
    folder = ROOT / room
    linked = {folder / other for other in ROOMS} if room == "redif_sdk" else set()
    return sorted(path for path in folder.rglob("*.py") if not linked & set(path.parents))


def test_the_command_line_starts_without_torch() -> None:
    heavy = {"torch", "diffusers", "transformers", "accelerate", "peft", "onnxruntime", "gradio"}
    script = f"import redif_sdk.cli.main, sys; print(sorted(set(sys.modules) & {heavy}))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("room", [*ROOMS, "zoo", "tests", "benchmarks"])
def test_every_module_says_what_it_is(room: str) -> None:
    without = [
        path.relative_to(ROOT).as_posix()
        for path in modules(room)
        if not (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").strip()
    ]
    assert without == []


@pytest.mark.parametrize("room", ROOMS)
def test_files_and_functions_fit_in_a_head(room: str) -> None:
    """Longer ones hold a second idea."""
    long_files, long_functions = [], []
    for path in modules(room):
        text = path.read_text(encoding="utf-8")
        if text.count("\n") > LONGEST_FILE:
            long_files.append(path.relative_to(ROOT).as_posix())
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > LONGEST_FUNCTION:
                    long_functions.append(f"{path.relative_to(ROOT).as_posix()}: {node.name}, {lines} lines")
    assert (long_files, long_functions) == ([], [])


@pytest.mark.parametrize(("room", "most"), [("redif_sdk", 12), ("distill", 6)])
def test_rooms_have_few_modules_of_their_own(room: str, most: int) -> None:
    """A prefix or a fortieth file side by side is a folder that was not made."""
    assert len(list((ROOT / room).glob("*.py"))) <= most


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_are_imported_by_their_installed_names(room: str) -> None:
    """`import distill` works from the root of a checkout and nowhere else, and would make every class twice."""
    top = re.compile(rf"^\s*(?:from|import) (?:{'|'.join(ROOMS[1:])})\b", re.MULTILINE)
    assert [path.name for path in modules(room) if top.search(path.read_text(encoding="utf-8"))] == []


def test_every_public_name_is_there() -> None:
    assert len(redif_sdk.__all__) == len(set(redif_sdk.__all__))
    assert [name for name in redif_sdk.__all__ if not hasattr(redif_sdk, name)] == []


def text_files() -> Iterator[tuple[str, str]]:
    """The files that git tracks and that are text, links left out; without git (in an sdist), all of the sources."""
    if (ROOT / ".git").exists():
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
        paths = [ROOT / os.fsdecode(name) for name in listed.split(b"\0") if name]
    else:
        paths = [
            path for folder in (*ROOMS, "zoo", "tests", "benchmarks", "docs") for path in (ROOT / folder).rglob("*")
        ]
        paths += ROOT.glob("*.*")
    for path in paths:
        if path.is_file() and not path.is_symlink():
            data = path.read_bytes()
            if b"\0" not in data[:8192]:
                yield path.relative_to(ROOT).as_posix(), data.decode("utf-8")


def test_no_file_names_a_machine_or_a_registry() -> None:
    """Paths of the machine that a file was written on, and package hosts: neither is true anywhere else."""
    absolute = r"(?<![\w.~$}/-])/(?:work|root|Users|mnt|home/[a-z]\w*|tmp/\w+)/"
    hosts = ("files.pythonhosted", "pypi.org/simple", "download.pytorch", "registry.npmjs", "proxy.golang")
    pattern = re.compile("|".join([absolute, *map(re.escape, hosts), r"extra-index-url"]))
    this = Path(__file__).relative_to(ROOT).as_posix()
    wrong = [
        f"{name}:{number}: {line.strip()[:120]}"
        for name, text in text_files()
        if name != this
        for number, line in enumerate(text.splitlines(), 1)
        if pattern.search(line)
    ]
    assert wrong == []


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="an sdist has neither links nor .ci")
def test_the_rooms_are_linked_and_continuous_integration_can_run() -> None:
    """git keeps links and the executable bit; where it cannot, a link is a text file with its target."""
    for room in ROOMS[1:]:
        link = ROOT / "redif_sdk" / room
        assert (str(link.readlink()) if link.is_symlink() else link.read_text()) == f"../{room}"
    modes = subprocess.run(
        ["git", "ls-files", "--stage", ".ci/run", "redif_sdk/distill"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert [line.split()[0] for line in modes.splitlines()] == ["100755", "120000"]
