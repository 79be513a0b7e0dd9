"""What systems and editors leave in a student's folder is neither read nor sent; all else is still refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from redif_sdk import FastPipeline
from redif_sdk.artifact.folder import StudentFolder, write_manifest
from redif_sdk.artifact.paths import check_kind, is_clutter, list_files
from redif_sdk.errors import IntegrityError, InvalidRequest, ManifestError
from redif_sdk.hub.target import student_files
from tests.conftest import SMALL, build_student
from tests.test_cli import redif

__all__ = ["redif"]

CLUTTER = [
    ".DS_Store",
    "._redif.json",
    "._.DS_Store",
    "unet/._diffusion_pytorch_model.safetensors",
    "__MACOSX/._unet",
    "__MACOSX/unet/.DS_Store",
    "Thumbs.db",
    "onnx/THUMBS.DB",
    "ehthumbs.db",
    "Desktop.ini",
    "unet/desktop.ini",
    "README.md~",
    "unet/config.json~",
    ".README.md.swp",
    "#README.md#",
    ".directory",
    ".nfs00000000a1b2c3d400000001",
    "Icon\r",
]
NOT_CLUTTER = [
    "evil.py",
    "unet/x.pkl~",
    "._x.pt",
    ".x.ckpt.swp",
    "__MACOSX/evil.py",
    "__MACOSX/x.json",
    "x.so~",
    "thumbs.db.json",
    "~",
    "notes.bak",
]


def litter(folder: Path, names: list[str]) -> None:
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_bytes(b"\0\5\26\7\0 clutter")


def test_a_folder_with_clutter_is_the_same_student(
    tiny_student: Path, copy_of: Any, redif: Any, tmp_path: Path
) -> None:
    folder = copy_of(tiny_student)
    litter(folder, CLUTTER)
    assert list_files(folder) == list_files(tiny_student)
    student = StudentFolder(folder)
    student.check_all()
    assert {file.path for file in student_files(student)} == {entry.path for entry in student.manifest.files}
    FastPipeline.from_pretrained(folder, runtime="onnxruntime").save_pretrained(tmp_path / "saved")
    assert list_files(tmp_path / "saved") == list_files(tiny_student)
    assert not [path for path in (tmp_path / "saved").rglob("*") if path.is_file() and is_clutter(path.name)]
    assert redif("verify", folder, "--runtime", "onnxruntime", "--batches", "1", "--quiet") == (0, "", "")


def test_a_manifest_lists_no_clutter(tmp_path: Path, bare_student: Path) -> None:
    folder = Path(shutil.copytree(bare_student, tmp_path / "student"))
    litter(folder, CLUTTER)
    before = StudentFolder(bare_student).manifest
    assert write_manifest(folder, before).digest == before.digest


@pytest.mark.parametrize("name", NOT_CLUTTER)
def test_what_only_looks_like_clutter_is_refused(bare_student: Path, copy_of: Any, name: str) -> None:
    folder = copy_of(bare_student)
    litter(folder, [name])
    with pytest.raises((IntegrityError, ManifestError)):
        StudentFolder(folder).check_all()
    if name.endswith(".json"):
        return  # a kind that a student may hold: listed, it is read and sent as any other
    with pytest.raises(ManifestError):
        write_manifest(folder, StudentFolder(bare_student).manifest)


def test_links_and_folders_with_such_names_are_refused(bare_student: Path, copy_of: Any) -> None:
    folder = copy_of(bare_student)
    (folder / ".DS_Store").symlink_to(folder / "README.md")
    with pytest.raises(IntegrityError, match="not in the list"):
        StudentFolder(folder).check_all()
    (folder / ".DS_Store").unlink()
    litter(folder, ["Thumbs.db/config.json"])
    with pytest.raises(IntegrityError, match=r"Thumbs\.db/config\.json"):
        StudentFolder(folder).check_all()


@given(st.text("._~#aAbB.-", max_size=6), st.sampled_from([".json", ".safetensors", ".onnx", ".txt", "", "~", ".db"]))
def test_no_file_of_a_student_is_clutter(start: str, end: str) -> None:
    name = start + end
    try:
        check_kind(name)
    except ManifestError:
        return
    assert not is_clutter(name)


def test_a_folder_with_nothing_but_clutter_is_free(tmp_path: Path, tiny_student: Path) -> None:
    pipeline = FastPipeline.from_pretrained(tiny_student, runtime="onnxruntime")
    litter(tmp_path / "new", [".DS_Store", "desktop.ini"])
    pipeline.save_pretrained(tmp_path / "new")
    assert list_files(tmp_path / "new") == list_files(tiny_student)
    litter(tmp_path / "mine", [".DS_Store", "thesis.tex~", "thesis.tex"])
    with pytest.raises(InvalidRequest, match="is not empty"):
        pipeline.save_pretrained(tmp_path / "mine")


def test_export_of_a_folder_with_clutter(tmp_path: Path, redif: Any) -> None:
    folder = build_student(tmp_path / "student", classes=None, channels_out=8, **SMALL)  # traced as plain_student is
    litter(folder, CLUTTER)
    assert redif("export", folder, "--quiet", "--batches", "1").code == 0
    StudentFolder(folder).check_all()
