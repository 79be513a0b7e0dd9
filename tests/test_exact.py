"""`precision="exact"` is fp32 throughout, and `runtime_info` says whether images equal those of other runtimes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from redif_sdk import FastPipeline, runtimes
from redif_sdk.errors import RuntimeUnavailable
from redif_sdk.runtimes import RuntimeInfo, RuntimeOptions, onnxruntime

INFO = RuntimeInfo("onnxruntime", "1", "CPUExecutionProvider", "cpu", "fp32", "generator", "file", None)


@pytest.mark.parametrize(
    ("changes", "exact"),
    [
        ({}, True),
        ({"provider": "CUDAExecutionProvider", "device": "cuda:0"}, True),
        ({"runtime": "openvino", "provider": "GPU", "device": "gpu"}, True),
        ({"runtime": "tensorrt", "provider": "NVIDIA H200", "device": "cuda:0"}, True),
        ({"precision": "bf16"}, False),
        ({"precision": "int8"}, False),
        ({"runtime": "openvino", "provider": "NPU", "device": "npu"}, False),
        ({"provider": "CoreMLExecutionProvider", "device": "coreml"}, False),
        ({"provider": "TensorrtExecutionProvider", "device": "cuda:0"}, False),
    ],
)
def test_what_is_exact(changes: dict[str, str], exact: bool) -> None:
    assert runtimes.is_exact(replace(INFO, **changes)) == exact  # type: ignore[arg-type]


def test_cuda_is_told_to_leave_tf32() -> None:
    place = onnxruntime._place(RuntimeOptions(device="cuda:1"), "prefix")
    assert place.settings == {"device_id": "1", "use_tf32": "0"}


def test_exact_takes_fp32_where_auto_would_take_bf16(full_student: Path) -> None:
    pytest.importorskip("openvino")
    manifest = FastPipeline.from_pretrained(full_student, precision="exact").manifest
    manifest = manifest.model_copy(
        update={"verification": [{"precision": "bf16", "component": "generator", "passed": True}]}
    )
    assert runtimes.candidates(manifest)[0][:2] == ("openvino", "bf16")
    assert {choice.precision for choice in runtimes.candidates(manifest, precision="exact")} == {"fp32"}


def test_exact_pipelines_agree_within_one_level(full_student: Path) -> None:
    pytest.importorskip("openvino")
    images = []
    for runtime in ("onnxruntime", "openvino"):
        pipe = FastPipeline.from_pretrained(full_student, runtime=runtime, precision="exact")
        assert pipe.runtime_info["exact"] is True
        images.append(pipe(class_labels=range(10), seed=0, output_type="uint8").images.astype(int))  # type: ignore[arg-type]
    assert np.abs(images[0] - images[1]).max() <= 1
    lossy = FastPipeline.from_pretrained(full_student, runtime="onnxruntime", precision="int8").runtime_info
    assert lossy["exact"] is False
    assert 'precision="exact" gives the same image' in lossy["choice"]


def test_exact_is_refused_where_it_cannot_be_had(full_student: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtimes, "_EXACT_PROVIDERS", ())
    with pytest.raises(RuntimeUnavailable, match="CPUExecutionProvider on cpu does not compute in fp32 throughout"):
        FastPipeline.from_pretrained(full_student, runtime="onnxruntime", precision="exact")
    assert FastPipeline.from_pretrained(full_student, runtime="onnxruntime", precision="fp32")
