"""Writes ONNX models to disk: one file, and one more for the weights where they exceed protobuf's 2 GiB."""

from __future__ import annotations

import math
from pathlib import Path

import onnx
from onnx import TensorProto

from redif_sdk.artifact.records import Graph, TensorSpec

__all__ = ["FOLDER", "LARGEST_FILE", "size_of", "spec_of", "write_graph"]

FOLDER = "onnx"

#: A protobuf is limited to 2 GiB; a larger graph has its weights in a file beside it. A larger generator is not made,
#: since ONNX Runtime cannot read the weights of a loop's body from memory. Pipelines then step the denoiser.
LARGEST_FILE = (1 << 31) - (1 << 24)

#: Tensors of at least so many bytes go into the file beside the graph; smaller ones may be shapes, which readers need.
LEAST_OUTSIDE = 1024
ALIGNMENT = 64

_DTYPES = {TensorProto.FLOAT: "float32", TensorProto.INT64: "int64", TensorProto.UINT8: "uint8"}
_WEIGHTS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.INT8)


def size_of(model: onnx.ModelProto) -> int:
    """Bytes of the weights, which make up a large model but for a few MiB; protobuf cannot measure more than 2 GiB."""
    return sum(
        math.prod(tensor.dims) * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        for tensor in model.graph.initializer
    )


def write_graph(folder: Path, component: str, precision: str, model: onnx.ModelProto) -> Graph:
    """Write a model to ``onnx/COMPONENT.PRECISION.onnx`` and describe it.

    The weights of a model above `LARGEST_FILE` are moved to ``onnx/COMPONENT.PRECISION.onnx.data``: `model` loses them,
    so that they are never in memory twice.
    """
    file = f"{FOLDER}/{component}.{precision}.onnx"
    (folder / FOLDER).mkdir(exist_ok=True)
    data = []
    if size_of(model) > LARGEST_FILE:
        data = [f"{file}.data"]
        _move_weights(model, folder / data[0])
    (folder / file).write_bytes(model.SerializeToString(deterministic=True))
    return Graph.model_validate(
        {
            "component": component,
            "precision": precision,
            "file": file,
            "data": data,
            "opset": next(opset.version for opset in model.opset_import if not opset.domain),
            "inputs": [spec_of(value) for value in model.graph.input],
            "outputs": [spec_of(value) for value in model.graph.output],
        }
    )


def _move_weights(model: onnx.ModelProto, path: Path) -> None:
    """Move the weights to the file `path`; the model keeps their offsets."""
    with path.open("wb") as file:
        for tensor in model.graph.initializer:
            if tensor.data_type not in _WEIGHTS or not tensor.HasField("raw_data"):
                continue
            content = tensor.raw_data
            if len(content) < LEAST_OUTSIDE:
                continue
            file.write(b"\0" * (-file.tell() % ALIGNMENT))
            places = {"location": path.name, "offset": str(file.tell()), "length": str(len(content))}
            file.write(content)
            tensor.ClearField("raw_data")
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in places.items():
                tensor.external_data.add(key=key, value=value)


def spec_of(value: onnx.ValueInfoProto) -> TensorSpec:
    """The manifest's description of an input or output."""
    tensor = value.type.tensor_type
    shape = [dim.dim_param or dim.dim_value for dim in tensor.shape.dim]
    return TensorSpec(name=value.name, dtype=_DTYPES[tensor.elem_type], shape=shape)
