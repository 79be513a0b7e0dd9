"""The wheel and the sdist: built from a copy of the checkout, installed into an environment of their own, and used.

Third-party packages are lent to that environment by a .pth file; redif_sdk itself must come from the wheel.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from importlib.metadata import requires
from pathlib import Path, PurePosixPath
from shutil import copytree, ignore_patterns, unpack_archive

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from PIL import Image

from redif_sdk import FastPipeline

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDERS = {room: f"redif_sdk/{room}" for room in ("models", "distill", "export", "demo")}
NOT_SOURCES = (".git", ".*_cache", ".hypothesis", ".venv", "__pycache__", "build", "dist", "*.egg-info")


def run(*command: str | Path, cwd: Path) -> str:
    """Standard output of a command that must succeed, run without this process's Python settings."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def build(source: Path, output: Path, *formats: str) -> None:
    run(sys.executable, "-m", "build", "--no-isolation", *formats, "--outdir", output, source, cwd=source)


def names_in(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def sources(root: Path) -> set[str]:
    """What a wheel must hold of the checkout: modules, templates, the type marker, the page, and all beside the
    teachers but two banks, which are too large."""
    linked = {root / inside for inside in FOLDERS.values()}
    kinds = (".py", ".j2")
    own = (p for p in (root / "redif_sdk").rglob("*") if p.suffix in kinds and not linked & set(p.parents))
    found = {path.relative_to(root).as_posix() for path in own} | {"redif_sdk/py.typed"}
    for folder, inside in FOLDERS.items():
        sources = (path for path in (root / folder).rglob("*") if path.suffix in kinds)
        found |= {f"{inside}/{path.relative_to(root / folder).as_posix()}" for path in sources}
    shipped = root / "distill/shipped"
    left_out = {shipped / "emoji" / "bank.npz", shipped / "mini-sd" / "bank.npz"}
    data = (p for p in shipped.rglob("*") if p.is_file() and p.parent.name != "__pycache__" and p not in left_out)
    found |= {f"redif_sdk/export/page/{path.name}" for path in (root / "export/page").iterdir()}
    return found | {f"redif_sdk/distill/shipped/{path.relative_to(shipped).as_posix()}" for path in data}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout with its links as links, so that no build writes into the checkout itself.

    One more teacher lies in it: data at any depth must travel, compiled modules must not.
    """
    copy = tmp_path_factory.mktemp("checkout") / "redif-sdk"
    copytree(ROOT, copy, symlinks=True, ignore=ignore_patterns(*NOT_SOURCES))
    for name in ("README.md", ".gitattributes", "unet/config.json", "unet/weights.safetensors", "__pycache__/x.pyc"):
        path = copy / "distill/shipped/of-this-test" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return copy


@pytest.fixture(scope="module")
def artifacts(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(wheel, sdist), both built straight from the checkout."""
    output = tmp_path_factory.mktemp("dist")
    build(checkout, output, "--wheel", "--sdist")
    (wheel,), (sdist,) = output.glob("*.whl"), output.glob("*.tar.gz")
    return wheel, sdist


def site_packages(environment: Path) -> Path:
    (found,) = environment.glob("lib/python*/site-packages")
    return found


def environment_with(wheel: Path, folder: Path) -> Path:
    """A new virtual environment with `wheel`, which sees this one's third-party packages after its own."""
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    pip = (sys.executable, "-m", "pip", "--python", folder / "bin/python", "install")
    run(*pip, "--quiet", "--no-deps", "--no-index", wheel, cwd=folder)
    # A path in a .pth file is searched, but .pth files below it (our own editable install) are not read.
    (site_packages(folder) / "third-party.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder


@pytest.fixture(scope="module")
def installed(artifacts: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel in it."""
    return environment_with(artifacts[0], tmp_path_factory.mktemp("environment") / "venv")


def test_the_wheel_holds_every_source_once(artifacts: tuple[Path, Path], checkout: Path) -> None:
    names = names_in(artifacts[0])
    assert len(names) == len(set(names))
    content = {name for name in names if ".dist-info/" not in name}
    assert content == sources(checkout)
    assert {PurePosixPath(name).parts[0] for name in content} == {"redif_sdk"}
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_the_sdist_holds_the_project_once_and_makes_the_same_wheel(
    artifacts: tuple[Path, Path], tmp_path: Path
) -> None:
    wheel, sdist = artifacts
    with tarfile.open(sdist) as archive:
        names = [name.partition("/")[2] for name in archive.getnames()]
    assert len(names) == len(set(names))
    wanted = {"LICENSE", "CHANGELOG.md", "Makefile", "constraints.txt", "docs/design.md", "tests/test_packaging.py"}
    assert wanted <= set(names)
    assert not [name for name in names if name.startswith(tuple(FOLDERS.values()))]
    unpack_archive(sdist, tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    build(source, tmp_path / "dist", "--wheel")
    (again,) = (tmp_path / "dist").glob("*.whl")
    assert sorted(names_in(again)) == sorted(names_in(wheel))


def test_the_wheel_works_in_an_environment_of_its_own(installed: Path, tmp_path: Path) -> None:
    python, packages = installed / "bin/python", site_packages(installed)
    own = {path.name for path in packages.iterdir()} - {"third-party.pth"}
    assert own == {"redif_sdk", f"redif_sdk-{PROJECT['project']['version']}.dist-info"}
    script = """
import json, redif_sdk, redif_sdk.demo, redif_sdk.distill, redif_sdk.export
modules = redif_sdk, redif_sdk.demo, redif_sdk.distill, redif_sdk.export
print(json.dumps([redif_sdk.__version__, *(module.__file__ for module in modules)]))
"""
    version, *files = json.loads(run(python, "-c", script, cwd=tmp_path))
    assert version == PROJECT["project"]["version"]
    folders = ("redif_sdk", "redif_sdk/demo", "redif_sdk/distill", "redif_sdk/export")
    assert [Path(file) for file in files] == [packages / folder / "__init__.py" for folder in folders]


def test_the_command_of_the_wheel_works(installed: Path, tiny_student: Path, tmp_path: Path) -> None:
    """It lists its commands, examines its environment, and generates the picture that this process generates."""
    redif = installed / "bin/redif"
    shown = re.sub(r"\x1b\[[0-9;]*m", "", run(redif, "--help", cwd=tmp_path))
    for command in ("quickstart", "import", "distill", "eval", "export", "verify", "generate", "doctor"):
        assert re.search(rf"\b{command}\b", shown), f"redif --help does not list {command}"
    assert "onnxruntime on cpu" in run(redif, "doctor", cwd=tmp_path)
    run(redif, "verify", tiny_student, cwd=tmp_path)
    run(redif, "generate", tiny_student, "--class-label", "3", "--seed", "5", "-o", "out.png", cwd=tmp_path)
    expected = FastPipeline.from_pretrained(tiny_student)(class_labels=3, seed=5).images[0]
    with Image.open(tmp_path / "out.png") as picture:
        assert picture.tobytes() == expected.tobytes()


@pytest.mark.parametrize("links", [True, False], ids=["with-links", "without-links"])
def test_an_editable_install_and_its_root_give_the_same_modules(checkout: Path, tmp_path: Path, links: bool) -> None:
    """Also where git has no symbolic links (core.symlinks=false): there they are text files holding their target."""
    project = Path(copytree(checkout, tmp_path / "project", symlinks=True, ignore=ignore_patterns(*NOT_SOURCES)))
    if not links:
        for folder, inside in FOLDERS.items():
            (project / inside).unlink()
            (project / inside).write_text(f"../{folder}")
    # What `pip install --editable` asks setuptools for (PEP 660), without fetching setuptools.
    run(sys.executable, "-c", "from setuptools import build_meta; build_meta.build_editable('dist')", cwd=project)
    (wheel,) = (project / "dist").glob("*.whl")
    environment = environment_with(wheel, tmp_path / "venv")
    names = [f"redif_sdk.{name}" for name in (*FOLDERS, "distill.shipped", "runtimes.protocol")]
    script = f"""
import json
from importlib.util import find_spec
print(json.dumps([find_spec(name).origin for name in {names}]))
"""
    answers = [json.loads(run(environment / "bin/python", "-c", script, cwd=cwd)) for cwd in (project, tmp_path)]
    from_root, from_elsewhere = ([Path(origin).resolve() for origin in answer] for answer in answers)
    assert from_root == from_elsewhere
    assert from_root[: len(FOLDERS)] == [project / folder / "__init__.py" for folder in FOLDERS]


def test_every_package_is_listed() -> None:
    """setuptools finds no packages by itself here: one that is not listed would be missing from the wheel."""
    listed = PROJECT["tool"]["setuptools"]["packages"]
    modules = {PurePosixPath(name) for name in sources(ROOT) if name.endswith(".py")}
    packages = {module.parent for module in modules if all(part.isidentifier() for part in module.parent.parts)}
    assert sorted(listed) == sorted(str(package).replace("/", ".") for package in packages)


@pytest.mark.skipif(
    sys.platform != "linux" or sys.version_info[:2] != (3, 11), reason="constraints.txt is of Python 3.11 on Linux"
)
def test_all_that_make_installs_is_pinned() -> None:
    """Every requirement of [all,dev], however deep, has one exact version in constraints.txt, within its range."""
    pins = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, _, version = line.partition("==")
            pins[canonicalize_name(name)] = version
    assert not [name for name in pins if name.startswith("nvidia") or name == "torchvision"]
    project = PROJECT["project"]
    missing: set[str] = set()
    seen: set[tuple[str, str]] = set()
    queue = [Requirement(f"redif-sdk[{extra}]") for extra in ("all", "dev")]
    while queue:
        requirement = queue.pop()
        name = canonicalize_name(requirement.name)
        if name != "redif-sdk" and not requirement.specifier.contains(pins.get(name, "0"), prereleases=True):
            missing.add(f"{requirement} (pinned: {pins.get(name)})")
            continue
        for extra in {"", *requirement.extras} - {extra for known, extra in seen if known == name}:
            seen.add((name, extra))
            if name == "redif-sdk":  # from pyproject.toml itself: what is installed may be an older one
                lines = project["optional-dependencies"][extra] if extra else project["dependencies"]
            else:
                lines = requires(name) or []
            deeper = (Requirement(line) for line in lines)
            queue += [r for r in deeper if r.marker is None or r.marker.evaluate({"extra": extra})]
    assert not missing
    assert {name for name, _ in seen} - {"redif-sdk"} == set(pins)
