"""Other tools and ours on one repository: the hf command, snapshot_download, plain diffusers; and redif itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from redif_sdk import FastPipeline
from redif_sdk.artifact.folder import StudentFolder
from redif_sdk.export import verify
from redif_sdk.hub import push

from .standin import HubStandIn, Refuse

REPO = "alice/tiny"


def run(hub: HubStandIn, *command: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    """A command in a process of its own, against the stand-in."""
    environment = os.environ | hub.environment | {"OMP_NUM_THREADS": "1"}
    program = Path(sys.executable).with_name(command[0])
    done = subprocess.run([program, *command[1:]], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stdout + done.stderr
    return done


def test_the_hub_s_own_tools_fetch_a_usable_student(hub: HubStandIn, tiny_student: Path, tmp_path: Path) -> None:
    from huggingface_hub import snapshot_download

    push(tiny_student, REPO)
    run(hub, "hf", "download", REPO, "--local-dir", str(tmp_path / "by-hf"))
    by_hand = Path(snapshot_download(REPO))
    into = Path(snapshot_download(REPO, local_dir=tmp_path / "by-hand"))
    expected = FastPipeline.from_pretrained(tiny_student)(class_labels=2, seed=3, output_type="uint8").images
    for folder in (tmp_path / "by-hf", by_hand, into):
        assert all(row["passed"] for row in verify(folder, ["onnxruntime"]))
        pictures = FastPipeline.from_pretrained(folder)(class_labels=2, seed=3, output_type="uint8").images
        assert np.array_equal(pictures, expected)


def test_what_the_hub_s_own_upload_sends_is_a_student_too(hub: HubStandIn, tiny_student: Path, tmp_path: Path) -> None:
    from huggingface_hub import HfApi

    HfApi().create_repo(REPO)
    HfApi().upload_folder(repo_id=REPO, folder_path=tiny_student)
    assert FastPipeline.from_pretrained(REPO).manifest == StudentFolder(tiny_student).manifest
    assert {row["action"] for row in push(tiny_student, REPO).rows if row["path"] != "README.md"} == {"keep"}


@pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks`:UserWarning")  # diffusers' own
def test_plain_diffusers_loads_the_same_repository(hub: HubStandIn, tiny_student: Path) -> None:
    import torch
    from diffusers import UNet2DModel

    push(tiny_student, REPO)
    network = UNet2DModel.from_pretrained(REPO, subfolder="unet", use_safetensors=True)
    local = UNet2DModel.from_pretrained(tiny_student / "unet", use_safetensors=True)
    theirs, ours = network.state_dict(), local.state_dict()
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)


def test_redif_push_and_pull_and_generate(hub: HubStandIn, tiny_student: Path, tmp_path: Path) -> None:
    planned = run(hub, "redif", "push", str(tiny_student), REPO, "--dry-run")
    assert "nothing was changed" in planned.stdout
    assert not hub.repos
    done = run(hub, "redif", "push", str(tiny_student), REPO, "--private", "-m", "One", "--tag", "grey", "--json", "-")
    document: dict[str, Any] = json.loads(done.stdout)
    assert document["command"] == "push"
    assert {row["commit"] for row in document["rows"]} == {hub.head(REPO)}
    assert hub.repos["model", REPO].private
    pulled = run(hub, "redif", "pull", REPO, "-o", str(tmp_path / "pulled"))
    assert f"from {REPO} at {hub.head(REPO)}; all hashes match" in pulled.stdout
    run(hub, "redif", "verify", str(tmp_path / "pulled"), "--runtime", "onnxruntime")
    run(hub, "redif", "card", str(tmp_path / "pulled"), "--check")  # it knows where it came from
    run(hub, "redif", "generate", REPO, "--revision", "main", "--class-label", "1", "-o", str(tmp_path / "x.png"))
    assert (tmp_path / "x.png").is_file()


def test_redif_says_in_one_line_what_went_wrong(
    hub: HubStandIn, tiny_student: Path, bare_student: Path, tmp_path: Path
) -> None:
    hub.faults.add(Refuse(429, headers={"Retry-After": "0"}), path="/api/models/alice/busy", times=None)
    cases = [
        (("pull", "alice/nothing", "-o", str(tmp_path / "a")), 2, "there is no such repository"),
        (("pull", "alice", "-o", str(tmp_path / "a")), 2, "give it as org/name"),
        (("pull", "alice/busy", "-o", str(tmp_path / "a")), 2, "too many requests"),
        (("push", str(tmp_path), REPO), 2, "no redif.json, so it is not a student"),
        (("push", str(bare_student), REPO), 1, "--allow-unverified"),
        (("push", str(tiny_student), "bob/tiny"), 2, "the token may not do that"),
    ]
    for command, code, said in cases:
        done = run(hub, "redif", *command, code=code)
        (line,) = done.stderr.strip().splitlines()
        assert line.startswith("redif: ")
        assert said in line
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("folder", ["distill", "import"])
def test_a_teacher_on_the_hub_is_named_by_its_commit(
    hub: HubStandIn, teacher_folder: Path, tmp_path: Path, folder: str
) -> None:
    from redif_sdk.distill import Teacher
    from redif_sdk.distill.student import import_pipeline

    files = {
        path.relative_to(teacher_folder).as_posix(): path.read_bytes()
        for path in teacher_folder.rglob("*")
        if path.is_file()
    }
    commit = hub.put("bob/teacher", files)
    if folder == "distill":
        teacher = Teacher.load("bob/teacher")
        assert (teacher.name, teacher.revision) == ("bob/teacher", commit)
    else:
        manifest = import_pipeline("bob/teacher", tmp_path / "student", [2])
        assert manifest.teacher is not None
        assert (manifest.teacher.id, manifest.teacher.revision) == ("bob/teacher", commit)
        assert "base_model" in (tmp_path / "student" / "README.md").read_text()
