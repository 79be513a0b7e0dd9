"""A push or a pull that broke at any byte can be repeated, and ends in a verified student; nothing is half there."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from redif_sdk import FastPipeline
from redif_sdk.artifact.folder import StudentFolder
from redif_sdk.errors import HubError
from redif_sdk.export import verify
from redif_sdk.hub import pull, push

from .standin import HubStandIn


def whole(hub: HubStandIn, repo: str, student: Path) -> bool:
    """Whether readers see the student; they must see all of it, or nothing."""
    if ("model", repo) not in hub.repos:
        return False
    files = hub.files(repo)
    if set(files) == {".gitattributes"}:
        return False
    listed = [entry.path for entry in StudentFolder(student).manifest.files]
    assert set(files) == {*listed, "redif.json", "README.md", ".gitattributes"}
    assert all(files[path] == (student / path).read_bytes() for path in (*listed, "redif.json"))
    return True


@pytest.mark.parametrize("rounds", [8, pytest.param(25, marks=pytest.mark.slow)])  # of two cuts each
def test_cuts_at_any_byte(
    hub: HubStandIn, plain_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rounds: int
) -> None:
    from huggingface_hub import constants

    cuts = random.Random(4)
    expected = FastPipeline.from_pretrained(plain_student)(seed=1, output_type="uint8").images
    push(plain_student, "alice/measure")
    to_push = hub.passed
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "measure"))
    pull("alice/measure", tmp_path / "measured")
    to_pull = hub.passed - to_push
    broken = {"push": 0, "pull": 0}
    for number in range(rounds):
        repo, output = f"alice/cut-{number}", tmp_path / f"pulled-{number}"
        cache = tmp_path / f"cache-{number}"
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))

        hub.cut_after(cuts.randrange(to_push), reset=bool(number % 2))
        try:
            push(plain_student, repo)
        except HubError as error:
            broken["push"] += 1
            assert error.kind == "network", error  # noqa: PT017
        whole(hub, repo, plain_student)
        hub.mend()
        push(plain_student, repo)
        assert whole(hub, repo, plain_student)

        hub.cut_after(cuts.randrange(to_pull), reset=bool(number % 2))
        try:
            pull(repo, output)
        except HubError as error:
            broken["pull"] += 1
            assert error.kind == "network", error  # noqa: PT017
            assert not output.exists()
        hub.mend()
        student, _ = pull(repo, output, overwrite=True)
        assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
        assert student.manifest == StudentFolder(plain_student).manifest
        student.check_all()
        if number % 5 == 0:
            assert all(row["passed"] for row in verify(output, ["onnxruntime"]))
        assert np.array_equal(FastPipeline.from_pretrained(output)(seed=1, output_type="uint8").images, expected)
        shutil.rmtree(output)
        shutil.rmtree(cache)
    assert min(broken.values()) > rounds / 2, broken  # the cuts did cut


def test_the_same_branch_survives_cut_after_cut(hub: HubStandIn, plain_student: Path, tmp_path: Path) -> None:
    """Every push of a changed student is cut twice; readers see the one before, or the new one, and nothing between."""
    from redif_sdk.artifact.folder import write_manifest

    cuts = random.Random(5)
    repo = "alice/again"
    push(plain_student, repo)
    seen = StudentFolder(plain_student)
    for number in range(5):
        changed = Path(shutil.copytree(plain_student, tmp_path / f"changed-{number}"))
        manifest = seen.manifest.model_copy(update={"name": f"tiny-{number}"})
        (changed / "unet" / f"more-{number}.json").write_text("{}")
        write_manifest(changed, manifest)
        for _ in range(2):
            hub.cut_after(cuts.randrange(40_000))
            try:
                push(changed, repo)
            except HubError:
                files = hub.files(repo)
                old = files["redif.json"] == (seen.path / "redif.json").read_bytes()
                assert whole(hub, repo, seen.path if old else changed)
            hub.mend()
        push(changed, repo)
        assert whole(hub, repo, changed)
        seen = StudentFolder(changed)
