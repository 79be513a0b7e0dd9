"""Engines: what was asked for runs, or an error says why not and what to do; nothing else is used instead."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from redif_sdk import FastPipeline, runtimes
from redif_sdk.errors import IntegrityError, InvalidRequest, RuntimeUnavailable
from redif_sdk.manifest import StudentFolder
from redif_sdk.runtimes import RUNTIMES, Engine, ort

needs_no_gpu = pytest.mark.skipif(
    ort.CUDA in onnxruntime.get_available_providers(), reason="onnxruntime-gpu is installed here"
)


@pytest.fixture
def lying_library(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """onnxruntime says that it has CUDA, as onnxruntime-gpu does on a machine without a driver."""
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [ort.CUDA, ort.CPU])
    ort.usable.cache_clear()
    yield
    ort.usable.cache_clear()


def test_the_cpu_works_and_says_what_it_is(tiny_student: Path) -> None:
    pipe = FastPipeline.from_pretrained(
        tiny_student, runtime="onnxruntime", device="cpu", precision="fp32", num_threads=1
    )
    assert pipe.runtime_info == {
        "runtime": "onnxruntime",
        "version": onnxruntime.__version__,
        "provider": "CPUExecutionProvider",
        "device": "cpu",
        "precision": "fp32",
        "component": "generator",
        "file": "onnx/generator.fp32.onnx",
        "num_threads": 1,
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"runtime": "bogus"}, "runtime 'bogus' is unknown; use one of auto, onnxruntime, fake"),
        ({"device": "tpu"}, "device is 'tpu'"),
        ({"device": "cpu:1"}, "device is 'cpu:1'"),
        ({"device": 0}, "device is 0"),
        ({"precision": "fp99"}, "precision 'fp99' is unknown"),
        ({"num_threads": 0}, "num_threads is 0"),
    ],
)
def test_unknown_choices_are_named(tiny_student: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        FastPipeline.from_pretrained(tiny_student, **options)


def test_a_precision_that_was_not_exported(tiny_student: Path) -> None:
    with pytest.raises(RuntimeUnavailable, match=r"no graph in fp16 \(it has fp32\)"):
        FastPipeline.from_pretrained(tiny_student, precision="fp16")


@pytest.mark.parametrize("runtime", ["auto", "onnxruntime"])
def test_an_engine_that_is_not_installed(tiny_student: Path, monkeypatch: pytest.MonkeyPatch, runtime: str) -> None:
    monkeypatch.setitem(RUNTIMES, "onnxruntime", Engine("no:where", "no_such_module", "cpu"))
    with pytest.raises(RuntimeUnavailable, match=r"redif-sdk\[cpu\]"):
        FastPipeline.from_pretrained(tiny_student, runtime=runtime)


@needs_no_gpu
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_a_gpu_that_the_library_has_not(tiny_student: Path, device: str) -> None:
    with pytest.raises(RuntimeUnavailable, match=r"no CUDAExecutionProvider; .*redif-sdk\[gpu\]"):
        FastPipeline.from_pretrained(tiny_student, device=device)


@needs_no_gpu
@pytest.mark.usefixtures("lying_library")
@pytest.mark.filterwarnings("ignore:Specified provider")  # onnxruntime's own remark before it falls back
def test_a_gpu_that_the_library_only_claims_to_have(tiny_student: Path) -> None:
    with pytest.raises(
        RuntimeUnavailable, match=r"cannot run this on cuda:0: .*fallback to CPU EP has been .*disabled"
    ):
        FastPipeline.from_pretrained(tiny_student, device="cuda")
    assert FastPipeline.from_pretrained(tiny_student, device="auto", num_threads=1).runtime_info["device"] == "cpu"


def test_a_graph_is_checked_when_it_is_loaded(tiny_student: Path, copy_of: Callable[[Path], Path]) -> None:
    folder = copy_of(tiny_student)
    student = StudentFolder(folder)
    data = bytearray((folder / "onnx/generator.fp32.onnx").read_bytes())
    data[5000] ^= 1
    (folder / "onnx/generator.fp32.onnx").write_bytes(data)
    with pytest.raises(IntegrityError, match=r"onnx/generator\.fp32\.onnx .* altered"):
        FastPipeline(student)


def test_the_engine_reports_a_wrong_feed_as_its_own_failure(tiny_student: Path) -> None:
    student = StudentFolder(tiny_student)
    graph = student.manifest.graph("denoiser", "fp32")
    assert graph is not None
    runtime = runtimes.load("onnxruntime", student, graph, num_threads=1)
    with pytest.raises(RuntimeUnavailable, match=r"failed in onnx/denoiser\.fp32\.onnx"):
        runtime.run({"sample": np.zeros((1, 4, 14, 14), np.float32)})


def test_the_fake_stands_in_for_any_engine(tiny_student: Path) -> None:
    pipe = FastPipeline.from_pretrained(tiny_student, runtime="fake")
    out = pipe(class_labels=[1, 2], seed=0, output_type="uint8")
    assert out.images.shape == (2, 28, 28, 1)
    assert out.runtime_info["runtime"] == "fake"
    assert not np.array_equal(out.images, pipe(class_labels=[3, 2], seed=0, output_type="uint8").images)
    stepped = pipe(class_labels=[1, 2], seed=0, output_type="uint8", callback_on_step_end=lambda *_: None)
    assert np.array_equal(out.images, stepped.images)
    with pytest.raises(RuntimeUnavailable, match="no GPU"):
        FastPipeline.from_pretrained(tiny_student, runtime="fake", device="cuda")
