"""The fused generator: an ONNX `Loop` around the denoiser, and the decoder after it; table and noise are its inputs.

One graph serves any number of steps and any step table, and holds no random generator. It is assembled from ONNX nodes
without torch; its arithmetic is that of `redif_sdk.sampling.loop` and `redif_sdk.images`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from redif_sdk.artifact.manifest import Manifest
from redif_sdk.errors import ExportError
from redif_sdk.export.weights import LazyModel
from redif_sdk.images import scale_and_offset
from redif_sdk.sampling.table import COLUMNS

__all__ = ["generator_model"]

_PREFIX = "redif."  # of every name of ours, so that none is one of the network's
_DTYPES = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64}


@dataclass
class _Builder:
    """Nodes and constants of one graph, in order."""

    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: list[onnx.TensorProto] = field(default_factory=list)

    def constant(self, name: str, value: Any, dtype: Any) -> str:
        self.constants.append(numpy_helper.from_array(np.asarray(value, dtype=dtype), _PREFIX + name))
        return _PREFIX + name

    def add(self, operator: str, inputs: list[str], output: str, **attributes: Any) -> str:
        """Append a node with one output, named after it, and return the output's name."""
        if output != "images":
            output = _PREFIX + output
        self.nodes.append(helper.make_node(operator, inputs, [output], name=f"{output}/{operator}", **attributes))
        return output


def generator_model(denoiser: LazyModel, manifest: Manifest, decoder: LazyModel | None = None) -> LazyModel:
    """The generator around `denoiser` (sample, timestep, conditions -> f), with `decoder` (latents -> sample) after it.

    Inputs: noise (N, batch, C, H, W) float32, table (K, 6) float32, init_scale () float32, and the denoiser's
    conditions; output: images (batch, H', W', C') uint8. Row k, with f of the state x, z = noise[min(k + 1, N - 1)]::

        x0 = p x + q f
        x' = r x0 + s x + c z

    The denoiser's weights are initialisers inside the loop's body: in the outer graph, engines would not fold constants
    into them. The decoder's are in the outer graph, where it is. Raises ExportError if names clash.
    """
    latents = manifest.latents
    size = [axis if axis in latents.dynamic else getattr(latents, axis) for axis in ("height", "width")]
    height, width, channels = manifest.image_shape
    image = [f"image_{axis}" if axis in latents.dynamic else n for axis, n in (("height", height), ("width", width))]
    conditions = manifest.graph_conditions
    inputs = [
        _tensor("noise", TensorProto.FLOAT, ["slices", "batch", latents.channels, *size]),
        _tensor("table", TensorProto.FLOAT, ["steps", len(COLUMNS)]),
        _tensor("init_scale", TensorProto.FLOAT, []),
        *(_tensor(spec.name, _DTYPES[spec.dtype], spec.shape) for spec in conditions),
    ]

    outer = _Builder()
    zero = outer.constant("zero", 0, np.int64)
    steps = outer.add("Squeeze", [outer.add("Shape", ["table"], "steps_1d", start=0, end=1)], "steps")
    outer.add("Shape", ["noise"], "batch_1d", start=1, end=2)
    slices = outer.add("Squeeze", [outer.add("Shape", ["noise"], "slices_1d", start=0, end=1)], "slices")
    outer.add("Sub", [slices, outer.constant("one", 1, np.int64)], "last_slice")
    start = outer.add("Mul", [outer.add("Gather", ["noise", zero], "noise_0", axis=0), "init_scale"], "start")
    go = outer.constant("go", True, np.bool_)
    final = outer.add("Loop", [steps, go, start], "final", body=_body(denoiser.proto))
    if decoder is not None:
        final = _include(outer, decoder.proto.graph, "decoder", {"latents": final})["sample"]
    _postprocess(outer, final, manifest)

    graph = helper.make_graph(
        outer.nodes,
        "generator",
        inputs,
        [_tensor("images", TensorProto.UINT8, ["batch", *image, channels])],
        initializer=outer.constants,
    )
    _check_names(graph, denoiser.proto.graph, {spec.name for spec in conditions})
    proto = helper.make_model(
        graph,
        opset_imports=_newest(denoiser.proto, decoder and decoder.proto).opset_import,
        ir_version=denoiser.proto.ir_version,
        producer_name=denoiser.proto.producer_name,
        producer_version=denoiser.proto.producer_version,
    )
    decoded = {_part_name("decoder", name): weight for name, weight in (decoder.weights if decoder else {}).items()}
    return LazyModel(proto, {**denoiser.weights, **decoded})


def _part_name(part: str, name: str) -> str:
    """The name that a value of an included graph has in the generator."""
    return f"{_PREFIX}{part}.{name}"


def _newest(denoiser: onnx.ModelProto, decoder: onnx.ModelProto | None) -> onnx.ModelProto:
    """The model with the later opset; bf16 has a later one (`precision.declare_bf16`)."""
    if decoder is None:
        return denoiser
    return max(denoiser, decoder, key=lambda model: max(opset.version for opset in model.opset_import))


def _include(outer: _Builder, graph: onnx.GraphProto, part: str, inputs: Mapping[str, str]) -> dict[str, str]:
    """Add the nodes and weights of a graph without subgraphs, under new names.

    Args:
        outer: The graph to add them to.
        graph: The graph to include.
        part: The prefix of the new names.
        inputs: The outer graph's value for each of its inputs.

    Returns:
        The new name of each output.
    """
    given = {"": "", **inputs}  # an optional input that is left out has no name

    def named(name: str) -> str:
        return given.get(name, _part_name(part, name))

    for tensor in graph.initializer:
        outer.constants.append(TensorProto())
        outer.constants[-1].CopyFrom(tensor)
        outer.constants[-1].name = named(tensor.name)
    for node in graph.node:
        if any(attribute.HasField("g") for attribute in node.attribute):
            raise ExportError(f"the graph of the {part} has a graph inside its node {node.name}; it cannot be fused")
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        copy.name = named(node.name)
        for side in (copy.input, copy.output):
            names = [named(name) for name in side]
            del side[:]
            side.extend(names)
        outer.nodes.append(copy)
    return {value.name: named(value.name) for value in graph.output}


def _tensor(name: str, dtype: int, shape: list[int | str]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, dtype, shape)


def _body(denoiser: onnx.ModelProto) -> onnx.GraphProto:
    """One step: (k, go, x) -> (go, x'). The table, the noise and the conditions come from the outer graph."""
    graph = denoiser.graph
    before, after = _Builder(), _Builder()
    k, go = _PREFIX + "k", _PREFIX + "go_in"
    row = before.add("Gather", ["table", k], "row", axis=0)
    scalar = {
        column: before.add("Gather", [row, before.constant(f"column_{column}", index, np.int64)], column, axis=0)
        for index, column in enumerate(COLUMNS)
    }
    before.nodes.append(
        helper.make_node("Expand", [scalar["t"], _PREFIX + "batch_1d"], ["timestep"], name=_PREFIX + "timestep/Expand")
    )

    clean = after.add(
        "Add",
        [after.add("Mul", [scalar["p"], "sample"], "px"), after.add("Mul", [scalar["q"], "f"], "qf")],
        "x0",
    )
    mean = after.add(
        "Add",
        [after.add("Mul", [scalar["r"], clean], "rx0"), after.add("Mul", [scalar["s"], "sample"], "sx")],
        "mean",
    )
    following = after.add("Add", [k, after.constant("one_step", 1, np.int64)], "k_next")
    place = after.add("Min", [following, _PREFIX + "last_slice"], "place")
    z = after.add("Gather", ["noise", place], "z", axis=0)
    following_x = after.add("Add", [mean, after.add("Mul", [scalar["c"], z], "cz")], "x_next")
    go_on = after.add("Identity", [go], "go_out")

    shape = [dim.dim_param or dim.dim_value for dim in graph.input[0].type.tensor_type.shape.dim]
    return helper.make_graph(
        [*before.nodes, *graph.node, *after.nodes],
        "step",
        [
            _tensor(k, TensorProto.INT64, []),
            _tensor(go, TensorProto.BOOL, []),
            _tensor("sample", TensorProto.FLOAT, shape),
        ],
        [_tensor(go_on, TensorProto.BOOL, []), _tensor(following_x, TensorProto.FLOAT, shape)],
        initializer=[*before.constants, *graph.initializer, *after.constants],
    )


def _postprocess(outer: _Builder, x: str, manifest: Manifest) -> None:
    """Latents to `images`, as `redif_sdk.images.to_uint8` does. ONNX's Round is half to even, CRD is torch's order."""
    factor = manifest.postprocess.pixel_shuffle
    if factor > 1:
        x = outer.add("DepthToSpace", [x], "shuffled", blocksize=factor, mode="CRD")
    scale, offset = scale_and_offset(manifest.postprocess)
    x = outer.add("Mul", [x, outer.constant("scale", scale, np.float32)], "scaled")
    x = outer.add("Add", [x, outer.constant("offset", offset, np.float32)], "shifted")
    low, high = outer.constant("low", 0, np.float32), outer.constant("high", 255, np.float32)
    x = outer.add("Round", [outer.add("Clip", [x, low, high], "clipped")], "rounded")
    x = outer.add("Transpose", [x], "transposed", perm=[0, 2, 3, 1])
    outer.add("Cast", [x], "images", to=TensorProto.UINT8)  # last: TensorRT has uint8 for outputs alone


def _check_names(graph: onnx.GraphProto, network: onnx.GraphProto, conditions: set[str]) -> None:
    """Check that the network uses none of our names: ONNX forbids a body to reuse a name of the outer graph."""
    ours = {value.name for value in (*graph.input, *graph.output)} - conditions
    theirs = {name for node in network.node for name in node.output} | {tensor.name for tensor in network.initializer}
    clash = {name for name in theirs if name in ours or name.startswith(_PREFIX)}
    if clash:
        raise ExportError(f"the network's graph uses names of the generator: {', '.join(sorted(clash))}; rename them")
