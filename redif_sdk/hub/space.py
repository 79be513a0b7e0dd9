"""Make a Space on the Hub, as one commit: the demo of a student, or a page that runs in browsers.

A demo loads the student from its own repository, at one commit, or from a folder in the Space. The Space runs the demo
of this release of the package; only a dozen lines are generated.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import redif_sdk
from redif_sdk.artifact.folder import StudentFolder
from redif_sdk.artifact.manifest import CARD_NAME, MANIFEST_NAME, Manifest
from redif_sdk.artifact.paths import hash_file, list_files, locate
from redif_sdk.artifact.web_folder import check_page, is_page
from redif_sdk.card.escape import markdown
from redif_sdk.card.metadata import hub_licence
from redif_sdk.card.render import read_card
from redif_sdk.errors import HubError, InvalidRequest
from redif_sdk.hub.client import check_id, client, offline, translated
from redif_sdk.hub.push import check_gate
from redif_sdk.hub.target import File, Pushed, Target, in_memory, rows_of, student_files

__all__ = ["SPACE_MARKER", "push_space"]

#: In the README.md of every Space that we make: without it, what is there is somebody else's.
SPACE_MARKER = "<!-- made by redif-sdk: redif push --space replaces all files of this Space -->"

_FOLDER = "student"
_PYTHON = "3.11"

_APP = '''\
"""The demo of a student of redif-sdk. Made by `redif push --space`, which makes it anew: edit it elsewhere."""

from redif_sdk.demo.space import run

run({arguments})
'''

_README = """\
{front_matter}
{marker}

# {name}

The demo of *{name}*, a few-step diffusion student: {source}. The same seed gives the same image everywhere; the API
is at the foot of the page. Made by redif-sdk {version}.
"""


def push_space(
    source: str | Path,
    space_id: str,
    *,
    student_id: str | None = None,
    student_commit: str | None = None,
    private: bool | None = None,
    commit_message: str | None = None,
    token: str | bool | None = None,
    allow_unverified: bool = False,
    dry_run: bool = False,
) -> Pushed:
    """Make the Space `space_id` ("org/name"), or make it anew, of a student's folder or of a page for browsers.

    `student_id` and `student_commit`: where the student is on the Hub, which the demo then loads from there; without,
    its files go into the Space. A page is a static Space by itself. A private `student_id` needs a token as the
    Space's secret HF_TOKEN. The other arguments are those of `redif_sdk.hub.push`.

    Raises InvalidRequest, ParityError, IntegrityError, and HubError, also for a Space that holds anything else.
    """
    check_id(space_id)
    if is_page(source):
        if student_id is not None:
            raise InvalidRequest(f"{source} is a page with the student in it; push it to a Space alone")
        sdk, files, name = "static", _page_files(Path(source)), Path(source).resolve().name
    else:
        student = StudentFolder(source)
        student.check_all()
        check_gate(student, allow_unverified)
        sdk, files, name = "gradio", _demo_files(student, student_id, student_commit), student.manifest.name
    if offline():
        raise HubError(f"cannot push to {space_id}: HF_HUB_OFFLINE is set; unset it", kind="offline")
    api = client(token)
    with translated(space_id, doing="push to the Space", token=token):
        target = Target(api, space_id, kind="space", sdk=sdk, private=private, token=token, dry_run=dry_run)
        gone = target.superseded(files, _is_ours(target), "a Space of redif-sdk")
        changed = [file for file in files if not file.is_at(target.files.get(file.path))]
        rows = rows_of(files, changed, target.files, gone)
        if dry_run:
            return Pushed(space_id, rows)
        result = target.send(changed, gone, commit_message or f"Show {name}", create_pr=False)
        target.check(result.oid, files, gone)
    return Pushed(space_id, rows, result.oid, f"{api.endpoint}/spaces/{space_id}")


def _is_ours(target: Target) -> bool:
    """Whether what is there may be replaced: it was made by us, or holds nothing but what the Hub put there."""
    if not set(target.files) - {CARD_NAME, ".gitattributes"}:
        return True
    return SPACE_MARKER in (target.card() or "")


def _page_files(folder: Path) -> list[File]:
    check_page(folder)
    return [File(path, locate(folder, path), *hash_file(folder, path)) for path in list_files(folder)]


def _demo_files(student: StudentFolder, student_id: str | None, commit: str | None) -> list[File]:
    """app.py, requirements.txt, README.md, and the student itself where it is nowhere else."""
    if student_id is None:
        arguments = repr(_FOLDER)
        own = [in_memory(f"{_FOLDER}/{MANIFEST_NAME}", student.manifest_bytes)]
        own += student_files(student, f"{_FOLDER}/")
        if (student.path / CARD_NAME).is_file():
            own.append(in_memory(f"{_FOLDER}/{CARD_NAME}", (read_card(student.path) or "").encode()))
    else:
        arguments, own = f"{check_id(student_id)!r}", []
        if commit is not None:
            arguments += f", revision={commit!r}"
    requirements = f"redif-sdk[cpu,demo]=={redif_sdk.__version__}\n"
    readme = _readme(student.manifest, student_id)
    return [
        in_memory("app.py", _APP.format(arguments=arguments).encode()),
        in_memory("requirements.txt", requirements.encode()),
        in_memory(CARD_NAME, readme.encode()),
        *own,
    ]


def _readme(manifest: Manifest, student_id: str | None) -> str:
    from huggingface_hub import SpaceCardData

    head: dict[str, Any] = hub_licence(manifest.licence)
    data = SpaceCardData(
        title=" ".join(manifest.name.split())[:64],
        sdk="gradio",
        sdk_version=_gradio(),
        python_version=_PYTHON,
        app_file="app.py",
        colorFrom="indigo",
        colorTo="purple",
        pinned=False,
        tags=["redif-sdk", "few-step-diffusion"],
        models=[student_id] if student_id is not None else None,
        **head,
    )
    return _README.format(
        front_matter=f"---\n{data.to_yaml()}\n---",
        marker=SPACE_MARKER,
        name=markdown(manifest.name),
        source=f"[{student_id}](https://huggingface.co/{student_id})"
        if student_id
        else f"its files are in `{_FOLDER}/`",
        version=redif_sdk.__version__,
    )


def _gradio() -> str | None:
    """The release of Gradio that the demo was tried with here; None, and the Hub takes its newest, without one."""
    try:
        return version("gradio")
    except PackageNotFoundError:
        return None
