"""redif.json: what is refused, what is noticed, and that a folder is written whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save

from redif_sdk.artifact.atomic import atomic_folder, atomic_write
from redif_sdk.artifact.folder import StudentFolder, write_manifest
from redif_sdk.artifact.manifest import Manifest
from redif_sdk.artifact.paths import list_files
from redif_sdk.artifact.records import Condition, Golden, Graph, Latents, Network, Postprocess
from redif_sdk.errors import IntegrityError, InvalidRequest, ManifestError
from redif_sdk.sampling.table import StepTable


def table(steps: int = 2) -> dict[str, Any]:
    rows = np.linspace(0.1, 0.9, steps * 6).reshape(steps, 6)
    return StepTable(rows, "v_prediction", "ddim").to_dict()


def manifest(**changes: Any) -> Manifest:
    fields: dict[str, Any] = {
        "name": "tiny",
        "licence": "mit",
        "task": "class-conditional",
        "step_tables": [table(2), table(4)],
        "latents": Latents(channels=4, height=14, width=14),
        "condition": Condition(num_classes=2, class_names=["Hose", "Kleid ä"]),
        "postprocess": Postprocess(pixel_shuffle=2),
        "network": Network(class_path="diffusers.UNet2DModel", folder="unet"),
    }
    return Manifest(**(fields | changes))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "student"
    (path / "unet").mkdir(parents=True)
    (path / "unet" / "config.json").write_text("{}")
    (path / "unet" / "weights.safetensors").write_bytes(save({"w": np.arange(8, dtype=np.float32)}))
    (path / "README.md").write_text("# tiny\n")
    write_manifest(path, manifest())
    return path


def rewrite(folder: Path, change: Any) -> None:
    """Change redif.json's document and sign it again, as an attacker would who can write the folder."""
    document = json.loads((folder / "redif.json").read_text())
    change(document)
    content = {key: value for key, value in document.items() if key != "digest"}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    document["digest"] = hashlib.sha256(text.encode()).hexdigest()
    (folder / "redif.json").write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")


def test_round_trip(folder: Path) -> None:
    written = write_manifest(folder, manifest())
    student = StudentFolder(folder)
    student.check_all()
    assert student.manifest == written
    assert [entry.path for entry in written.files] == ["unet/config.json", "unet/weights.safetensors"]
    assert student.read("unet/config.json") == b"{}"
    assert Manifest.from_bytes(written.to_bytes()) == written


@given(
    name=st.text(max_size=20).filter(str.isprintable),
    metrics=st.lists(
        st.dictionaries(st.sampled_from("abc"), st.floats(allow_nan=False, allow_infinity=False)), max_size=3
    ),
    rows=st.lists(st.lists(st.floats(-1e6, 1e6, width=32), min_size=6, max_size=6), min_size=1, max_size=4),
)
def test_any_manifest_round_trips(name: str, metrics: list[dict[str, float]], rows: list[list[float]]) -> None:
    original = manifest(
        name=name, metrics=metrics, step_tables=[StepTable(np.array(rows), "epsilon").to_dict()]
    ).digested()
    again = Manifest.from_bytes(original.to_bytes())
    assert again == original
    assert again.step_table() == original.step_table()


def test_step_table_is_the_first_or_the_asked_one() -> None:
    students = manifest()
    assert students.step_table().num_inference_steps == 2
    assert students.step_table(4).num_inference_steps == 4
    with pytest.raises(InvalidRequest, match="2, 4"):
        students.step_table(3)


@pytest.mark.parametrize(
    "changes",
    [
        {"step_tables": []},
        {"step_tables": [table(2), table(2)]},
        {"task": "unconditional"},
        {"condition": None},
        {"latents": {"channels": 3, "height": 14, "width": 14}},
        {"postprocess": {"value_range": (1.0, -1.0)}},
        {"condition": {"num_classes": 3, "class_names": ["a", "b"]}},
        {"condition": {"num_classes": 2, "class_names": ["a", "a"]}},
        {"metrics": [{"a": float("nan")}], "surprise": 1},
    ],
)
def test_contradictions_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="validation error"):
        manifest(**changes)


def test_flipping_any_byte_is_noticed_and_the_file_named(folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or path.name == "README.md":
            continue
        relative = path.relative_to(folder).as_posix()
        original = path.read_bytes()
        for position in range(len(original)):
            altered = bytearray(original)
            altered[position] ^= 1 << (position % 8)
            path.write_bytes(altered)
            with pytest.raises(ManifestError, match=relative):
                StudentFolder(folder).check_all()
        path.write_bytes(original)
    StudentFolder(folder).check_all()


@pytest.mark.parametrize(
    ("before", "after"),
    [(b"\n", b"\r\n"), (b'"name": "tiny"', b'"name":  "tiny"'), (b"1.0", b"1.00"), (b"\xc3\xa4", b"\\u00e4")],
)
def test_a_respelled_manifest_is_refused(folder: Path, before: bytes, after: bytes) -> None:
    data = (folder / "redif.json").read_bytes()
    assert before in data
    (folder / "redif.json").write_bytes(data.replace(before, after))
    with pytest.raises(IntegrityError, match=r"redif\.json was altered"):
        StudentFolder(folder)


def test_read_refuses_what_is_altered_missing_or_unlisted(folder: Path) -> None:
    student = StudentFolder(folder)
    (folder / "unet" / "config.json").write_text("{ }")
    with pytest.raises(IntegrityError, match=r"unet/config\.json .* altered"):
        student.read("unet/config.json")
    (folder / "unet" / "config.json").unlink()
    with pytest.raises(IntegrityError, match=r"unet/config\.json is missing"):
        student.read("unet/config.json")
    with pytest.raises(IntegrityError, match=r"README\.md is not in the list"):
        student.read("README.md")


def test_files_may_be_added_or_taken_away_only_where_they_are_not_hashed(folder: Path) -> None:
    (folder / "README.md").write_text("another card")
    (folder / ".gitattributes").write_text("*.onnx filter=lfs\n")
    (folder / ".cache" / "huggingface").mkdir(parents=True)
    (folder / ".cache" / "huggingface" / "x.metadata").write_text("left by the Hub's client")
    StudentFolder(folder).check_all()
    (folder / "unet" / "extra.json").write_text("{}")
    with pytest.raises(IntegrityError, match=r"unet/extra\.json .* not in the list"):
        StudentFolder(folder).check_all()


def test_links_may_not_leave_the_folder(folder: Path, tmp_path: Path) -> None:
    outside = tmp_path / "secret"
    outside.write_text("{}")
    for target in (outside, Path("../../secret")):
        (folder / "unet" / "config.json").unlink()
        (folder / "unet" / "config.json").symlink_to(target)
        with pytest.raises(IntegrityError, match=r"unet/config\.json .* leaves the folder"):
            StudentFolder(folder).read("unet/config.json")
        with pytest.raises(IntegrityError, match=r"unet/config\.json .* leaves the folder"):
            write_manifest(folder, manifest())
    (folder / "unet" / "config.json").unlink()
    (folder / "unet" / "config.json").symlink_to("config.json")
    with pytest.raises(IntegrityError, match=r"unet/config\.json"):
        StudentFolder(folder).read("unet/config.json")


def test_a_folder_that_is_a_link_counts_as_unlisted(folder: Path, tmp_path: Path) -> None:
    (folder / "more").symlink_to(tmp_path, target_is_directory=True)
    with pytest.raises(IntegrityError, match="more"):
        StudentFolder(folder).check_all()


def test_a_pipe_in_place_of_a_file_does_not_hang(folder: Path) -> None:
    (folder / "unet" / "config.json").unlink()
    os.mkfifo(folder / "unet" / "config.json")
    with pytest.raises(IntegrityError, match="regular file"):
        StudentFolder(folder).read("unet/config.json")


@pytest.mark.parametrize("shared", [False, True])
def test_links_into_the_blobs_of_the_same_hub_repository_are_read(folder: Path, tmp_path: Path, shared: bool) -> None:
    snapshot = tmp_path / "hub" / "models--me--tiny" / "snapshots" / ("0" * 40)
    blobs = tmp_path / "hub" / "models--me--tiny" / "blobs"
    store = tmp_path / "hub" / "blobs" / "ab"
    for directory in (snapshot / "unet", blobs, store):
        directory.mkdir(parents=True)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            if shared:  # huggingface_hub >= 2: one blob for all repositories
                (store / digest).write_bytes(path.read_bytes())
                (blobs / digest).symlink_to(Path("../../blobs/ab") / digest)
            else:
                (blobs / digest).write_bytes(path.read_bytes())
            place = snapshot / path.relative_to(folder)
            place.symlink_to(os.path.relpath(blobs / digest, place.parent))
    StudentFolder(snapshot).check_all()

    other = tmp_path / "hub" / "models--you--other" / "blobs"
    other.mkdir(parents=True)
    (other / "x").write_text("{}")
    (snapshot / "unet" / "config.json").unlink()
    (snapshot / "unet" / "config.json").symlink_to(other / "x")
    with pytest.raises(IntegrityError, match="leaves the folder"):
        StudentFolder(snapshot).read("unet/config.json")


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        "../x",
        "a/../../x",
        "a\\b",
        "C:/x",
        "c:x",
        "",
        ".",
        "a//b",
        "a/./b",
        "a/\x00b",
        "a\n",
        "x.pkl",
        "x.PT",
        "w.bin",
    ],
)
def test_unsafe_paths_are_refused_even_when_signed(folder: Path, path: str) -> None:
    def change(document: dict[str, Any]) -> None:
        document["files"].append({"path": path, "bytes": 0, "sha256": hashlib.sha256().hexdigest()})

    rewrite(folder, change)
    with pytest.raises(ManifestError):
        StudentFolder(folder)


def test_pickles_are_never_listed(folder: Path) -> None:
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(ManifestError, match="pickle"):
        write_manifest(folder, manifest())


def test_versions(folder: Path) -> None:
    rewrite(folder, lambda document: document.update(format_version="2.0"))
    with pytest.raises(ManifestError, match="update redif-sdk"):
        StudentFolder(folder)
    for minor in ("1.0", "1.9"):
        rewrite(folder, lambda document, minor=minor: document.update(format_version=minor))
        assert StudentFolder(folder).manifest.format_version == minor
    rewrite(folder, lambda document: document.update(format_version="1.9", novelty=1))
    with pytest.raises(ManifestError, match=r"novelty.*update redif-sdk"):
        StudentFolder(folder)


@pytest.mark.parametrize("version", ["1.0", "1.1", "1.2"])
def test_a_copy_of_an_older_format_is_the_same_file(folder: Path, tmp_path: Path, version: str) -> None:
    """Written anew it would have today's fields, and would not match its own digest."""

    def older(document: dict[str, Any]) -> None:
        document["format_version"] = version
        document["distillation"] = {"method": "redif", "rewards": ["pixel"], "seed": 0, "budget": {}, "versions": {}}
        if version == "1.0":
            del document["latents"]["multiple"]

    rewrite(folder, older)
    (tmp_path / "copy").mkdir()
    StudentFolder(folder).copy_to(tmp_path / "copy")
    assert (tmp_path / "copy/redif.json").read_bytes() == (folder / "redif.json").read_bytes()
    copied = StudentFolder(tmp_path / "copy").manifest
    assert copied.format_version == version
    assert copied.distillation is not None
    assert (copied.distillation.estimator, copied.distillation.configuration) == (None, {})


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"{",
        b"\xff\xfe",
        b'{"format_version": "1.0", "format_version": "1.0"}',
        b'{"format_version": "1.0", "x": NaN}',
        b'{"format_version": "1.0", "x": 1e999}',
        b'{"format_version": "1.0", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"format_version": "1.0", "x": "\\ud800"}',
        b'{"format_version": 1}',
        b'{"format_version": "1.0"}',
    ],
)
def test_malformed_manifests_are_refused(folder: Path, data: bytes) -> None:
    (folder / "redif.json").write_bytes(data)
    with pytest.raises(ManifestError, match=r"redif\.json"):
        StudentFolder(folder)


def test_a_huge_manifest_is_not_read(folder: Path) -> None:
    with (folder / "redif.json").open("r+b") as file:
        file.truncate(1 << 34)  # sparse: costs nothing unless it is read
    with pytest.raises(IntegrityError, match=r"redif\.json"):
        StudentFolder(folder)


def test_graphs_and_golden_files_must_be_listed(folder: Path) -> None:
    graph = Graph(component="denoiser", precision="fp32", file="onnx/x.onnx", opset=20, inputs=[], outputs=[])
    golden = Golden(file="golden/x.npz", num_inference_steps=2, batch=1)
    for changed in (manifest(graphs=[graph]), manifest(golden=[golden])):
        write_manifest(folder, changed)
        with pytest.raises(IntegrityError, match="not in its list"):
            StudentFolder(folder)


def test_no_student(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="not a folder"):
        StudentFolder(tmp_path / "nowhere")
    with pytest.raises(ManifestError, match=r"no redif\.json"):
        StudentFolder(tmp_path)


# ---------------------------------------------------------------- folders that are whole or absent


def test_atomic_folder_swaps_in_the_new_and_removes_the_old(folder: Path) -> None:
    with atomic_folder(folder, overwrite=True) as new:
        (new / "model_index.json").write_text("{}")
        assert (folder / "redif.json").exists()
    assert [path.name for path in folder.parent.rglob("*")] == ["student", "model_index.json"]


def test_atomic_folder_leaves_nothing_after_an_error(tmp_path: Path, folder: Path) -> None:
    def write(path: Path) -> None:
        with atomic_folder(path, overwrite=True) as new:
            (new / "half").write_text("x")
            raise OSError(errno.ENOSPC, "No space left on device")

    before = list_files(tmp_path)
    for path in (tmp_path / "new", folder):
        with pytest.raises(OSError, match="No space"):
            write(path)
    assert list_files(tmp_path) == before


def test_atomic_folder_takes_an_empty_folder_but_no_other(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "empty").mkdir()
    with atomic_folder(tmp_path / "empty") as new:
        (new / "a").write_text("x")
    assert (tmp_path / "empty" / "a").read_text() == "x"
    with pytest.raises(InvalidRequest, match="not empty"), atomic_folder(folder):
        pass
    with (
        pytest.raises(InvalidRequest, match="so it is not overwritten"),
        atomic_folder(tmp_path / "empty", overwrite=True),
    ):
        pass
    with pytest.raises(InvalidRequest, match="is a file"), atomic_folder(tmp_path / "empty" / "a", overwrite=True):
        pass


def test_atomic_write_leaves_the_old_file_after_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_text("old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        atomic_write(tmp_path / "a", b"new")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a", "old")]


def test_copy_checks_every_file(folder: Path, tmp_path: Path) -> None:
    student = StudentFolder(folder)
    with atomic_folder(tmp_path / "copy") as new:
        student.copy_to(new)
    StudentFolder(tmp_path / "copy").check_all()
    assert (tmp_path / "copy" / "README.md").read_text() == "# tiny\n"
    (folder / "unet" / "config.json").write_text("[]")
    with pytest.raises(IntegrityError, match=r"unet/config\.json"), atomic_folder(tmp_path / "other") as new:
        student.copy_to(new)
    assert not (tmp_path / "other").exists()
