"""Putting a student on the Hub: checked here, sent as one commit, and checked there.

One commit, and not `upload_folder`: with Xet that makes several, and between two of them a reader would see a manifest
without its graphs. A push that broke is repeated as it was; weights that have arrived are not sent again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from redif_sdk.errors import HubError, InvalidRequest, ParityError
from redif_sdk.files import locate
from redif_sdk.folder import UNHASHED, StudentFolder
from redif_sdk.hub.client import RemoteFile, check_id, client, offline, remote_files, translated
from redif_sdk.manifest import CARD_LIMIT, CARD_NAME, MANIFEST_NAME, Manifest
from redif_sdk.runtimes import gate_passed

__all__ = ["Pushed", "push", "ungated"]

KEPT = UNHASHED - {MANIFEST_NAME}  # of the repository: they are the Hub's, or its readers'
_IN_MEMORY = 1 << 20  # bytes; larger files are read while they are sent


@dataclass(frozen=True)
class Pushed:
    """What a push did, or would do: `rows` have path, bytes and action ("add", "replace", "keep", "delete").

    `commit`, `url` and `pull_request` (its address) are None where there is none, as in a dry run.
    """

    repo_id: str
    rows: list[dict[str, Any]]
    commit: str | None = None
    url: str | None = None
    pull_request: str | None = None


@dataclass(frozen=True)
class _File:
    """A file to send: its path or its bytes, and what the Hub should say of it."""

    path: str
    source: Path | bytes
    size: int
    sha256: str

    def git_sha1(self) -> str:
        data = self.source if isinstance(self.source, bytes) else self.source.read_bytes()
        return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()

    def is_at(self, remote: RemoteFile | None) -> bool:
        """Whether the repository holds this file, by the hash that the Hub gives."""
        if remote is None or remote.size not in (None, self.size):
            return False
        if remote.sha256 is not None:
            return remote.sha256 == self.sha256
        return remote.git_sha1 == self.git_sha1()


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
    """Send the student in a folder to the repository `repo_id` ("org/name"), which is made where it is not there.

    `private`: whether it shall be; None: public where it is made, and as it is otherwise. `revision`: a branch, made
    where it is not there, or an open pull request (``refs/pr/N``). `create_pr`: open a pull request in place of a
    commit on the main branch. `tags`: more words in the card's metadata. `git_tag`: a name for the commit. `dry_run`:
    say what would be sent, and change nothing. The card is written anew for `repo_id`; what users wrote in its marked
    sections, here or there, stays, and so does a whole card that was written by hand. Compiled engines never travel.

    Afterwards every file of the new commit is compared with what was sent, by hash. To repeat a push that broke does no
    harm, and goes on where it stopped.

    Raises IntegrityError for a student that is not whole, ParityError for one that did not pass its gate, unless
    `allow_unverified`; InvalidRequest for arguments that contradict each other; HubError, whose `kind` says why.
    """
    check_id(repo_id)
    if create_pr and revision is not None:
        raise InvalidRequest("create_pr opens a pull request to the main branch; give it or revision, not both")
    if create_pr and git_tag is not None:
        raise InvalidRequest("a pull request has no commit to tag yet; give create_pr or git_tag, not both")
    student = source if isinstance(source, StudentFolder) else StudentFolder(source)
    student.check_all()
    if not allow_unverified and (reason := ungated(student.manifest)):
        raise ParityError(
            f"{student.path} is not pushed: {reason}; allow_unverified (--allow-unverified) sends it as it is"
        )
    if offline():
        raise HubError(f"cannot push to {repo_id}: HF_HUB_OFFLINE is set; take it away", kind="offline")
    api = client(token)
    with translated(repo_id, revision, doing="push to", token=token):
        target = _Target(api, repo_id, private, revision, token, dry_run)
        files = _files(student, repo_id, tags, target.card())
        changed = [file for file in files if not file.is_at(target.files.get(file.path))]
        gone = target.superseded(files)
        rows = _rows(files, changed, target.files, gone)
        if dry_run:
            return Pushed(repo_id, rows)
        result = target.send(changed, gone, commit_message or f"Push {student.manifest.name}", create_pr)
        target.check(result.oid, files, gone)
        if git_tag is not None:
            _tag(api, repo_id, git_tag, result.oid)
    return Pushed(repo_id, rows, result.oid, result.url, result.pull_request)


def ungated(manifest: Manifest) -> str | None:
    """Why a student has not passed the parity gate, or None if it has."""
    if not manifest.graphs:
        return "it has no compiled graphs; run redif export"
    precisions = dict.fromkeys(graph.precision for graph in manifest.graphs)
    if failed := [precision for precision in precisions if not gate_passed(manifest, precision)]:
        return f"its graphs in {', '.join(failed)} have not passed the parity gate; run redif export"
    return None


def _files(student: StudentFolder, repo_id: str, tags: Sequence[str], remote_card: str | None) -> list[_File]:
    """All that is sent, the card rendered for its new place."""
    text = _card(student, repo_id, tags, remote_card)
    files = [_in_memory(MANIFEST_NAME, student.manifest.to_bytes()), _in_memory(CARD_NAME, text.encode())]
    for entry in student.manifest.files:
        if entry.bytes <= _IN_MEMORY:
            files.append(_in_memory(entry.path, student.read_bytes(entry.path)))
        else:
            files.append(_File(entry.path, locate(student.path, entry.path), entry.bytes, entry.sha256))
    return files


def _in_memory(path: str, data: bytes) -> _File:
    return _File(path, data, len(data), hashlib.sha256(data).hexdigest())


def _card(student: StudentFolder, repo_id: str, tags: Sequence[str], there: str | None) -> str:
    """The card to send: ours, with the users' sections of the cards here and there; where both have text, of this one.

    A whole card that somebody wrote by hand, metadata and all, stays as it is.
    """
    from redif_sdk import card  # whoever loads a pipeline imports this module, and makes no card

    here = card.read_card(student.path)
    for text in (here, there):
        if text is not None and card.is_foreign(text):
            return text
    mine = card.render_over(student.manifest, here, repo_id=repo_id, tags=tags)
    if there is None:
        return mine
    theirs = card.render_over(student.manifest, there, repo_id=repo_id)
    return card.render(
        student.manifest,
        repo_id=repo_id,
        tags=[*card.user_tags(mine), *card.user_tags(theirs)],
        keys=card.user_keys(theirs) | card.user_keys(mine),
        user_sections=card.merge(card.user_sections(theirs), card.user_sections(mine)),
    )


def _rows(
    files: Sequence[_File], changed: Sequence[_File], present: dict[str, RemoteFile], gone: Sequence[str]
) -> list[dict[str, Any]]:
    send = {file.path for file in changed}
    actions = {file.path: "replace" if file.path in present else "add" for file in files if file.path in send}
    rows = [{"path": file.path, "bytes": file.size, "action": actions.get(file.path, "keep")} for file in files]
    return rows + [{"path": path, "bytes": present[path].size, "action": "delete"} for path in gone]


@dataclass(frozen=True)
class _Commit:
    oid: str
    url: str
    pull_request: str | None


class _Target:
    """The repository and branch that a student goes to, as it was when the push began."""

    def __init__(
        self,
        api: Any,
        repo_id: str,
        private: bool | None,
        revision: str | None,
        token: str | bool | None,
        dry_run: bool,
    ) -> None:
        """Look at it; make repository and branch where they are not there, unless it is a `dry_run`."""
        from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

        self._api, self._repo_id, self._revision, self._token = api, repo_id, revision, token
        self._head: str | None = None
        self.files: dict[str, RemoteFile] = {}
        if not dry_run:
            api.create_repo(repo_id, private=private, exist_ok=True)
            if revision is not None and not revision.startswith("refs/pr/"):
                api.create_branch(repo_id, branch=revision, exist_ok=True)
        try:
            info, self.files = remote_files(api, repo_id, revision)
        except (RepositoryNotFoundError, RevisionNotFoundError):
            if not dry_run:
                raise
            return
        self._head = info.sha
        if private is not None and info.private is not None and bool(info.private) != private:
            kind = "private" if info.private else "public"
            raise InvalidRequest(
                f"{repo_id} is there already, and {kind}; change that in its settings at the Hub, or leave private out"
            )

    def card(self) -> str | None:
        """The card that is there."""
        from huggingface_hub import hf_hub_download

        if CARD_NAME not in self.files or (self.files[CARD_NAME].size or 0) > CARD_LIMIT:
            return None
        path = hf_hub_download(self._repo_id, CARD_NAME, revision=self._head, token=self._token)
        return Path(path).read_text(encoding="utf-8", errors="replace")

    def superseded(self, files: Sequence[_File]) -> list[str]:
        """What the repository holds and the student has not, to be deleted: a student is what its manifest lists.

        Raises HubError where it holds something else than a student.
        """
        others = sorted(set(self.files) - {file.path for file in files} - KEPT)
        if others and MANIFEST_NAME not in self.files:
            raise HubError(
                f"{self._repo_id} holds something else than a student ({', '.join(others[:3])}), which a push would "
                f"replace; push to a repository or a branch of its own",
                kind="conflict",
            )
        return others

    def send(self, changed: Sequence[_File], gone: Sequence[str], message: str, create_pr: bool) -> _Commit:
        """Make the commit. Nothing of it is visible before all of it is there."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        if not changed and not gone and not create_pr:
            return _Commit(str(self._head), f"{self._api.endpoint}/{self._repo_id}/commit/{self._head}", None)
        operations: list[Any] = [CommitOperationDelete(path) for path in gone]
        operations += [CommitOperationAdd(file.path, file.source) for file in changed]
        info = self._api.create_commit(
            self._repo_id,
            operations,
            commit_message=message,
            revision=self._revision,
            create_pr=create_pr,
            parent_commit=self._head,
        )
        return _Commit(info.oid, info.commit_url, info.pr_url)

    def check(self, commit: str, files: Sequence[_File], gone: Sequence[str]) -> None:
        """Compare the commit with what was sent. Raises HubError."""
        _, present = remote_files(self._api, self._repo_id, commit)
        wrong = [file.path for file in files if not file.is_at(present.get(file.path))]
        wrong += [path for path in gone if path in present]
        if wrong:
            raise HubError(
                f"{', '.join(wrong[:5])} of {self._repo_id} at {commit} is not what was sent; push again",
                kind="altered",
            )


def _tag(api: Any, repo_id: str, name: str, commit: str) -> None:
    """Give the commit a name. HubError if the name stands for another commit."""
    for tag in api.list_repo_refs(repo_id).tags:
        if tag.name == name:
            if tag.target_commit == commit:
                return
            raise HubError(f"{repo_id} has a tag {name} for another commit; give another name", kind="conflict")
    api.create_tag(repo_id, tag=name, revision=commit)
