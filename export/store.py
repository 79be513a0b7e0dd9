"""ONNX models on disk: one file, with its weights in one more beside it where protobuf's 2 GiB do not hold them.

Writing and describing graphs lives here; what is written is `build.py`'s business, and hashes are the manifest's.
"""

from __future__ import annotations

import math
from pathlib import Path

import onnx
from onnx import TensorProto

from redif_sdk.artifact.records import Graph, TensorSpec

__all__ = ["FOLDER", "LARGEST_FILE", "size_of", "spec_of", "write_graph"]

FOLDER = "onnx"

#: A protobuf ends at 2 GiB. A larger graph keeps its weights in a file beside it. A larger generator is not made: ONNX
#: Runtime takes such a file from memory for a graph, but not for a loop's body. Pipelines then step the denoiser.
LARGEST_FILE = (1 << 31) - (1 << 24)

#: Weights from this size on go into the file beside the graph; what is smaller may be a shape, which readers look at.
LEAST_OUTSIDE = 1024
ALIGNMENT = 64

_DTYPES = {TensorProto.FLOAT: "float32", TensorProto.INT64: "int64", TensorProto.UINT8: "uint8"}
_WEIGHTS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.INT8)


def size_of(model: onnx.ModelProto) -> int:
    """Bytes of the weights, which are all of a large model but a few MiB. protobuf cannot say it above 2 GiB."""
    return sum(
        math.prod(tensor.dims) * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        for tensor in model.graph.initializer
    )


def write_graph(folder: Path, component: str, precision: str, model: onnx.ModelProto) -> Graph:
    """Write a model to ``onnx/COMPONENT.PRECISION.onnx`` and describe it.

    A model above `LARGEST_FILE` is written with its weights in ``onnx/COMPONENT.PRECISION.onnx.data``, and loses them
    on the way: there is no second copy of them in memory.
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
    """Write the weights to `path`, one after another, and leave their places in the model."""
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
    """What the manifest says of an input or output."""
    tensor = value.type.tensor_type
    shape = [dim.dim_param or dim.dim_value for dim in tensor.shape.dim]
    return TensorSpec(name=value.name, dtype=_DTYPES[tensor.elem_type], shape=shape)
