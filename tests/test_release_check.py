"""`make release-check`: each thing that is wrong is one line, and a tree without faults passes."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / ".ci" / "release_check.py"


@pytest.fixture(scope="module")
def check() -> ModuleType:
    spec = importlib.util.spec_from_file_location("release_check", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def release(check: ModuleType, tmp_path: Path) -> Any:
    """A work tree with what the checks of text read, as it stands now."""
    for name in ("pyproject.toml", "CITATION.cff", "CHANGELOG.md"):
        shutil.copy(ROOT / name, tmp_path)
    return check.Release(tmp_path, tmp_path / "work", rehearsal=True)


def rewrite(release: Any, name: str, old: str, new: str) -> None:
    path = release.root / name
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


def test_versions_and_changelog_of_this_tree_agree(check: ModuleType, release: Any) -> None:
    assert check.faults(release, check.version) == []
    assert check.faults(release, check.changelog) == []


def test_a_version_that_differs_is_named(check: ModuleType, release: Any) -> None:
    rewrite(release, "CITATION.cff", f"version: {release.version}", "version: 9.9")
    (fault,) = check.faults(release, check.version)
    assert fault == f"CITATION.cff has version 9.9, pyproject.toml {release.version}"
    (release.root / "CITATION.cff").unlink()
    assert check.faults(release, check.version) == ["CITATION.cff cannot be read: No such file or directory"]


@pytest.mark.parametrize(
    ("head", "said"),
    [
        ("## [9.9] - 2026-01-01", "the first section is '[9.9] - 2026-01-01'"),
        ("## [{version}]", "the first section is '[{version}]'"),
        ("## [{version}] - Unreleased", "is 'Unreleased'; write the date of the release"),
        ("## [{version}] - 2026-01-01", ""),
    ],
)
def test_the_changelog_names_the_version_and_its_date(check: ModuleType, release: Any, head: str, said: str) -> None:
    release.rehearsal = False
    text = "# Changelog\n\n" + head.format(version=release.version) + "\n\n- A change.\n"
    (release.root / "CHANGELOG.md").write_text(text)
    found = check.faults(release, check.changelog)
    assert len(found) == bool(said)
    assert all(said.format(version=release.version) in fault for fault in found)


def test_a_section_without_changes_is_a_fault(check: ModuleType, release: Any) -> None:
    (release.root / "CHANGELOG.md").write_text(
        f"## [{release.version}] - 2026-01-01\n\n## [0.0.1] - 2025-01-01\n- Old.\n"
    )
    assert check.faults(release, check.changelog) == [f"CHANGELOG.md: the section of {release.version} lists no change"]


def test_changes_without_a_commit_and_a_wrong_tag_are_faults(check: ModuleType, release: Any) -> None:
    def git(*command: str) -> None:
        identity = ("-c", "user.name=a", "-c", "user.email=a@example.org")
        subprocess.run(["git", *identity, *command], cwd=release.root, check=True, capture_output=True)

    (release.root / "work").mkdir()
    release.rehearsal = False
    git("init")
    git("add", "CITATION.cff", "CHANGELOG.md")
    git("commit", "-m", "one")
    (fault,) = check.faults(release, check.tree)
    assert fault.endswith("differ from the last commit, pyproject.toml among them; commit them")
    git("add", "pyproject.toml")
    git("commit", "-m", "two")
    assert check.faults(release, check.tree) == []
    git("tag", "v9.9")
    assert check.faults(release, check.version) == [
        f"the commit has the tag v9.9, and the version is {release.version}"
    ]


def test_a_command_that_fails_is_one_line(check: ModuleType, release: Any) -> None:
    release.work.mkdir()

    def failing(release: Any) -> Any:
        release.run("the build", sys.executable, "-c", "import sys; sys.exit('first\\nno setuptools\\n')")
        yield "not reached"

    assert check.faults(release, failing) == ["the build fails: no setuptools"]


@pytest.mark.slow
def test_the_whole_check_passes_on_this_tree(tiny_student: Path) -> None:
    options = ["--rehearsal", "--offline", "--student", str(tiny_student)]
    done = subprocess.run([sys.executable, str(SCRIPT), *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "this can be released"
    assert "ok: installed" in done.stdout


@pytest.mark.slow
def test_a_wheel_that_does_not_work_is_a_fault(check: ModuleType, tmp_path: Path) -> None:
    """A tree whose package breaks when it is imported, and whose metadata are invalid."""
    ignored = shutil.ignore_patterns(".git", ".*_cache", ".hypothesis", ".venv", "__pycache__", "build", "*.egg-info")
    tree = Path(shutil.copytree(ROOT, tmp_path / "tree", symlinks=True, ignore=ignored))
    release = check.Release(tree, tmp_path / "work", rehearsal=True, offline=True)
    release.work.mkdir()
    rewrite(release, "redif_sdk/errors.py", "from __future__", "import of_no_package\nfrom __future__")
    rewrite(release, "pyproject.toml", '"Typing :: Typed"', '"Typing :: Typed", "Private :: Of this test"')
    rewrite(release, "pyproject.toml", "\nlicense = ", "\n#")
    assert check.faults(release, check.build) == []
    assert any("license-expression" in fault for fault in check.faults(release, check.metadata))
    (fault,) = check.faults(release, check.installed)
    assert fault.startswith("the import fails:")
    (release.root / "README.md").unlink()
    shutil.rmtree(release.work / "dist")
    assert check.faults(release, check.build) == []
    assert any("has no description" in fault for fault in check.faults(release, check.metadata))
