"""Upload a student to the Hub: checked here, sent as one commit (`target.py`), and checked there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from redif_sdk.artifact.folder import StudentFolder
from redif_sdk.artifact.manifest import CARD_NAME, MANIFEST_NAME, Manifest
from redif_sdk.card import sections
from redif_sdk.card.render import read_card, render, render_over
from redif_sdk.errors import HubError, InvalidRequest, ParityError
from redif_sdk.hub.client import check_id, client, offline, translated
from redif_sdk.hub.target import File, Pushed, Target, in_memory, rows_of, student_files
from redif_sdk.runtimes import gate_passed

__all__ = ["check_gate", "push", "ungated"]


def push(
    source: str | Path | StudentFolder,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    tags: Sequence[str] = (),
    git_tag: str | None = None,
    token: str | bool | None = None,
    allow_unverified: bool = False,
    dry_run: bool = False,
) -> Pushed:
    """Send the student in a folder to the repository `repo_id` ("org/name"), which is created if necessary.

    The card is made anew for `repo_id`; the users' marked sections, here and there, stay, and so does a card that was
    written entirely by hand. Compiled engines are never sent. Afterwards every file of the new commit is compared with
    what was sent, by hash. An interrupted push can be repeated, and continues where it stopped.

    Args:
        private: the repository's visibility; None: public if it is created, unchanged otherwise.
        revision: a branch, created if necessary, or an open pull request (``refs/pr/N``).
        create_pr: open a pull request instead of committing to the main branch.
        tags: further tags for the card's metadata.
        git_tag: a name for the commit.
        allow_unverified: also send a student that did not pass its parity gate.
        dry_run: report what would be sent, and change nothing.

    Raises:
        IntegrityError: the student is not whole.
        ParityError: it did not pass its parity gate.
        InvalidRequest: arguments contradict each other.
        HubError: the Hub refused or failed; `kind` says why.
    """
    check_id(repo_id)
    if create_pr and revision is not None:
        raise InvalidRequest("create_pr opens a pull request to the main branch; give it or revision, not both")
    if create_pr and git_tag is not None:
        raise InvalidRequest("a pull request has no commit to tag yet; give create_pr or git_tag, not both")
    student = source if isinstance(source, StudentFolder) else StudentFolder(source)
    student.check_all()
    check_gate(student, allow_unverified)
    if offline():
        raise HubError(f"cannot push to {repo_id}: HF_HUB_OFFLINE is set; unset it", kind="offline")
    api = client(token)
    with translated(repo_id, revision, doing="push to", token=token):
        target = Target(api, repo_id, private=private, revision=revision, token=token, dry_run=dry_run)
        files = _files(student, repo_id, tags, target.card())
        changed = [file for file in files if not file.is_at(target.files.get(file.path))]
        gone = target.superseded(files, MANIFEST_NAME in target.files)
        rows = rows_of(files, changed, target.files, gone)
        if dry_run:
            return Pushed(repo_id, rows)
        result = target.send(changed, gone, commit_message or f"Push {student.manifest.name}", create_pr)
        target.check(result.oid, files, gone)
        if git_tag is not None:
            _tag(api, repo_id, git_tag, result.oid)
    return Pushed(repo_id, rows, result.oid, result.url, result.pull_request)


def check_gate(student: StudentFolder, allow_unverified: bool) -> None:
    """Raise ParityError for a student that has not passed its gate, unless that is allowed."""
    if not allow_unverified and (reason := ungated(student.manifest)):
        raise ParityError(
            f"{student.path} is not pushed: {reason}; allow_unverified (--allow-unverified) sends it as it is"
        )


def ungated(manifest: Manifest) -> str | None:
    """Return why a student has not passed the parity gate, or None if it has."""
    if not manifest.graphs:
        return "it has no compiled graphs; run redif export"
    precisions = dict.fromkeys(graph.precision for graph in manifest.graphs)
    if failed := [precision for precision in precisions if not gate_passed(manifest, precision)]:
        return f"its graphs in {', '.join(failed)} have not passed the parity gate; run redif export"
    return None


def _files(student: StudentFolder, repo_id: str, tags: Sequence[str], remote_card: str | None) -> list[File]:
    """Everything that is sent, with the card made for its new place."""
    text = _card(student, repo_id, tags, remote_card)
    files = [in_memory(MANIFEST_NAME, student.manifest_bytes), in_memory(CARD_NAME, text.encode())]
    return files + student_files(student)


def _card(student: StudentFolder, repo_id: str, tags: Sequence[str], there: str | None) -> str:
    """The card to send: ours, with the users' sections of the cards here and there; where both have text, of this one.

    A whole card that somebody wrote by hand, metadata and all, stays as it is.
    """
    here = read_card(student.path)
    for text in (here, there):
        if text is not None and sections.is_foreign(text):
            return text
    mine = render_over(student.manifest, here, repo_id=repo_id, tags=tags)
    if there is None:
        return mine
    theirs = render_over(student.manifest, there, repo_id=repo_id)
    return render(
        student.manifest,
        repo_id=repo_id,
        tags=[*sections.user_tags(mine), *sections.user_tags(theirs)],
        keys=sections.user_keys(theirs) | sections.user_keys(mine),
        user_sections=sections.merge(sections.user_sections(theirs), sections.user_sections(mine)),
    )


def _tag(api: Any, repo_id: str, name: str, commit: str) -> None:
    """Give the commit a name. HubError if the name stands for another commit."""
    for tag in api.list_repo_refs(repo_id).tags:
        if tag.name == name:
            if tag.target_commit == commit:
                return
            raise HubError(f"{repo_id} has a tag {name} for another commit; give another name", kind="conflict")
    api.create_tag(repo_id, tag=name, revision=commit)
