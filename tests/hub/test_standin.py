"""The stand-in behaves as the Hub does, as the real client sees it."""

from __future__ import annotations

import gc
import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationCopy,
    CommitOperationDelete,
    HfApi,
    constants,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import (
    BadRequestError,
    DisabledRepoError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from .standin import (
    Corrupt,
    CutDownload,
    CutUpload,
    HubStandIn,
    LoseAnswer,
    Refuse,
    Stall,
    Truncate,
    check_card,
)

BROKEN = (httpx2.TransportError, RuntimeError)  # the latter from the client's own threads, caused by the former
REPO = "alice/student"
WEIGHTS = bytes(range(256)) * 1200  # 307 200 bytes
FILES = {
    "README.md": b"---\nlicense: mit\ntags:\n- diffusion\nlibrary_name: redif\n---\n# A student\n",
    "redif.json": b'{"name": "student"}\n',
    "graphs/unet.onnx": WEIGHTS,
    "graphs/vae.onnx": WEIGHTS[::-1],
    "empty.npz": b"",
}


@pytest.fixture
def api(hub: HubStandIn) -> HfApi:
    return HfApi()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "folder"
    for path, data in FILES.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(data)
    return root


def visible(hub: HubStandIn, repo: str = REPO, revision: str = "main") -> dict[str, bytes]:
    return {path: data for path, data in hub.files(repo, revision).items() if path != ".gitattributes"}


def adds(**files: bytes) -> list[Any]:
    return [CommitOperationAdd(name.replace("__", "."), data) for name, data in files.items()]


def read(root: str | Path) -> dict[str, bytes]:
    found = {path.relative_to(root).as_posix(): path.read_bytes() for path in Path(root).rglob("*") if path.is_file()}
    return {path: data for path, data in found.items() if path != ".gitattributes"}


def incomplete() -> list[str]:
    return [path.name for path in Path(constants.HF_HUB_CACHE).rglob("*.incomplete")]


def blobs() -> list[Path]:
    return [path for path in Path(constants.HF_HUB_CACHE).glob("models--*/blobs/*") if path.is_file()]


class TestRepositories:
    def test_create(self, hub: HubStandIn, api: HfApi) -> None:
        url = api.create_repo(REPO)
        assert (str(url), url.repo_id) == (f"{hub.url}/{REPO}", REPO)
        assert list(hub.files(REPO)) == [".gitattributes"]
        with pytest.raises(HfHubHTTPError) as caught:
            api.create_repo(REPO)
        assert caught.value.response.status_code == 409
        assert api.create_repo(REPO, exist_ok=True) == url
        assert api.repo_info(REPO).private is False

    def test_create_private_in_an_organisation(self, hub: HubStandIn, api: HfApi) -> None:
        with pytest.raises(HfHubHTTPError, match="You don't have the rights"):
            api.create_repo("acme/student")
        hub.orgs["acme"] = {"alice"}
        api.create_repo("acme/student", private=True)
        assert api.repo_info("acme/student").private is True

    def test_settings_and_delete(self, hub: HubStandIn, api: HfApi) -> None:
        api.create_repo(REPO)
        api.update_repo_settings(REPO, private=True, gated="auto")
        assert (hub.repos["model", REPO].private, hub.repos["model", REPO].gated) == (True, "auto")
        api.delete_repo(REPO)
        with pytest.raises(RepositoryNotFoundError):
            api.repo_info(REPO)

    def test_space(self, hub: HubStandIn, api: HfApi) -> None:
        api.create_repo("alice/demo", repo_type="space", space_sdk="gradio")
        api.create_commit("alice/demo", adds(app__py=b"pass\n", a__png=WEIGHTS), commit_message="a", repo_type="space")
        assert hub.files("alice/demo", kind="space")["a.png"] == WEIGHTS
        path = hf_hub_download("alice/demo", "a.png", repo_type="space")
        assert Path(path).read_bytes() == WEIGHTS

    def test_whoami(self, hub: HubStandIn, api: HfApi) -> None:
        assert api.whoami()["name"] == "alice"
        with pytest.raises(HfHubHTTPError, match="Invalid user token"):
            api.whoami(token="hf_wrong")


class TestCommits:
    def test_upload_folder(self, hub: HubStandIn, api: HfApi, folder: Path) -> None:
        api.create_repo(REPO)
        before = hub.head(REPO)
        info = api.upload_folder(repo_id=REPO, folder_path=folder)
        assert visible(hub) == FILES
        assert info.oid == hub.head(REPO) != before
        siblings = {
            one.rfilename: one for one in api.model_info(REPO, files_metadata=True, securityStatus=True).siblings
        }
        assert siblings["graphs/unet.onnx"].lfs.sha256 == hashlib.sha256(WEIGHTS).hexdigest()
        assert siblings["graphs/unet.onnx"].size == len(WEIGHTS)
        assert siblings["redif.json"].lfs is None
        git = hashlib.sha1(b"blob %d\0" % len(FILES["redif.json"]) + FILES["redif.json"]).hexdigest()
        assert siblings["redif.json"].blob_id == git
        assert siblings["empty.npz"].lfs is None
        assert api.model_info(REPO).card_data.license == "mit"
        assert len(hub.asked("PUT")) == 2

    def test_a_second_upload_sends_nothing_again(self, hub: HubStandIn, api: HfApi, folder: Path) -> None:
        api.create_repo(REPO)
        head = api.upload_folder(repo_id=REPO, folder_path=folder).oid
        hub.requests.clear()
        assert api.upload_folder(repo_id=REPO, folder_path=folder).oid == head
        assert not hub.asked("PUT")
        assert not hub.asked("POST", "/commit/")

    def test_tree_and_paths(self, hub: HubStandIn, api: HfApi) -> None:
        hub.put(REPO, FILES)
        flat = [entry.path for entry in api.list_repo_tree(REPO)]
        assert flat == [".gitattributes", "README.md", "empty.npz", "graphs", "redif.json"]
        assert [entry.path for entry in api.list_repo_tree(REPO, "graphs", expand=True)] == [
            "graphs/unet.onnx",
            "graphs/vae.onnx",
        ]
        assert api.list_repo_files(REPO) == sorted([*FILES, ".gitattributes"])
        (entry,) = api.get_paths_info(REPO, ["graphs/unet.onnx", "nowhere"])
        assert entry.lfs.size == len(WEIGHTS)
        with pytest.raises(RemoteEntryNotFoundError):
            list(api.list_repo_tree(REPO, "nowhere"))
        assert [one.title for one in api.list_repo_commits(REPO)] == ["put", "initial commit"]

    def test_delete_and_copy(self, hub: HubStandIn, api: HfApi) -> None:
        hub.put(REPO, FILES)
        operations = [
            CommitOperationDelete("redif.json"),
            CommitOperationCopy("graphs/unet.onnx", "kept.onnx"),
            CommitOperationDelete("graphs/"),
        ]
        api.create_commit(REPO, operations, commit_message="less")
        assert set(visible(hub)) == {"README.md", "empty.npz", "kept.onnx"}
        with pytest.raises(RemoteEntryNotFoundError, match="doesn't exist"):
            api.delete_file("nowhere.json", REPO)

    def test_parent_commit(self, hub: HubStandIn, api: HfApi) -> None:
        old = hub.put(REPO, FILES)
        new = hub.put(REPO, {"a.json": b"1"})
        with pytest.raises(HfHubHTTPError, match="A commit has happened since") as caught:
            api.create_commit(REPO, adds(b__json=b"2"), commit_message="late", parent_commit=old)
        assert caught.value.response.status_code == 412
        assert hub.head(REPO) == new
        made = api.create_commit(REPO, adds(b__json=b"2"), commit_message="on time", parent_commit=new)
        assert made.oid == hub.head(REPO)

    def test_a_commit_is_whole_or_not_at_all(self, hub: HubStandIn, api: HfApi) -> None:
        head = hub.put(REPO, FILES)
        missing = {"path": "b.onnx", "algo": "sha256", "oid": "0" * 64, "size": 1}
        lines = (
            b'{"key": "header", "value": {"summary": "half"}}\n'
            b'{"key": "file", "value": {"path": "a.json", "content": "MQ==", "encoding": "base64"}}\n'
            b'{"key": "lfsFile", "value": ' + str(missing).replace("'", '"').encode() + b"}\n"
        )
        url = f"{hub.url}/api/models/{REPO}/commit/main"
        answer = httpx2.post(url, content=lines, headers={"Authorization": "Bearer hf_alice"})
        assert answer.status_code == 400
        assert "does not exist" in answer.json()["error"]
        assert hub.head(REPO) == head
        assert visible(hub) == FILES

    def test_an_object_must_be_what_was_announced(self, hub: HubStandIn, api: HfApi) -> None:
        hub.put(REPO, {})
        oid = hashlib.sha256(WEIGHTS).hexdigest()
        asked = {"operation": "upload", "objects": [{"oid": oid, "size": len(WEIGHTS)}], "ref": {"name": "main"}}
        url, login = f"{hub.url}/{REPO}.git/info/lfs/objects", {"Authorization": "Bearer hf_alice"}
        (answer,) = httpx2.post(f"{url}/batch", json=asked, headers=login).json()["objects"]
        href = answer["actions"]["upload"]["href"]
        assert httpx2.put(href, content=WEIGHTS[:-1]).status_code == 400
        assert httpx2.put(href, content=WEIGHTS[:-1] + b"x").status_code == 400
        assert httpx2.post(f"{url}/verify", json=asked["objects"][0], headers=login).status_code == 404
        assert httpx2.put(href, content=WEIGHTS).status_code == 200
        assert httpx2.post(f"{url}/verify", json=asked["objects"][0], headers=login).status_code == 200
        (again,) = httpx2.post(f"{url}/batch", json=asked, headers=login).json()["objects"]
        assert "actions" not in again

    def test_pull_request(self, hub: HubStandIn, api: HfApi) -> None:
        head = hub.put(REPO, FILES)
        made = api.create_commit(REPO, adds(a__onnx=WEIGHTS), commit_message="please", create_pr=True, token="hf_bob")
        assert (made.pr_num, made.pr_revision) == (1, "refs/pr/1")
        assert hub.head(REPO) == head
        assert hub.head(REPO, "refs/pr/1") == made.oid
        api.create_commit(REPO, adds(b__json=b"2"), commit_message="more", revision="refs/pr/1")
        assert visible(hub, revision="refs/pr/1") == {**FILES, "a.onnx": WEIGHTS, "b.json": b"2"}
        (pull,) = api.get_repo_discussions(REPO)
        assert (pull.num, pull.title, pull.is_pull_request, pull.author) == (1, "please", True, "bob")
        (ref,) = api.list_repo_refs(REPO, include_pull_requests=True).pull_requests
        assert ref.ref == "refs/pr/1"
        assert Path(hf_hub_download(REPO, "a.onnx", revision="refs/pr/1")).read_bytes() == WEIGHTS

    def test_branches_and_tags(self, hub: HubStandIn, api: HfApi) -> None:
        first = hub.put(REPO, {"a.json": b"1"})
        api.create_branch(REPO, branch="dev/next")
        api.create_commit(REPO, adds(a__json=b"2"), commit_message="two", revision="dev/next")
        assert (visible(hub), visible(hub, revision="dev/next")) == ({"a.json": b"1"}, {"a.json": b"2"})
        api.create_tag(REPO, tag="v1", revision=first)
        with pytest.raises(HfHubHTTPError) as caught:
            api.create_tag(REPO, tag="v1", revision="dev/next")
        assert caught.value.response.status_code == 409
        api.create_tag(REPO, tag="v1", exist_ok=True)
        with pytest.raises(HfHubHTTPError):
            api.create_branch(REPO, branch="dev/next")
        api.create_branch(REPO, branch="old", revision=first, exist_ok=True)
        refs = api.list_repo_refs(REPO)
        assert [ref.name for ref in refs.branches] == ["dev/next", "main", "old"]
        assert [(ref.name, ref.target_commit) for ref in refs.tags] == [("v1", first)]
        assert api.repo_info(REPO, revision=first[:8]).sha == first
        with pytest.raises(RevisionNotFoundError):
            api.create_tag(REPO, tag="v2", revision="nowhere")
        with pytest.raises(BadRequestError):
            api.create_commit(REPO, adds(a__json=b"3"), commit_message="three", revision="v1")
        api.delete_branch(REPO, branch="old")
        api.delete_tag(REPO, tag="v1")
        assert api.list_repo_refs(REPO).tags == []

    @pytest.mark.parametrize(
        ("card", "message"),
        [
            (b"---\nlicense: no-such\n---\n", '"license" must be one of'),
            (b"---\nlicense: mit\ntags: diffusion\n---\n", '"tags" must be an array'),
            (b"---\nlicense: [mit\n---\n", "YAML Metadata Error"),
            (b"---\n- mit\n---\n", "must be an object"),
        ],
    )
    def test_card_with_errors(self, hub: HubStandIn, api: HfApi, card: bytes, message: str) -> None:
        head = hub.put(REPO, {})
        with pytest.raises(ValueError, match=message):
            api.create_commit(REPO, [CommitOperationAdd("README.md", card)], commit_message="card")
        assert hub.head(REPO) == head

    def test_card_without_metadata(self, hub: HubStandIn, api: HfApi) -> None:
        hub.put(REPO, {})
        with pytest.warns(UserWarning, match="empty or missing yaml metadata"):
            api.create_commit(REPO, [CommitOperationAdd("README.md", b"# Hello\n")], commit_message="card")

    def test_card_that_is_fine(self) -> None:
        assert check_card(FILES["README.md"].decode()) == ([], [])


class TestDownloads:
    def test_snapshot(self, hub: HubStandIn, tmp_path: Path) -> None:
        commit = hub.put(REPO, FILES)
        path = Path(snapshot_download(REPO))
        assert path.name == commit
        assert read(path) == FILES
        hub.requests.clear()
        assert snapshot_download(REPO) == str(path)
        assert [request.method for request in hub.requests] == ["GET"]
        assert read(snapshot_download(REPO, local_dir=tmp_path / "here", allow_patterns="*.json"))["redif.json"]

    def test_verify_checksums(self, hub: HubStandIn, api: HfApi) -> None:
        hub.put(REPO, FILES)
        path = Path(snapshot_download(REPO))
        good = api.verify_repo_checksums(REPO)
        assert (good.checked_count, good.mismatches, good.missing_paths) == (len(FILES) + 1, [], [])
        (path / "graphs/unet.onnx").resolve().write_bytes(b"x" + WEIGHTS[1:])
        (path / "redif.json").resolve().write_bytes(b"{}")
        bad = api.verify_repo_checksums(REPO)
        assert [(one["path"], one["algorithm"]) for one in bad.mismatches] == [
            ("graphs/unet.onnx", "sha256"),
            ("redif.json", "git-sha1"),
        ]

    def test_ranges(self, hub: HubStandIn) -> None:
        hub.put(REPO, FILES)
        url = f"{hub.url}/{REPO}/resolve/main/graphs/unet.onnx"

        def get(wanted: str) -> tuple[int, bytes, str | None]:
            answer = httpx2.get(url, headers={"Range": wanted})
            return answer.status_code, answer.content, answer.headers.get("Content-Range")

        size = len(WEIGHTS)
        assert get("bytes=10-19") == (206, WEIGHTS[10:20], f"bytes 10-19/{size}")
        assert get("bytes=-7") == (206, WEIGHTS[-7:], f"bytes {size - 7}-{size - 1}/{size}")
        assert get(f"bytes={size - 3}-") == (206, WEIGHTS[-3:], f"bytes {size - 3}-{size - 1}/{size}")
        assert get(f"bytes={size}-")[0] == 416
        head = httpx2.head(url)
        assert int(head.headers["Content-Length"]) == int(head.headers["X-Linked-Size"]) == size
        assert head.headers["ETag"] == head.headers["X-Linked-Etag"] == f'"{hashlib.sha256(WEIGHTS).hexdigest()}"'
        assert head.headers["X-Repo-Commit"] == hub.head(REPO)

    def test_other_process(self, hub: HubStandIn) -> None:
        commit = hub.put(REPO, FILES, private=True)
        code = f"import huggingface_hub; print(huggingface_hub.snapshot_download({REPO!r}))"
        result = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, **hub.environment},
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        path = Path(result.stdout.strip())
        assert path == Path(hub.environment["HF_HOME"], "hub", "models--alice--student", "snapshots", commit)
        assert read(path) == FILES


class TestAccess:
    """Each refusal is the very class that the client raises for the real Hub."""

    def test_private(self, hub: HubStandIn, api: HfApi) -> None:
        hub.put(REPO, FILES, private=True)
        assert api.repo_info(REPO).private is True
        for token, status in ((False, 401), ("hf_bob", 404)):
            for look in (
                api.repo_info,
                snapshot_download,
                lambda repo, token: list(api.list_repo_tree(repo, token=token)),
            ):
                with pytest.raises(RepositoryNotFoundError) as caught:
                    look(REPO, token=token)
                assert type(caught.value) is RepositoryNotFoundError
                assert caught.value.response.status_code == status

    def test_no_such_repository(self, hub: HubStandIn) -> None:
        with pytest.raises(RepositoryNotFoundError) as caught:
            hf_hub_download("alice/nothing", "a.json")
        assert type(caught.value) is RepositoryNotFoundError

    def test_gated(self, hub: HubStandIn, api: HfApi) -> None:
        hub.put(REPO, FILES, gated="manual")
        assert api.repo_info(REPO, token=False).gated == "manual"
        for token, status in ((False, 401), ("hf_bob", 403)):
            with pytest.raises(GatedRepoError) as caught:
                hf_hub_download(REPO, "redif.json", token=token)
            assert caught.value.response.status_code == status
        hub.repos["model", REPO].granted.add("bob")
        hf_hub_download(REPO, "redif.json", token="hf_bob")

    def test_no_such_revision_or_file(self, hub: HubStandIn, api: HfApi) -> None:
        hub.put(REPO, FILES)
        for look in (
            lambda: api.repo_info(REPO, revision="nowhere"),
            lambda: snapshot_download(REPO, revision="nowhere"),
            lambda: hf_hub_download(REPO, "redif.json", revision="nowhere"),
        ):
            with pytest.raises(RevisionNotFoundError):
                look()
        with pytest.raises(RemoteEntryNotFoundError):
            hf_hub_download(REPO, "nowhere.json")

    def test_writing(self, hub: HubStandIn, api: HfApi) -> None:
        head = hub.put(REPO, FILES)
        hub.tokens["hf_reader"] = "alice"
        hub.read_only.add("hf_reader")
        for token in ("hf_bob", "hf_reader"):
            with pytest.raises(HfHubHTTPError, match="403 Forbidden") as caught:
                api.create_commit(REPO, adds(a__json=b"1"), commit_message="no", token=token)
            assert type(caught.value) is HfHubHTTPError
        with pytest.raises(RepositoryNotFoundError) as refused:
            api.create_commit(REPO, adds(a__json=b"1"), commit_message="no", token=False)
        assert refused.value.response.status_code == 401
        with pytest.raises(HfHubHTTPError) as caught:
            api.create_repo("alice/other", token=False)
        assert caught.value.response.status_code == 401
        assert hub.head(REPO) == head

    def test_bad_token(self, hub: HubStandIn, api: HfApi) -> None:
        hub.put(REPO, FILES)
        with pytest.raises(HfHubHTTPError, match="Invalid credentials in Authorization header") as caught:
            api.repo_info(REPO, token="hf_wrong")
        assert type(caught.value) is HfHubHTTPError
        assert caught.value.response.status_code == 401

    def test_disabled(self, hub: HubStandIn, api: HfApi) -> None:
        hub.put(REPO, FILES)
        hub.repos["model", REPO].disabled = True
        with pytest.raises(DisabledRepoError):
            api.repo_info(REPO)


class TestFaults:
    def test_resume_after_a_cut(self, hub: HubStandIn, waits: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
        hub.put(REPO, FILES)
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # what is less than a chunk is not kept
        hub.faults.add(CutDownload(100_500), path="unet.onnx")
        path = hf_hub_download(REPO, "graphs/unet.onnx")
        assert Path(path).read_bytes() == WEIGHTS
        first, second = hub.asked("GET", "unet.onnx")
        assert (first.status, first.sent) == (200, 100_500)
        assert (second.status, second.headers["range"]) == (206, "bytes=100000-")
        assert second.sent == len(WEIGHTS) - 100_000
        assert waits == [1]

    def test_a_reset_is_not_resumed(self, hub: HubStandIn) -> None:
        hub.put(REPO, FILES)
        fault = hub.faults.add(CutDownload(100_000, reset=True), path="unet.onnx")
        with pytest.raises(httpx2.ReadError):
            hf_hub_download(REPO, "graphs/unet.onnx")
        assert fault.struck == len(hub.asked("GET", "unet.onnx")) == 1
        assert incomplete() == blobs() == []
        assert Path(hf_hub_download(REPO, "graphs/unet.onnx")).read_bytes() == WEIGHTS

    def test_cut_upload(self, hub: HubStandIn, api: HfApi, folder: Path, waits: list[float]) -> None:
        hub.put(REPO, {})
        hub.faults.add(CutUpload(70_001), method="PUT")
        api.upload_file(path_or_fileobj=folder / "graphs/unet.onnx", path_in_repo="a.onnx", repo_id=REPO)
        first, second = hub.asked("PUT")
        assert (first.status, first.received) == (None, 70_001)
        assert (second.status, second.received) == (200, len(WEIGHTS))
        assert visible(hub) == {"a.onnx": WEIGHTS}
        assert waits == [1]

    def test_lost_answer(self, hub: HubStandIn, api: HfApi) -> None:
        head = hub.put(REPO, {})
        hub.faults.add(LoseAnswer(), method="POST", path="/commit/")
        with pytest.raises(httpx2.RemoteProtocolError):
            api.create_commit(REPO, adds(a__json=b"1"), commit_message="lost")
        assert hub.head(REPO) != head
        assert visible(hub) == {"a.json": b"1"}
        again = api.create_commit(REPO, adds(a__json=b"1"), commit_message="lost")
        assert again.oid == hub.head(REPO)
        assert len(hub.asked("POST", "/commit/")) == 1

    def test_too_many_requests(self, hub: HubStandIn, api: HfApi, waits: list[float]) -> None:
        hub.put(REPO, FILES)
        fault = hub.faults.add(Refuse(429, headers={"Retry-After": "7"}), path="/tree/", times=2)
        assert len(api.list_repo_files(REPO)) == len(list(api.list_repo_tree(REPO))) + 1
        assert fault.struck == 2
        assert waits == [8, 8]
        hub.faults.add(Refuse(429, headers={"Retry-After": "7"}), path="/api/models", times=None)
        with pytest.raises(HfHubHTTPError, match="429 Too Many Requests"):
            api.repo_info(REPO)
        assert waits == [8, 8]

    @pytest.mark.parametrize("status", [500, 502, 503, 504])
    def test_server_errors(self, hub: HubStandIn, api: HfApi, waits: list[float], status: int) -> None:
        hub.put(REPO, {})
        hub.faults.add(Refuse(status), method="PUT", times=2)
        api.create_commit(REPO, adds(a__onnx=WEIGHTS), commit_message="at last")
        assert [request.status for request in hub.asked("PUT")] == [status, status, 200]
        assert waits == [1, 2]
        hub.faults.add(Refuse(status), path="/commit/")
        with pytest.raises(HfHubHTTPError, match=str(status)):
            api.create_commit(REPO, adds(b__json=b"2"), commit_message="not again")
        assert set(visible(hub)) == {"a.onnx"}

    def test_error_by_code(self, hub: HubStandIn) -> None:
        hub.put(REPO, FILES)
        hub.faults.add(Refuse(403, code="GatedRepo"), path="/resolve/")
        with pytest.raises(GatedRepoError):
            hf_hub_download(REPO, "redif.json")

    def test_truncated(self, hub: HubStandIn) -> None:
        hub.put(REPO, FILES)
        hub.faults.add(Truncate(1000), path="unet.onnx")
        with pytest.raises(OSError, match=r"should be of size 307200 but has size 1000"):
            hf_hub_download(REPO, "graphs/unet.onnx")
        assert len(hub.asked("GET", "unet.onnx")) == 1
        assert incomplete() == blobs() == []

    def test_corrupted(self, hub: HubStandIn, api: HfApi) -> None:
        """The client takes what it gets, if only the length is right, for good."""
        hub.put(REPO, FILES)
        hub.faults.add(Corrupt(-1), path="unet.onnx")
        path = Path(snapshot_download(REPO)) / "graphs/unet.onnx"
        assert path.read_bytes() == WEIGHTS[:-1] + bytes([WEIGHTS[-1] ^ 0xFF])
        assert path.resolve().name == hashlib.sha256(WEIGHTS).hexdigest()
        (bad,) = api.verify_repo_checksums(REPO).mismatches
        assert bad["path"] == "graphs/unet.onnx"
        snapshot_download(REPO)
        assert len(hub.asked("GET", "unet.onnx")) == 1
        hf_hub_download(REPO, "graphs/unet.onnx", force_download=True)
        assert path.read_bytes() == WEIGHTS

    def test_stall(self, hub: HubStandIn, api: HfApi, monkeypatch: pytest.MonkeyPatch) -> None:
        hub.put(REPO, FILES)
        hub.faults.add(Stall(30), path="/api/models")
        with pytest.raises(httpx2.ReadTimeout):
            api.repo_info(REPO, timeout=0.2)
        hub.faults.add(Stall(0.05), path="/api/models")
        assert api.repo_info(REPO).sha == hub.head(REPO)
        monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
        hub.faults.add(Stall(30), method="GET", path="redif.json")
        assert Path(hf_hub_download(REPO, "redif.json")).read_bytes() == FILES["redif.json"]

    def test_which_requests_are_met(self, hub: HubStandIn, api: HfApi) -> None:
        hub.put(REPO, FILES)
        fault = hub.faults.add(Refuse(403), method="GET", path="/api/models/.*", after=1, times=1)
        for expected in (200, 403, 200):
            assert httpx2.get(f"{hub.url}/api/models/{REPO}").status_code == expected
        assert (fault.seen, fault.struck) == (3, 1)
        hub.faults.add(Refuse(404), times=None)
        hub.faults.clear()
        assert httpx2.get(f"{hub.url}/api/models/{REPO}").status_code == 200


class TestCutAfter:
    def push(self, api: HfApi) -> None:
        api.create_commit(REPO, adds(a__onnx=WEIGHTS, b__json=b"{}"), commit_message="cut", num_threads=1)

    def test_an_upload_is_cut_at_the_byte(self, hub: HubStandIn, api: HfApi) -> None:
        head = hub.put(REPO, {})
        hub.cut_after(150_000)
        before = hub.passed
        with pytest.raises(BROKEN):
            self.push(api)
        assert hub.passed - before == 150_000
        assert sum(request.received + request.sent for request in hub.requests) == 150_000
        with pytest.raises(httpx2.TransportError):
            api.repo_info(REPO)
        assert hub.passed - before == 150_000
        assert hub.head(REPO) == head
        hub.mend()
        self.push(api)
        assert visible(hub) == {"a.onnx": WEIGHTS, "b.json": b"{}"}

    @pytest.mark.parametrize("reset", [False, True])
    def test_a_download_gets_each_byte_before_the_cut(self, hub: HubStandIn, reset: bool) -> None:
        hub.put(REPO, FILES)
        hub.cut_after(123_457, reset=reset)
        got = bytearray()
        url = f"{hub.url}/{REPO}/resolve/main/graphs/unet.onnx"
        expected = httpx2.ReadError if reset else httpx2.RemoteProtocolError

        def get() -> None:
            with httpx2.stream("GET", url) as answer:
                assert int(answer.headers["Content-Length"]) == len(WEIGHTS)
                for piece in answer.iter_raw():
                    got.extend(piece)

        with pytest.raises(expected):
            get()
        assert bytes(got) == WEIGHTS[:123_457]
        with pytest.raises(expected):
            httpx2.get(url)
        hub.mend()
        assert httpx2.get(url).content == WEIGHTS

    def test_at_the_edges(self, hub: HubStandIn) -> None:
        """At 0 nothing is answered; at a body's last byte it is whole, and nothing comes after it."""
        hub.put(REPO, FILES)
        url = f"{hub.url}/{REPO}/resolve/main/redif.json"
        hub.cut_after(0)
        with pytest.raises(httpx2.RemoteProtocolError):
            httpx2.get(url)
        hub.cut_after(len(FILES["redif.json"]))
        assert httpx2.get(url).content == FILES["redif.json"]
        with pytest.raises(httpx2.RemoteProtocolError):
            httpx2.get(url)

    def test_every_cut_leaves_all_or_nothing(self, hub: HubStandIn, api: HfApi) -> None:
        """Cuts spread over a whole push, each the same twice, and the next try finishes it."""
        hub.put(REPO, {})
        before = hub.passed
        self.push(api)
        total = hub.passed - before

        def cut(at: int) -> tuple[str, list[tuple[str, str, int | None, int, int]]]:
            hub.repos.clear()
            hub.put(REPO, {})
            hub.requests.clear()
            hub.cut_after(at)
            start = hub.passed
            with pytest.raises(BROKEN):
                self.push(api)
            assert hub.passed - start == at
            hub.mend()
            seen = [(one.method, one.path, one.status, one.received, one.sent) for one in hub.requests]
            return hub.head(REPO), seen

        for at in [*range(0, total, total // 12), total - 1]:
            head, seen = cut(at)
            assert cut(at) == (head, seen)
            assert visible(hub) in ({}, {"a.onnx": WEIGHTS, "b.json": b"{}"})
            self.push(api)
            assert visible(hub) == {"a.onnx": WEIGHTS, "b.json": b"{}"}
        assert visible(hub)

    def test_down(self, hub: HubStandIn, api: HfApi) -> None:
        hub.put(REPO, FILES)
        path = snapshot_download(REPO)
        hub.down()
        with pytest.raises(httpx2.ConnectError):
            api.repo_info(REPO)
        assert snapshot_download(REPO) == path
        with pytest.raises(LocalEntryNotFoundError):
            snapshot_download("alice/other")
        hub.mend()
        assert api.repo_info(REPO).sha == hub.head(REPO)


class TestFixture:
    @pytest.fixture
    def after(self) -> Callable[[], None]:
        from huggingface_hub import hf_api

        before = {name: value for name, value in vars(constants).items() if name.isupper()}
        endpoint, token = hf_api.api.endpoint, os.environ.get("HF_TOKEN")

        def check() -> None:
            assert {name: value for name, value in vars(constants).items() if name.isupper()} == before
            assert (hf_api.api.endpoint, os.environ.get("HF_TOKEN")) == (endpoint, token)

        return check

    def test_everything_is_restored(self, after: Callable[[], None], request: pytest.FixtureRequest) -> None:
        with pytest.MonkeyPatch.context() as monkeypatch:
            from . import conftest

            path = request.getfixturevalue("tmp_path")
            steps = conftest.hub.__wrapped__(path, monkeypatch, [])
            standin = next(steps)
            assert standin.url == constants.ENDPOINT
            with pytest.raises(StopIteration):
                next(steps)
        after()
        with pytest.raises(httpx2.ConnectError):
            httpx2.get(standin.url)

    def test_nothing_is_left_open(self, hub: HubStandIn) -> None:
        hub.put(REPO, FILES)
        hub.faults.add(CutDownload(10), path="unet.onnx", times=None)
        with pytest.raises(httpx2.RemoteProtocolError):
            httpx2.get(f"{hub.url}/{REPO}/resolve/main/graphs/unet.onnx")
        gc.collect()
