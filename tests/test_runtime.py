"""Engines: what was asked for runs, or an error says why not and what to do; nothing else is used instead."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest

from redif_sdk import FastPipeline, runtimes
from redif_sdk.artifact.folder import StudentFolder, write_manifest
from redif_sdk.errors import IntegrityError, InvalidRequest, RuntimeUnavailable
from redif_sdk.runtimes import RUNTIMES, Engine, RuntimeOptions
from redif_sdk.runtimes import onnxruntime as ort

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
        "exact": True,
        "choice": "asked for",
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"runtime": "bogus"}, "runtime 'bogus' is unknown; use one of auto, onnxruntime, openvino, tensorrt, "),
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
    for name in ("onnxruntime", "openvino", "tensorrt", "tensorrt-rtx"):
        monkeypatch.setitem(RUNTIMES, name, Engine("no:where", "no_such_module", "cpu", ("cpu",)))
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
    runtime = runtimes.load("onnxruntime", student, graph, RuntimeOptions(num_threads=1))
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


# ---------------------------------------------------------------- what "auto" takes


def signed(folder: Path, **changes: Any) -> StudentFolder:
    manifest = StudentFolder(folder).manifest
    write_manifest(folder, manifest.model_copy(update=changes))
    return StudentFolder(folder)


def bf16_too(folder: Path, verdict: bool | None) -> StudentFolder:
    """A student that says it has bf16 graphs, with that outcome of their gate."""
    manifest = StudentFolder(folder).manifest
    graphs = [*manifest.graphs, *(g.model_copy(update={"precision": "bf16"}) for g in manifest.graphs)]
    row = {"component": "denoiser", "precision": "bf16", "passed": verdict}
    return signed(folder, graphs=graphs, verification=[] if verdict is None else [row])


def pairs(choices: list[runtimes.Choice]) -> list[tuple[str, str]]:
    return [(choice.runtime, choice.precision) for choice in choices]


@pytest.mark.parametrize(("verdict", "first"), [(True, "bf16"), (False, "fp32"), (None, "fp32")])
def test_auto_takes_bf16_only_where_its_gate_passed(
    tiny_student: Path, copy_of: Callable[[Path], Path], verdict: bool | None, first: str
) -> None:
    pytest.importorskip("openvino")
    manifest = bf16_too(copy_of(tiny_student), verdict).manifest
    assert runtimes.candidates(manifest)[0].precision == first
    assert all(choice.runtime != "fake" for choice in runtimes.candidates(manifest))
    # who asks for it by name gets it, gate or no gate
    assert ("openvino", "bf16") in pairs(runtimes.candidates(manifest, precision="bf16"))


def test_auto_says_what_it_took_and_what_it_passed_over(
    tiny_student: Path, copy_of: Callable[[Path], Path], caplog: pytest.LogCaptureFixture
) -> None:
    ov = pytest.importorskip("redif_sdk.runtimes.openvino")
    student = bf16_too(copy_of(tiny_student), True)
    if ov.refusal("bf16") is None:
        pytest.skip("this processor has bfloat16")
    with caplog.at_level("INFO", logger="redif_sdk"):
        pipe = FastPipeline(student)
    assert (pipe.runtime_info["runtime"], pipe.runtime_info["precision"]) == ("onnxruntime", "fp32")
    assert "fastest in fp32" in pipe.runtime_info["choice"]
    assert "not available: runtime openvino cannot compute in bf16" in caplog.text
    assert "onnxruntime in fp32 on cpu" in caplog.text
    with pytest.raises(RuntimeUnavailable, match=r"has no bf16 instructions.*onnxruntime has no bf16"):
        FastPipeline(student, precision="bf16")


def test_what_nobody_measured_is_not_taken_unasked(tiny_student: Path) -> None:
    manifest = StudentFolder(tiny_student).manifest
    assert pairs(runtimes.candidates(manifest))[0] == ("onnxruntime", "fp32")
    assert pairs(runtimes.candidates(manifest, "fake")) == [("fake", "fp32")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"provider": "no-such-plugin"}, "neither of ONNX Runtime's own"),
        ({"provider": "DmlExecutionProvider"}, "no DmlExecutionProvider"),
        ({"device": "dml:1"}, "no DmlExecutionProvider"),
        ({"device": "coreml"}, "no CoreMLExecutionProvider"),
        ({"provider": "TensorrtExecutionProvider"}, "no TensorrtExecutionProvider"),
        ({"device": "npu"}, "no device npu"),
    ],
)
@pytest.mark.skipif(onnxruntime.get_available_providers()[-1] != ort.CPU, reason="not plain onnxruntime")
def test_providers_that_are_not_here(tiny_student: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeUnavailable, match=message):
        FastPipeline.from_pretrained(tiny_student, runtime="onnxruntime", **options)


def test_a_provider_runs_on_its_own_device(tiny_student: Path) -> None:
    with pytest.raises(InvalidRequest, match="device='cuda' is not supported by CPUExecutionProvider; use 'cpu'"):
        FastPipeline.from_pretrained(
            tiny_student, runtime="onnxruntime", provider="CPUExecutionProvider", device="cuda"
        )


def test_openvino_s_plugin_is_told_the_graph_s_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """By itself it computes fp32 graphs in bfloat16 where that is fast."""
    plugin = pytest.importorskip("onnxruntime_ep_openvino")
    cpu = SimpleNamespace(ep_name=plugin.get_ep_name(), device=SimpleNamespace(type=SimpleNamespace(name="CPU")))
    monkeypatch.setattr(onnxruntime, "get_ep_devices", lambda: [cpu])
    for precision, hint in (("fp32", "f32"), ("int8", "f32"), ("bf16", "bf16")):
        place = ort._place(RuntimeOptions(provider="onnxruntime-ep-openvino"), "graph", precision)
        assert json.loads(place.settings["load_config"]) == {"CPU": {"INFERENCE_PRECISION_HINT": hint}}


def test_a_plugin_provider(tiny_student: Path) -> None:
    """Of a package of its own, on plain onnxruntime. This one serves Intel's processors alone."""
    plugin = pytest.importorskip("onnxruntime_ep_openvino")
    ort._register(plugin.get_ep_name(), plugin.get_library_path())
    if plugin.get_ep_name() not in {device.ep_name for device in onnxruntime.get_ep_devices()}:
        with pytest.raises(RuntimeUnavailable, match=r"offers no device on this machine \(it offers: none\)"):
            FastPipeline.from_pretrained(tiny_student, runtime="onnxruntime", provider="onnxruntime-ep-openvino")
        return
    pipe = FastPipeline.from_pretrained(tiny_student, runtime="onnxruntime", provider="onnxruntime-ep-openvino")
    assert pipe.runtime_info["provider"] == "OpenVINOExecutionProvider"
    plain = FastPipeline.from_pretrained(tiny_student, runtime="onnxruntime", provider="CPUExecutionProvider")
    images = [p(class_labels=[1, 2, 3], seed=0, output_type="uint8").images.astype(int) for p in (pipe, plain)]
    assert np.abs(images[0] - images[1]).max() <= 1


# ---------------------------------------------------------------- the pictures, whoever computes them


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_eight_threads_make_the_pictures_of_one(tiny_student: Path, runtime: str) -> None:
    pytest.importorskip(runtime)
    pipe = FastPipeline.from_pretrained(tiny_student, runtime=runtime, num_threads=2)

    def draw(number: int) -> Any:
        return pipe(class_labels=number, num_images_per_prompt=1 + number % 3, seed=number, output_type="uint8").images

    alone = [draw(number) for number in range(8)]
    with ThreadPoolExecutor(8) as threads:
        together = list(threads.map(draw, range(8)))
    for one, other in zip(alone, together, strict=True):
        assert np.array_equal(one, other)


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_a_batch_is_its_pictures(tiny_student: Path, runtime: str) -> None:
    """However it is cut over the cores."""
    pytest.importorskip(runtime)
    pipe = FastPipeline.from_pretrained(tiny_student, runtime=runtime, num_threads=3)
    together = pipe(class_labels=1, num_images_per_prompt=11, seed=5, output_type="uint8").images
    for index in (0, 4, 10):
        alone = pipe(class_labels=1, seed=[(5, index)], output_type="uint8").images[0]
        assert np.abs(together[index].astype(int) - alone).max() <= 1


def test_openvino_makes_the_pictures_of_onnxruntime_and_says_what_it_is(tiny_student: Path) -> None:
    openvino = pytest.importorskip("openvino")
    pipe = FastPipeline.from_pretrained(tiny_student, runtime="openvino")
    info = pipe.runtime_info
    assert (info["runtime"], info["provider"], info["device"], info["precision"]) == ("openvino", "CPU", "cpu", "fp32")
    assert openvino.__version__.startswith(info["version"])
    other = FastPipeline.from_pretrained(tiny_student, runtime="onnxruntime")
    for steps in (2, 3):
        request = {"class_labels": [1, 2, 3], "seed": 4, "num_inference_steps": steps, "output_type": "uint8"}
        assert np.abs(pipe(**request).images.astype(int) - other(**request).images).max() <= 1
    assert len(list(pipe.stream("b", seed=1))) == 2
    assert list((Path(os.environ["REDIF_CACHE"]) / "openvino").iterdir())  # compiled once a machine


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "cuda"}, "no device cuda"),
        ({"device": "gpu:7"}, r"OpenVINO finds no GPU\.7 here"),
        ({"precision": "int8"}, "does not compute symmetric int8"),
    ],
)
def test_what_openvino_cannot_do_it_refuses(full_student: Path, options: dict[str, Any], message: str) -> None:
    pytest.importorskip("openvino")
    with pytest.raises(RuntimeUnavailable, match=message):
        FastPipeline.from_pretrained(full_student, runtime="openvino", **options)


def test_openvino_that_computes_in_another_precision_is_refused(
    tiny_student: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes the hint for advice: where it does not follow, nothing is computed."""
    ov = pytest.importorskip("redif_sdk.runtimes.openvino")
    if ov.refusal("bf16") is None:
        pytest.skip("this processor has bfloat16")
    monkeypatch.setitem(ov.HINTS, "fp32", ("bf16", "FP32"))  # ask for what it will not do
    pipe = FastPipeline.from_pretrained(tiny_student, runtime="openvino")
    with pytest.raises(RuntimeUnavailable, match="took f32 in place of bf16"):
        pipe("a", seed=0)


def test_openvino_is_imported_without_its_telemetry(tiny_student: Path) -> None:
    pytest.importorskip("openvino")
    code = """
import sys
from redif_sdk import FastPipeline
FastPipeline.from_pretrained(sys.argv[1], runtime="openvino")("a", seed=0)
assert not [name for name in sys.modules if name.startswith("openvino_telemetry")]
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code, str(tiny_student)], check=True, timeout=300)
