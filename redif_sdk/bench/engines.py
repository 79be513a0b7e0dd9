"""The contenders of `redif bench` without torch: FastPipeline, and the engines used directly.

The bare engines are given what serves them best: the fused graph or the network stepped, shapes fixed, the precision
said. `overhead` measures what FastPipeline adds to its own engine. How things are timed stands in `bench.py`.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from redif_sdk import runtimes
from redif_sdk.artifact.records import Graph
from redif_sdk.bench.interleave import interleave
from redif_sdk.bench.rounds import Contender, Fresh, Generate, Prepared, Workload
from redif_sdk.errors import RuntimeUnavailable
from redif_sdk.images import to_uint8
from redif_sdk.pipeline import FastPipeline
from redif_sdk.runtimes import Runtime
from redif_sdk.sampling.loop import run_steps

__all__ = ["ENGINES", "NAMES", "contenders", "overhead"]

#: Engines that FastPipeline is measured on, beside "auto".
ENGINES = ("onnxruntime", "openvino", "tensorrt", "tensorrt-rtx")
NAMES = ("fastpipeline-auto", "fastpipeline", "onnxruntime", "openvino", "openvino-stepped")

#: ONNX Runtime's execution provider by kind of device.
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider", "dml": "DmlExecutionProvider"}

_ENGINE_ERRORS = (RuntimeError, ValueError, TypeError)
OVERHEAD_SECONDS = 8.0  # at most, for the pairs of calls that the overhead is measured with
OVERHEAD_PAIRS = (10, 200)
PLAIN_CALLS = 20  # at most, for what a call spends beside its engine


def contenders(engines: Sequence[str], precisions: Sequence[str]) -> list[Contender]:
    """FastPipeline with "auto" and on each of `engines` in each of `precisions`, and the bare engines."""
    found = [_fast("fastpipeline-auto", "auto", "auto")]
    for engine in engines:
        for precision in precisions:
            found.append(_fast("fastpipeline", engine, precision))
            if engine == "onnxruntime":
                found.append(_onnxruntime(precision))
            elif engine == "openvino":
                found += [_openvino(precision, fused=True), _openvino(precision, fused=False)]
    return found


def _fast(name: str, runtime: str, precision: str) -> Contender:
    def prepare(work: Workload) -> Prepared:
        pipe = _pipeline(work, runtime, precision)
        info = pipe.runtime_info
        return Prepared(
            lambda noise, condition: pipe.generate_array(noise, condition, work.steps),
            info["runtime"],
            info["precision"],
        )

    def fresh(work: Workload) -> Fresh:
        options = {"runtime": runtime, "device": work.device, "precision": precision, "num_threads": work.num_threads}
        call = {**work.asked, "num_inference_steps": work.steps, "seed": 0}
        return Fresh(FAST_PROGRAM, {"student": str(work.student.path), "options": options, "call": call})

    return Contender(name, runtime, precision, prepare, fresh)


def _pipeline(work: Workload, runtime: str, precision: str) -> FastPipeline:
    return FastPipeline.from_pretrained(
        work.student.path, runtime=runtime, device=work.device, precision=precision, num_threads=work.num_threads
    )


def _graph(work: Workload, component: str, precision: str) -> Graph:
    graph = work.manifest.graph(component, precision)
    if graph is None:
        raise RuntimeUnavailable(
            f"{work.manifest.name} has no {component} in {precision}; redif export --precision {precision} makes one"
        )
    if graph.data:
        raise RuntimeUnavailable(f"{graph.file} keeps its weights in another file, which this contender does not read")
    return graph


def _onnxruntime(precision: str) -> Contender:
    def prepare(work: Workload) -> Prepared:
        graph = _graph(work, "generator", precision)
        runtimes.resolve("onnxruntime")
        import onnxruntime

        provider = _provider(work.device)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        if work.num_threads is not None:
            options.intra_op_num_threads = work.num_threads
        try:
            session = onnxruntime.InferenceSession(work.student.read_graph(graph)[0], options, providers=[provider])
        except _engine_errors() as error:
            raise RuntimeUnavailable(f"onnxruntime cannot run {graph.file}: {_line(error)}") from error
        if session.get_providers()[0] != provider:
            raise RuntimeUnavailable(f"onnxruntime took {session.get_providers()[0]} in place of {provider}")
        return Prepared(lambda noise, _: session.run(["images"], work.graph_inputs(noise))[0], "onnxruntime", precision)

    def fresh(work: Workload) -> Fresh:
        path = work.student.path / _graph(work, "generator", precision).file
        asked = {"threads": work.num_threads, "provider": _provider(work.device)}
        return Fresh(ONNXRUNTIME_PROGRAM, {"graph": str(path), **asked})

    return Contender("onnxruntime", "onnxruntime", precision, prepare, fresh)


def _engine_errors() -> tuple[type[Exception], ...]:
    """The exceptions of ONNX Runtime: its own classes, which are RuntimeErrors or plain Exceptions."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    return (*_ENGINE_ERRORS, state.Fail, state.InvalidArgument, state.NotImplemented, state.InvalidGraph)


def _provider(device: str) -> str:
    kind, _ = runtimes.parse_device(device)
    if kind not in PROVIDERS:
        raise RuntimeUnavailable(f"the bare onnxruntime is not measured on {device}; use {', '.join(PROVIDERS)}")
    return PROVIDERS[kind]


def _openvino(precision: str, *, fused: bool) -> Contender:
    name = "openvino" if fused else "openvino-stepped"

    def prepare(work: Workload) -> Prepared:
        run = _openvino_fused(work, precision) if fused else _openvino_stepped(work, precision)
        return Prepared(run, "openvino", precision)

    def fresh(work: Workload) -> Fresh:
        path = work.student.path / _graph(work, "generator", _stored(precision)).file
        hint = _hint(precision, work.device)
        asked = {"graph": str(path), "hint": hint, "device": _openvino_device(work.device)}
        return Fresh(OPENVINO_PROGRAM, {**asked, "threads": work.num_threads})

    return Contender(name, "openvino", precision, prepare, fresh if fused else None)


def _stored(precision: str) -> str:
    """The graph for OpenVINO, which makes bf16 and fp16 of an fp32 one by itself."""
    return "fp32" if precision in ("bf16", "fp16") else precision


def _openvino_device(device: str) -> str:
    kind, index = runtimes.parse_device(device)
    if kind not in ("cpu", "gpu", "npu"):
        raise RuntimeUnavailable(f"the bare openvino is not measured on {device}; use cpu, gpu or npu")
    return f"GPU.{index}" if kind == "gpu" and index else kind.upper()


def _hint(precision: str, device: str) -> str:
    """OpenVINO's name of the precision. Raises RuntimeUnavailable where it would silently compute in another one."""
    runtimes.resolve("openvino")
    from redif_sdk.runtimes.openvino import HINTS, refusal

    if reason := refusal(precision, _openvino_device(device)):
        raise RuntimeUnavailable(reason)
    return HINTS[precision][0]


def _compiled(work: Workload, component: str, precision: str, shapes: dict[str, list[int]]) -> Callable[[Any], Any]:
    """A graph in a bare OpenVINO, with its shapes fixed: inputs by name -> the only output."""
    hint = _hint(precision, work.device)
    graph = _graph(work, component, _stored(precision))
    import openvino

    settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": hint}
    if work.num_threads is not None:
        settings["INFERENCE_NUM_THREADS"] = work.num_threads
    try:
        core = openvino.Core()
        model = core.read_model(work.student.read_graph(graph)[0])
        model.reshape(shapes)
        request = core.compile_model(model, _openvino_device(work.device), settings).create_infer_request()
    except _ENGINE_ERRORS as error:
        raise RuntimeUnavailable(f"openvino cannot run {graph.file}: {_line(error)}") from error

    def run(inputs: dict[str, NDArray[Any]]) -> NDArray[Any]:
        request.infer(inputs, share_inputs=True)
        output: NDArray[Any] = request.get_output_tensor(0).data.copy()
        return output

    return run


def _openvino_fused(work: Workload, precision: str) -> Generate:
    inputs = work.graph_inputs(work.noise)
    run = _compiled(work, "generator", precision, {name: list(value.shape) for name, value in inputs.items()})
    return lambda noise, _: run(work.graph_inputs(noise))


def _openvino_stepped(work: Workload, precision: str) -> Generate:
    shapes = {"sample": list(work.noise.shape[1:]), "timestep": [work.batch]}
    shapes |= {name: list(value.shape) for name, value in work.graph_conditions.items()}
    network = _compiled(work, "denoiser", precision, shapes)
    decode = None
    if work.manifest.postprocess.decoder is not None:
        decode = _compiled(work, "decoder", precision, {"latents": shapes["sample"]})
    table = work.table
    times = [np.full((work.batch,), time, dtype=np.float32) for time in table.timesteps]

    def predict(k: int, x: NDArray[np.float32]) -> NDArray[np.float32]:
        clean: NDArray[np.float32] = table.clean(
            k, x, network({"sample": x, "timestep": times[k], **work.graph_conditions})
        )
        return clean

    def generate(noise: NDArray[np.float32], _: Any) -> NDArray[np.uint8]:
        x = run_steps(table, table.start(noise[0]), noise, predict)
        return to_uint8(x if decode is None else decode({"latents": x}), work.manifest.postprocess)

    return generate


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


# ---------------------------------------------------------------- what FastPipeline adds


def overhead(work: Workload, runtime: str, precision: str) -> dict[str, float]:
    """What `FastPipeline` costs beyond its engine: seconds a call, and as a share of the engine's.

    The same loaded engine is called through `generate_array` and directly, with inputs that lie ready, by turns; the
    overhead is the median of the pairs' differences. overhead_alone_seconds is that of calls whose engine answers at
    once: it does not vanish in the noise of long calls, but misses what a cold cache costs. noise_seconds and
    output_seconds are what a plain call spends beside that, on drawing the noise and on making PIL images.
    """
    pipe = _pipeline(work, runtime, precision)
    engine = _engine_alone(pipe, work)

    def whole() -> object:
        return pipe.generate_array(work.noise, work.condition, work.steps)

    low, high = OVERHEAD_PAIRS
    first = interleave({"whole": whole, "engine": engine}, 1, min_seconds=0.0, settle=False)
    pair = sum(turns[0][0] for turns in first.values())
    pairs = int(min(high, max(low, OVERHEAD_SECONDS / pair)))
    times = interleave({"whole": whole, "engine": engine}, pairs, min_seconds=0.0, settle=False)
    differences = [ours[0] - alone[0] for ours, alone in zip(times["whole"], times["engine"], strict=True)]
    own = statistics.median(differences)
    calls = [_plain_call(pipe, work).timings for _ in range(min(pairs, PLAIN_CALLS))]
    return {
        "overhead_seconds": own,
        "overhead_alone_seconds": _without_engine(pipe, work),
        "overhead_share": own / statistics.median(turn[0] for turn in times["engine"]),
        "noise_seconds": statistics.median(call["noise"] for call in calls),
        "output_seconds": statistics.median(call["output"] for call in calls),
    }


def _engine_alone(pipe: FastPipeline, work: Workload) -> Callable[[], object]:
    """The pipeline's own engine: one call of the fused graph, or the network once per step without it."""
    generator = pipe._components.generator
    if generator is not None:
        inputs = work.inputs(work.noise)
        return lambda: generator.run(inputs)
    denoiser, steps = pipe._components["denoiser"], _steps(work)
    if work.manifest.postprocess.decoder is None:
        return lambda: [denoiser.run(step) for step in steps]
    decoder, latents = pipe._components["decoder"], {"latents": work.noise[0]}
    return lambda: [*(denoiser.run(step) for step in steps), decoder.run(latents)]


class _AtOnce:
    """An engine that returns what it computed before."""

    def __init__(self, engine: Runtime, inputs: dict[str, NDArray[Any]]) -> None:
        self.info = engine.info
        self._answer = engine.run(inputs)

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        return self._answer


def _without_engine(pipe: FastPipeline, work: Workload) -> float:
    """Seconds of a call of a pipeline whose engine takes no time."""
    other, parts = copy.copy(pipe), pipe._components
    if parts.generator is not None:
        at_once = _AtOnce(parts.generator, work.inputs(work.noise))
        other._components = parts.replaced("generator", cast(Runtime, at_once))
    else:
        at_once = _AtOnce(parts["denoiser"], _steps(work)[0])
        other._components = parts.replaced("denoiser", cast(Runtime, at_once))
    calls = {"alone": lambda: other.generate_array(work.noise, work.condition, work.steps)}
    times = interleave(calls, OVERHEAD_PAIRS[1], min_seconds=0.0, settle=False)
    return statistics.median(turn[0] for turn in times["alone"])


def _steps(work: Workload) -> list[dict[str, NDArray[Any]]]:
    """Inputs of the network at each row of the table; the state is the noise in all of them."""
    return [
        {"sample": work.noise[0], "timestep": np.full((work.batch,), moment, dtype=np.float32), **work.conditions}
        for moment in work.table.timesteps
    ]


def _plain_call(pipe: FastPipeline, work: Workload) -> Any:
    return pipe(**work.asked, num_inference_steps=work.steps, seed=0)


# ---------------------------------------------------------------- the same in a fresh process

FAST_PROGRAM = """
import json, sys
asked = json.loads(sys.argv[1])
from redif_sdk import FastPipeline
images = FastPipeline.from_pretrained(asked["student"], **asked["options"])(**asked["call"]).images
"""

ONNXRUNTIME_PROGRAM = """
import json, sys
asked = json.loads(sys.argv[1])
import numpy as np
import onnxruntime
options = onnxruntime.SessionOptions()
if asked["threads"] is not None:
    options.intra_op_num_threads = asked["threads"]
session = onnxruntime.InferenceSession(asked["graph"], options, providers=[asked["provider"]])
images = session.run(["images"], dict(np.load(asked["inputs"])))[0]
"""

OPENVINO_PROGRAM = """
import json, sys
asked = json.loads(sys.argv[1])
import numpy as np
sys.modules["openvino_telemetry"] = None
import openvino
inputs = dict(np.load(asked["inputs"]))
core = openvino.Core()
model = core.read_model(asked["graph"])
model.reshape({name: list(value.shape) for name, value in inputs.items()})
settings = {"INFERENCE_PRECISION_HINT": asked["hint"]}
if asked["threads"] is not None:
    settings["INFERENCE_NUM_THREADS"] = asked["threads"]
request = core.compile_model(model, asked["device"], settings).create_infer_request()
request.infer(inputs)
images = request.get_output_tensor(0).data.copy()
"""
