"""What the documentation tells people to type: the tutorials run as they stand, and every command and name exists."""

from __future__ import annotations

import ast
import re
import shlex
import shutil
import tomllib
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import pytest
from blocks import ROOT, blocks, head, run_page
from gaussian import make_teacher, trainer, weights

from redif_sdk.distill.methods import METHODS
from redif_sdk.distill.options import MethodOptions

DOCS = ROOT / "docs"
TUTORIALS = sorted(page for page in (DOCS / "tutorials").glob("*.md") if page.name != "index.md")
PAGES = sorted([*DOCS.rglob("*.md"), ROOT / "README.md"])


def _tutorial(page: Path) -> object:
    return pytest.param(page, id=page.stem, marks=[pytest.mark.slow] if head(page)["tested"] == "slow" else [])


@pytest.mark.parametrize("page", [_tutorial(page) for page in TUTORIALS])
def test_a_tutorial_runs_as_it_stands(page: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Prints what each block took: pytest -s."""
    if head(page).get("needs") == "student":
        shutil.copytree(request.getfixturevalue("tiny_student"), tmp_path / "student")
    if "--target web" in page.read_text() and shutil.which("npm") is None:
        pytest.skip("no npm here: install Node.js")
    for line, seconds in run_page(page, tmp_path).items():
        print(f"{page.stem}: {seconds:.1f} s  {line}")


def test_every_tutorial_says_how_it_is_tested() -> None:
    assert len(TUTORIALS) >= 6
    assert {head(page).get("tested") for page in TUTORIALS} == {"quick", "slow"}


def _lines(code: str) -> list[str]:
    """The commands of a bash block, each on one line, without comments."""
    joined = re.sub(r"\\\n\s*", " ", code)
    joined = re.sub(r"<<'(\w+)'.*?^\1$", "", joined, flags=re.DOTALL | re.MULTILINE)
    return [part.strip() for line in joined.splitlines() for part in re.split(r"&&|\|\|?|;", line.split(" #")[0])]


def _redif(page: Path) -> list[list[str]]:
    """The words of every redif command of a page, after ``redif``."""
    found = []
    for block in blocks(page, "bash", "sh"):
        for line in _lines(block.code):
            words = shlex.split(line.replace("<(", "").replace("$(", ""), comments=True) if "redif " in line else []
            if "redif" in words:
                found.append(words[words.index("redif") + 1 :])
    return found


def test_every_command_in_the_documentation_exists() -> None:
    """Commands and options in blocks of all pages, README included; values are not looked at."""
    from docs.generators.commands import commands
    from docs.generators.settings import settings

    known = commands()
    for page, words in [(where, words) for where in PAGES for words in _redif(where)]:
        if words[0].startswith("-"):
            continue
        assert words[0] in known, f"{page}: redif {words[0]}"
        options = {
            name for parameter in known[words[0]].params for name in (*parameter.opts, *parameter.secondary_opts)
        }
        options |= {"--help"} | (
            {f"--{name.replace('_', '-')}" for name in settings()} if words[0] == "distill" else set()
        )
        for word in words[1:]:
            if re.match(r"--?[a-z]", word):
                assert word.split("=")[0] in options, f"{page}: redif {' '.join(words)}: {word}"


def test_commands_are_found_in_blocks() -> None:
    found = [words for page in PAGES for words in _redif(page)]
    assert len(found) > 100
    assert {"distill", "import", "export", "serve", "push"} <= {words[0] for words in found}


def test_python_in_the_documentation_is_python_and_its_names_exist() -> None:
    for page, block in [(where, block) for where in PAGES for block in blocks(where, "python")]:
        for node in ast.walk(ast.parse(block.code)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("redif_sdk"):
                module = import_module(node.module or "")
                for name in node.names:
                    assert hasattr(module, name.name), f"{page}: {node.module}.{name.name}"


def test_extras_in_the_documentation_exist() -> None:
    known = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    for page in PAGES:
        for extras in re.findall(r"redif-sdk\[([\w,-]+)\]", page.read_text(encoding="utf-8")):
            assert set(extras.split(",")) <= known, f"{page}: {extras}"


def test_the_method_of_the_how_to_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it stands in docs/how-to/own-method.md, under the name of a method whose settings it can read."""
    page = DOCS / "how-to" / "own-method.md"
    example, options = blocks(page, "python")
    names: dict[str, Any] = {}
    exec(compile(example.code, str(page), "exec"), names)
    monkeypatch.setitem(METHODS, "regression", names["Nearest"])
    run = trainer(make_teacher(), "regression", updates=4)
    before = weights(run).clone()
    run.run()
    assert (weights(run) - before).abs().max() > 0
    assert isinstance(run.method, names["Nearest"])
    scope: dict[str, Any] = {"MethodOptions": MethodOptions, "Literal": Literal}
    exec(compile(options.code, str(page), "exec", dont_inherit=True), scope)
    assert scope["NearestOptions"]().method == "nearest"
