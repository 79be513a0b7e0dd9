"""Routes that write: uploads to LFS, commits and pull requests, branches and tags."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .calls import API, WEB, Answer, Call, Refused, commit_at, json_answer, kind_prefix, route
from .repository import Blob, PullRequest, Repository, git_match

if TYPE_CHECKING:
    from .standin import HubStandIn


@route("POST", API + "/preupload/(?P<revision>[^/]+)")
def preupload(hub: HubStandIn, call: Call) -> Answer:
    repo = hub.visible(call, write="create_pr" not in call.query, login=True)
    commit = commit_at(repo, call.parts["revision"])
    asked = call.json()
    ignored = [line.strip() for line in asked.get("gitIgnore", "").splitlines() if line.strip()]
    found = []
    for file in asked["files"]:
        path, sample = file["path"], base64.b64decode(file.get("sample", ""))
        lfs = repo.is_lfs(path, file["size"], sample, commit.files)
        answer = {"path": path, "uploadMode": "lfs" if lfs else "regular"}
        answer["shouldIgnore"] = any(git_match(path, pattern) for pattern in ignored)
        if path in commit.files:
            answer["oid"] = commit.files[path].etag
        found.append(answer)
    return json_answer({"files": found, "commitOid": commit.oid})


@route("POST", WEB + r"\.git/info/lfs/objects/batch")
def lfs_batch(hub: HubStandIn, call: Call) -> Answer:
    asked = call.json()
    repo = hub.visible(call, write="ref" in asked, login=True)
    objects = []
    for wanted in asked["objects"]:
        oid, size = wanted["oid"], wanted["size"]
        answer = {"oid": oid, "size": size, "authenticated": True}
        if oid not in repo.objects:
            repo.announced[oid] = size
            base = f"{hub.url}/{kind_prefix(repo.kind)}{repo.name}"
            answer["actions"] = {"upload": {"href": f"{base}/lfs-storage/{oid}?X-Amz-Signature=0", "header": {}}}
            if hub.verify:
                answer["actions"]["verify"] = {"href": f"{base}.git/info/lfs/objects/verify", "header": {}}
        objects.append(answer)
    return json_answer({"transfer": "basic", "objects": objects})


@route("PUT", WEB + "/lfs-storage/(?P<oid>[0-9a-f]{64})")
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


@route("POST", WEB + r"\.git/info/lfs/objects/verify")
def lfs_verify(hub: HubStandIn, call: Call) -> Answer:
    repo = hub.visible(call, login=True)
    asked = call.json()
    data = repo.objects.get(asked["oid"])
    if data is None or len(data) != asked["size"]:
        raise Refused(404, "LFS object not found")
    return json_answer({})


@route("POST", API + "/commit/(?P<revision>[^/]+)")
def commit_files(hub: HubStandIn, call: Call) -> Answer:
    pull = "create_pr" in call.query
    repo = hub.visible(call, write=not pull, login=True)
    revision = call.parts["revision"]
    head = commit_at(repo, revision)
    header, operations = _operations(call.body)
    if wanted := header.get("parentCommit"):
        if pull:
            head = commit_at(repo, wanted)
        elif repo.find(wanted) != head.oid:
            raise Refused(412, "A commit has happened since. Please refresh and try again.")
    files = dict(head.files)
    for key, value in operations:
        _apply(repo, files, key, value)
    title, message = header["summary"], header.get("description", "")
    commit = repo.commit(head.oid, files, title, message, str(call.user))
    url = f"{hub.url}/{kind_prefix(repo.kind)}{repo.name}"
    made = {"success": True, "commitOid": commit.oid, "commitUrl": f"{url}/commit/{commit.oid}", "hookOutput": ""}
    if pull:
        number = len(repo.pulls) + 1
        repo.pulls[number] = PullRequest(number, title, str(call.user), commit.oid)
        made |= {"pullRequestUrl": f"{url}/discussions/{number}", "pullRequestNum": number}
    elif not repo.move(revision, commit.oid):
        raise Refused(400, f"Can only commit to a branch or a pull request, not to {revision}")
    return json_answer(made)


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


@route("POST DELETE", API + "/branch/(?P<name>[^/]+)")
def branch(hub: HubStandIn, call: Call) -> Answer:
    repo = hub.visible(call, write=True)
    name = call.parts["name"]
    if call.method == "DELETE":
        if name == "main":
            raise Refused(403, "Cannot delete refs/heads/main")
        if repo.branches.pop(name, None) is None:
            raise Refused(404, f"Invalid rev id: {name}", "RevisionNotFound")
        return json_answer({})
    if name in repo.branches:
        raise Refused(409, f"Reference refs/heads/{name} already exists")
    repo.branches[name] = commit_at(repo, call.json().get("startingPoint", "main")).oid
    return json_answer({})


@route("POST DELETE", API + "/tag/(?P<name>[^/]+)")
def tag(hub: HubStandIn, call: Call) -> Answer:
    repo = hub.visible(call, write=True)
    if call.method == "DELETE":
        if repo.tags.pop(call.parts["name"], None) is None:
            raise Refused(404, f"Invalid rev id: {call.parts['name']}", "RevisionNotFound")
        return json_answer({})
    commit = commit_at(repo, call.parts["name"])
    wanted = call.json()["tag"]
    if wanted in repo.tags:
        raise Refused(409, f"Tag refs/tags/{wanted} already exists")
    repo.tags[wanted] = commit.oid
    return json_answer({})
