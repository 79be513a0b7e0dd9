"""Download students from the Hub. The repository's file list is checked before anything is downloaded.

Files go through the Hub's own cache, so an interrupted download continues where it stopped. Each file is hashed
on arrival and compared with the manifest; a wrong file is fetched once more, and then refused.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from redif_sdk.artifact.atomic import atomic_folder, atomic_write
from redif_sdk.artifact.folder import MANIFEST_LIMIT, StudentFolder
from redif_sdk.artifact.manifest import CARD_LIMIT, CARD_NAME, MANIFEST_NAME, Manifest
from redif_sdk.artifact.paths import ORIGIN, check_pickle, hash_file
from redif_sdk.artifact.records import FileEntry
from redif_sdk.errors import HubError, IntegrityError, ManifestError
from redif_sdk.hub.client import RemoteFile, check_id, client, not_cached, offline, place, remote_files, translated

__all__ = ["Origin", "Remote", "fetch", "pull"]


_COMMIT = re.compile(r"[0-9a-f]{40}")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Origin:
    """Where a student came from: the repository, the requested revision, and the commit that it resolved to."""

    repo_id: str
    revision: str | None
    commit: str


class Remote:
    """A student's repository at one commit.

    A branch or tag is resolved to a commit once, and all files come from that commit, even if somebody pushes later.
    Files come from the cache if the Hub is unreachable, or with `local_files_only` or ``HF_HUB_OFFLINE``.
    """

    def __init__(
        self,
        repo_id: str,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> None:
        """Look at the repository and read its manifest.

        Raises HubError, whose `kind` says why it cannot be had; ManifestError for what is no student, or holds a
        pickle; IntegrityError where the repository is not what its manifest lists.
        """
        self._repo_id = check_id(repo_id)
        self._token = token
        self._cache_dir = cache_dir
        self._asked_local = local_files_only
        self._local = local_files_only or offline()
        self._files: dict[str, RemoteFile] | None = None  # None: not known, the cache serves
        commit = self._resolve(revision)
        self.origin = Origin(repo_id, revision, commit)
        self._check_files()
        self._folder = self._download([MANIFEST_NAME])
        self._remember(revision or "main", commit)
        self.manifest = self._read_manifest()
        self._entries = {entry.path: entry for entry in self.manifest.files}
        self._check_listed()

    def again(self) -> dict[str, Any]:
        """The arguments, for `FastPipeline.from_pretrained`, that give the same commit in another process."""
        token = self._token if isinstance(self._token, bool) else None
        return {
            "revision": self.origin.commit,
            "token": token,
            "cache_dir": self._cache_dir,
            "local_files_only": self._asked_local,
        }

    def _resolve(self, revision: str | None) -> str:
        """The commit that `revision` resolves to."""
        if not self._local and not (revision and _COMMIT.fullmatch(revision) and self._cached(revision)):
            try:
                with translated(self._repo_id, revision, doing="get", token=self._token):
                    info, self._files = remote_files(client(self._token), self._repo_id, revision)
                if _COMMIT.fullmatch(str(info.sha)):  # it becomes the name of a folder
                    return str(info.sha)
                raise HubError(f"the Hub names {info.sha!r:.100} as a commit of {self._repo_id}, which is none")
            except HubError as error:
                if error.kind not in ("network", "server", "rate-limit") or not (found := self._cached(revision)):
                    raise
                _log.warning("%s; commit %s is taken from the cache", error, found)
        self._local = True
        if found := self._cached(revision):
            return found
        raise not_cached(f"cannot get {place(self._repo_id, revision)}")

    def _cached(self, revision: str | None) -> str | None:
        """The commit of `revision` in the cache, if its manifest is there."""
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(self._repo_id, MANIFEST_NAME, cache_dir=self._cache_dir, revision=revision)
        return Path(found).parent.name if isinstance(found, str) else None

    def _remember(self, revision: str, commit: str) -> None:
        """Note in the cache, as the Hub's client does, what `revision` resolves to, for use without the Hub."""
        if self._local or revision == commit:
            return
        note = self._folder.parent.parent / "refs" / revision
        try:
            note.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(note, commit.encode())
        except OSError as error:  # a cache that may only be read
            _log.warning("%s cannot be written: %s", note, error)

    def _check_files(self) -> None:
        """Check the names and sizes of the repository's files before anything is downloaded."""
        if self._files is None:
            return
        for path in self._files:
            check_pickle(path)
        manifest = self._files.get(MANIFEST_NAME)
        if manifest is None:
            raise ManifestError(f"{self._repo_id} has no {MANIFEST_NAME}, so it is not a student{self._hint()}")
        limits = {MANIFEST_NAME: MANIFEST_LIMIT, CARD_NAME: CARD_LIMIT}
        for path, limit in limits.items():
            if path in self._files and (self._files[path].size or 0) > limit:
                raise ManifestError(f"{path} of {self._repo_id} has more than {limit} bytes, the limit of such a file")

    def _hint(self) -> str:
        if self._files is not None and "model_index.json" in self._files:
            return (
                f": it is a diffusers pipeline; redif import {self._repo_id} -o DIR --steps 8 turns it into a student "
                f"without training, redif distill {self._repo_id} -o DIR --steps 4 trains a faster one"
            )
        return "; redif import or redif distill make one of a diffusers pipeline"

    def _read_manifest(self) -> Manifest:
        """The manifest, fetched once more if it does not match its own digest."""
        try:
            return StudentFolder(self._folder).manifest
        except ManifestError:
            if self._local:
                raise
        self.refetch(MANIFEST_NAME)
        return StudentFolder(self._folder).manifest

    def _check_listed(self) -> None:
        """IntegrityError unless what the repository says of its files is what the manifest lists."""
        if self._files is None:
            return
        for entry in self.manifest.files:
            present = self._files.get(entry.path)
            if present is None:
                raise IntegrityError(f"{entry.path} is missing from {self._repo_id}; ask its owner to push it again")
            if present.size not in (None, entry.bytes) or present.sha256 not in (None, entry.sha256):
                raise IntegrityError(
                    f"{entry.path} of {self._repo_id} is not what its manifest lists; ask its owner to push it again"
                )

    # ------------------------------------------------------------------ downloads

    def student(self, paths: Iterable[str]) -> StudentFolder:
        """The student with the listed files `paths`, downloaded where they are not cached. A damaged file heals."""
        self.fetch(paths)
        return StudentFolder(self._folder, repair=None if self._local else self.refetch)

    def whole(self) -> StudentFolder:
        """The student with every file, each of them hashed, and the card."""
        entries = list(self._entries)
        card = [CARD_NAME] if self._files is None or CARD_NAME in self._files else []
        self.fetch(entries, also=card, every=True)
        return self.student([])

    def fetch(self, paths: Iterable[str], *, also: Sequence[str] = (), every: bool = False) -> Path:
        """The folder of the snapshot, with the listed files `paths`; what is new, or `every` one, is hashed.

        Raises IntegrityError.
        """
        wanted = list(dict.fromkeys(paths))
        new = [path for path in wanted if not (self._folder / path).exists()]
        if new or also:
            self._download([*wanted, *also])
        for path in wanted if every else new:
            self._ensure(self._entries[path])
        return self._folder

    def _ensure(self, entry: FileEntry) -> None:
        """Hash a downloaded file; fetch it once more if it is not what the manifest lists."""
        try:
            if hash_file(self._folder, entry.path, size=entry.bytes) == (entry.bytes, entry.sha256):
                return
        except IntegrityError:
            if self._local:
                raise
        if not self._local:
            self.refetch(entry.path)
            if hash_file(self._folder, entry.path, size=entry.bytes) == (entry.bytes, entry.sha256):
                return
        (self._folder / entry.path).unlink(missing_ok=True)  # the next call asks for it anew
        raise IntegrityError(
            f"{entry.path} of {self._repo_id} arrived altered: it is not what the manifest lists; try again, and if "
            f"that does not help ask its owner to push it again"
        )

    def refetch(self, path: str) -> None:
        """Download a file again, whatever the cache holds. Raises HubError."""
        from huggingface_hub import hf_hub_download

        _log.warning("%s of %s is damaged in the cache; it is fetched again", path, self._repo_id)
        with translated(self._repo_id, self.origin.commit, doing=f"get {path} of", token=self._token):
            hf_hub_download(
                self._repo_id,
                path,
                revision=self.origin.commit,
                token=self._token,
                cache_dir=self._cache_dir,
                force_download=True,
            )

    def _download(self, paths: Sequence[str]) -> Path:
        return fetch(
            self._repo_id,
            paths,
            revision=self.origin.commit,
            token=self._token,
            cache_dir=self._cache_dir,
            local_files_only=self._local,
        )


def fetch(
    repo_id: str,
    patterns: Sequence[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Path:
    """The local folder of `repo_id` at `revision` with the files that match `patterns`, downloaded where not cached.

    The folder's name is the commit. Nothing is checked. Raises HubError.
    """
    from huggingface_hub import snapshot_download

    check_id(repo_id)
    with translated(repo_id, revision, doing="get", token=token):
        return Path(
            snapshot_download(
                repo_id,
                allow_patterns=list(patterns),
                revision=revision,
                token=token,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
                library_name="redif-sdk",
            )
        )


def pull(
    repo_id: str,
    output: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    overwrite: bool = False,
) -> tuple[StudentFolder, Origin]:
    """Download a whole student into the folder `output`, which appears whole or not at all; check every file.

    After a failure the next call continues from the Hub's cache. ``.cache/huggingface/redif-origin.json`` in the folder
    notes where the student came from.

    Raises:
        HubError: the repository cannot be downloaded; `kind` says why.
        ManifestError, IntegrityError: it is not a student, or was altered.
        InvalidRequest: `output` exists and may not be replaced.
    """
    remote = Remote(repo_id, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only)
    with atomic_folder(Path(output), overwrite=overwrite) as new:
        student = remote.whole()
        student.copy_to(new)
        StudentFolder(new).check_all()
        note = new / ORIGIN
        note.parent.mkdir(parents=True)
        note.write_text(json.dumps(asdict(remote.origin), indent=1) + "\n")
    return StudentFolder(output), remote.origin
