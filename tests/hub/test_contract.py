"""The stand-in answers the real huggingface_hub client as the Hub does, in all that redif-sdk uses of it."""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, errors, hf_hub_download, snapshot_download

from .standin import Corrupt, CutDownload, CutUpload, HubStandIn, LoseAnswer, Refuse, Truncate

REPO = "alice/student"
WEIGHTS = bytes(range(256)) * 1200  # 307 200 bytes: an LFS file
CARD = b"---\nlicense: mit\ntags:\n- diffusion\n---\n# A student\n"
FILES = {"README.md": CARD, "redif.json": b'{"name": "student"}\n', "graphs/unet.onnx": WEIGHTS}


@pytest.fixture
def api(hub: HubStandIn) -> HfApi:
    return HfApi()


def commit(api: HfApi, files: dict[str, bytes], **options: Any) -> Any:
    return api.create_commit(REPO, [CommitOperationAdd(*file) for file in files.items()], commit_message="x", **options)


def content(hub: HubStandIn, revision: str = "main") -> dict[str, bytes]:
    return {path: data for path, data in hub.files(REPO, revision).items() if path[0] != "."}


def test_a_push_and_a_pull(hub: HubStandIn, api: HfApi) -> None:
    """Repositories, commits with LFS files, their hashes, deletions, downloads by patterns and offline."""
    assert api.create_repo(REPO, exist_ok=True) == api.create_repo(REPO, exist_ok=True)
    made = commit(api, FILES)
    assert made.oid == hub.head(REPO)
    assert content(hub) == FILES
    info = api.repo_info(REPO, files_metadata=True)
    assert (info.sha, info.private, info.card_data.license) == (made.oid, False, "mit")
    found = {sibling.rfilename: sibling for sibling in info.siblings}
    assert found["graphs/unet.onnx"].lfs.sha256 == hashlib.sha256(WEIGHTS).hexdigest()
    git = hashlib.sha1(b"blob %d\0" % len(FILES["redif.json"]) + FILES["redif.json"]).hexdigest()
    assert (found["redif.json"].lfs, found["redif.json"].blob_id) == (None, git)
    folder = Path(snapshot_download(REPO, allow_patterns=["*.json"]))
    assert folder.name == made.oid
    assert [path.name for path in folder.iterdir()] == ["redif.json"]
    assert Path(hf_hub_download(REPO, "graphs/unet.onnx", revision=made.oid)).read_bytes() == WEIGHTS
    api.create_commit(REPO, [CommitOperationDelete("graphs/unet.onnx")], commit_message="less")
    assert "graphs/unet.onnx" not in content(hub)
    hub.down()
    cached = snapshot_download(REPO, revision=made.oid, allow_patterns=["*.json"], local_files_only=True)
    assert cached == str(folder)
    with pytest.raises(errors.LocalEntryNotFoundError):
        snapshot_download("alice/other")


def test_revisions_pull_requests_and_conflicts(hub: HubStandIn, api: HfApi) -> None:
    first = hub.put(REPO, {"a.json": b"1"})
    api.create_branch(REPO, branch="next", exist_ok=True)
    commit(api, {"a.json": b"2"}, revision="next")
    assert (content(hub), content(hub, "next")) == ({"a.json": b"1"}, {"a.json": b"2"})
    api.create_tag(REPO, tag="v1", revision=first)
    assert [(tag.name, tag.target_commit) for tag in api.list_repo_refs(REPO).tags] == [("v1", first)]
    asked = commit(api, {"b.onnx": WEIGHTS}, create_pr=True)
    assert (asked.pr_revision, hub.head(REPO)) == ("refs/pr/1", first)
    assert content(hub, "refs/pr/1") == {"a.json": b"1", "b.onnx": WEIGHTS}
    second = hub.put(REPO, {"a.json": b"3"})
    with pytest.raises(errors.HfHubHTTPError, match="A commit has happened since") as late:
        commit(api, {"a.json": b"4"}, parent_commit=first)
    assert (late.value.response.status_code, hub.head(REPO)) == (412, second)
    with pytest.raises(ValueError, match='"license" must be one of'):
        commit(api, {"README.md": b"---\nlicense: no-such\n---\n"})


def test_spaces(hub: HubStandIn, api: HfApi) -> None:
    api.create_repo("alice/demo", repo_type="space", space_sdk="gradio", exist_ok=True)
    api.create_commit("alice/demo", [CommitOperationAdd("app.py", b"pass\n")], commit_message="x", repo_type="space")
    assert hub.files("alice/demo", kind="space")["app.py"] == b"pass\n"
    assert api.repo_info("alice/demo", repo_type="space").sha == hub.head("alice/demo", kind="space")


@pytest.mark.parametrize(
    ("change", "token", "error", "status"),
    [
        ({"private": True}, False, errors.RepositoryNotFoundError, 401),
        ({"private": True}, "hf_bob", errors.RepositoryNotFoundError, 404),
        ({"gated": "manual"}, "hf_bob", errors.GatedRepoError, 403),
        ({"disabled": True}, None, errors.DisabledRepoError, 403),
        ({}, "hf_wrong", errors.HfHubHTTPError, 401),
    ],
)
def test_refusals_have_the_client_s_own_classes(
    hub: HubStandIn, change: dict[str, Any], token: Any, error: type[errors.HfHubHTTPError], status: int
) -> None:
    hub.put(REPO, FILES)
    vars(hub.repos["model", REPO]).update(change)
    look = partial(hf_hub_download, filename="redif.json") if "gated" in change else HfApi().repo_info
    with pytest.raises(error) as caught:
        look(REPO, token=token)  # the description of a gated repository is public, its files are not
    assert type(caught.value) is error
    assert caught.value.response.status_code == status


def test_what_is_not_there_and_may_not_be_written(hub: HubStandIn, api: HfApi) -> None:
    head = hub.put(REPO, FILES)
    with pytest.raises(errors.RevisionNotFoundError):
        api.repo_info(REPO, revision="nowhere")
    with pytest.raises(errors.RemoteEntryNotFoundError):
        hf_hub_download(REPO, "nowhere.json")
    with pytest.raises(errors.HfHubHTTPError, match="403 Forbidden"):
        commit(api, {"a.json": b"1"}, token="hf_bob")
    assert hub.head(REPO) == head


def test_faults_strike_as_they_say(hub: HubStandIn, api: HfApi, waits: list[float]) -> None:
    """The client tries again after a cut, takes altered bytes for good, and never makes half a commit."""
    head = hub.put(REPO, {"unet.onnx": WEIGHTS, "a.json": b"12"})
    hub.faults.add(CutDownload(100_500), path="unet.onnx")
    assert Path(hf_hub_download(REPO, "unet.onnx")).read_bytes() == WEIGHTS
    assert hub.asked("GET", "unet.onnx")[0].sent == 100_500
    hub.faults.add(Corrupt(-1), path="unet.onnx")
    altered = Path(hf_hub_download(REPO, "unet.onnx", force_download=True)).read_bytes()
    assert altered == WEIGHTS[:-1] + bytes([WEIGHTS[-1] ^ 0xFF])
    hub.faults.add(Truncate(7), path="unet.onnx")
    with pytest.raises(OSError, match="Consistency check failed"):
        hf_hub_download(REPO, "unet.onnx", force_download=True)
    hub.faults.add(Refuse(429, headers={"Retry-After": "7"}), path="/api/models", times=None)
    with pytest.raises(errors.HfHubHTTPError, match="429 Too Many Requests"):
        api.repo_info(REPO)
    hub.faults.clear()
    hub.faults.add(CutUpload(70_001), method="PUT")
    hub.faults.add(LoseAnswer(), method="POST", path="/commit/")
    with pytest.raises(httpx2.RemoteProtocolError):
        commit(api, {"b.onnx": WEIGHTS[::-1]})
    assert [request.received for request in hub.asked("PUT")] == [70_001, len(WEIGHTS)]
    assert hub.head(REPO) != head  # carried out, though the answer was lost
    hub.cut_after(1000)
    with pytest.raises((httpx2.TransportError, RuntimeError)):
        commit(api, {"c.onnx": WEIGHTS[1:]})
    hub.mend()
    assert set(content(hub)) == {"unet.onnx", "a.json", "b.onnx"}
    assert waits
