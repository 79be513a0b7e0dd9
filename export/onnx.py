"""A torch network to an ONNX graph: the denoiser, f = network(sample, timestep[, class_labels]).

Loading the network of a student from verified bytes, and the call of torch's exporter, live here. The loop around the
denoiser is assembled in `fuse.py`, at ONNX level; files are written by `build.py`.
"""

from __future__ import annotations

import copy
import importlib
import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx
import onnxscript.optimizer
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors

from redif_sdk.errors import ExportError, UnsupportedModel
from redif_sdk.export.precision import DTYPES, declare_bf16, int8_model
from redif_sdk.folder import StudentFolder
from redif_sdk.manifest import Guidance, Manifest

__all__ = ["OPSET", "Denoiser", "clean_model", "denoiser_model", "load_network", "size_multiple"]

#: 18 to 20 decompose GroupNorm and attention, which ONNX Runtime runs fastest and every TensorRT parses.
OPSET = 20

_AXES = ("height", "width")
_EXAMPLE_BATCH = 2  # torch.export would take 1 for a constant


class Denoiser(torch.nn.Module):
    """A network with one signature: sample (B, C, H, W), timestep (B,), class_labels (B,) or None -> f (B, C, H, W).

    `network` is called as diffusers' are, ``network(sample, timestep, class_labels=...)`` (without the labels where it
    has no condition), and returns a tensor, a tuple, or an object with ``.sample``. Networks that learn their variance
    return 2C channels: f is the first C. With `guidance` the network sees every image twice, with the asked class and
    with none, and f is the guided mix. A network in another `dtype` than float32 is given, and gives, float32.
    """

    def __init__(
        self,
        network: torch.nn.Module,
        channels: int,
        guidance: Guidance | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.network = network
        self.channels = channels
        self.guidance = guidance
        self.dtype = dtype

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor | None = None
    ) -> torch.Tensor:
        if self.guidance is None or class_labels is None:
            return self._call(sample, timestep, class_labels)
        null = torch.full_like(class_labels, self.guidance.null_class)
        asked, unasked = self._call(sample, timestep, class_labels), self._call(sample, timestep, null)
        mixed: torch.Tensor = self.guidance.mix(asked, unasked)
        return mixed

    def _call(self, sample: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor | None) -> torch.Tensor:
        condition = {} if class_labels is None else {"class_labels": class_labels}
        output = self.network(sample.to(self.dtype), timestep, **condition)
        if not isinstance(output, torch.Tensor):
            output = output.sample if hasattr(output, "sample") else output[0]
        return output[:, : self.channels].float()


def load_network(student: StudentFolder) -> torch.nn.Module:
    """The student's network in float32, in evaluation mode, from the bytes that were checked against the manifest.

    Raises UnsupportedModel for a class that is not diffusers' (importing whatever a manifest names would run it: give
    such a network to `export` yourself), ExportError for weights that do not fit it.
    """
    path, folder = student.manifest.network.class_path, student.manifest.network.folder
    module, _, name = path.rpartition(".")
    if module.partition(".")[0] != "diffusers":
        raise UnsupportedModel(
            f"{path} is not a class of diffusers; load the network and give it as export(network=...)"
        )
    kind = getattr(importlib.import_module("diffusers"), name, None)
    if not (isinstance(kind, type) and issubclass(kind, torch.nn.Module) and hasattr(kind, "from_config")):
        raise UnsupportedModel(f"{path} is not a network of the installed diffusers; update diffusers")
    shards = [file for file in student.files(folder) if file.endswith(".safetensors")]
    if not shards:
        raise ExportError(f"{student.path}/{folder} holds no safetensors file, so there are no weights to export")
    weights: dict[str, torch.Tensor] = {}
    for shard in shards:
        try:
            weights |= load_safetensors(student.read(shard))
        except SafetensorError as error:
            raise ExportError(f"{shard} in {student.path} is not a whole safetensors file: {error}") from error
    try:
        network = _fill(kind, json.loads(student.read(f"{folder}/config.json")), weights)
    except (TypeError, ValueError, RuntimeError, KeyError, AttributeError, ArithmeticError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ExportError(f"the weights and config.json in {student.path}/{folder} make no {name}: {reason}") from error
    return network.float().eval().requires_grad_(False)


def _fill(kind: Any, config: dict[str, Any], weights: dict[str, torch.Tensor]) -> torch.nn.Module:
    """The network of `config` with `weights`. Its own are never allocated: a configuration may ask for any number."""
    with torch.device("meta"):
        network: torch.nn.Module = kind.from_config(config)
    network.load_state_dict(weights, assign=True)  # RuntimeError unless names and shapes are those of the weights
    if any(buffer.is_meta for buffer in network.buffers()):  # such as are computed and not saved
        network = kind.from_config(config)
        network.load_state_dict(weights)
    return network


def size_multiple(network: torch.nn.Module) -> int:
    """What height and width of the network's input must be multiples of: 2 for each time that it halves them.

    Raises UnsupportedModel for a network of which that is not known.
    """
    blocks = getattr(network, "down_blocks", None)
    if blocks is None:
        raise UnsupportedModel(
            f"{type(network).__name__} has no down_blocks, so the sizes that it takes are not known; "
            f"set latents.multiple in the manifest"
        )
    return 2 ** sum(getattr(block, "downsamplers", None) is not None for block in blocks)


def example_inputs(manifest: Manifest, batch: int) -> dict[str, torch.Tensor]:
    """Inputs of the denoiser's signature: zeros, and the first row's time."""
    latents = manifest.latents
    inputs = {
        "sample": torch.zeros(batch, latents.channels, latents.height, latents.width),
        "timestep": torch.full((batch,), float(manifest.step_table().timesteps[0])),
    }
    if manifest.condition is not None:
        inputs["class_labels"] = torch.zeros(batch, dtype=torch.int64)
    return inputs


def denoiser_model(denoiser: Denoiser, manifest: Manifest, precision: str = "fp32") -> onnx.ModelProto:
    """The denoiser in ONNX with a free batch axis: sample, timestep[, class_labels] -> f. Raises ExportError.

    The inputs and f are float32 in every precision; fp16 and bf16 are the network's own dtype between them.
    """
    if precision == "int8":
        return int8_model(denoiser_model(denoiser, manifest), manifest)
    dtype = DTYPES[precision]
    inner = denoiser.network if dtype == torch.float32 else _in_dtype(denoiser.network, dtype)
    network = Denoiser(inner, denoiser.channels, dtype=dtype).eval()
    traced = _trace(network, example_inputs(manifest, _EXAMPLE_BATCH), manifest.latents.dynamic)
    signature = list(traced.graph.input)
    model = _slim(onnxscript.optimizer.optimize(traced))
    model.graph.ClearField("input")  # a network may ignore an input, and the optimiser then drops it
    model.graph.input.extend(signature)
    clean_model(model)
    if model.functions:
        raise ExportError(f"the graph of {type(denoiser.network).__name__} has functions that were not inlined")
    if precision == "bf16":
        declare_bf16(model)
    if denoiser.guidance is not None:
        add_guidance(model, denoiser.guidance)
    return model


def _in_dtype(network: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """A copy of the network. Not by its own ``to``: diffusers' warns of what it then does not do."""
    return torch.nn.Module.to(copy.deepcopy(network), dtype)


#: Graphs of networks that were traced by this process, without their weights: students of one teacher differ in these
#: alone, and tracing takes ten times as long as all the rest.
_traced: dict[str, onnx.ModelProto] = {}


def _trace(network: Denoiser, inputs: dict[str, torch.Tensor], dynamic: Sequence[str]) -> onnx.ModelProto:
    """The graph as torch's exporter writes it, with the network's weights as initializers under their own names."""
    weights = {name: value.detach().cpu() for name, value in network.state_dict().items()}
    key = _structure(network, inputs, weights, dynamic)
    if key is None or key not in _traced:
        model = _torch_export(network, inputs, dynamic)
        if key is None or not _holds(model, weights):
            return model
        for tensor in model.graph.initializer:
            tensor.ClearField("raw_data")
        _traced[key] = model
    model = onnx.ModelProto()
    model.CopyFrom(_traced[key])
    for tensor in model.graph.initializer:
        tensor.raw_data = _bytes(weights[tensor.name])
    return model


def _bytes(value: torch.Tensor) -> bytes:
    """A tensor as ONNX stores it; numpy has no bfloat16."""
    plain = value.contiguous()
    return (plain.view(torch.int16) if plain.dtype == torch.bfloat16 else plain).numpy().tobytes()


def _structure(
    network: Denoiser, inputs: dict[str, torch.Tensor], weights: dict[str, torch.Tensor], dynamic: Sequence[str]
) -> str | None:
    """All that a traced graph depends on, weights apart; None for a network without a diffusers config."""
    config = getattr(network.network, "config", None)
    if not type(network.network).__module__.startswith("diffusers.") or config is None:
        return None
    kind = f"{type(network.network).__module__}.{type(network.network).__qualname__}"
    shapes = {name: [str(value.dtype), *value.shape] for name, value in weights.items()}
    given = {name: [str(value.dtype), *value.shape] for name, value in inputs.items()}
    facts = [kind, network.channels, dict(config), shapes, given, *dynamic]
    return json.dumps(facts, sort_keys=True, default=str)


def _holds(model: onnx.ModelProto, weights: dict[str, torch.Tensor]) -> bool:
    """Whether the graph's initializers are weights by name and by bytes, so that others can take their place."""
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    return set(stored) <= set(weights) and all(
        tensor.raw_data == _bytes(weights[name]) for name, tensor in stored.items()
    )


def _torch_export(network: Denoiser, inputs: dict[str, torch.Tensor], dynamic: Sequence[str]) -> onnx.ModelProto:
    axes: dict[str, Any] = {name: {0: torch.export.Dim("batch")} for name in inputs}
    axes["sample"] |= {2 + _AXES.index(axis): torch.export.Dim(axis) for axis in dynamic}
    with _quiet_exporter(), torch.no_grad():
        try:
            program = torch.onnx.export(
                network,
                tuple(inputs.values()),
                dynamo=True,
                opset_version=OPSET,
                dynamic_shapes=tuple(axes[name] for name in inputs),
                input_names=list(inputs),
                output_names=["f"],
                verbose=False,
                optimize=False,  # it is optimised with its weights in place
            )
        except (torch.onnx.errors.OnnxExporterError, torch._dynamo.exc.TorchDynamoException) as error:
            reason = " ".join(str(error).split())[:500]
            raise ExportError(f"torch cannot export {type(network.network).__name__} to ONNX: {reason}") from error
    assert program is not None  # dynamo=True always returns the program
    return program.model_proto


def add_guidance(model: onnx.ModelProto, guidance: Guidance) -> None:
    """Make a denoiser a guided one: its batch is doubled, the second half asked for 'no class', and the halves mixed.

    It is done here since torch.export cannot double a free batch axis through diffusers' networks.
    """
    graph, make = model.graph, onnx.helper.make_node
    names = [value.name for value in graph.input]
    for node in graph.node:
        for old in names:
            rename(node, old, f"{old}_twice")
        rename(node, "f", "f_twice")
    constants = {
        "guidance_null": np.array(guidance.null_class, np.int64),
        "guidance_scale": np.array(guidance.scale, np.float32),
        "guidance_zero": np.array(0, np.int64),
    }
    graph.initializer.extend(onnx.numpy_helper.from_array(value, name) for name, value in constants.items())
    before = [
        make("Mul", ["class_labels", "guidance_zero"], ["guidance_zeros"]),
        make("Add", ["guidance_zeros", "guidance_null"], ["guidance_nulls"]),
        *(
            make("Concat", [name, "guidance_nulls" if name == "class_labels" else name], [f"{name}_twice"], axis=0)
            for name in names
        ),
    ]
    after = [
        make("Split", ["f_twice"], ["f_asked", "f_unasked"], axis=0, num_outputs=2),
        make("Sub", ["f_asked", "f_unasked"], ["f_difference"]),
        make("Mul", ["f_difference", "guidance_scale"], ["f_guidance"]),
        make("Add", ["f_unasked", "f_guidance"], ["f"]),
    ]
    nodes = [*before, *graph.node, *after]
    graph.ClearField("node")
    graph.node.extend(nodes)


def rename(node: onnx.NodeProto, old: str, new: str) -> None:
    """Give a value another name in one node's inputs and outputs."""
    for side in (node.input, node.output):
        for index, name in enumerate(side):
            if name == old:
                side[index] = new


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Without the exporter's remarks on itself: that torchvision is absent, and how it names axes."""
    log = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r".*LeafSpec.*is deprecated", category=FutureWarning)
            warnings.filterwarnings("ignore", message=r"# The axis name: .* will not be used", category=UserWarning)
            yield
    finally:
        log.setLevel(level)


def _slim(model: onnx.ModelProto) -> onnx.ModelProto:
    """Fold what the exporter left over, where onnxslim is installed: a quarter fewer nodes, the same results."""
    try:
        import onnxslim
    except ImportError:
        return model
    slimmed: onnx.ModelProto = onnxslim.slim(model)
    return slimmed


def clean_model(model: onnx.ModelProto) -> onnx.ModelProto:
    """Remove what says how and where the graph was made (stack traces with paths): equal graphs are equal bytes."""
    for message in (model, model.graph, *model.graph.node, *model.graph.input, *model.graph.output):
        message.ClearField("metadata_props")
        message.ClearField("doc_string")
    for tensor in model.graph.initializer:
        tensor.ClearField("metadata_props")
        tensor.ClearField("doc_string")
    model.graph.ClearField("value_info")  # engines infer it again
    model.graph.name = "denoiser"
    return model
