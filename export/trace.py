"""A torch module to an ONNX graph with named inputs and outputs, by torch's exporter.

The same module gives the same graph on every machine. Modules that differ only in their weights are traced once.
"""

from __future__ import annotations

import inspect
import json
import logging
import operator
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import onnx
import onnxscript.optimizer
import torch
from onnxscript import opset20
from torch import Tensor

from redif_sdk.artifact.manifest import Manifest
from redif_sdk.artifact.records import TensorSpec
from redif_sdk.errors import ExportError
from redif_sdk.export.precision import declare_bf16
from redif_sdk.export.weights import LazyModel, lazy_model

__all__ = ["OPSET", "clean_model", "trace_graph"]

#: 18 to 20 decompose GroupNorm and attention, which ONNX Runtime runs fastest and every TensorRT parses.
OPSET = 20

_EXAMPLE_BATCH = 2  # torch.export would take 1 for a constant
_EXAMPLE_TOKENS = 154  # no other size that a network has: one that is equal would be taken for the same
#: For the exporter alone; graphs take any batch. diffusers' upsampling has a branch for 64 images and more, on which
#: the exporter would stumble, and begin anew.
_LARGEST_BATCH = 63
_ONNX_DTYPES = {"float32": onnx.TensorProto.FLOAT, "int64": onnx.TensorProto.INT64}
_TORCH_DTYPES = {"float32": torch.float32, "int64": torch.int64}


def trace_graph(
    module: torch.nn.Module,
    manifest: Manifest,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    precision: str,
) -> LazyModel:
    """The optimised graph of `module`, with these inputs and outputs. Its weights are read when it is written.

    Raises:
        ExportError: torch's exporter failed.
    """
    tensors = dict(_tensors(module))
    model = onnx.ModelProto()
    model.CopyFrom(_trace(module.eval(), tensors, manifest, inputs, outputs))
    if precision == "bf16":
        declare_bf16(model)
    lazy = lazy_model(model, {name: tensors[name] for name in _weights(tensors)})
    for field, specs in ((model.graph.input, inputs), (model.graph.output, outputs)):
        del field[:]  # a network may ignore an input, and the optimiser then drops it
        field.extend(
            onnx.helper.make_tensor_value_info(spec.name, _ONNX_DTYPES[spec.dtype], spec.shape) for spec in specs
        )
    return lazy


#: Graphs that this process traced and optimised, whose weights are inputs. Students of one teacher differ only in
#: these, and tracing takes ten times as long as everything else.
_traced: dict[str, onnx.ModelProto] = {}


def _trace(
    module: torch.nn.Module,
    tensors: Mapping[str, Tensor],
    manifest: Manifest,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
) -> onnx.ModelProto:
    """The optimised graph, whose weights are inputs under their own names. It is not to be changed."""
    key = _structure(module, tensors, manifest, inputs)
    if key is not None and key in _traced:
        return _traced[key]
    program = _torch_export(module, manifest, inputs, outputs)
    ours = _weights_as_inputs(program, _weights(tensors)) <= set(tensors)
    model = _slim(onnxscript.optimizer.optimize(program.model_proto))
    clean_model(model)
    if model.functions:
        raise ExportError(f"the graph of {_name(module)} has functions that were not inlined")
    if key is not None and ours:
        _traced[key] = model
    return model


def _weights(tensors: Mapping[str, Tensor]) -> list[str]:
    """The tensors that are kept out of the graph; what counts places or tokens stays, for shapes depend on it."""
    return [name for name, value in tensors.items() if value.is_floating_point()]


def _weights_as_inputs(program: Any, weights: Collection[str]) -> set[str]:
    """Make inputs of a program's weights, so that its optimisers need no values; returns the other initializers."""
    graph = program.model.graph
    for name in [name for name in graph.initializers if name in weights]:
        value = graph.initializers.pop(name)
        value.shape, value.dtype, value.const_value = value.const_value.shape, value.const_value.dtype, None
        graph.inputs.append(value)
    return set(graph.initializers)


def _tensors(module: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All parameters and buffers, under each of their names."""
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _structure(
    module: torch.nn.Module, tensors: Mapping[str, Tensor], manifest: Manifest, inputs: Sequence[TensorSpec]
) -> str | None:
    """Everything that a traced graph depends on, except weights; None for a network without a library's config."""
    parts = [_library_part(part) for part in _networks(module)]
    if None in parts:
        return None
    own = [
        {name: value for name, value in vars(part).items() if not name.startswith("_") and name != "nulls"}
        for part in module.modules()
        if type(part).__module__.startswith("redif_sdk.")
    ]
    shapes = {name: [str(value.dtype), *value.shape] for name, value in tensors.items()}
    counts = {name: value.tolist() for name, value in tensors.items() if not value.is_floating_point()}
    given = [spec.model_dump(mode="json") for spec in inputs]
    return json.dumps(
        [parts, own, shapes, counts, given, manifest.latents.model_dump(mode="json")], sort_keys=True, default=str
    )


def _networks(module: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """The outermost parts of a module that are not classes of this package."""
    ours = type(module).__module__.startswith("redif_sdk.") or isinstance(module, torch.nn.ModuleList)
    if not ours:
        yield module
        return
    for part in module.children():
        yield from _networks(part)


def _library_part(network: torch.nn.Module) -> list[Any] | None:
    """The class and configuration of a network of diffusers or transformers; None for any other."""
    config: Any = getattr(network, "config", None)
    kind = f"{type(network).__module__}.{type(network).__qualname__}"
    if config is None or kind.partition(".")[0] not in ("diffusers", "transformers"):
        return None
    return [kind, config.to_dict() if hasattr(config, "to_dict") else dict(config)]


def _name(module: torch.nn.Module) -> str:
    """The networks of a module, as an error names them."""
    return ", ".join(type(part).__name__ for part in _networks(module))


def _examples(manifest: Manifest, inputs: Sequence[TensorSpec]) -> tuple[Tensor, ...]:
    """Zeros of the inputs' shapes. A free side is at least two multiples long: torch.export takes 1 as a constant."""
    latents = manifest.latents
    sizes: dict[str, int] = {"batch": _EXAMPLE_BATCH, "tokens": _EXAMPLE_TOKENS}
    sizes |= {axis: max(getattr(latents, axis), 2 * latents.multiple) for axis in latents.dynamic}
    sizes |= {f"image_{axis}": manifest.postprocess.scale * sizes[axis] for axis in latents.dynamic}
    return tuple(
        torch.zeros(
            [sizes[side] if isinstance(side, str) else side for side in spec.shape], dtype=_TORCH_DTYPES[spec.dtype]
        )
        for spec in inputs
    )


def _free_axes(module: torch.nn.Module, manifest: Manifest, inputs: Sequence[TensorSpec]) -> tuple[Any, ...]:
    """torch.export's description of the free axes, in the structure of the arguments of the module's ``forward``."""
    multiple = manifest.latents.multiple
    axes: dict[str, Any] = {
        "batch": torch.export.Dim("batch", max=_LARGEST_BATCH),
        "tokens": torch.export.Dim("tokens"),
    }
    for axis in manifest.latents.dynamic:
        axes[axis] = torch.export.Dim(axis) if multiple == 1 else multiple * torch.export.Dim(f"{axis}_steps")
        pixels = multiple * manifest.postprocess.scale
        axes[f"image_{axis}"] = pixels * torch.export.Dim(f"{axis}_steps") if pixels > 1 else axes[axis]
    free = [{index: axes[side] for index, side in enumerate(spec.shape) if isinstance(side, str)} for spec in inputs]
    parameters = inspect.signature(module.forward).parameters.values()
    named = sum(parameter.kind is not inspect.Parameter.VAR_POSITIONAL for parameter in parameters)
    return (*free[:named], tuple(free[named:])) if free[named:] else tuple(free)


def _torch_export(
    module: torch.nn.Module, manifest: Manifest, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]
) -> Any:
    """The exporter's program, not optimised."""
    with _quiet_exporter(), _translations_read_once(), torch.no_grad():
        try:
            program = torch.onnx.export(
                module,
                _examples(manifest, inputs),
                dynamo=True,
                opset_version=OPSET,
                dynamic_shapes=_free_axes(module, manifest, inputs),
                input_names=[spec.name for spec in inputs],
                output_names=[spec.name for spec in outputs],
                verbose=False,
                optimize=False,  # that comes when its weights are inputs
                custom_translation_table={torch.ops.aten.squeeze.dim: _squeeze, operator.floordiv: _floor_divide},
            )
        except (torch.onnx.errors.OnnxExporterError, torch._dynamo.exc.TorchDynamoException) as error:
            reason = " ".join(str(error.__cause__ or error).split())[:500]
            raise ExportError(f"torch cannot export {_name(module)} to ONNX: {reason}") from error
    assert program is not None  # dynamo=True always returns the program
    return program


def _squeeze(self: Any, dim: int) -> Any:
    """torch does not squeeze an axis longer than 1; the exporter would, which is an error in ONNX."""
    if len(self.shape) and self.shape[dim] == 1:
        return opset20.Squeeze(self, [dim])
    return opset20.Identity(self)


def _floor_divide(self: Any, other: Any) -> Any:
    """Python rounds a quotient of sizes down; ONNX rounds it towards zero, and torch puts minus signs where none was:
    (16 - n) // 2 becomes 8 + -n // 2."""
    return opset20.Div(opset20.Sub(self, opset20.Mod(self, other)), other)


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Silence the exporter's warnings about torchvision and the names of axes."""
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


@contextmanager
def _translations_read_once() -> Iterator[None]:
    """Let the exporter take its list of translations from the export before; parsing them anew takes a second each."""
    from torch.onnx._internal.exporter import _registration

    apis: Any = getattr(_registration, "onnxscript_apis", None)
    listed = getattr(apis, "get_torchlib_ops", None)
    if listed is None:  # another torch
        yield
        return
    apis.get_torchlib_ops = lambda: _translations(listed)
    try:
        yield
    finally:
        apis.get_torchlib_ops = listed


@cache
def _translations(read: Callable[[], list[Any]]) -> list[Any]:
    return read()


def _slim(model: onnx.ModelProto) -> onnx.ModelProto:
    """Simplify the graph if onnxslim is installed: a quarter fewer nodes, the same results."""
    try:
        import onnxslim
    except ImportError:
        return model
    with _names_first():
        slimmed: onnx.ModelProto = onnxslim.slim(model)
    return slimmed


@contextmanager
def _names_first() -> Iterator[None]:
    """Let onnxslim compare two tensors by their names before all else that they have, which changes no answer.

    It looks for each of a graph's inputs, here its weights, among all tensors: 73 s in place of 15 for the 686 of
    Stable Diffusion 1.5.
    """
    from onnxslim.third_party.onnx_graphsurgeon import Variable

    compared = Variable.__eq__

    def equal(self: Any, other: object) -> bool:
        return self is other or (self.name == getattr(other, "name", None) and compared(self, other))

    Variable.__eq__ = equal
    try:
        yield
    finally:
        Variable.__eq__ = compared


def clean_model(model: onnx.ModelProto) -> onnx.ModelProto:
    """Remove stack traces, paths and comments, so that equal graphs are equal bytes."""
    for message in (model, model.graph, *model.graph.node, *model.graph.input, *model.graph.output):
        message.ClearField("metadata_props")
        message.ClearField("doc_string")
    for tensor in model.graph.initializer:
        tensor.ClearField("metadata_props")
        tensor.ClearField("doc_string")
    model.graph.ClearField("value_info")  # engines infer it again
    return model
