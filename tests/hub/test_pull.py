"""Pulling students: only what is needed, checked as it comes, from the cache where that serves, and errors by kind."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from redif_sdk import FastPipeline
from redif_sdk.artifact.folder import StudentFolder
from redif_sdk.artifact.paths import list_files
from redif_sdk.errors import HubError, IntegrityError, InvalidRequest, ManifestError
from redif_sdk.hub import Remote, pull, push

from .standin import Corrupt, CutDownload, HubStandIn, LoseAnswer, Refuse, Truncate

REPO = "alice/tiny"
MANIFEST = r"resolve/[^/]*/redif\.json"
GENERATOR = r"resolve/[^/]*/onnx/generator"


@pytest.fixture
def pushed(hub: HubStandIn, tiny_student: Path) -> str:
    """The commit of alice/tiny, a student on the stand-in. What was asked for so far is forgotten."""
    commit = push(tiny_student, REPO).commit
    hub.requests.clear()
    assert commit is not None
    return commit


def downloaded(hub: HubStandIn) -> list[str]:
    """The files whose bytes went over the line."""
    return sorted({request.path.split("/", 5)[-1] for request in hub.asked("GET", "/resolve/") if request.sent})


def picture(pipe: FastPipeline) -> np.ndarray:
    return np.asarray(pipe(class_labels=3, seed=5, output_type="uint8").images)


def test_only_what_the_engine_and_precision_need_is_downloaded(
    hub: HubStandIn, full_student: Path, tiny_student: Path
) -> None:
    push(full_student, REPO)
    hub.requests.clear()
    pipe = FastPipeline.from_pretrained(REPO, runtime="onnxruntime", precision="int8")
    wanted = ["onnx/denoiser.int8.onnx", "onnx/generator.int8.onnx", "redif.json"]
    assert downloaded(hub) == wanted
    assert np.array_equal(
        picture(pipe), picture(FastPipeline.from_pretrained(full_student, runtime="onnxruntime", precision="int8"))
    )
    assert pipe.origin is not None
    assert (pipe.origin.repo_id, pipe.origin.revision, pipe.origin.commit) == (REPO, None, hub.head(REPO))
    hub.requests.clear()
    FastPipeline.from_pretrained(REPO, runtime="onnxruntime", precision="int8")
    assert downloaded(hub) == []
    assert len(hub.requests) == 1  # which commit is it now?
    hub.requests.clear()
    FastPipeline.from_pretrained(REPO, revision=pipe.origin.commit, runtime="onnxruntime", precision="int8")
    assert hub.requests == []  # a commit is what it is


def test_a_revision_is_a_branch_a_tag_or_a_commit(hub: HubStandIn, pushed: str, full_student: Path) -> None:
    branch = push(full_student, REPO, revision="full", git_tag="v2")
    assert branch.commit is not None
    digest = StudentFolder(full_student).manifest.digest
    for revision in ("full", "v2", branch.commit):
        pipe = FastPipeline.from_pretrained(REPO, revision=revision, runtime="onnxruntime", precision="fp32")
        assert pipe.manifest.digest == digest
        assert pipe.origin is not None
        assert (pipe.origin.revision, pipe.origin.commit) == (revision, branch.commit)
    assert FastPipeline.from_pretrained(REPO).manifest.digest != digest


def test_what_was_loaded_is_of_one_commit_also_if_somebody_pushes_meanwhile(
    hub: HubStandIn, pushed: str, full_student: Path, tmp_path: Path
) -> None:
    pipe = FastPipeline.from_pretrained(REPO)
    push(full_student, REPO)
    pipe.save_pretrained(tmp_path / "saved")
    assert StudentFolder(tmp_path / "saved").manifest.digest == pipe.manifest.digest


def test_pull_makes_a_whole_student_and_notes_where_it_came_from(
    hub: HubStandIn, pushed: str, tiny_student: Path, tmp_path: Path
) -> None:
    student, origin = pull(REPO, tmp_path / "pulled")
    student.check_all()
    assert origin.commit == pushed
    same = set(list_files(tmp_path / "pulled")) - {"README.md"}
    assert same == set(list_files(tiny_student)) - {"README.md"}
    assert all((tmp_path / "pulled" / path).read_bytes() == (tiny_student / path).read_bytes() for path in same)
    assert not any(path.is_symlink() for path in (tmp_path / "pulled").rglob("*"))
    note = json.loads((tmp_path / "pulled/.cache/huggingface/redif-origin.json").read_text())
    assert note == {"repo_id": REPO, "revision": None, "commit": pushed}
    with pytest.raises(InvalidRequest, match="not empty"):
        pull(REPO, tmp_path / "pulled")
    pull(REPO, tmp_path / "pulled", overwrite=True)
    push(tmp_path / "pulled", "alice/again")  # the note stays at home
    assert set(hub.files("alice/again")) == {*same, "README.md", ".gitattributes"}


def test_files_that_the_manifest_does_not_list_are_not_downloaded(hub: HubStandIn, pushed: str, tmp_path: Path) -> None:
    hub.put(REPO, {"huge.safetensors": bytes(1 << 20), "app.py": b"print()"})
    pull(REPO, tmp_path / "pulled")
    assert not {"huge.safetensors", "app.py"} & set(downloaded(hub))
    StudentFolder(tmp_path / "pulled").check_all()


# ---------------------------------------------------------------- what is refused before it is downloaded


@pytest.mark.parametrize(
    ("files", "error", "said"),
    [
        ({"unet/diffusion_pytorch_model.bin": b"x"}, ManifestError, "pickle"),
        ({"old/Model.CKPT": b"x"}, ManifestError, "pickle"),
        ({"onnx/generator.fp32.onnx": b"other"}, IntegrityError, "not what its manifest lists"),
        ({"unet/config.json": b"{}"}, IntegrityError, "not what its manifest lists"),
        ({"redif.json": b"{}" + b" " * (5 << 20)}, ManifestError, "has more than"),
        ({"README.md": b"x" * (2 << 20)}, ManifestError, "has more than"),
    ],
)
def test_a_repository_that_is_not_what_it_says_is_refused_by_its_listing(
    hub: HubStandIn, pushed: str, files: dict[str, bytes], error: type[Exception], said: str
) -> None:
    hub.put(REPO, files)
    with pytest.raises(error, match=said):
        FastPipeline.from_pretrained(REPO)
    assert set(downloaded(hub)) <= {"redif.json"}


def test_a_file_that_is_listed_and_not_there(hub: HubStandIn, tiny_student: Path) -> None:
    hub.put(REPO, {"redif.json": (tiny_student / "redif.json").read_bytes()})
    with pytest.raises(IntegrityError, match="is missing from alice/tiny; ask its owner"):
        FastPipeline.from_pretrained(REPO)


def test_what_is_no_student(hub: HubStandIn) -> None:
    hub.put("alice/pipeline", {"model_index.json": b"{}", "unet/config.json": b"{}"})
    with pytest.raises(
        ManifestError, match=r"not a student: it is a diffusers pipeline; redif import alice/pipeline -o"
    ):
        FastPipeline.from_pretrained("alice/pipeline")
    hub.put("alice/notes", {"notes.txt": b"x"})
    with pytest.raises(ManifestError, match=r"has no redif\.json, so it is not a student; redif import"):
        FastPipeline.from_pretrained("alice/notes")
    hub.put("alice/odd", {"redif.json": b"{}"})
    with pytest.raises(ManifestError, match="format_version"):
        FastPipeline.from_pretrained("alice/odd")


# ---------------------------------------------------------------- errors by their kind


def kind_of(repo: str = REPO, **options: object) -> tuple[str, str]:
    with pytest.raises(HubError) as caught:
        FastPipeline.from_pretrained(repo, **options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert repo in str(caught.value)
    return caught.value.kind, str(caught.value)


def test_errors_tell_apart(hub: HubStandIn, pushed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert kind_of("alice/nothing")[0] == "not-found"
    assert kind_of(revision="nowhere") == (
        "revision",
        "cannot get alice/tiny at nowhere: it has no such branch, tag or commit; see its page at the Hub",
    )
    hub.repos["model", REPO].private = True
    assert kind_of(token="hf_bob")[0] == "not-found"
    assert kind_of(token=False)[0] == "private"
    assert "HF_TOKEN" in kind_of(token=False)[1]
    assert kind_of(token="hf_wrong")[0] in ("token", "private", "not-found")
    hub.repos["model", REPO].private = False
    hub.repos["model", REPO].gated = "auto"
    assert kind_of(token="hf_bob")[0] == "gated"
    assert "accept its terms" in kind_of(token=False)[1]
    hub.repos["model", REPO].granted.add("bob")
    FastPipeline.from_pretrained(REPO, token="hf_bob")
    hub.repos["model", REPO].gated = False
    hub.repos["model", REPO].disabled = True
    assert kind_of()[0] == "forbidden"


@pytest.mark.parametrize(
    ("fault", "kind", "said"),
    [
        (Refuse(429, "slow", headers={"Retry-After": "31"}), "rate-limit", "try again in 31 seconds"),
        (Refuse(500), "server", "status 500"),
        (Refuse(502), "server", "status 502"),
        (LoseAnswer(), "network", "connection failed"),
    ],
)
@pytest.mark.parametrize("where", ["/api/models/", MANIFEST, GENERATOR])
def test_a_hub_that_fails(hub: HubStandIn, pushed: str, fault: Refuse, kind: str, said: str, where: str) -> None:
    hub.faults.add(fault, path=where, times=None)
    found, message = kind_of()
    assert found == kind
    assert said in message
    hub.faults.clear()
    assert picture(FastPipeline.from_pretrained(REPO)).shape == (1, 28, 28, 1)


def test_no_connection(hub: HubStandIn, pushed: str, caplog: pytest.LogCaptureFixture) -> None:
    hub.down()
    assert kind_of()[0] == "network"
    hub.mend()
    expected = picture(FastPipeline.from_pretrained(REPO))
    hub.down()
    with caplog.at_level(logging.WARNING, "redif_sdk"):
        pipe = FastPipeline.from_pretrained(REPO)
    assert "is taken from the cache" in caplog.text
    assert np.array_equal(picture(pipe), expected)
    hub.mend()


def test_offline_takes_the_cache_and_nothing_else(
    hub: HubStandIn, pushed: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from huggingface_hub import constants

    assert kind_of(local_files_only=True)[0] == "offline"
    expected = picture(FastPipeline.from_pretrained(REPO))
    hub.requests.clear()
    assert np.array_equal(picture(FastPipeline.from_pretrained(REPO, local_files_only=True)), expected)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert np.array_equal(picture(FastPipeline.from_pretrained(REPO)), expected)
    assert kind_of("alice/other")[0] == "offline"
    with pytest.raises((HubError, IntegrityError)):  # the rest of its files is not in the cache
        pull(REPO, tmp_path / "pulled")
    assert hub.requests == []


# ---------------------------------------------------------------- transfers that go wrong


@pytest.mark.parametrize("where", [MANIFEST, GENERATOR])
@pytest.mark.parametrize("fault", [Corrupt(100), Truncate(50), CutDownload(50), CutDownload(0, reset=True)])
def test_one_bad_transfer_is_made_good(
    hub: HubStandIn, pushed: str, tiny_student: Path, fault: Corrupt, where: str
) -> None:
    hub.faults.add(fault, path=where)
    with suppress(HubError):  # where the client gives up, the next call goes on
        FastPipeline.from_pretrained(REPO)
    pipe = FastPipeline.from_pretrained(REPO)
    assert np.array_equal(picture(pipe), picture(FastPipeline.from_pretrained(tiny_student)))


@pytest.mark.parametrize("where", [MANIFEST, GENERATOR, r"resolve/[^/]*/unet/config"])
def test_a_hub_that_always_sends_other_bytes_is_refused(
    hub: HubStandIn, pushed: str, where: str, tmp_path: Path
) -> None:
    hub.faults.add(Corrupt(100), path=where, times=None)
    with pytest.raises((IntegrityError, ManifestError), match=r"altered|not valid JSON"):
        pull(REPO, tmp_path / "pulled")
    assert not (tmp_path / "pulled").exists()
    assert not [path.name for path in tmp_path.iterdir() if "partial" in path.name]
    hub.faults.clear()
    pull(REPO, tmp_path / "pulled")[0].check_all()


def test_a_file_that_was_damaged_in_the_cache_is_fetched_again(hub: HubStandIn, pushed: str) -> None:
    expected = picture(FastPipeline.from_pretrained(REPO))
    for name in ("generator", "denoiser"):
        blob = cached(f"onnx/{name}.fp32.onnx").resolve()
        blob.write_bytes(b"\0" + blob.read_bytes()[1:])
        hub.requests.clear()
        pipe = FastPipeline.from_pretrained(REPO)
        assert np.array_equal(picture(pipe), expected)
        list(pipe.stream(class_labels=3, seed=5))  # uses the denoiser
        assert downloaded(hub) == [f"onnx/{name}.fp32.onnx"]


def cached(path: str) -> Path:
    """A file of alice/tiny in the Hub's cache."""
    from huggingface_hub import constants

    (found,) = Path(constants.HF_HUB_CACHE).glob(f"models--alice--tiny/snapshots/*/{path}")
    return found


def test_a_download_goes_on_where_it_stopped(
    hub: HubStandIn, pushed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one call, at the byte (the Hub's client asks for a range); in the next call, at the file."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1 << 16)  # the client keeps whole chunks
    size = len(hub.files(REPO)["unet/diffusion_pytorch_model.safetensors"])
    hub.faults.add(CutDownload(size // 2), path="safetensors")
    Remote(REPO).fetch(["unet/diffusion_pytorch_model.safetensors"])
    first, second = hub.asked("GET", "safetensors")
    assert "range" not in first.headers
    assert second.status == 206
    assert first.sent + second.sent < 1.1 * size
    hub.requests.clear()
    pull(REPO, tmp_path / "pulled")
    assert not hub.asked("GET", "safetensors")


def test_several_processes_pull_at_once(hub: HubStandIn, pushed: str) -> None:
    """As workers of a server do at start: one cache, and each gets a picture."""
    script = f"from redif_sdk import FastPipeline; print(FastPipeline.from_pretrained({REPO!r})(class_labels=3).images)"
    environment = os.environ | hub.environment | {"OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for _ in range(3)
    ]
    for process in processes:
        output, complaints = process.communicate(timeout=120)
        assert process.returncode == 0, complaints.decode()
        assert b"image mode=" in output


def test_a_remote_knows_its_manifest_before_anything_large_is_fetched(hub: HubStandIn, pushed: str) -> None:
    remote = Remote(REPO)
    assert remote.manifest.name == "tiny"
    assert downloaded(hub) == ["redif.json"]
    assert (remote.fetch(["onnx/generator.fp32.onnx"]) / "onnx/generator.fp32.onnx").is_file()
    assert downloaded(hub) == ["onnx/generator.fp32.onnx", "redif.json"]
