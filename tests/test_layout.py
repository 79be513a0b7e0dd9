"""The rooms of the project: who may import whom, and what no file of it may say.

Imports are read from the sources, so that a forbidden one is found even where no test runs it. What the public names
do is tested elsewhere; here they only have to be there.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import redif_sdk

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("redif_sdk", "distill", "export", "demo")
TRAINING_PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft")
# What each room may use of the others.
MAY_IMPORT = {
    "redif_sdk": set(),
    "distill": {"redif_sdk", "export"},  # of export its families alone: see below
    "export": {"redif_sdk"},
    "demo": {"redif_sdk"},
}
# These join the rooms, inside functions only. The command line also collects the other rooms' commands when it starts.
JOINING = {
    "redif_sdk/cli/main.py",
    "redif_sdk/quickstart/images.py",
    "redif_sdk/quickstart/text.py",
    "redif_sdk/cli/bench.py",
}
COMMANDS = ("redif_sdk/cli/main.py", re.compile(r"redif_sdk\.\w+\.commands(\.\w+)?"))


@dataclass(frozen=True)
class Import:
    """One imported module, where, and whether importing the file is enough to import it."""

    file: str
    line: int
    module: str
    at_import: bool


def modules(room: str) -> list[Path]:
    """The room's own modules; in redif_sdk without the linked rooms."""
    folder = ROOT / room
    linked = {folder / other for other in ROOMS} if room == "redif_sdk" else set()
    return sorted(path for path in folder.rglob("*.py") if not linked & set(path.parents))


def imports(path: Path, root: Path = ROOT) -> list[Import]:
    """Every import of a file, also by import_module("..."). Those of TYPE_CHECKING blocks do not run: left out."""
    file = path.relative_to(root)
    parts = file.parent.parts
    package = list(parts if parts[0] == "redif_sdk" else ("redif_sdk", *parts))
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [Import(file.as_posix(), line, module, top) for line, module, top in _walk(tree, package, True)]


def _walk(node: ast.AST, package: list[str], at_import: bool) -> Iterator[tuple[int, str, bool]]:
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        return
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield node.lineno, alias.name, at_import
    elif isinstance(node, ast.ImportFrom):
        base = package[: len(package) - node.level + 1] if node.level else []
        name = ".".join([*base, *([node.module] if node.module else [])])
        for alias in node.names:  # the name may itself be a module: from redif_sdk import distill
            yield node.lineno, f"{name}.{alias.name}", at_import
    elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
        for argument in node.args[:1]:
            if isinstance(argument, ast.Constant):
                yield node.lineno, str(argument.value), at_import
    inside = at_import and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
    for child in ast.iter_child_nodes(node):
        yield from _walk(child, package, inside)


def room_of(module: str) -> str | None:
    """The room that a dotted name leads to; None for third-party modules. Rooms have no top-level names."""
    first, _, rest = module.partition(".")
    if first != "redif_sdk":
        return first if first in ROOMS else None
    second = rest.partition(".")[0]
    return second if second in ROOMS else "redif_sdk"


def test_the_reader_of_imports_finds_each_form(tmp_path: Path) -> None:
    """The tests below would pass on a reader that finds nothing."""
    path = tmp_path / "distill" / "methods" / "one.py"
    path.parent.mkdir(parents=True)
    path.write_text(
        "import torch.nn as nn\n"
        "from ..pairs import Pairs\n"
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    import peft\n"
        "try:\n    from redif_sdk import export\nexcept ImportError:\n    pass\n"
        "def f():\n    import importlib\n    importlib.import_module('redif_sdk.demo.app')\n"
    )
    found = {(entry.module, entry.at_import) for entry in imports(path, tmp_path)}
    assert found == {
        ("torch.nn", True),
        ("redif_sdk.distill.training.pool.Pairs", True),
        ("typing.TYPE_CHECKING", True),
        ("redif_sdk.export", True),
        ("importlib", False),
        ("redif_sdk.demo.app", False),
    }
    assert [
        room_of(name) for name in ("redif_sdk.export", "redif_sdk.sampling.table", "torch.nn", "distill.pairs")
    ] == [
        "export",
        "redif_sdk",
        None,
        "distill",
    ]


def test_the_runtime_never_imports_torch() -> None:
    wrong = [
        entry
        for path in modules("redif_sdk")
        for entry in imports(path)
        if entry.module.partition(".")[0] in TRAINING_PACKAGES
    ]
    assert wrong == []


@pytest.mark.parametrize("room", ROOMS)
def test_the_arrows_between_the_rooms_go_one_way(room: str) -> None:
    wrong = [
        entry
        for path in modules(room)
        for entry in imports(path)
        if room_of(entry.module) not in {None, room, *MAY_IMPORT[room]}
        and (entry.at_import or entry.file not in JOINING)
        and not (entry.file == COMMANDS[0] and COMMANDS[1].fullmatch(entry.module))
    ]
    assert wrong == []


def test_the_command_line_starts_without_torch() -> None:
    script = f"import redif_sdk.cli.main, sys; print(sorted(set(sys.modules) & {set(TRAINING_PACKAGES)}))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_distill_takes_from_export_only_how_networks_are_called() -> None:
    """Both call the same networks, so that is written once; distill needs nothing of ONNX."""
    taken = {
        entry.module.split(".")[2]
        for path in modules("distill")
        for entry in imports(path)
        if room_of(entry.module) == "export"
    }
    assert taken == {"families"}


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_are_imported_by_their_installed_names(room: str) -> None:
    """`import distill` works from the root of a checkout and nowhere else, and would make every class twice."""
    wrong = [entry for path in modules(room) for entry in imports(path) if entry.module.partition(".")[0] in ROOMS[1:]]
    assert wrong == []


@pytest.mark.parametrize("room", [*ROOMS, "tests", "benchmarks"])
def test_every_module_says_what_it_is(room: str) -> None:
    without = [
        path.relative_to(ROOT).as_posix()
        for path in modules(room)
        if not (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").strip()
    ]
    assert without == []


def test_the_design_names_every_module_and_no_other() -> None:
    text = (ROOT / "docs/design.md").read_text(encoding="utf-8")
    built, _, _ = text.partition("\n## 8. Planned")
    named = set(re.findall(r"\b(\w+\.py)\b", built))
    there = {path.name for room in (*ROOMS, "benchmarks") for path in modules(room)}
    tests = {path.name for path in modules("tests")}
    assert named - (tests - there) == there


def test_every_public_name_is_there() -> None:
    assert len(redif_sdk.__all__) == len(set(redif_sdk.__all__))
    assert [name for name in redif_sdk.__all__ if not hasattr(redif_sdk, name)] == []


def text_files() -> Iterator[tuple[str, str]]:
    """The files that git tracks and that are text, links left out; without git (in an sdist), all of the sources."""
    if (ROOT / ".git").exists():
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
        paths = [ROOT / os.fsdecode(name) for name in listed.split(b"\0") if name]
    else:
        paths = [path for folder in (*ROOMS, "tests", "benchmarks", "docs") for path in (ROOT / folder).rglob("*")]
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
