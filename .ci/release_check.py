"""Whether this work tree can be released: ``make release-check``. One line for each thing that is wrong; exit code 1.

    python .ci/release_check.py
    python .ci/release_check.py --rehearsal     between releases: changes without a commit, and "Unreleased", are taken
    python .ci/release_check.py --offline       third-party packages are lent by this environment, not installed

Wheel and sdist are built, their metadata checked, and the wheel is installed into an empty environment, which draws
from a student that ships. Versions, changelog and documentation are checked. Nothing is published.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import tomllib
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from email.parser import HeaderParser
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

from packaging.metadata import Metadata
from packaging.utils import parse_sdist_filename, parse_wheel_filename
from packaging.version import InvalidVersion, Version

ROOT = Path(__file__).resolve().parent.parent
LARGEST = 100 << 20  # bytes of a file that PyPI takes
RUN_IN_WHEEL = """
import sys, redif_sdk
from redif_sdk import FastPipeline, StepTable
print(redif_sdk.__file__, "torch" in sys.modules)
"""


class FaultError(Exception):
    """What is wrong, in one line."""


@dataclass
class Release:
    """A work tree, and where its check works."""

    root: Path
    work: Path
    rehearsal: bool = False
    offline: bool = False
    student: Path | None = None

    @cached_property
    def project(self) -> dict[str, object]:
        return dict(tomllib.loads(self.read("pyproject.toml"))["project"])

    @property
    def version(self) -> str:
        return str(self.project["version"])

    @property
    def wheel(self) -> Path:
        return self._built("*.whl")

    @property
    def sdist(self) -> Path:
        return self._built("*.tar.gz")

    @property
    def bin(self) -> Path:
        """Where the commands of the environment with the wheel are."""
        return self.work / "environment" / ("Scripts" if os.name == "nt" else "bin")

    def _built(self, pattern: str) -> Path:
        found = list((self.work / "dist").glob(pattern))
        if len(found) != 1:
            raise FaultError(f"the build made {len(found)} files {pattern}, not one")
        return found[0]

    def read(self, name: str) -> str:
        try:
            return (self.root / name).read_text(encoding="utf-8")
        except OSError as error:
            raise FaultError(f"{name} cannot be read: {error.strerror}") from error

    def run(self, what: str, *command: str | Path, cwd: Path | None = None) -> str:
        """Standard output of a command that must succeed, without this process's Python settings."""
        clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        done = subprocess.run(
            [str(part) for part in command],
            cwd=cwd or self.work,
            env=clean,
            capture_output=True,
            text=True,
            timeout=3600,
        )
        if done.returncode:
            said = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
            raise FaultError(f"{what} fails: {said[-1].strip() if said else f'exit code {done.returncode}'}")
        return done.stdout


def tree(release: Release) -> Iterator[str]:
    """Nothing is released that no commit holds."""
    if release.rehearsal or not (release.root / ".git").exists():
        return
    changed = release.run("git status", "git", "status", "--porcelain", cwd=release.root).splitlines()
    if changed:
        yield f"{len(changed)} files differ from the last commit, {changed[0][3:]} among them; commit them"


def version(release: Release) -> Iterator[str]:
    """One version, wherever one stands."""
    try:
        Version(release.version)
    except InvalidVersion:
        yield f"pyproject.toml: {release.version!r} is no version (PEP 440)"
    cited = re.search(r'^version: "?([^"\n]+)"?$', release.read("CITATION.cff"), re.M)
    if cited is None or cited[1] != release.version:
        yield f"CITATION.cff has version {cited[1] if cited else 'none'}, pyproject.toml {release.version}"
    if (release.root / ".git").exists():
        tags = release.run("git tag", "git", "tag", "--points-at", "HEAD", cwd=release.root).split()
        wrong = [tag for tag in tags if tag.startswith("v") and tag != f"v{release.version}"]
        if wrong:
            yield f"the commit has the tag {wrong[0]}, and the version is {release.version}"


def changelog(release: Release) -> Iterator[str]:
    """The version's section comes first in CHANGELOG.md, has a date, and says something."""
    sections = re.split(r"^## ", release.read("CHANGELOG.md"), flags=re.M)[1:]
    head, _, body = (sections[0] if sections else "").partition("\n")
    found = re.fullmatch(r"\[([^\]]+)\] - (\d{4}-\d\d-\d\d|Unreleased)", head.strip())
    if found is None or found[1] != release.version:
        yield f"CHANGELOG.md: the first section is {head.strip()!r}, not '[{release.version}] - DATE'"
        return
    if found[2] == "Unreleased" and not release.rehearsal:
        yield f"CHANGELOG.md: {release.version} is 'Unreleased'; write the date of the release"
    if not re.search(r"^- \S", body, re.M):
        yield f"CHANGELOG.md: the section of {release.version} lists no change"


def build(release: Release) -> Iterator[str]:
    """Wheel and sdist are made: the wheel from the sdist, so that the sdist is whole."""
    release.run(
        "the build", sys.executable, "-m", "build", "--no-isolation", "--outdir", release.work / "dist", release.root
    )
    if parse_wheel_filename(release.wheel.name)[1] != Version(release.version):
        yield f"{release.wheel.name} is not of version {release.version}"
    if parse_sdist_filename(release.sdist.name)[1] != Version(release.version):
        yield f"{release.sdist.name} is not of version {release.version}"
    for file in (release.wheel, release.sdist):
        if file.stat().st_size > LARGEST:
            yield f"{file.name} has {file.stat().st_size >> 20} MiB; PyPI takes {LARGEST >> 20}"


def metadata(release: Release) -> Iterator[str]:
    """What PyPI reads is valid, whole, and the same in both files."""
    texts = {}
    with zipfile.ZipFile(release.wheel) as archive:
        (inside,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        texts[release.wheel.name] = archive.read(inside).decode()
        licences = [name for name in archive.namelist() if ".dist-info/licenses/" in name]
    with tarfile.open(release.sdist) as packed:
        member = packed.extractfile(f"{release.sdist.name.removesuffix('.tar.gz')}/PKG-INFO")
        texts[release.sdist.name] = member.read().decode() if member else ""
    for name, text in texts.items():
        try:
            found = Metadata.from_email(text, validate=True)
        except ExceptionGroup as group:
            yield from (f"{name}: {error}" for error in group.exceptions)
            continue
        for field in ("summary", "license_expression", "requires_python", "description", "classifiers"):
            if not getattr(found, field):
                yield f"{name}: its metadata has no {field.replace('_', '-')}"
        if found.description_content_type != "text/markdown":
            yield f"{name}: its description is {found.description_content_type}, not text/markdown"
    first, second = (sorted(HeaderParser().parsestr(text).items()) for text in texts.values())
    if first != second:
        yield "the metadata of wheel and sdist differ"
    if not licences:
        yield f"{release.wheel.name} holds no licence"


def installed(release: Release) -> Iterator[str]:
    """The wheel works in an environment that has nothing else."""
    environment = release.work / "environment"
    release.run("venv", sys.executable, "-m", "venv", environment, *(["--without-pip"] if release.offline else []))
    if release.offline:
        pip = [sys.executable, "-m", "pip", "--python", release.bin / "python"]
        release.run("the installation", *pip, "install", "--quiet", "--no-deps", "--no-index", release.wheel)
        (packages,) = environment.glob("[Ll]ib/**/site-packages")
        (packages / "lent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    else:
        pip = [release.bin / "python", "-m", "pip", "--disable-pip-version-check"]
        release.run("the installation", *pip, "install", "--quiet", f"{release.wheel}[cpu]")
        release.run("pip check", *pip, "check")
    where, torch = release.run("the import", release.bin / "python", "-c", RUN_IN_WHEEL).rsplit(maxsplit=1)
    if not Path(where).resolve().is_relative_to(environment.resolve()):
        yield f"redif_sdk is imported from {where}, not from the wheel"
    if torch == "True":
        yield "import redif_sdk imports torch"
    told = release.run("redif --version", release.bin / "redif", "--version").strip()
    if told != f"redif {release.version}":
        yield f"redif --version says {told!r}, not 'redif {release.version}'"
    if "onnxruntime" not in release.run("redif doctor", release.bin / "redif", "doctor"):
        yield "redif doctor of the wheel with [cpu] names no onnxruntime"


def generate(release: Release) -> Iterator[str]:
    """A student that ships, exported here, is drawn from by the wheel."""
    from PIL import Image

    if not release.bin.exists():
        raise FaultError("no image was generated, since the wheel was not installed")
    student = release.student
    if student is None:
        sys.path.insert(0, str(release.root / "examples"))
        from shipped import shipped_student

        student = shipped_student()
    condition = json.loads((student / "redif.json").read_text(encoding="utf-8")).get("condition") or {}
    asked = condition["examples"][:1] if "examples" in condition else ["--class-label", "0"] if condition else []
    output = release.work / "image.png"
    release.run("redif verify", release.bin / "redif", "verify", student, "--batches", "1", "--quiet")
    release.run("redif generate", release.bin / "redif", "generate", student, *asked, "--seed", "0", "-o", output)
    with Image.open(output) as image:
        if image.convert("L").getextrema()[0] == image.convert("L").getextrema()[1]:
            yield f"redif generate {student} gives an image of one colour"


def documentation(release: Release) -> Iterator[str]:
    """The site builds without a warning."""
    if not (release.root / "mkdocs.yml").exists():
        return
    if find_spec("mkdocs") is None:
        yield "mkdocs is not installed, and mkdocs.yml is there; install the documentation's packages"
        return
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", release.work / "site"]
    release.run("mkdocs build --strict", *command, cwd=release.root)


CHECKS: tuple[Callable[[Release], Iterator[str]], ...] = (
    tree, version, changelog, build, metadata, installed, generate, documentation,
)  # fmt: skip


def faults(release: Release, check: Callable[[Release], Iterator[str]]) -> list[str]:
    """What a check finds; one that cannot run is a fault too."""
    found = []
    try:
        for fault in check(release):
            found.append(fault)
    except FaultError as error:
        found.append(str(error))
    except (OSError, ValueError, KeyError, subprocess.SubprocessError) as error:
        found.append(f"{check.__name__} cannot be checked: {type(error).__name__}: {error}")
    return found


def main() -> int:
    """Run every check, print a line for each, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rehearsal", action="store_true", help="take changes without a commit, and 'Unreleased'")
    parser.add_argument("--offline", action="store_true", help="lend this environment's packages to the wheel's")
    parser.add_argument("--student", type=Path, help="an exported student to draw from; default: one that ships")
    asked = parser.parse_args()
    wrong = 0
    with tempfile.TemporaryDirectory(prefix="redif-release-") as work:
        student = asked.student and asked.student.resolve()
        release = Release(ROOT, Path(work), asked.rehearsal, asked.offline, student)
        for check in CHECKS:
            found = faults(release, check)
            wrong += len(found)
            for fault in found:
                print(f"release-check: {' '.join(fault.split())}", file=sys.stderr, flush=True)
            if not found:
                print(f"ok: {check.__name__}", flush=True)
    print(f"{wrong} faults" if wrong else "this can be released")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
