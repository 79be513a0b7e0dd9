"""Reduced precision: fp16 and bf16 by the dtype of the network, int8 by quantising its convolutions.

Engines compute in the types of the graph, so a precision is a property of the file, not an option of an engine. The
sampler's arithmetic around the network is fp32 in all of them (`fuse.py`). `onnx.py` chooses each component's
precision.
"""

from __future__ import annotations

import io
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np
import onnx
import torch
from onnx import numpy_helper

from redif_sdk.artifact.manifest import GUIDANCE_SCALE, Manifest
from redif_sdk.errors import ExportError
from redif_sdk.export.conditions import ExampleConditions
from redif_sdk.export.store import LARGEST_PROTOBUF
from redif_sdk.export.weights import LazyModel
from redif_sdk.runtimes.guided import GuidedInputs
from redif_sdk.sampling.loop import run_steps
from redif_sdk.sampling.noise import noise as draw
from redif_sdk.sampling.table import StepTable

if TYPE_CHECKING:
    import onnxruntime

__all__ = ["DTYPES", "declare_bf16", "int8_model"]

#: Precisions that are the network's own dtype.
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


BF16_OPSET = 22

CALIBRATION_SEED = 1
CALIBRATION_SLOT = 1 << 16  # training's noise, which no evaluation uses
CALIBRATION_IMAGES = 64  # a step table
PIECE = 8

#: Activations beyond this share of all are clipped: a fifth less error than with the whole range (docs/performance.md).
PERCENTILE = 99.99


def declare_bf16(model: onnx.ModelProto) -> None:
    """Make a bfloat16 graph valid: convolutions and norms support the type from opset 22 on.

    Constants that the graph casts to bfloat16, since the exporter cannot fold them, are cast here.
    """
    for opset in model.opset_import:
        if not opset.domain:
            opset.version = max(opset.version, BF16_OPSET)
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes = []
    for node in model.graph.node:
        if node.op_type == "CastLike" and node.input[0] in constants:
            value = numpy_helper.to_array(constants[node.input[0]]).astype(ml_dtypes.bfloat16)
            model.graph.initializer.append(numpy_helper.from_array(value, node.output[0]))
        else:
            nodes.append(node)
    used = {name for node in nodes for name in node.input}
    initializers = [tensor for tensor in model.graph.initializer if tensor.name in used]
    for field, values in (("node", nodes), ("initializer", initializers)):
        model.graph.ClearField(field)
        getattr(model.graph, field).extend(values)


def int8_model(fp32: onnx.ModelProto, manifest: Manifest, conditions: ExampleConditions) -> onnx.ModelProto:
    """The denoiser with int8 convolutions: static, symmetric, weights per channel, for ONNX Runtime and TensorRT.

    The first and the last convolution stay fp32, and so do biases (TensorRT has no int32 biases). Weights use 7 of 8
    bits: processors without VNNI add two products in 16 bits, which would saturate (relative error .27 instead of .05
    with a UNet of 6.5 M). Ranges are calibrated on the student's own trajectories, from noise that only training uses.

    Args:
        fp32: The denoiser's graph.
        manifest: The student's manifest.
        conditions: The conditions of the calibration images.

    Raises:
        ExportError: onnxruntime is not installed, the network has fewer than 3 convolutions, or is above 2 GiB.
    """
    try:
        from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
    except ImportError as error:
        raise ExportError(f'int8 needs onnxruntime ({error}); pip install "redif-sdk[export]"') from error
    convolutions = [node.name for node in fp32.graph.node if node.op_type == "Conv"]
    if len(convolutions) < 3:
        raise ExportError(
            f"{manifest.name} has {len(convolutions)} convolutions, and int8 quantises all but the first and the last: "
            f"there is nothing to gain; leave int8 out"
        )
    if LazyModel(fp32).size > LARGEST_PROTOBUF:
        raise ExportError(
            f"the network of {manifest.name} is above 2 GiB, for which int8 is not supported; leave int8 out"
        )
    with tempfile.TemporaryDirectory(prefix="redif-int8-") as folder, _quiet():
        target = Path(folder) / "int8.onnx"
        quantize_static(
            onnx.ModelProto.FromString(fp32.SerializeToString()),
            target,
            _Feeds(trajectories(fp32, manifest, conditions)),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["Conv"],
            nodes_to_exclude=[convolutions[0], convolutions[-1]],
            per_channel=True,
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
            reduce_range=True,
            calibrate_method=CalibrationMethod.Percentile,
            extra_options={
                "ActivationSymmetric": True,
                "WeightSymmetric": True,
                "QuantizeBias": False,
                "CalibPercentile": PERCENTILE,
            },
        )
        model = onnx.load(target)
    model.graph.name = fp32.graph.name
    model.producer_name, model.producer_version = fp32.producer_name, fp32.producer_version
    model.ir_version = fp32.ir_version
    model.ClearField("metadata_props")
    return model


def trajectories(
    denoiser: onnx.ModelProto, manifest: Manifest, conditions: ExampleConditions
) -> Iterator[dict[str, np.ndarray]]:
    """The denoiser's inputs at each step of each table, for `CALIBRATION_IMAGES` images a table."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(denoiser.SerializeToString(), options, providers=["CPUExecutionProvider"])
    latents = manifest.latents
    shape = (latents.channels, latents.height, latents.width)
    inputs_of = GuidedInputs(manifest.graph_conditions)
    for steps in manifest.supported_steps:
        table = manifest.step_table(steps)
        for first in range(0, CALIBRATION_IMAGES, PIECE):
            indices = range(first, first + PIECE)
            seeds = [(CALIBRATION_SEED, index) for index in indices]
            noise = draw(seeds, shape, slices=table.noise_slices, first_slot=CALIBRATION_SLOT)
            asked = {name: value.numpy() for name, value in conditions.of(indices).items()}
            if GUIDANCE_SCALE in asked:  # the same number of rows in all, which the quantiser wants
                asked[GUIDANCE_SCALE] = np.full_like(asked[GUIDANCE_SCALE], asked[GUIDANCE_SCALE].max())
            yield from _inputs_of_steps(session, table, noise, inputs_of(asked))


def _inputs_of_steps(
    session: onnxruntime.InferenceSession, table: StepTable, noise: np.ndarray, asked: dict[str, np.ndarray]
) -> list[dict[str, np.ndarray]]:
    """The denoiser's inputs at each step for `noise` (N, B, C, H, W)."""
    inputs: list[dict[str, np.ndarray]] = []

    def predict(k: int, x: np.ndarray) -> np.ndarray:
        inputs.append({"sample": x, "timestep": np.full((len(x),), table.timesteps[k], np.float32), **asked})
        clean: np.ndarray = table.clean(k, x, session.run(["f"], inputs[-1])[0])
        return clean

    run_steps(table, table.start(noise[0]), noise, predict)
    return inputs


class _Feeds:
    """The inputs one at a time, by the protocol of ONNX Runtime's calibration."""

    def __init__(self, feeds: Iterator[dict[str, np.ndarray]]) -> None:
        self._feeds = feeds

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._feeds, None)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the quantiser's advice on the root logger, and its remarks on standard output."""
    root = logging.getLogger()
    root.addFilter(_no_advice)
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        root.removeFilter(_no_advice)


def _no_advice(record: logging.LogRecord) -> bool:
    return "quantiz" not in record.getMessage()
