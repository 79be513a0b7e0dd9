"""A repository on the Hub that something is sent to: what is there, one commit, and whether that is what was sent.

One commit, and not `upload_folder`: with Xet that makes several, and between two of them a reader would see a manifest
without its graphs. A push that broke is repeated as it was; weights that have arrived are not sent again.
What is sent, and to what it may be sent, is the business of `push.py` and `space.py`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from redif_sdk.artifact.folder import UNHASHED, StudentFolder
from redif_sdk.artifact.manifest import CARD_LIMIT, CARD_NAME, MANIFEST_NAME
from redif_sdk.artifact.paths import is_clutter, locate
from redif_sdk.errors import HubError, InvalidRequest
from redif_sdk.hub.client import RemoteFile, remote_files

__all__ = ["Commit", "File", "Pushed", "Target", "in_memory", "rows_of", "student_files"]

KEPT = UNHASHED - {MANIFEST_NAME}  # of the repository: they are the Hub's, or its readers'
_IN_MEMORY = 1 << 20  # bytes; larger files are read while they are sent
_PREFIXES = {"model": "", "space": "spaces/"}  # of the addresses of pages


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
class File:
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


def in_memory(path: str, data: bytes) -> File:
    return File(path, data, len(data), hashlib.sha256(data).hexdigest())


def student_files(student: StudentFolder, folder: str = "") -> list[File]:
    """A student's listed files, below `folder` ("name/") of the repository."""
    files = []
    for entry in student.manifest.files:
        if entry.bytes <= _IN_MEMORY:
            files.append(in_memory(folder + entry.path, student.read_bytes(entry.path)))
        else:
            files.append(File(folder + entry.path, locate(student.path, entry.path), entry.bytes, entry.sha256))
    return files


def rows_of(
    files: Sequence[File], changed: Sequence[File], present: dict[str, RemoteFile], gone: Sequence[str]
) -> list[dict[str, Any]]:
    send = {file.path for file in changed}
    actions = {file.path: "replace" if file.path in present else "add" for file in files if file.path in send}
    rows = [{"path": file.path, "bytes": file.size, "action": actions.get(file.path, "keep")} for file in files]
    return rows + [{"path": path, "bytes": present[path].size, "action": "delete"} for path in gone]


@dataclass(frozen=True)
class Commit:
    oid: str
    url: str
    pull_request: str | None


class Target:
    """A repository and branch, of a model or a Space, as it was when the push began."""

    def __init__(
        self,
        api: Any,
        repo_id: str,
        *,
        kind: str = "model",
        sdk: str | None = None,
        private: bool | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        dry_run: bool = False,
    ) -> None:
        """Look at it; make repository and branch where they are not there, unless it is a `dry_run`.

        `kind`: "model" or "space"; `sdk`: what runs a Space that is made. Raises InvalidRequest, and the client's own.
        """
        from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

        self._api, self._repo_id, self._kind, self._revision, self._token = api, repo_id, kind, revision, token
        self._head: str | None = None
        self.files: dict[str, RemoteFile] = {}
        if not dry_run:
            api.create_repo(repo_id, repo_type=kind, space_sdk=sdk, private=private, exist_ok=True)
            if revision is not None and not revision.startswith("refs/pr/"):
                api.create_branch(repo_id, repo_type=kind, branch=revision, exist_ok=True)
        try:
            info, self.files = remote_files(api, repo_id, revision, kind)
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
        """The README.md that is there."""
        from huggingface_hub import hf_hub_download

        if CARD_NAME not in self.files or (self.files[CARD_NAME].size or 0) > CARD_LIMIT:
            return None
        path = hf_hub_download(self._repo_id, CARD_NAME, repo_type=self._kind, revision=self._head, token=self._token)
        return Path(path).read_text(encoding="utf-8", errors="replace")

    def superseded(self, files: Sequence[File], ours: bool, what: str = "a student") -> list[str]:
        """What the repository holds and `files` do not, to be deleted: what is sent is all there shall be.

        Raises HubError where what is there is not `ours`.
        """
        present = sorted(set(self.files) - KEPT)
        others = [path for path in present if not is_clutter(path)]
        if others and not ours:
            raise HubError(
                f"{self._repo_id} holds something else than {what} ({', '.join(others[:3])}), which a push would "
                f"replace; push to a repository or a branch of its own",
                kind="conflict",
            )
        sent = {file.path for file in files}
        return [path for path in present if path not in sent]

    def send(self, changed: Sequence[File], gone: Sequence[str], message: str, create_pr: bool) -> Commit:
        """Make the commit. Nothing of it is visible before all of it is there."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        if not changed and not gone and not create_pr:
            page = f"{self._api.endpoint}/{_PREFIXES[self._kind]}{self._repo_id}"
            return Commit(str(self._head), f"{page}/commit/{self._head}", None)
        operations: list[Any] = [CommitOperationDelete(path) for path in gone]
        operations += [CommitOperationAdd(file.path, file.source) for file in changed]
        info = self._api.create_commit(
            self._repo_id,
            operations,
            commit_message=message,
            repo_type=self._kind,
            revision=self._revision,
            create_pr=create_pr,
            parent_commit=self._head,
        )
        return Commit(info.oid, info.commit_url, info.pr_url)

    def check(self, commit: str, files: Sequence[File], gone: Sequence[str]) -> None:
        """Compare the commit with what was sent. Raises HubError."""
        _, present = remote_files(self._api, self._repo_id, commit, self._kind)
        wrong = [file.path for file in files if not file.is_at(present.get(file.path))]
        wrong += [path for path in gone if path in present]
        if wrong:
            raise HubError(
                f"{', '.join(wrong[:5])} of {self._repo_id} at {commit} is not what was sent; push again",
                kind="altered",
            )
