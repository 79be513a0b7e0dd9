"""The command `redif`: what it prints, its exit codes, and that failures are one line and leave nothing behind."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

from redif_sdk.artifact.folder import StudentFolder, write_manifest
from redif_sdk.artifact.paths import list_files
from redif_sdk.cli import doctor
from redif_sdk.cli import main as cli
from redif_sdk.pipeline import FastPipeline

Copy = Callable[[Path], Path]


class Result(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def redif(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Runs the command in this process, as its entry point does."""

    def run(*arguments: str | Path) -> Result:
        monkeypatch.setattr(sys, "argv", ["redif", *map(str, arguments)])
        with pytest.raises(SystemExit) as raised:
            cli.main()
        return Result(int(raised.value.code or 0), *capsys.readouterr())

    return run


def assert_one_line(result: Result, code: int, *words: str) -> None:
    """One line says what is wrong, after the lines of the stages that began."""
    assert result.code == code
    failures = [line for line in result.err.splitlines() if line.startswith("redif: ")]
    assert [failures[-1:], "Traceback" in result.err] == [failures, False], result.err
    assert result.err.endswith(f"{failures[0]}\n")
    for word in words:
        assert word in failures[0]


# ---------------------------------------------------------------- verify


def test_verify(redif: Callable[..., Result], tiny_student: Path) -> None:
    result = redif("verify", tiny_student, "--runtime", "onnxruntime")
    assert (result.code, result.err) == (0, f"verify {tiny_student}\n")
    assert "all 16 checks passed" in result.out
    result = redif("verify", tiny_student, "--runtime", "onnxruntime", "--batches", "8", "--sizes", "28x28")
    assert "all 8 checks passed" in result.out
    assert_one_line(redif("verify", tiny_student, "--batches", "3"), 2, "batches of 1 of 28x28, 8 of 28x28")
    assert_one_line(redif("verify", tiny_student, "--sizes", "3"), 2, "--sizes is '3'", "28x28,56x28")
    assert_one_line(redif("verify", tiny_student, "--precision", "int8"), 2, "has graphs in fp32")
    assert redif("verify", tiny_student, "--quiet") == (0, "", "")
    result = redif("verify", tiny_student, "--json", "-")
    document = json.loads(result.out)  # nothing else on standard output
    assert {"schema", "command", "date", "versions", "machine", "rows"} <= set(document)
    assert document["command"] == "verify"
    assert {"processor", "cores", "threads", "device"} <= set(document["machine"])
    keys = "component precision runtime batch size max_abs mean_abs psnr nonfinite threshold passed"
    assert all(set(keys.split()) <= set(row) for row in document["rows"])


def test_flipping_one_byte_of_any_file_fails_naming_the_file(
    redif: Callable[..., Result], tiny_student: Path, copy_of: Copy
) -> None:
    folder = copy_of(tiny_student)
    for relative in list_files(folder):
        original = (folder / relative).read_bytes()
        places = 24 if relative == "redif.json" else 1  # there a byte may make it another manifest, or none at all
        for place in range(places):
            altered = bytearray(original)
            altered[len(altered) * (2 * place + 1) // (2 * places + 1)] ^= 0x01
            (folder / relative).write_bytes(altered)
            result = redif("verify", folder, "--quiet")
            if relative == "README.md":
                assert result.code == 0
            else:
                assert_one_line(result, 1, relative)
        (folder / relative).write_bytes(original)


def test_verify_fails_when_a_graph_computes_something_else(
    redif: Callable[..., Result], tiny_student: Path, copy_of: Copy
) -> None:
    folder = copy_of(tiny_student)
    path = folder / "golden/steps-2-batch-8.npz"
    with np.load(path) as arrays:
        np.savez_compressed(path, **(dict(arrays) | {"images": arrays["images"] ^ np.uint8(4)}))
    write_manifest(folder, StudentFolder(folder).manifest)
    result = redif("verify", folder, "--json", folder.parent / "report.json")
    assert_one_line(result, 1, "generator", "2 steps", "batch 8", "max_abs")
    assert "NO" in result.out
    rows = json.loads((folder.parent / "report.json").read_text())["rows"]
    assert {row["component"] for row in rows if not row["passed"]} == {"generator", "loop"}


# ---------------------------------------------------------------- generate


def test_generate(redif: Callable[..., Result], tiny_student: Path, tmp_path: Path) -> None:
    common = ["--threads", "1", "--seed", "3"]
    result = redif("generate", tiny_student, "c", *common, "-o", tmp_path / "one.png")
    assert (result.code, result.err) == (0, "")
    with Image.open(tmp_path / "one.png") as picture:
        assert (picture.mode, picture.size) == ("L", (28, 28))
        expected = FastPipeline.from_pretrained(tiny_student, num_threads=1)("c", seed=3).images[0]
        assert np.array_equal(np.asarray(picture), np.asarray(expected))

    labels = ["--class-label", "1", "--class-label", "b"]
    assert redif("generate", tiny_student, *labels, "-n", "2", *common, "-o", tmp_path / "sheet.png").code == 0
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (56, 56)
    result = redif("generate", tiny_student, *labels, *common, "--steps", "3", "-o", f"{tmp_path}/all/", "--json", "-")
    rows = json.loads(result.out)["rows"]
    assert [Path(row["file"]).name for row in rows] == ["0.png", "1.png"]
    assert [(row["seed"], row["index"], row["runtime"]) for row in rows] == [
        (3, 0, "onnxruntime"),
        (3, 1, "onnxruntime"),
    ]
    assert sorted(path.name for path in (tmp_path / "all").iterdir()) == ["0.png", "1.png"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere", "a"], ["nowhere", "neither a folder nor the id"]),
        ([".", "a"], ["redif.json"]),
        (["STUDENT"], ["class_labels is required"]),
        (["STUDENT", "trousers"], ["'trousers' is not a class of tiny"]),
        (["STUDENT", "--class-label", "10"], ["10 is not a class of tiny"]),
        (["STUDENT", "--class-label", "-1"], ["-1 is not a class of tiny"]),
        (["STUDENT", "a", "--steps", "0"], ["num_inference_steps is 0"]),
        (["STUDENT", "a", "--steps", "5"], ["choose from 2, 3"]),
        (["STUDENT", "a", "--steps", "two"], ["--steps"]),
        (["STUDENT", "a", "-n", "0"], ["num_images_per_prompt is 0"]),
        (["STUDENT", "a", "--runtime", "caffe"], ["caffe"]),
        (["STUDENT", "a", "--precision", "int8"], ["int8"]),
        (["STUDENT", "a", "-o", "picture.xyz"], ["picture.xyz"]),
        (["STUDENT", "a", "--bogus"], ["--bogus"]),
        ([], ["DIR"]),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    redif: Callable[..., Result],
    tiny_student: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    words: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    given = [str(tiny_student) if argument == "STUDENT" else argument for argument in arguments]
    assert_one_line(redif("generate", *given), 2, *words)
    assert list(tmp_path.iterdir()) == []


def fill_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on the disk is full: every synchronisation of a file fails as it does then."""

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)


def test_a_full_disk(
    redif: Callable[..., Result],
    tiny_student: Path,
    bare_student: Path,
    copy_of: Copy,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = copy_of(bare_student)
    before = {path: (tmp_path / path).read_bytes() for path in list_files(tmp_path)}
    with monkeypatch.context() as patch:
        fill_the_disk(patch)
        assert_one_line(redif("generate", tiny_student, "a", "-o", tmp_path / "out.png"), 2, "No space left")
        assert_one_line(redif("verify", tiny_student, "--quiet", "--json", tmp_path / "x.json"), 2, "No space left")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(np, "savez_compressed", full)
        assert_one_line(redif("export", folder), 2, "No space left")
    assert {path: (tmp_path / path).read_bytes() for path in list_files(tmp_path)} == before


def test_an_interruption(redif: Callable[..., Result], tiny_student: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(FastPipeline, "__call__", interrupted)
    assert redif("generate", tiny_student, "a") == (130, "", "redif: interrupted\n")


# ---------------------------------------------------------------- export, doctor, help


@pytest.mark.parametrize("listed", [False, True])
def test_export_of_truncated_weights(
    redif: Callable[..., Result], bare_student: Path, copy_of: Copy, listed: bool
) -> None:
    folder = copy_of(bare_student)
    with (folder / "unet/diffusion_pytorch_model.safetensors").open("r+b") as file:
        file.truncate(5000)
    if listed:
        write_manifest(folder, StudentFolder(folder).manifest)
    before = {path: (folder / path).read_bytes() for path in list_files(folder)}
    assert_one_line(redif("export", folder), 2, "unet/diffusion_pytorch_model.safetensors")
    assert {path: (folder / path).read_bytes() for path in list_files(folder)} == before
    assert list(folder.parent.iterdir()) == [folder]


def test_export_of_what_is_no_student(redif: Callable[..., Result], tmp_path: Path, bare_student: Path) -> None:
    assert_one_line(redif("export", tmp_path), 2, "no redif.json")
    assert_one_line(redif("export", bare_student, "--target", "coreml"), 2, "coreml", "onnx")
    assert_one_line(redif("export", bare_student, "--precision", "fp7"), 2, "fp7", "fp32")


def test_engines_are_built_for_named_targets_and_found_again(
    redif: Callable[..., Result], plain_student: Path, tmp_path: Path
) -> None:
    pytest.importorskip("tensorrt_rtx")
    build = ("export", plain_student, "--target", "tensorrt-rtx", "--component", "generator", "--sm", "89")
    for cache in ("miss: no engine for this student", "hit"):
        result = redif(*build, "--engine-dir", tmp_path / "engines", "--batches", "1,2,4", "--json", "-")
        assert result.code == 0
        (row,) = json.loads(result.out)["rows"]
        assert (row["cache"], row["targets"], row["precision"]) == (cache, [89], "fp32")
        assert Path(row["file"]).stat().st_size == row["bytes"]
    assert "hit" in redif(*build, "--engine-dir", tmp_path / "engines", "--batches", "1,2,4").out
    assert_one_line(redif(*build), 2, "--engine-dir")
    assert_one_line(redif(*build, "--engine-dir", tmp_path, "--batches", "1,8"), 2, "SMALLEST,BEST,LARGEST")
    assert_one_line(redif(*build, "--engine-dir", tmp_path, "--sm", "9x"), 2, "--sm is '9x'")
    assert_one_line(redif(*build[:-2], "--engine-dir", tmp_path), 2, "--sm 89")


def test_what_needs_a_gpu_says_so(redif: Callable[..., Result], plain_student: Path, tmp_path: Path) -> None:
    from redif_sdk.runtimes.protocol import nvidia_driver

    if nvidia_driver() is not None:
        pytest.skip("there is a GPU")
    file = tmp_path / "no.png"
    assert_one_line(redif("generate", plain_student, "--device", "cuda", "-o", file), 2, "no CUDAExecutionProvider")
    for runtime in ("tensorrt", "tensorrt-rtx"):
        result = redif("generate", plain_student, "--runtime", runtime, "-o", file)
        assert_one_line(result, 2, runtime)
        assert "not installed" in result.err or "NVIDIA GPU" in result.err
    assert not file.exists()


def test_a_failed_gate_exits_with_1(
    redif: Callable[..., Result], bare_student: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from redif_sdk import export
    from redif_sdk.errors import ParityError

    def failing(*_: Any, **__: Any) -> None:
        raise ParityError("the graphs do not compute what torch computes")

    monkeypatch.setattr(export, "export", failing)
    assert_one_line(redif("export", bare_student), 1, "do not compute")


def test_doctor(redif: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    result = redif("doctor", "--json", "-")
    assert result.code == 0
    rows = {row["subject"]: row for row in json.loads(result.out)["rows"]}
    assert rows["onnxruntime on cpu"]["status"] == "ok"
    assert rows["extra [cpu]"]["status"] == "ok"
    assert rows["onnxruntime on cuda"]["status"] in ("ok", "missing")
    assert rows["shadowed packages"]["status"] == "ok"


def test_doctor_finds_packages_that_overwrite_each_other(
    redif: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "onnxruntime_gpu-1.20.0.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: onnxruntime-gpu\nVersion: 1.20.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    result = redif("doctor")
    assert_one_line(result, 1, "shadowed packages")
    assert "onnxruntime-gpu 1.20.0" in " ".join(result.out.split())


def test_an_engine_that_runs_nothing_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    from redif_sdk.runtimes import onnxruntime as ort

    monkeypatch.setattr(ort, "PROBE", b"no graph")
    ort.usable.cache_clear()
    rows = {row["subject"]: row["status"] for row in doctor.examine()}
    ort.usable.cache_clear()
    assert rows["onnxruntime on cpu"] == "problem"


def test_help_lists_every_command_and_no_command_imports_torch(tiny_student: Path, tmp_path: Path) -> None:
    code = """
import sys
from redif_sdk.cli.main import main
sys.argv = ["redif", *sys.argv[1:]]
try:
    main()
finally:
    assert not {"torch", "diffusers", "transformers"} & set(sys.modules)
"""
    for arguments in (["--help"], [], ["generate", str(tiny_student), "a", "-o", f"{tmp_path}/a.png"], ["doctor"]):
        result = subprocess.run(
            [sys.executable, "-W", "error", "-c", code, *arguments],
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        assert (result.returncode, result.stderr) == (0, "")
        if arguments in ([], ["--help"]):
            for name in ["export", "verify", "generate", "bench", "doctor", "distill", "import", "eval", "quickstart"]:
                assert f"  {name} " in result.stdout


def test_what_is_not_installed_is_named(
    redif: Callable[..., Result], bare_student: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "redif_sdk.export.build", raising=False)
    monkeypatch.setitem(sys.modules, "torch", None)  # importing it now raises ModuleNotFoundError
    monkeypatch.delitem(sys.modules, "redif_sdk.export.onnx", raising=False)
    monkeypatch.delitem(sys.modules, "redif_sdk.export.golden", raising=False)
    assert_one_line(redif("export", bare_student), 2, "torch", "redif-sdk[export]")
