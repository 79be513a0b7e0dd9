"""ONNX graphs to TensorRT engines: one builder for both flavours, Enterprise (``tensorrt``) and RTX (``tensorrt-rtx``).

They share one Python API. RTX builds for named compute capabilities, with or without a GPU; Enterprise builds on the
GPU that will run the engine, and keeps a cache of timings. The precision is in the graph (dtypes, Q/DQ). Engines are
kept in `redif_sdk.runtimes.tensorrt.cache`, never in the student's folder, and run by
`redif_sdk.runtimes.tensorrt.runtime`. Needs no torch. RTX was tested without a GPU; Enterprise was not tested.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import onnx
from pydantic import ValidationError

from redif_sdk.artifact.atomic import atomic_write
from redif_sdk.artifact.folder import StudentFolder
from redif_sdk.artifact.manifest import Manifest
from redif_sdk.artifact.records import Graph, TensorSpec
from redif_sdk.errors import ExportError, InvalidRequest, RuntimeUnavailable
from redif_sdk.export.tensorrt_graph import refuse_opset, refuse_rtx
from redif_sdk.runtimes import loops_in_numpy
from redif_sdk.runtimes.protocol import RuntimeOptions
from redif_sdk.runtimes.tensorrt.cache import (
    FLAVOURS,
    BuildSettings,
    Built,
    EngineCache,
    EngineKey,
    EngineRecord,
    Flavour,
    graph_digest,
)
from redif_sdk.runtimes.tensorrt.cuda import Gpu, find_gpu
from redif_sdk.runtimes.tensorrt.runtime import library, load_weights, logger

__all__ = ["LEVELS", "build_engines"]

Range = tuple[int, int, int]
Size = tuple[int, int]

#: Names of builder_optimization_level, 0 to 5.
LEVELS = {"fast": 1, "default": 3, "best": 5}

#: Names of hardware_compatibility_level.
COMPATIBILITY = {"none": "NONE", "ampere-plus": "AMPERE_PLUS", "same-cc": "SAME_COMPUTE_CAPABILITY"}

#: Chunks of a prompt that engines take, of students with long prompts.
MOST_CHUNKS = 4

_DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "INT64": "int64",
    "INT32": "int32",
    "UINT8": "uint8",
    "BOOL": "bool",
}
_building = Lock()  # TensorRT has one logger in a process; one build at a time, so that its errors belong to it


def build_engines(
    folder: str | Path,
    *,
    flavour: Flavour = "tensorrt-rtx",
    precisions: Sequence[str] | None = None,
    components: Sequence[str] | None = None,
    sm: Sequence[int] = (),
    engine_dir: str | Path | None = None,
    batches: Range = (1, 4, 8),
    sizes: tuple[Size, Size, Size] | None = None,
    max_steps: int | None = None,
    level: str = "default",
    workspace_mb: int | None = None,
    hardware_compatibility: str = "none",
    strip_weights: bool = False,
    timing_cache: bool = True,
) -> list[dict[str, Any]]:
    """An engine for each graph of the student, built or found in the cache.

    Args:
        folder: The student's folder.
        flavour: "tensorrt-rtx" or "tensorrt" (Enterprise).
        precisions: Precisions of the graphs; None: all.
        components: Components of the graphs; None: all.
        sm: Compute capabilities to build for, 89 for 8.9. RTX only; default: that of this machine's GPU.
        engine_dir: The folder of the engines; None: the cache, which is for this machine's GPU only.
        batches: (smallest, best, largest) batch.
        sizes: The same of the images' (height, width) in pixels, for students with free sizes.
        max_steps: Most steps of a table; None: those of the student's longest table.
        level: How long the builder searches: "fast", "default" or "best".
        workspace_mb: Most MiB of memory for one layer; None: all of the GPU's.
        hardware_compatibility: Further GPUs that an Enterprise engine runs on: "none", "ampere-plus" or "same-cc".
        strip_weights: Leave the weights out; they are put back from the student's graph when the engine is loaded.
        timing_cache: Keep the timings of Enterprise's builder for later builds.

    Returns:
        A row for each engine: component, precision, flavour, version, targets, device, file, bytes, seconds (of the
        build), cache ("hit", or "miss: " and the reason), inputs, outputs, profile.

    Raises:
        InvalidRequest: An argument is wrong, or does not go with another one.
        RuntimeUnavailable: The library, or a GPU that the build needs, is not available.
        ExportError: TensorRT cannot build a graph; the message names the node.
    """
    settings = _settings(flavour, level, workspace_mb, hardware_compatibility, strip_weights)
    options = RuntimeOptions(engine_dir=None if engine_dir is None else Path(engine_dir))
    student = StudentFolder(folder)
    graphs = _graphs(student, components, precisions, flavour)
    axes = _axes(student.manifest, batches, sizes, max_steps)
    engines = EngineCache(options)
    trt = library(flavour)
    targets, gpu = _targets(trt, flavour, sorted(set(sm)), own_folder=engine_dir is not None)
    if strip_weights and gpu is None:
        raise RuntimeUnavailable("an engine without weights can be built on a GPU only; leave strip_weights out")
    rows = []
    for graph in graphs:
        key = EngineKey(
            graph=graph_digest(student, graph),
            component=graph.component,
            precision=graph.precision,
            flavour=flavour,
            version=trt.__version__,
            targets=targets,
            device=None if gpu is None else gpu.name,
            profile=_profile(graph, axes),
            settings=settings,
        )
        timings = None
        if timing_cache and flavour == "tensorrt" and gpu is not None:
            timings = engines.folder / f"{flavour}-{key.version}.{re.sub(r'[^0-9A-Za-z]+', '-', gpu.name)}.timings"
        job = _Job(trt, student, graph, key, timings)
        record, reason = engines.build_once(key, job.build)
        rows.append(_row(engines, record, reason))
    return rows


def _row(engines: EngineCache, record: EngineRecord, reason: str) -> dict[str, Any]:
    key = record.key.model_dump(
        mode="json", include={"component", "precision", "flavour", "version", "targets", "device"}
    )
    built = record.model_dump(mode="json", include={"bytes", "seconds", "inputs", "outputs"})
    file = str(engines.folder / record.file)
    return {**key, "file": file, "cache": reason, **built, "profile": record.key.model_dump(mode="json")["profile"]}


# ---------------------------------------------------------------------- what was asked for


def _settings(
    flavour: str, level: str, workspace_mb: int | None, hardware_compatibility: str, strip_weights: bool
) -> BuildSettings:
    if flavour not in FLAVOURS:
        raise InvalidRequest(f"flavour {flavour!r} is unknown; use {' or '.join(FLAVOURS)}")
    if flavour == "tensorrt-rtx" and hardware_compatibility != "none":
        raise InvalidRequest(
            "hardware_compatibility is for tensorrt; a tensorrt-rtx engine runs on all GPUs that sm names"
        )
    try:
        return BuildSettings.model_validate(
            {
                "level": level,
                "workspace_mb": workspace_mb,
                "hardware_compatibility": hardware_compatibility,
                "strip_weights": strip_weights,
            }
        )
    except ValidationError as error:
        first = error.errors()[0]
        raise InvalidRequest(f"{first['loc'][0]} is {first['input']!r}: {first['msg']}") from error


def _graphs(
    student: StudentFolder, components: Sequence[str] | None, precisions: Sequence[str] | None, flavour: str
) -> list[Graph]:
    """The graphs of these components and precisions; of None, of all that the flavour runs.

    Raises InvalidRequest for one that is not there.
    """
    present = student.manifest.graphs
    if not present:
        raise InvalidRequest(f"{student.path} has no graphs to build engines of; run redif export {student.path}")
    for what, asked, known in (
        ("component", components, [graph.component for graph in present]),
        ("precision", precisions, [graph.precision for graph in present]),
    ):
        for choice in asked or ():
            if choice not in known:
                have = ", ".join(dict.fromkeys(known))
                raise InvalidRequest(
                    f"{student.path} has no graph of {what} {choice!r} (it has {have}); export it first"
                )
    chosen = [
        graph
        for graph in present
        if graph.component in (components or [graph.component])
        and graph.precision in (precisions or [graph.precision])
        and (components or graph.component != "generator" or not loops_in_numpy(flavour, graph.precision))
    ]
    if not chosen:
        raise InvalidRequest(f"{student.path} has no {', '.join(components or ())} in {', '.join(precisions or ())}")
    return chosen


def _tokens(manifest: Manifest) -> Range:
    """The tokens of prompts, where they may be long."""
    own = next((spec.shape[1] for spec in manifest.condition_tensors if len(spec.shape) > 1), 1)
    assert isinstance(own, int)
    return own, own, MOST_CHUNKS * own


def _axes(
    manifest: Manifest, batches: Range, sizes: tuple[Size, Size, Size] | None, max_steps: int | None
) -> dict[str, Range]:
    """The range of each free axis, by its name in the graphs."""
    tables = [manifest.step_table(steps) for steps in manifest.supported_steps]
    longest = max(manifest.supported_steps)
    most = longest if max_steps is None else max_steps
    if most < longest:
        raise InvalidRequest(
            f"max_steps is {most}, and {manifest.name} has a table of {longest} steps; give at least that"
        )
    slices = [table.noise_slices for table in tables]
    most_slices = most + 1 if any(table.stochastic for table in tables) else 1
    latents, scale = manifest.latents, manifest.postprocess.scale
    extents = [latents.size(height, width, scale) for height, width in sizes or [(None, None)] * 3]
    sides = {
        "height": _range("sizes", [height for height, _ in extents]),
        "width": _range("sizes", [width for _, width in extents]),
    }
    return {
        **sides,
        **{f"image_{side}": (scale * low, scale * best, scale * high) for side, (low, best, high) in sides.items()},
        "batch": _range("batches", batches),
        "rows": (batches[0], 2 * batches[1], 2 * batches[2]),  # of images that are guided: `runtimes.guided`
        "tokens": _tokens(manifest),
        "steps": (1, tables[0].num_inference_steps, most),  # from an image on, a table's last rows
        "slices": (min(slices), slices[0], most_slices),
    }


def _range(what: str, values: Sequence[int]) -> Range:
    if len(values) != 3 or values[0] < 1 or list(values) != sorted(values):
        raise InvalidRequest(f"{what} are {tuple(values)}; give smallest, best and largest, at least 1 and rising")
    return values[0], values[1], values[2]


def _profile(graph: Graph, axes: Mapping[str, Range]) -> dict[str, tuple[tuple[int, ...], ...]]:
    """The smallest, best and largest shape of every input that has a free axis."""
    profile = {}
    for spec in graph.inputs:
        free = [size for size in spec.shape if isinstance(size, str)]
        unknown = [name for name in free if name not in axes]
        if unknown:
            raise ExportError(f"{spec.name} of {graph.file} has the free axis {unknown[0]!r}, whose range is not known")
        if free:
            profile[spec.name] = tuple(
                tuple(axes[size][which] if isinstance(size, str) else size for size in spec.shape) for which in range(3)
            )
    return profile


def _targets(trt: Any, flavour: Flavour, sm: list[int], *, own_folder: bool) -> tuple[list[int], Gpu | None]:
    """The compute capabilities to build for, and the GPU of the engine's key, or None."""
    gpu = find_gpu()
    if flavour == "tensorrt":
        if sm:
            raise InvalidRequest("tensorrt builds for the GPU that it runs on; sm is for tensorrt-rtx")
        if isinstance(gpu, str):
            raise RuntimeUnavailable(
                f"tensorrt builds engines on the GPU that they are for, and none was found ({gpu}); use tensorrt-rtx, "
                f"which builds for named targets"
            )
        return [gpu.sm], gpu
    known = sorted(int(name[2:]) for name in dir(trt.ComputeCapability) if re.fullmatch(r"SM\d+", name))
    for target in sm:
        if target not in known:
            have = ", ".join(map(str, known))
            raise InvalidRequest(f"sm {target} is not a target of tensorrt-rtx {trt.__version__}; use {have}")
    if isinstance(gpu, str):
        if not sm:
            raise RuntimeUnavailable(
                f"no GPU was found ({gpu}), so the targets have to be named: --sm 89, of {', '.join(map(str, known))}"
            )
        if not own_folder:
            raise InvalidRequest(
                "an engine that is built without a GPU cannot enter the cache, which is for this machine's own; name a "
                "folder for it: --engine-dir"
            )
        return sm, None
    if sm and not own_folder and gpu.sm not in sm:
        raise InvalidRequest(
            f"the cache is for this machine's GPU, {gpu.name}, which is sm {gpu.sm}; add that to --sm, or name another "
            f"folder: --engine-dir"
        )
    return sm or [gpu.sm], None if sm and own_folder else gpu


# ---------------------------------------------------------------------- the build


class _CheckedGraph(NamedTuple):
    """A graph's checked bytes, which stay in memory while TensorRT reads them."""

    model: onnx.ModelProto
    data: bytes
    blobs: dict[str, bytes]  # the files of large weights, by their names in the graph


class _Job(NamedTuple):
    """One engine to build."""

    trt: Any
    student: StudentFolder
    graph: Graph
    key: EngineKey
    timings: Path | None

    def build(self) -> Built:
        """Check the graph, parse it and build the engine. Raises ExportError."""
        source = _read(self.student, self.graph)
        refuse_opset(source.model, self.graph.file)
        if self.key.flavour == "tensorrt-rtx":
            refuse_rtx(source.model, self.graph.file, self.key.targets)
        with _building:
            start = time.perf_counter()
            log = logger(self.key.flavour)
            log.take_errors()
            builder = self.trt.Builder(log)
            network = builder.create_network(_network_flags(self.trt))
            parser = self.trt.OnnxParser(network, log)
            held = _parse(parser, source, self.graph)
            inputs = self._check(network.num_inputs, network.get_input, self.graph.inputs)
            outputs = self._check(network.num_outputs, network.get_output, self.graph.outputs)
            config = self._config(builder)
            plan = builder.build_serialized_network(network, config)
            del held
            if plan is None:
                raise ExportError(f"{self.key.flavour} cannot build {self.graph.file}: {log.take_errors()}")
            self._keep_timings(config)
            return Built(bytes(plan), time.perf_counter() - start, inputs, outputs)

    def _check(self, number: int, tensor: Any, described: list[TensorSpec]) -> list[TensorSpec]:
        """Check that the network's inputs or outputs are those of the manifest, and return the latter."""
        found = {tensor(index).name: tensor(index) for index in range(number)}
        if set(found) != {spec.name for spec in described}:
            names = ", ".join(spec.name for spec in described)
            raise ExportError(f"{self.graph.file} has {', '.join(found)} for TensorRT, and {names} in the manifest")
        for spec in described:
            dtype = _DTYPES.get(found[spec.name].dtype.name, found[spec.name].dtype.name)
            shape = tuple(found[spec.name].shape)
            asked = tuple(-1 if isinstance(size, str) else size for size in spec.shape)
            # The parser may not know the size of an output that it computes.
            if (
                dtype != spec.dtype
                or len(shape) != len(asked)
                or any(have not in (-1, want) for have, want in zip(shape, asked, strict=True))
            ):
                raise ExportError(
                    f"{spec.name} of {self.graph.file} is {dtype} {shape} for TensorRT, and {spec.dtype} {asked} in "
                    f"the manifest; export the student again"
                )
        return described

    def _config(self, builder: Any) -> Any:
        trt, key = self.trt, self.key
        config = builder.create_builder_config()
        config.builder_optimization_level = LEVELS[key.settings.level]
        config.clear_flag(trt.BuilderFlag.TF32)
        if key.settings.workspace_mb is not None:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, key.settings.workspace_mb << 20)
        if key.settings.strip_weights:
            config.set_flag(trt.BuilderFlag.STRIP_PLAN)
        if key.flavour == "tensorrt-rtx":
            self._name_targets(config)
        else:
            config.hardware_compatibility_level = getattr(
                trt.HardwareCompatibilityLevel, COMPATIBILITY[key.settings.hardware_compatibility]
            )
        if self.timings is not None:
            kept = self.timings.read_bytes() if self.timings.is_file() else b""
            config.set_timing_cache(config.create_timing_cache(kept), False)
        self._name_shapes(config, builder.create_optimization_profile())
        return config

    def _name_targets(self, config: Any) -> None:
        known = self.trt.ComputeCapability
        config.num_compute_capabilities = len(self.key.targets)
        for index, target in enumerate(self.key.targets):
            if not config.set_compute_capability(getattr(known, f"SM{target}", known.CURRENT), index):
                raise ExportError(f"tensorrt-rtx does not take the target sm {target}")

    def _name_shapes(self, config: Any, profile: Any) -> None:
        for name, shapes in self.key.profile.items():
            profile.set_shape(name, *shapes)
            if [tuple(shape) for shape in profile.get_shape(name)] != [tuple(shape) for shape in shapes]:
                raise ExportError(f"TensorRT does not take the shapes {shapes} of {name}")
        if self.key.profile and config.add_optimization_profile(profile) < 0:
            reason = logger(self.key.flavour).take_errors()
            raise ExportError(f"TensorRT does not take the shapes of {self.graph.file}: {reason}")

    def _keep_timings(self, config: Any) -> None:
        """Write the builder's timings, for later builds on this GPU."""
        if self.timings is not None:
            atomic_write(self.timings, bytes(config.get_timing_cache().serialize()))


def _network_flags(trt: Any) -> int:
    """Strong typing, so that types are the graph's own: a flag in TensorRT 10, the only mode in 11 and in RTX."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _read(student: StudentFolder, graph: Graph) -> _CheckedGraph:
    data, blobs = student.read_graph(graph)
    return _CheckedGraph(onnx.load_model_from_string(data), data, blobs)


def _parse(parser: Any, source: _CheckedGraph, graph: Graph) -> list[Any]:
    """Parse a graph; the returned objects hold its weights and have to live until the engine is built."""
    if not source.blobs:
        held: list[Any] = [source.data]
        done = parser.parse(source.data)
    else:
        done = parser.load_model_proto(source.data)
        held = load_weights(parser, source.model, source.blobs) if done else []
        done = done and parser.parse_model_proto()
    if not done:
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        raise ExportError(
            f"TensorRT cannot read {graph.file}: {'; '.join(map(_parse_error, errors)) or 'no reason given'}"
        )
    return held


def _parse_error(error: Any) -> str:
    reason = " ".join(error.desc().split())
    if not error.node_operator():
        return reason
    return f"node {error.node_name() or error.node()} ({error.node_operator()}): {reason}"
