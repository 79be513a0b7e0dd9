"""A stand-in for the Hugging Face Hub on 127.0.0.1, as far as pushing and pulling reach, with faults on call.

It speaks to the real client without Xet: git revisions, LFS objects, who may see and write what, and the errors by
their codes. Nothing of redif_sdk is known here, and nothing is kept on disk.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import re
import socket
import struct
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


def _words(text: str) -> list[str]:
    return text.split()


LFS_PATTERNS = _words(
    "*.7z *.arrow *.bin *.bz2 *.ckpt *.data *.ftz *.gz *.h5 *.jpeg *.jpg *.joblib *.mlmodel *.model *.msgpack *.npy "
    "*.npz *.onnx *.ot *.parquet *.pb *.pickle *.pkl *.png *.pt *.pth *.rar *.safetensorssaved_model/**/* *.tar "
    "*.tar.* *.tflite *.tgz *.wasm *.webp *.xz *.zip *.zst *tfevents*"
)
GITATTRIBUTES = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LFS_PATTERNS).encode()
LICENCES = frozenset(
    _words(
        "afl-3.0 agpl-3.0 apache-2.0 artistic-2.0 bsd bsd-2-clause bsd-3-clause bsl-1.0 cc cc-by-2.0 cc-by-3.0 "
        "cc-by-4.0 cc-by-nc-4.0 cc-by-nc-sa-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 creativeml-openrail-m gemma gpl "
        "gpl-2.0 gpl-3.0 isc lgpl lgpl-3.0 llama2 llama3 mit mpl-2.0 odc-by openrail openrail++ other unknown "
        "unlicense wtfpl zlib"
    )
)
LARGEST_REGULAR = 10 << 20
DATE = "2026-01-01T00:00:00.000Z"
LOGIN = "Invalid username or password."
BAD_TOKEN = "Invalid credentials in Authorization header"

_CHUNK = 1 << 16
_SPECIAL_REFS = re.compile(r"refs/(heads|tags|pr)/(.+)")


# --- what a repository holds


@dataclass(frozen=True)
class Blob:
    """One file's content, in git or in LFS."""

    data: bytes
    lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def pointer(self) -> bytes:
        text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.data)}\n"
        return text.encode()

    @property
    def oid(self) -> str:
        """The SHA-1 that git gives to the file, or to its LFS pointer."""
        content = self.pointer if self.lfs else self.data
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.oid


@dataclass(frozen=True)
class Commit:
    """A state of all files. It never changes, so that a reader sees all of a commit or nothing of it."""

    oid: str
    parent: str | None
    title: str
    message: str
    author: str
    files: Mapping[str, Blob]


@dataclass
class PullRequest:
    number: int
    title: str
    author: str
    head: str


@dataclass
class Repository:
    """A repository's settings, refs, commits and LFS objects. Tests may change the settings at any time."""

    name: str
    kind: str = "model"
    private: bool = False
    gated: str | bool = False
    disabled: bool = False
    granted: set[str] = field(default_factory=set)  # users who accepted the terms of a gated repository
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    pulls: dict[int, PullRequest] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)  # LFS contents by SHA-256, committed or not
    announced: dict[str, int] = field(default_factory=dict)  # LFS objects that may be uploaded, with their sizes

    def find(self, revision: str) -> str | None:
        """The commit that a branch, tag, ref or (short) commit id stands for."""
        if match := _SPECIAL_REFS.fullmatch(revision):
            space, name = match.groups()
            if space == "pr":
                pull = self.pulls.get(int(name)) if name.isdigit() else None
                return pull.head if pull else None
            return (self.branches if space == "heads" else self.tags).get(name)
        if found := self.branches.get(revision) or self.tags.get(revision):
            return found
        if re.fullmatch(r"[0-9a-f]{5,40}", revision):
            found_ids = [oid for oid in self.commits if oid.startswith(revision)]
            return found_ids[0] if len(found_ids) == 1 else None
        return None

    def move(self, revision: str, oid: str) -> bool:
        """Let a branch or an open pull request point to `oid`; whether there is such a one."""
        match = _SPECIAL_REFS.fullmatch(revision)
        if match and match[1] == "pr" and match[2].isdigit() and int(match[2]) in self.pulls:
            self.pulls[int(match[2])].head = oid
            return True
        name = match[2] if match and match[1] == "heads" else revision
        if name not in self.branches:
            return False
        self.branches[name] = oid
        return True

    def commit(self, parent: str | None, files: Mapping[str, Blob], title: str, message: str, author: str) -> Commit:
        """Keep a new commit. No ref points to it yet."""
        tree = json.dumps(sorted((path, blob.oid) for path, blob in files.items()))
        seed = f"{self.kind} {self.name} {len(self.commits)} {parent} {title} {message} {author} {tree}"
        commit = Commit(hashlib.sha1(seed.encode()).hexdigest(), parent, title, message, author, dict(files))
        self.commits[commit.oid] = commit
        return commit

    def is_lfs(self, path: str, size: int, sample: bytes, files: Mapping[str, Blob]) -> bool:
        """What .gitattributes says; else by size, and by whether it looks like text."""
        if size == 0:
            return False
        attributes = files[".gitattributes"].data.decode() if ".gitattributes" in files else ""
        patterns = [line.split()[0] for line in attributes.splitlines() if "filter=lfs" in line]
        if any(_git_match(path, pattern) for pattern in patterns):
            return True
        return size > LARGEST_REGULAR or b"\0" in sample


def _git_match(path: str, pattern: str) -> bool:
    return fnmatchcase(path if "/" in pattern else path.rsplit("/", 1)[-1], pattern.replace("/**/", "/*"))


# --- faults


@dataclass(frozen=True)
class Refuse:
    """Answer with `status`, and do nothing. `code` is the X-Error-Code; `headers` as given."""

    status: int
    message: str = "refused by the stand-in"
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class CutUpload:
    """Drop the connection when `after` bytes of the request's body were read. The request is not carried out."""

    after: int


@dataclass(frozen=True)
class CutDownload:
    """Promise the whole body, send `after` bytes of it, drop the connection (`reset`: by RST, else as if it ended)."""

    after: int
    reset: bool = False


@dataclass(frozen=True)
class LoseAnswer:
    """Carry the request out, and drop the connection without an answer."""

    reset: bool = False


@dataclass(frozen=True)
class Truncate:
    """Send only `keep` bytes of the body, and a Content-Length that fits them."""

    keep: int


@dataclass(frozen=True)
class Corrupt:
    """Flip every bit of the body's byte `at` (negative: from the end). The length and all headers stay true."""

    at: int = 0


@dataclass(frozen=True)
class Stall:
    """Wait `seconds` before the answer, which then is as usual."""

    seconds: float


Action = Refuse | CutUpload | CutDownload | LoseAnswer | Truncate | Corrupt | Stall


@dataclass
class Fault:
    """An action for requests whose method and path (as sent, with the query) match, past the first `after` of them."""

    action: Action
    method: str
    path: str
    after: int
    times: int | None
    seen: int = 0
    struck: int = 0


class Faults:
    """The faults that are set. A request meets the first that matches it and is not used up."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._faults: list[Fault] = []

    def add(
        self, action: Action, *, method: str | None = None, path: str = "", after: int = 0, times: int | None = 1
    ) -> Fault:
        """Let `action` strike `times` times (None: always), past the first `after` requests that match.

        Both are regular expressions; `method` must match whole, `path` anywhere. Without `method`: those that have a
        body to spoil, or all.
        """
        if method is None:
            method = {CutUpload: "POST|PUT", CutDownload: "GET", Truncate: "GET", Corrupt: "GET"}.get(
                type(action), ".*"
            )
        fault = Fault(action, method, path, after, times)
        with self._lock:
            self._faults.append(fault)
        return fault

    def clear(self) -> None:
        with self._lock:
            self._faults.clear()

    def match(self, method: str, path: str) -> Action | None:
        with self._lock:
            for fault in self._faults:
                if not re.fullmatch(fault.method, method) or not re.search(fault.path, path):
                    continue
                fault.seen += 1
                if fault.seen > fault.after and (fault.times is None or fault.struck < fault.times):
                    fault.struck += 1
                    return fault.action
        return None


class Wire:
    """Counts the bytes of bodies, both ways, and breaks after a budget of them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._left: int | None = None
        self.passed = 0
        self.reset = False

    @property
    def broken(self) -> bool:
        return self._left == 0

    def budget(self, total: int | None, reset: bool = False) -> None:
        with self._lock:
            self._left, self.reset = total, reset

    def take(self, wanted: int) -> tuple[int, bool]:
        """How many of `wanted` bytes may pass, and whether the wire is broken after them."""
        with self._lock:
            allowed = wanted if self._left is None else min(wanted, self._left)
            self.passed += allowed
            if self._left is not None:
                self._left -= allowed
            return allowed, self._left == 0


# --- requests and answers


@dataclass
class Request:
    """One request as it went. `status` is None where no answer was sent; the counts are of body bytes."""

    method: str
    path: str
    headers: dict[str, str]  # names in lower case
    status: int | None = None
    received: int = 0
    sent: int = 0


@dataclass(frozen=True)
class Answer:
    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)


class Refused(Exception):  # noqa: N818
    """An answer that is an error of the Hub."""

    def __init__(self, status: int, message: str, code: str | None = None, **more: Any) -> None:
        super().__init__(message)
        self.answer = _refusal(status, message, code, more)


class Dropped(Exception):  # noqa: N818
    """The connection ends here."""

    def __init__(self, reset: bool) -> None:
        super().__init__()
        self.reset = reset


def _refusal(status: int, message: str, code: str | None, more: Mapping[str, Any]) -> Answer:
    headers = {"Content-Type": "application/json; charset=utf-8", "X-Error-Message": message}
    if code is not None:
        headers["X-Error-Code"] = code
    return Answer(status, json.dumps({"error": message, **more}).encode(), headers)


def _json(value: Any, status: int = 200, **headers: str) -> Answer:
    return Answer(status, json.dumps(value).encode(), {"Content-Type": "application/json; charset=utf-8", **headers})


@dataclass(frozen=True)
class Call:
    """What a route is given: the caller, the path's parts by name, the query and the body."""

    method: str
    user: str | None
    may_write: bool
    parts: Mapping[str, str]
    query: Mapping[str, str]
    body: bytes
    headers: Mapping[str, str]

    def json(self) -> Any:
        try:
            return json.loads(self.body or b"{}")
        except ValueError as error:
            raise Refused(400, f"Invalid JSON: {error}") from error

    @property
    def kind(self) -> str:
        return (self.parts.get("kind") or "models").strip("/")[:-1]


Route = Callable[["HubStandIn", Call], Answer]
_ROUTES: list[tuple[str, re.Pattern[str], Route]] = []
_API = r"/api/(?P<kind>models|datasets|spaces)/(?P<repo>[^/]+/[^/]+)"
_WEB = r"/(?P<kind>datasets/|spaces/)?(?P<repo>[^/]+/[^/]+)"


def route(methods: str, path: str) -> Callable[[Route], Route]:
    def keep(function: Route) -> Route:
        _ROUTES.extend((method, re.compile(path), function) for method in methods.split())
        return function

    return keep


def _find_route(method: str, path: str) -> tuple[Route, dict[str, str]]:
    for wanted, pattern, function in _ROUTES:
        if wanted == method and (match := pattern.fullmatch(path)):
            return function, {name: unquote(value) for name, value in match.groupdict().items() if value is not None}
    raise Refused(404, f"Sorry, the stand-in knows no {method} {path}")


# --- accounts and repositories


@route("GET", "/api/whoami-v2")
def whoami(hub: HubStandIn, call: Call) -> Answer:
    if call.user is None:
        raise Refused(401, LOGIN)
    orgs = [{"type": "org", "name": name} for name, members in hub.orgs.items() if call.user in members]
    role = "write" if call.may_write else "read"
    token = {"type": "access_token", "accessToken": {"displayName": "test", "role": role}}
    return _json({"type": "user", "id": call.user, "name": call.user, "orgs": orgs, "auth": token})


@route("GET", "/api/agent-harnesses")
def agent_harnesses(hub: HubStandIn, call: Call) -> Answer:
    return _json({"standardEnvVars": [], "harnesses": {}})


@route("POST", "/api/repos/create")
def create_repo(hub: HubStandIn, call: Call) -> Answer:
    asked = call.json()
    if call.user is None:
        raise Refused(401, LOGIN)
    namespace = asked.get("organization") or call.user
    name = f"{namespace}/{asked['name']}"
    kind = asked.get("type") or "model"
    if not hub.writes(call, namespace):
        raise Refused(403, f'You don\'t have the rights to create a {kind} under the namespace "{namespace}"')
    url = f"{hub.url}/{_prefix(kind)}{name}"
    if (kind, name) in hub.repos:
        raise Refused(409, f"You already created this {kind} repo", url=url)
    private = asked.get("private") or asked.get("visibility") == "private"
    hub.new_repo(name, kind, private=bool(private))
    return _json({"url": url, "name": name, "id": name})


@route("DELETE", "/api/repos/delete")
def delete_repo(hub: HubStandIn, call: Call) -> Answer:
    asked = call.json()
    name = f"{asked.get('organization') or call.user}/{asked['name']}"
    repo = hub.visible(call, asked.get("type") or "model", name, write=True)
    del hub.repos[repo.kind, repo.name]
    return _json({})


@route("PUT", _API + "/settings")
def settings(hub: HubStandIn, call: Call) -> Answer:
    repo = hub.visible(call, write=True)
    asked = call.json()
    if "visibility" in asked or "private" in asked:
        repo.private = asked.get("visibility") == "private" or bool(asked.get("private"))
    if "gated" in asked:
        repo.gated = asked["gated"]
    return _json({"private": repo.private, "gated": repo.gated})


@route("POST", "/api/validate-yaml")
def validate_yaml(hub: HubStandIn, call: Call) -> Answer:
    errors, warnings = check_card(call.json().get("content", ""))
    found = {"errors": [{"message": text} for text in errors], "warnings": [{"message": text} for text in warnings]}
    if errors:
        return _json({"error": "Invalid metadata in README.md", **found}, 400)
    return _json(found)


def check_card(content: str) -> tuple[list[str], list[str]]:
    """(errors, warnings) of a card's metadata, for the fields that matter here."""
    match = re.match(r"\ufeff?---\r?\n(.*?)\r?\n?---[ \t]*(\r?\n|$)", content, re.DOTALL)
    if match is None:
        return [], ["empty or missing yaml metadata in repo card"]
    try:
        data = yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        return [f"YAML Metadata Error: {error}"], []
    if not data:
        return [], ["empty or missing yaml metadata in repo card"]
    if not isinstance(data, dict):
        return ['"yaml" must be an object'], []
    errors = []
    licence = data.get("license")
    for name in licence if isinstance(licence, list) else [licence]:
        if name is not None and name not in LICENCES:
            errors.append(f'"license" must be one of [{", ".join(sorted(LICENCES))}]')
    tags = data.get("tags", [])
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        errors.append('"tags" must be an array of strings')
    errors += [
        f'"{key}" must be a string'
        for key in ("library_name", "pipeline_tag", "license_name", "license_link")
        if not isinstance(data.get(key, ""), str)
    ]
    for result in data.get("model-index") or []:
        if not isinstance(result, dict) or not isinstance(result.get("name"), str) or "results" not in result:
            errors.append('"model-index[0]" must have "name" and "results"')
    return errors, []


# --- reading


@route("GET", _API + "(/revision/(?P<revision>[^/]+))?")
def info(hub: HubStandIn, call: Call) -> Answer:
    repo = hub.visible(call)
    commit = _commit(repo, call.parts.get("revision", "main"))
    card = _metadata(commit.files)
    blobs = call.query.get("blobs") == "true"
    known = {
        "_id": hashlib.sha1(repo.name.encode()).hexdigest()[:24],
        "id": repo.name,
        "modelId": repo.name,
        "author": repo.name.split("/")[0],
        "sha": commit.oid,
        "lastModified": DATE,
        "createdAt": DATE,
        "private": repo.private,
        "gated": repo.gated,
        "disabled": repo.disabled,
        "downloads": 0,
        "likes": 0,
        "tags": [str(tag) for tag in card.get("tags", [])] + ["region:us"],
        "cardData": card,
        "siblings": [_sibling(path, blob, blobs) for path, blob in sorted(commit.files.items())],
        "usedStorage": sum(map(len, repo.objects.values())),
    }
    known |= {key: card[key] for key in ("library_name", "pipeline_tag") if key in card}
    if call.query.get("securityStatus"):
        known["securityRepoStatus"] = {"scansDone": True, "filesWithIssues": []}
    return _json(known)


def _metadata(files: Mapping[str, Blob]) -> dict[str, Any]:
    card = files["README.md"].data.decode(errors="replace") if "README.md" in files else ""
    if check_card(card) != ([], []):
        return {}
    return dict(yaml.safe_load(card.split("---")[1]))


def _sibling(path: str, blob: Blob, full: bool) -> dict[str, Any]:
    if not full:
        return {"rfilename": path}
    sibling: dict[str, Any] = {"rfilename": path, "size": len(blob.data), "blobId": blob.oid}
    if blob.lfs:
        sibling["lfs"] = {"sha256": blob.sha256, "size": len(blob.data), "pointerSize": len(blob.pointer)}
    return sibling


@route("GET", _API + "/tree/(?P<revision>[^/]+)(/(?P<path>.+))?")
def tree(hub: HubStandIn, call: Call) -> Answer:
    commit = _commit(hub.visible(call), call.parts["revision"])
    folder = call.parts.get("path", "")
    inside = f"{folder}/" if folder else ""
    paths = [path for path in commit.files if path.startswith(inside)]
    if folder and not paths:
        raise Refused(404, f"{folder} does not exist on {commit.oid}", "EntryNotFound")
    everything = _with_folders(paths, inside)
    if call.query.get("recursive") != "true":
        everything = [path for path in everything if "/" not in path[len(inside) :]]
    expand = call.query.get("expand") == "true"
    return _json([_entry(commit, path, expand) for path in everything])


def _with_folders(paths: Iterable[str], inside: str = "") -> list[str]:
    found = set(paths)
    for path in paths:
        parts = path.split("/")
        found |= {"/".join(parts[:depth]) for depth in range(1, len(parts))}
    return sorted(path for path in found if path.startswith(inside) and path != inside.rstrip("/"))


def _entry(commit: Commit, path: str, expand: bool) -> dict[str, Any]:
    blob = commit.files.get(path)
    entry: dict[str, Any]
    if blob is None:
        inner = json.dumps(sorted((name, at.oid) for name, at in commit.files.items() if name.startswith(path + "/")))
        entry = {"type": "directory", "oid": hashlib.sha1(inner.encode()).hexdigest(), "size": 0, "path": path}
    else:
        entry = {"type": "file", "oid": blob.oid, "size": len(blob.data), "path": path}
        if blob.lfs:
            entry["lfs"] = {"oid": blob.sha256, "size": len(blob.data), "pointerSize": len(blob.pointer)}
    if expand:
        entry["lastCommit"] = {"id": commit.oid, "title": commit.title, "date": DATE}
        if blob is not None:
            scan = {"status": "safe", "avScan": {"status": "safe"}, "pickleImportScan": None}
            entry["securityFileStatus"] = scan
    return entry


@route("POST", _API + "/paths-info/(?P<revision>[^/]+)")
def paths_info(hub: HubStandIn, call: Call) -> Answer:
    commit = _commit(hub.visible(call), call.parts["revision"])
    form = parse_qs(call.body.decode())
    known = set(_with_folders(list(commit.files)))
    expand = form.get("expand") == ["true"]
    return _json([_entry(commit, path, expand) for path in form.get("paths", []) if path in known])


@route("GET", _API + "/refs")
def refs(hub: HubStandIn, call: Call) -> Answer:
    repo = hub.visible(call)

    def listed(names: Mapping[str, str], space: str) -> list[dict[str, str]]:
        return [{"name": name, "ref": f"{space}{name}", "targetCommit": oid} for name, oid in sorted(names.items())]

    found = {"branches": listed(repo.branches, "refs/heads/"), "tags": listed(repo.tags, "refs/tags/"), "converts": []}
    if "include_prs" in call.query:
        heads = {f"refs/pr/{pull.number}": pull.head for pull in repo.pulls.values()}
        found["pullRequests"] = listed(heads, "")
    return _json(found)


@route("GET", _API + "/commits/(?P<revision>[^/]+)")
def commits(hub: HubStandIn, call: Call) -> Answer:
    repo = hub.visible(call)
    oid: str | None = _commit(repo, call.parts["revision"]).oid
    history = []
    while oid is not None:
        commit = repo.commits[oid]
        author = {"user": commit.author}
        history.append({"id": oid, "title": commit.title, "message": commit.message, "authors": [author], "date": DATE})
        oid = commit.parent
    return _json(history)


@route("GET", _API + "/discussions")
def discussions(hub: HubStandIn, call: Call) -> Answer:
    repo = hub.visible(call)
    found = [
        {
            "num": pull.number,
            "title": pull.title,
            "author": {"name": pull.author},
            "createdAt": DATE,
            "status": "draft",
            "isPullRequest": True,
            "repo": {"name": repo.name, "type": repo.kind},
        }
        for pull in sorted(repo.pulls.values(), key=lambda pull: -pull.number)
    ]
    return _json({"discussions": found, "count": len(found), "start": 0})


@route("GET HEAD", _WEB + "/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
def resolve(hub: HubStandIn, call: Call) -> Answer:
    repo = hub.visible(call, files=True)
    commit = _commit(repo, call.parts["revision"])
    blob = commit.files.get(call.parts["path"])
    if blob is None:
        refused = Refused(404, "Entry not found", "EntryNotFound").answer
        return Answer(404, refused.body, {**refused.headers, "X-Repo-Commit": commit.oid})
    headers = {
        "Content-Type": "application/octet-stream" if blob.lfs else "text/plain; charset=utf-8",
        "X-Repo-Commit": commit.oid,
        "ETag": f'"{blob.etag}"',
        "Accept-Ranges": "bytes",
    }
    if blob.lfs:
        headers |= {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(len(blob.data))}
    return _ranged(blob.data, call.headers.get("range"), headers)


def _ranged(data: bytes, wanted: str | None, headers: Mapping[str, str]) -> Answer:
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", wanted or "")
    if match is None or match.groups() == ("", ""):
        return Answer(200, data, headers)
    first, last = match.groups()
    start = int(first) if first else max(len(data) - int(last), 0)
    stop = min(int(last) + 1, len(data)) if first and last else len(data)
    if start >= stop:
        return Answer(416, b"", {**headers, "Content-Range": f"bytes */{len(data)}"})
    return Answer(206, data[start:stop], {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"})


def _commit(repo: Repository, revision: str) -> Commit:
    oid = repo.find(revision)
    if oid is None:
        raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
    return repo.commits[oid]


# --- writing


@route("POST", _API + "/preupload/(?P<revision>[^/]+)")
def preupload(hub: HubStandIn, call: Call) -> Answer:
    repo = hub.visible(call, write="create_pr" not in call.query, login=True)
    commit = _commit(repo, call.parts["revision"])
    asked = call.json()
    ignored = [line.strip() for line in asked.get("gitIgnore", "").splitlines() if line.strip()]
    found = []
    for file in asked["files"]:
        path, sample = file["path"], base64.b64decode(file.get("sample", ""))
        lfs = repo.is_lfs(path, file["size"], sample, commit.files)
        answer = {"path": path, "uploadMode": "lfs" if lfs else "regular"}
        answer["shouldIgnore"] = any(_git_match(path, pattern) for pattern in ignored)
        if path in commit.files:
            answer["oid"] = commit.files[path].etag
        found.append(answer)
    return _json({"files": found, "commitOid": commit.oid})


@route("POST", _WEB + r"\.git/info/lfs/objects/batch")
def lfs_batch(hub: HubStandIn, call: Call) -> Answer:
    asked = call.json()
    repo = hub.visible(call, write="ref" in asked, login=True)
    objects = []
    for wanted in asked["objects"]:
        oid, size = wanted["oid"], wanted["size"]
        answer = {"oid": oid, "size": size, "authenticated": True}
        if oid not in repo.objects:
            repo.announced[oid] = size
            base = f"{hub.url}/{_prefix(repo.kind)}{repo.name}"
            answer["actions"] = {"upload": {"href": f"{base}/lfs-storage/{oid}?X-Amz-Signature=0", "header": {}}}
            if hub.verify:
                answer["actions"]["verify"] = {"href": f"{base}.git/info/lfs/objects/verify", "header": {}}
        objects.append(answer)
    return _json({"transfer": "basic", "objects": objects})


@route("PUT", _WEB + "/lfs-storage/(?P<oid>[0-9a-f]{64})")
def lfs_put(hub: HubStandIn, call: Call) -> Answer:
    repo = hub.repos.get((call.kind, call.parts["repo"]))
    oid = call.parts["oid"]
    if repo is None or oid not in repo.announced:
        raise Refused(403, "SignatureDoesNotMatch")
    if len(call.body) != repo.announced[oid]:
        raise Refused(400, f"EntityTooSmall: {len(call.body)} bytes came, not {repo.announced[oid]}")
    if hashlib.sha256(call.body).hexdigest() != oid:
        raise Refused(400, "XAmzContentSHA256Mismatch: the SHA-256 is not the announced one")
    repo.objects[oid] = call.body
    return Answer(200, b"", {"ETag": f'"{hashlib.md5(call.body).hexdigest()}"'})


@route("POST", _WEB + r"\.git/info/lfs/objects/verify")
def lfs_verify(hub: HubStandIn, call: Call) -> Answer:
    repo = hub.visible(call, login=True)
    asked = call.json()
    data = repo.objects.get(asked["oid"])
    if data is None or len(data) != asked["size"]:
        raise Refused(404, "LFS object not found")
    return _json({})


@route("POST", _API + "/commit/(?P<revision>[^/]+)")
def commit_files(hub: HubStandIn, call: Call) -> Answer:
    pull = "create_pr" in call.query
    repo = hub.visible(call, write=not pull, login=True)
    revision = call.parts["revision"]
    head = _commit(repo, revision)
    header, operations = _operations(call.body)
    if wanted := header.get("parentCommit"):
        if pull:
            head = _commit(repo, wanted)
        elif repo.find(wanted) != head.oid:
            raise Refused(412, "A commit has happened since. Please refresh and try again.")
    files = dict(head.files)
    for key, value in operations:
        _apply(repo, files, key, value)
    title, message = header["summary"], header.get("description", "")
    commit = repo.commit(head.oid, files, title, message, str(call.user))
    url = f"{hub.url}/{_prefix(repo.kind)}{repo.name}"
    made = {"success": True, "commitOid": commit.oid, "commitUrl": f"{url}/commit/{commit.oid}", "hookOutput": ""}
    if pull:
        number = len(repo.pulls) + 1
        repo.pulls[number] = PullRequest(number, title, str(call.user), commit.oid)
        made |= {"pullRequestUrl": f"{url}/discussions/{number}", "pullRequestNum": number}
    elif not repo.move(revision, commit.oid):
        raise Refused(400, f"Can only commit to a branch or a pull request, not to {revision}")
    return _json(made)


def _operations(body: bytes) -> tuple[dict[str, Any], list[tuple[str, dict[str, Any]]]]:
    try:
        lines = [json.loads(line) for line in body.splitlines() if line.strip()]
        operations = [(line["key"], line["value"]) for line in lines]
    except (ValueError, KeyError, TypeError) as error:
        raise Refused(400, f"Invalid ndjson: {error}") from error
    if not operations or operations[0][0] != "header" or not operations[0][1].get("summary"):
        raise Refused(400, "The first line must be a header with a summary")
    return operations[0][1], operations[1:]


def _apply(repo: Repository, files: dict[str, Blob], key: str, value: Mapping[str, Any]) -> None:
    path = value["path"]
    if key == "file":
        try:
            files[path] = Blob(base64.b64decode(value["content"], validate=True), lfs=False)
        except binascii.Error as error:
            raise Refused(400, f"{path}: not base64") from error
    elif key == "lfsFile":
        data = repo.objects.get(value["oid"])
        if data is None or value.get("size", len(data)) != len(data):
            raise Refused(400, f'LFS pointer pointed to a file that does not exist: "{path}"')
        files[path] = Blob(data, lfs=True)
    elif key in ("deletedFile", "deletedFolder"):
        folder = path.rstrip("/") + "/"
        gone = [name for name in files if (name.startswith(folder) if key == "deletedFolder" else name == path)]
        if not gone:
            raise Refused(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
        for name in gone:
            del files[name]
    else:
        raise Refused(400, f"Invalid key {key}")


@route("POST DELETE", _API + "/branch/(?P<name>[^/]+)")
def branch(hub: HubStandIn, call: Call) -> Answer:
    repo = hub.visible(call, write=True)
    name = call.parts["name"]
    if call.method == "DELETE":
        if name == "main":
            raise Refused(403, "Cannot delete refs/heads/main")
        if repo.branches.pop(name, None) is None:
            raise Refused(404, f"Invalid rev id: {name}", "RevisionNotFound")
        return _json({})
    if name in repo.branches:
        raise Refused(409, f"Reference refs/heads/{name} already exists")
    repo.branches[name] = _commit(repo, call.json().get("startingPoint", "main")).oid
    return _json({})


@route("POST DELETE", _API + "/tag/(?P<name>[^/]+)")
def tag(hub: HubStandIn, call: Call) -> Answer:
    repo = hub.visible(call, write=True)
    if call.method == "DELETE":
        if repo.tags.pop(call.parts["name"], None) is None:
            raise Refused(404, f"Invalid rev id: {call.parts['name']}", "RevisionNotFound")
        return _json({})
    commit = _commit(repo, call.parts["name"])
    wanted = call.json()["tag"]
    if wanted in repo.tags:
        raise Refused(409, f"Tag refs/tags/{wanted} already exists")
    repo.tags[wanted] = commit.oid
    return _json({})


def _prefix(kind: str) -> str:
    return "" if kind == "model" else f"{kind}s/"


# --- the server


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
        self.stopping = threading.Event()
        self._lock = threading.RLock()
        self._server: _Server | None = None
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
            head = _commit(repository, revision)
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
            return _commit(self.repos[kind, repo], revision).oid

    def files(self, repo: str, revision: str = "main", *, kind: str = "model") -> dict[str, bytes]:
        """What readers see at a revision."""
        with self._lock:
            return {path: blob.data for path, blob in _commit(self.repos[kind, repo], revision).files.items()}

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
            self._server = _Server(self, self._port)

    def __enter__(self) -> HubStandIn:
        # Holds the port while the listener is down, so that nobody else gets it.
        self._place = socket.socket()
        self._place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._place.bind(("127.0.0.1", 0))
        self._port = self._place.getsockname()[1]
        self._server = _Server(self, self._port)
        self.environment = {"HF_ENDPOINT": self.url, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
        return self

    def __exit__(self, *_: object) -> None:
        self.stopping.set()
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
                function, named = _find_route(method, parts.path)
                token = headers.get("authorization", "").removeprefix("Bearer ")
                if token and token not in self.tokens:
                    raise Refused(401, BAD_TOKEN)
                may_write = bool(token) and token not in self.read_only
                return function(self, Call(method, self.tokens.get(token), may_write, named, query, body, headers))
            except Refused as refused:
                return refused.answer
            except Exception:
                self.errors.append(traceback.format_exc())
                return _refusal(500, "the stand-in itself failed", None, {})


class _Server(ThreadingHTTPServer):
    """One listener with its connections."""

    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 64

    def __init__(self, hub: HubStandIn, port: int) -> None:
        self.hub = hub
        self.resets: set[socket.socket] = set()
        self._open: dict[socket.socket, threading.Thread] = {}
        self._guard = threading.Lock()
        self._closed = False
        super().__init__(("127.0.0.1", port), _Handler)
        self._thread = threading.Thread(target=self.serve_forever, args=(0.02,), name="hub-standin", daemon=True)
        self._thread.start()

    def server_bind(self) -> None:
        TCPServer.server_bind(self)  # HTTPServer's own looks the host's name up
        self.server_name, self.server_port = "127.0.0.1", self.server_address[1]

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        with self._guard:
            self._open[request] = threading.current_thread()
            if self._closed:
                request.shutdown(socket.SHUT_RDWR)
        try:
            super().process_request_thread(request, client_address)
        finally:
            with self._guard:
                self._open.pop(request, None)

    def shutdown_request(self, request: Any) -> None:
        if request in self.resets:
            self.resets.discard(request)
            _wait_until_sent(request)
            request.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            request.close()
        else:
            super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = traceback.format_exc()
        if "ConnectionResetError" not in error and "BrokenPipeError" not in error:
            self.hub.errors.append(error)

    def drop_all(self) -> None:
        """End all connections, and wait until they have ended."""
        with self._guard:
            connections = dict(self._open)
        for connection in connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in connections.values():
            thread.join(1)

    def close(self) -> None:
        self.shutdown()
        self.server_close()
        self._thread.join()
        with self._guard:
            self._closed = True
        self.drop_all()


def _wait_until_sent(connection: socket.socket) -> None:
    """Wait until the other side has all that was sent: a reset would throw away what is still on its way."""
    import fcntl
    import termios

    deadline = time.monotonic() + 1.0
    while time.monotonic() < deadline:
        if struct.unpack("i", fcntl.ioctl(connection, termios.TIOCOUTQ, b"\0" * 4))[0] == 0:
            return
        time.sleep(0.001)


class _Handler(BaseHTTPRequestHandler):
    """One connection: reads requests, meets faults, counts bytes."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def handle(self) -> None:
        try:
            super().handle()
        except Dropped as dropped:
            if dropped.reset:
                self.server.resets.add(self.connection)
        except OSError:
            pass  # the client went away

    def finish(self) -> None:
        with suppress(OSError):
            super().finish()

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def serve(self) -> None:
        hub = self.server.hub
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.record = Request(self.command, self.path, headers)
        hub.requests.append(self.record)
        fault = hub.faults.match(self.command, self.path)
        body = self._read_body(headers, fault.after if isinstance(fault, CutUpload) else None)
        if isinstance(fault, Stall):
            hub.stopping.wait(fault.seconds)
        if isinstance(fault, Refuse):
            answer = _refusal(fault.status, fault.message, fault.code, {})
            answer = Answer(answer.status, answer.body, {**answer.headers, **fault.headers})
        else:
            answer = hub.answer(self.command, self.path, headers, body)
        if isinstance(fault, LoseAnswer):
            raise Dropped(fault.reset)
        self._send(_spoil(answer, fault), fault)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = serve  # noqa: N815

    def _read_body(self, headers: Mapping[str, str], cut: int | None) -> bytes:
        """The request's body. Raises Dropped where a fault or the budget ends it."""
        if self.server.hub.wire.broken:
            self._drop(unread=int(headers.get("content-length", "0")) > 0 or "transfer-encoding" in headers)
        read = bytearray()
        for size in self._pieces(headers):
            left = size
            while left:
                wanted = min(left, _CHUNK) if cut is None else min(left, _CHUNK, cut - len(read))
                allowed, _ = self.server.hub.wire.take(wanted)
                piece = self.rfile.read(allowed)
                read += piece
                self.record.received += len(piece)
                left -= len(piece)
                if len(piece) < allowed:
                    raise Dropped(reset=False)  # the client went away
                if (allowed < wanted) or len(read) == cut:
                    self._drop(unread=True)
        if cut is not None:
            self._drop(unread=False)
        return bytes(read)

    def _pieces(self, headers: Mapping[str, str]) -> Iterable[int]:
        """The sizes of the body's pieces; each is to be read before the next is asked for."""
        if headers.get("transfer-encoding", "").lower() != "chunked":
            yield int(headers.get("content-length", "0"))
            return
        while size := int(self.rfile.readline().split(b";")[0] or b"0", 16):
            yield size
            self.rfile.readline()
        self.rfile.readline()

    def _send(self, answer: Answer, fault: Action | None) -> None:
        wire = self.server.hub.wire
        if wire.broken:
            self._drop(unread=False)
        self.record.status = answer.status
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        whole = memoryview(answer.body)
        body = whole[: fault.after] if isinstance(fault, CutDownload) else whole
        while body:
            wanted = min(len(body), _CHUNK)
            allowed, broken = wire.take(wanted)
            self.record.sent += allowed
            self.wfile.write(body[:allowed])
            body = body[allowed:]
            if broken:
                self._drop(unread=False)
        if isinstance(fault, CutDownload):
            raise Dropped(fault.reset)

    def _drop(self, *, unread: bool) -> None:
        """End the connection. What the client still sends makes it a reset in any case; then always, to be the same."""
        raise Dropped(unread or self.server.hub.wire.reset)


def _spoil(answer: Answer, fault: Action | None) -> Answer:
    if isinstance(fault, Truncate):
        return Answer(answer.status, answer.body[: fault.keep], answer.headers)
    if isinstance(fault, Corrupt) and answer.body:
        body = bytearray(answer.body)
        body[fault.at] ^= 0xFF
        return Answer(answer.status, bytes(body), answer.headers)
    return answer
