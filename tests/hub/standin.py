"""A stand-in for the Hugging Face Hub on 127.0.0.1, as far as pushing and pulling reach, with faults on call.

It speaks to the real client without Xet: git revisions, LFS objects, who may see and write what, and the errors by
their codes. Nothing of redif_sdk is known here, and nothing is kept on disk.
"""

from __future__ import annotations

import re
import socket
import threading
import traceback
from collections.abc import Iterable, Mapping
from urllib.parse import parse_qs, urlsplit

from . import accounts, reading, writing  # noqa: F401  (their routes are known once they are imported)
from .calls import BAD_TOKEN, LOGIN, Answer, Call, Refused, Request, commit_at, find_route, refusal
from .cards import check_card
from .faults import Corrupt, CutDownload, CutUpload, Faults, LoseAnswer, Refuse, Truncate, Wire
from .repository import GITATTRIBUTES, Blob, Repository
from .server import Server

__all__ = [
    "Corrupt",
    "CutDownload",
    "CutUpload",
    "HubStandIn",
    "LoseAnswer",
    "Refuse",
    "Truncate",
    "check_card",
]


class HubStandIn:
    """The Hub, as a context manager.

    `tokens`: user by token; `orgs`: members by organisation (a user owns the namespace of that name); `read_only`:
    tokens that may not write. Repositories are in `repos`, by (kind, name). `requests` has all that was asked.
    """

    def __init__(
        self,
        *,
        tokens: Mapping[str, str] | None = None,
        orgs: Mapping[str, set[str]] | None = None,
        read_only: Iterable[str] = (),
        verify: bool = True,
    ) -> None:
        self.tokens = dict(tokens if tokens is not None else {"hf_alice": "alice", "hf_bob": "bob"})
        self.orgs = {name: set(members) for name, members in (orgs or {}).items()}
        self.read_only = set(read_only)
        self.verify = verify
        self.repos: dict[tuple[str, str], Repository] = {}
        self.requests: list[Request] = []
        self.faults = Faults()
        self.wire = Wire()
        self.errors: list[str] = []  # tracebacks of the stand-in's own mistakes
        self.environment: dict[str, str] = {}  # for other processes
        self._lock = threading.RLock()
        self._server: Server | None = None
        self._place: socket.socket | None = None
        self._port = 0

    # -- for tests

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    @property
    def passed(self) -> int:
        """Body bytes, both ways, since the start."""
        return self.wire.passed

    def put(
        self,
        repo: str,
        files: Mapping[str, bytes],
        *,
        revision: str = "main",
        kind: str = "model",
        private: bool | None = None,
        gated: str | bool | None = None,
    ) -> str:
        """Commit `files`, in a repository and on a branch that are made where they are not there; the commit's id."""
        with self._lock:
            repository = self.repos.get((kind, repo)) or self.new_repo(repo, kind)
            repository.private = repository.private if private is None else private
            repository.gated = repository.gated if gated is None else gated
            if repository.find(revision) is None:
                repository.branches[revision] = repository.branches["main"]
            head = commit_at(repository, revision)
            known = dict(head.files)
            for path, data in files.items():
                blob = Blob(data, repository.is_lfs(path, len(data), data[:512], {**head.files, **known}))
                known[path] = blob
                if blob.lfs:
                    repository.objects[blob.sha256] = data
            commit = repository.commit(head.oid, known, "put", "", repo.split("/")[0])
            repository.move(revision, commit.oid)
            return commit.oid

    def head(self, repo: str, revision: str = "main", *, kind: str = "model") -> str:
        """The commit that a revision stands for."""
        with self._lock:
            return commit_at(self.repos[kind, repo], revision).oid

    def files(self, repo: str, revision: str = "main", *, kind: str = "model") -> dict[str, bytes]:
        """What readers see at a revision."""
        with self._lock:
            return {path: blob.data for path, blob in commit_at(self.repos[kind, repo], revision).files.items()}

    def asked(self, method: str = ".*", path: str = "") -> list[Request]:
        """The requests so far whose method and path match."""
        found = list(self.requests)
        return [one for one in found if re.fullmatch(method, one.method) and re.search(path, one.path)]

    def cut_after(self, total_bytes: int, *, reset: bool = False) -> None:
        """Drop every connection, old and new, once so many more bytes of bodies have passed, until `mend`."""
        self.wire.budget(total_bytes, reset)

    def down(self) -> None:
        """Refuse connections, and drop those that are open, until `mend`."""
        if self._server is not None:
            self._server.close()
            self._server = None

    def mend(self) -> None:
        """Take away what `cut_after` and `down` did. Faults stay."""
        if self.wire.broken and self._server is not None:
            self._server.drop_all()
        self.wire.budget(None)
        if self._server is None:
            self._server = Server(self, self._port)

    def __enter__(self) -> HubStandIn:
        # Holds the port while the listener is down, so that nobody else gets it.
        self._place = socket.socket()
        self._place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._place.bind(("127.0.0.1", 0))
        self._port = self._place.getsockname()[1]
        self._server = Server(self, self._port)
        self.environment = {"HF_ENDPOINT": self.url, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
        return self

    def __exit__(self, *_: object) -> None:
        self.down()
        if self._place is not None:
            self._place.close()

    # -- for routes

    def new_repo(self, name: str, kind: str = "model", *, private: bool = False) -> Repository:
        repo = Repository(name, kind, private)
        first = repo.commit(None, {".gitattributes": Blob(GITATTRIBUTES, False)}, "initial commit", "", "system")
        repo.branches["main"] = first.oid
        self.repos[kind, name] = repo
        return repo

    def writes(self, call: Call, namespace: str) -> bool:
        return call.may_write and (call.user == namespace or call.user in self.orgs.get(namespace, ()))

    def visible(
        self,
        call: Call,
        kind: str | None = None,
        name: str | None = None,
        *,
        files: bool = False,
        write: bool = False,
        login: bool = False,
    ) -> Repository:
        """The repository, if the caller may see it; its `files`, `write` to it, or do what needs a `login`."""
        name = name or call.parts["repo"]
        repo = self.repos.get((kind or call.kind, name))
        namespace = name.split("/")[0]
        member = call.user is not None and (call.user == namespace or call.user in self.orgs.get(namespace, ()))
        if repo is None or (repo.private and not member):
            if call.user is None:
                raise Refused(401, LOGIN, "RepoNotFound")
            raise Refused(404, "Repository not found", "RepoNotFound")
        if repo.disabled:
            raise Refused(403, "Access to this resource is disabled.")
        if (write or login) and call.user is None:
            # The client takes any 401 from https for RepoNotFound; the code makes it do so for http
            raise Refused(401, LOGIN, "RepoNotFound")
        if write and not self.writes(call, namespace):
            raise Refused(403, "Forbidden: you don't have write access to this repository")
        if files and repo.gated and not member and call.user not in repo.granted:
            status = 401 if call.user is None else 403
            raise Refused(status, f"Access to model {repo.name} is restricted.", "GatedRepo")
        return repo

    def answer(self, method: str, target: str, headers: Mapping[str, str], body: bytes) -> Answer:
        """Carry a request out."""
        parts = urlsplit(target)
        query = {name: values[-1] for name, values in parse_qs(parts.query, keep_blank_values=True).items()}
        with self._lock:
            try:
                function, named = find_route(method, parts.path)
                token = headers.get("authorization", "").removeprefix("Bearer ")
                if token and token not in self.tokens:
                    raise Refused(401, BAD_TOKEN)
                may_write = bool(token) and token not in self.read_only
                return function(self, Call(method, self.tokens.get(token), may_write, named, query, body, headers))
            except Refused as refused:
                return refused.answer
            except Exception:
                self.errors.append(traceback.format_exc())
                return refusal(500, "the stand-in itself failed", None, {})
