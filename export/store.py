"""Writes ONNX models to disk: one file, and one more for the weights where these are large."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

import onnx
from onnx import TensorProto

from redif_sdk.artifact.records import Graph, TensorSpec
from redif_sdk.export.weights import LazyModel

__all__ = ["FOLDER", "LARGEST_FILE", "LARGEST_PROTOBUF", "spec_of", "write_graph"]

FOLDER = "onnx"

#: A graph with more bytes of weights has them in a file beside it, which engines map, and which is written tensor by
#: tensor. A larger generator is not made: it would hold the weights once more, and pipelines step the denoiser as fast.
LARGEST_FILE = 1 << 28
#: The limit of a protobuf, 2 GiB, with room for what is not weights.
LARGEST_PROTOBUF = (1 << 31) - (1 << 24)

#: Tensors of at least so many bytes go into the file beside the graph; smaller ones may be shapes, which readers need.
LEAST_OUTSIDE = 1024
ALIGNMENT = 64

_DTYPES = {TensorProto.FLOAT: "float32", TensorProto.INT64: "int64", TensorProto.UINT8: "uint8"}
_WEIGHTS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.INT8, TensorProto.INT4)


def write_graph(folder: Path, component: str, precision: str, model: LazyModel, other: Graph | None = None) -> Graph:
    """Write a model to ``onnx/COMPONENT.PRECISION.onnx`` and describe it.

    Its weights are in that file, or, where it would exceed `LARGEST_FILE`, in ``onnx/COMPONENT.PRECISION.onnx.data``.
    They are made one at a time. Weights that `other`, a graph of the same network, has in a file beside it are read
    from there.
    """
    file = f"{FOLDER}/{component}.{precision}.onnx"
    (folder / FOLDER).mkdir(exist_ok=True)
    data = []
    if model.size > LARGEST_FILE:
        places = _places(folder, other) if other is not None else {}
        data = [*(other.data if other is not None else []), f"{file}.data"]
        (folder / file).write_bytes(_beside(model, folder / data[-1], places).SerializeToString(deterministic=True))
        if not (folder / data[-1]).stat().st_size:
            (folder / data.pop()).unlink()
    else:
        (folder / file).write_bytes(model.filled().SerializeToString(deterministic=True))
    return Graph.model_validate(
        {
            "component": component,
            "precision": precision,
            "file": file,
            "data": data,
            "opset": next(opset.version for opset in model.proto.opset_import if not opset.domain),
            "inputs": [spec_of(value) for value in model.proto.graph.input],
            "outputs": [spec_of(value) for value in model.proto.graph.output],
        }
    )


Places = dict[str, dict[str, str]]  # location, offset and length of tensors by their SHA-256


def _places(folder: Path, graph: Graph) -> Places:
    """Where a graph's weights are beside it."""
    proto = onnx.load(folder / graph.file, load_external_data=False)
    found: Places = {}
    for tensor in proto.graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL:
            place = {entry.key: entry.value for entry in tensor.external_data}
            with (folder / FOLDER / place["location"]).open("rb") as file:
                file.seek(int(place["offset"]))
                found[sha256(file.read(int(place["length"]))).hexdigest()] = place
    return found


def _beside(model: LazyModel, path: Path, known: Places) -> onnx.ModelProto:
    """The model without its weights, which are written to the file `path` unless they are in a `known` place."""
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    with path.open("wb") as file:
        for tensor, weight in LazyModel(proto, model.weights).initializers():
            if weight is not None:
                content = weight.content()
            elif tensor.data_type in _WEIGHTS and tensor.HasField("raw_data"):
                content = tensor.raw_data
            else:
                continue
            if len(content) < LEAST_OUTSIDE:
                tensor.raw_data = content
                continue
            places = known.get(sha256(content).hexdigest(), {}) if known else {}
            if not places:
                file.write(b"\0" * (-file.tell() % ALIGNMENT))
                places = {"location": path.name, "offset": str(file.tell()), "length": str(len(content))}
                file.write(content)
            tensor.ClearField("raw_data")
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in places.items():
                tensor.external_data.add(key=key, value=value)
    return proto


def spec_of(value: onnx.ValueInfoProto) -> TensorSpec:
    """The manifest's description of an input or output."""
    tensor = value.type.tensor_type
    shape = [dim.dim_param or dim.dim_value for dim in tensor.shape.dim]
    return TensorSpec(name=value.name, dtype=_DTYPES[tensor.elem_type], shape=shape)
