"""Routes that read: a repository's files, refs and history, and the files' contents."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

from .calls import API, WEB, Answer, Call, Refused, commit_at, json_answer, route
from .cards import metadata
from .repository import Blob, Commit

if TYPE_CHECKING:
    from .standin import HubStandIn

DATE = "2026-01-01T00:00:00.000Z"


@route("GET", API + "(/revision/(?P<revision>[^/]+))?")
def info(hub: HubStandIn, call: Call) -> Answer:
    repo = hub.visible(call)
    commit = commit_at(repo, call.parts.get("revision", "main"))
    card = metadata(commit.files)
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
    return json_answer(known)


def _sibling(path: str, blob: Blob, full: bool) -> dict[str, Any]:
    if not full:
        return {"rfilename": path}
    sibling: dict[str, Any] = {"rfilename": path, "size": len(blob.data), "blobId": blob.oid}
    if blob.lfs:
        sibling["lfs"] = {"sha256": blob.sha256, "size": len(blob.data), "pointerSize": len(blob.pointer)}
    return sibling


@route("GET", API + "/tree/(?P<revision>[^/]+)(/(?P<path>.+))?")
def tree(hub: HubStandIn, call: Call) -> Answer:
    commit = commit_at(hub.visible(call), call.parts["revision"])
    folder = call.parts.get("path", "")
    inside = f"{folder}/" if folder else ""
    paths = [path for path in commit.files if path.startswith(inside)]
    if folder and not paths:
        raise Refused(404, f"{folder} does not exist on {commit.oid}", "EntryNotFound")
    everything = _with_folders(paths, inside)
    if call.query.get("recursive") != "true":
        everything = [path for path in everything if "/" not in path[len(inside) :]]
    expand = call.query.get("expand") == "true"
    return json_answer([_entry(commit, path, expand) for path in everything])


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


@route("POST", API + "/paths-info/(?P<revision>[^/]+)")
def paths_info(hub: HubStandIn, call: Call) -> Answer:
    commit = commit_at(hub.visible(call), call.parts["revision"])
    form = parse_qs(call.body.decode())
    known = set(_with_folders(list(commit.files)))
    expand = form.get("expand") == ["true"]
    return json_answer([_entry(commit, path, expand) for path in form.get("paths", []) if path in known])


@route("GET", API + "/refs")
def refs(hub: HubStandIn, call: Call) -> Answer:
    repo = hub.visible(call)

    def listed(names: Mapping[str, str], space: str) -> list[dict[str, str]]:
        return [{"name": name, "ref": f"{space}{name}", "targetCommit": oid} for name, oid in sorted(names.items())]

    found = {"branches": listed(repo.branches, "refs/heads/"), "tags": listed(repo.tags, "refs/tags/"), "converts": []}
    if "include_prs" in call.query:
        heads = {f"refs/pr/{pull.number}": pull.head for pull in repo.pulls.values()}
        found["pullRequests"] = listed(heads, "")
    return json_answer(found)


@route("GET", API + "/commits/(?P<revision>[^/]+)")
def commits(hub: HubStandIn, call: Call) -> Answer:
    repo = hub.visible(call)
    oid: str | None = commit_at(repo, call.parts["revision"]).oid
    history = []
    while oid is not None:
        commit = repo.commits[oid]
        author = {"user": commit.author}
        history.append({"id": oid, "title": commit.title, "message": commit.message, "authors": [author], "date": DATE})
        oid = commit.parent
    return json_answer(history)


@route("GET", API + "/discussions")
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
    return json_answer({"discussions": found, "count": len(found), "start": 0})


@route("GET HEAD", WEB + "/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
def resolve(hub: HubStandIn, call: Call) -> Answer:
    repo = hub.visible(call, files=True)
    commit = commit_at(repo, call.parts["revision"])
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
