"""What an export needs is said, and held to, before any work."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import build_student
from typer.testing import CliRunner

from redif_sdk.artifact.folder import StudentFolder
from redif_sdk.cli.main import app
from redif_sdk.cli.terminal import bytes_of
from redif_sdk.errors import ExportError, InvalidRequest
from redif_sdk.export import export, needs
from redif_sdk.export.build import build_graphs
from redif_sdk.memory import free_memory

GIB = 1 << 30


@pytest.fixture
def student(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small student that counts as large enough to be reckoned."""
    monkeypatch.setattr(needs, "SMALL", 0)
    return build_student(tmp_path / "student")


def test_memory_and_disk_follow_the_weights_and_the_precision(student: Path) -> None:
    folder = StudentFolder(student)
    weights = sum(entry.bytes for entry in folder.manifest.files if entry.path.endswith(".safetensors"))
    for precisions, width in ((["fp32"], 1.0), (["fp16"], 0.5), (["fp16", "fp32"], 1.0)):
        for engine, peak in (("onnxruntime", 1.1), ("openvino", 2.2), ("tensorrt", 2.4)):
            found = needs.needs_of(folder, precisions, engine)
            assert found.memory - needs.LIBRARIES == pytest.approx(peak * width * weights, rel=0.02)
    both = needs.needs_of(folder, ["fp16", "fp32"], "onnxruntime")
    assert both.disk == pytest.approx(2.5 * weights, rel=0.05)


def test_what_does_not_fit_is_refused_before_any_work(
    student: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    before = sorted(path.name for path in student.rglob("*"))
    ran = CliRunner().invoke(app, ["export", str(student), "--max-memory", "100MB"])
    assert isinstance(ran.exception, ExportError)
    assert "takes about 1." in str(ran.exception)
    assert "0.1 GiB may be used" in str(ran.exception)
    monkeypatch.setattr(needs, "free_memory", lambda: GIB)
    with pytest.raises(
        ExportError, match=r"1\.0 GiB are free; use a machine with more; --precision int8wo needs a quarter"
    ):
        export(student)
    monkeypatch.setattr(needs, "free_memory", lambda: None)  # a system that does not tell
    monkeypatch.setattr(needs.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(ExportError, match=r"0\.0 GB of its disk are free; make room"):
        export(student)
    assert sorted(path.name for path in student.rglob("*")) == before


def test_an_engine_that_does_not_fit_is_left_out_unless_it_was_asked_for(
    student: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(needs, "LIBRARIES", 0)
    weights = needs.needs_of(StudentFolder(student), ["fp32"], "onnxruntime").weights
    said: list[str] = []
    manifest = build_graphs(
        student, ["fp32"], batches=(1,), max_memory=2 * weights, on_progress=lambda done, note: said.append(note)
    )
    assert said[0] == "openvino would not fit into memory, and is not checked"
    assert {row["runtime"] for row in manifest.verification} == {"numpy", "onnxruntime"}
    with pytest.raises(ExportError, match=r"0\.0 GiB may be used"):
        build_graphs(student, ["fp32"], runtimes=["onnxruntime", "openvino"], max_memory=2 * weights)


def test_small_students_are_not_reckoned(tmp_path: Path) -> None:
    needs.check_fits(StudentFolder(build_student(tmp_path / "student")), ["fp32"], max_memory=1)


def test_free_memory_is_no_more_than_there_is() -> None:
    found = free_memory()
    if Path("/proc/meminfo").is_file():
        assert found is not None
        assert 0 < found < 1 << 50


def test_sizes_are_read_as_people_write_them() -> None:
    assert bytes_of("--max-memory", "8GiB") == 8 * GIB
    assert bytes_of("--max-memory", "500 MB") == 500_000_000
    assert bytes_of("--max-memory", "1.5g") == 1_500_000_000
    assert bytes_of("--max-memory", None) is None
    for wrong in ("", "eight", "-1GiB", "0", "8 GiBytes"):
        with pytest.raises(InvalidRequest, match="give a size"):
            bytes_of("--max-memory", wrong)
