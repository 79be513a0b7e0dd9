"""The parity gate: do the graphs compute what torch computed at export? Needs numpy and an engine, no torch.

Every file's hash is checked first, then each graph in each engine against the golden outputs. Nothing is written. The
thresholds stand in one table, `THRESHOLDS`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from redif_sdk.contents import npz_arrays
from redif_sdk.errors import InvalidRequest, ManifestError, RuntimeUnavailable
from redif_sdk.folder import StudentFolder
from redif_sdk.images import to_uint8
from redif_sdk.manifest import Golden, Graph, Manifest
from redif_sdk.noise import noise as draw
from redif_sdk.runtimes import Runtime, RuntimeInfo, RuntimeOptions, load, resolve, runnable, steps_alone
from redif_sdk.steps import StepTable, sample

__all__ = ["THRESHOLDS", "Threshold", "absent", "summary", "verify"]

Measure = Literal["relative_rmse", "max_abs", "psnr"]


@dataclass(frozen=True)
class Threshold:
    """A bound on one measure: the least for "psnr" (dB), the most for the others."""

    measure: Measure
    bound: float

    def passed(self, value: float) -> bool:
        """Whether `value` is within the bound; NaN never is."""
        return value >= self.bound if self.measure == "psnr" else value <= self.bound


#: By precision: for the network's output, and for the pictures (max_abs in levels of 255).
THRESHOLDS: Mapping[str, tuple[Threshold, Threshold]] = {
    "fp32": (Threshold("relative_rmse", 1e-4), Threshold("max_abs", 1)),
    "fp16": (Threshold("relative_rmse", 1e-2), Threshold("psnr", 45)),
    "bf16": (Threshold("relative_rmse", 1e-1), Threshold("psnr", 30)),
    "int8": (Threshold("relative_rmse", 2e-1), Threshold("psnr", 30)),
}
NOISE = Threshold("max_abs", 0)

#: Of a row, in order.
FIELDS = (
    *("component", "precision", "runtime", "device", "num_inference_steps", "batch", "size"),
    *("max_abs", "mean_abs", "relative_rmse", "psnr", "nonfinite", "measure", "threshold", "passed", "reason"),
)


def verify(
    folder: str | Path,
    runtimes: Sequence[str] | None = None,
    *,
    precisions: Sequence[str] | None = None,
    batches: Sequence[int] | None = None,
    sizes: Sequence[tuple[int, int]] | None = None,
) -> list[dict[str, Any]]:
    """Check every hash, then every graph in every engine (default: those that run here) against the golden outputs.

    Returns one row a check: component ("noise", drawn anew; "denoiser", the network's output at each recorded row;
    "loop", the pictures of the denoiser stepped in numpy; "generator", those of the fused graph), precision, runtime,
    device, num_inference_steps, batch, size, max_abs, mean_abs, relative_rmse, psnr (dB), nonfinite (values), measure
    and threshold (what was asked of it), passed. An undefined figure, such as the psnr of equal pictures, is None. An
    engine that cannot be had for a precision gives one row with the `reason`, and None for the rest: it is not passed.
    A bf16 graph that no engine here computes is checked by emulation (runtime "emulated", see `emulate.py`); so is the
    fused one where the engine is OpenVINO, which is given the network alone.

    `precisions`, `batches` and `sizes` (height, width in pixels) restrict the checks to some of what was recorded.

    Raises IntegrityError for an altered, missing or additional file, ManifestError for a student that was not exported,
    InvalidRequest for a restriction that leaves nothing, RuntimeUnavailable without an engine. A failed check is no
    error here: see ``passed``.
    """
    student = StudentFolder(folder)
    student.check_all()
    manifest = student.manifest
    if not manifest.graphs or not manifest.golden:
        raise ManifestError(f"{folder} has no graphs to verify; run redif export {folder}")
    engines = [resolve(name) for name in runtimes] if runtimes is not None else runnable()
    records = _records(student, batches, sizes)
    graphs = _graphs(manifest, precisions)
    rows = [_check_noise(record) for record in records]
    for precision in dict.fromkeys(graph.precision for graph in graphs):
        rows += _check_precision(student, engines, [g for g in graphs if g.precision == precision], records)
    return rows


def _records(
    student: StudentFolder, batches: Sequence[int] | None, sizes: Sequence[tuple[int, int]] | None
) -> list[_Record]:
    records = [_read(student, golden) for golden in student.manifest.golden]
    found = [
        record
        for record in records
        if (batches is None or len(record.seeds) in batches) and (sizes is None or record.images.shape[1:3] in sizes)
    ]
    if not found:
        have = sorted({f"{len(r.seeds)} of {r.images.shape[1]}x{r.images.shape[2]}" for r in records})
        raise InvalidRequest(
            f"{student.path} has golden outputs for batches of {', '.join(have)}; ask for some of these"
        )
    return found


def _graphs(manifest: Manifest, precisions: Sequence[str] | None) -> list[Graph]:
    graphs = [graph for graph in manifest.graphs if precisions is None or graph.precision in precisions]
    if not graphs:
        have = ", ".join(sorted({graph.precision for graph in manifest.graphs}))
        raise InvalidRequest(f"{manifest.name} has graphs in {have}; ask for some of these")
    return graphs


def _check_precision(
    student: StudentFolder, engines: Sequence[str], graphs: Sequence[Graph], records: Sequence[_Record]
) -> list[dict[str, Any]]:
    """The rows of one precision's graphs in every engine."""
    rows: list[dict[str, Any]] = []
    absent: list[dict[str, Any]] = []
    left = {graph.file: graph for graph in graphs if graph.precision == "bf16"}  # to be emulated
    for engine in engines:
        try:
            for graph in graphs:
                if graph.component == "denoiser" or not steps_alone(engine, graph.precision):
                    rows += _check_graph(load(engine, student, graph), records)
                    left.pop(graph.file, None)
        except RuntimeUnavailable as error:
            absent.append(_absent(engine, graphs[0].precision, str(error)))
    for graph in left.values():
        try:
            rows += _check_graph(Emulated.load(student, graph, RuntimeOptions()), records)
        except RuntimeUnavailable as error:
            if not rows:
                raise
            absent.append(_absent("emulated", graph.precision, str(error)))
    return rows + absent


def _check_graph(runtime: Runtime, records: Sequence[_Record]) -> list[dict[str, Any]]:
    if runtime.info.component == "generator":
        return [_check_generator(runtime, record) for record in records]
    return [check(runtime, record) for record in records for check in (_check_denoiser, _check_loop)]


def _absent(engine: str, precision: str, reason: str) -> dict[str, Any]:
    return dict.fromkeys(FIELDS) | {"precision": precision, "runtime": engine, "reason": reason}


class Emulated:
    """A bfloat16 graph as `emulate` writes it, in ONNX Runtime on the CPU."""

    def __init__(self, session: Any, info: RuntimeInfo) -> None:
        self._session = session
        self.info = info

    @classmethod
    def load(cls, student: StudentFolder, graph: Graph, options: RuntimeOptions) -> Self:
        try:
            import onnx
            import onnxruntime

            from redif_sdk.export.emulate import emulate
        except ImportError as error:
            raise RuntimeUnavailable(
                f"no engine here computes bf16, and to emulate it needs {error.name}; pip install onnx onnxruntime"
            ) from error
        if graph.data:
            raise RuntimeUnavailable(f"no engine here computes bf16, and {graph.file} is too large to be emulated")
        model = emulate(onnx.ModelProto.FromString(student.read_graph(graph)[0]))
        settings = onnxruntime.SessionOptions()
        settings.log_severity_level = 4
        session = onnxruntime.InferenceSession(model.SerializeToString(), settings, providers=["CPUExecutionProvider"])
        version = onnxruntime.__version__
        info = RuntimeInfo("emulated", version, "onnxruntime", "cpu", "bf16", graph.component, graph.file, None)
        return cls(session, info)

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        names = [output.name for output in self._session.get_outputs()]
        return dict(zip(names, self._session.run(names, dict(inputs)), strict=True))


def summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """The failed rows in one line."""
    return "; ".join(
        f"{row['component']} {row['precision']} on {row['runtime']}, {row['num_inference_steps']} steps, batch "
        f"{row['batch']}: {row['measure']} {_text(row[row['measure']])}, threshold {row['threshold']:g}"
        + (f", {row['nonfinite']} values not finite" if row["nonfinite"] else "")
        for row in rows
        if row["passed"] is False
    )


def absent(rows: Sequence[Mapping[str, Any]]) -> str:
    """What could not be checked here, in one line."""
    return "; ".join(f"{row['precision']} on {row['runtime']}: {row['reason']}" for row in rows if row["reason"])


def _text(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.3g}"


@dataclass(frozen=True)
class _Record:
    """A golden file (see `golden.py`) with what is needed to run it again."""

    manifest: Manifest
    table: StepTable
    seeds: list[tuple[int, int]]
    labels: NDArray[np.int64] | None
    rows: list[int]
    x: NDArray[np.float32]
    f: NDArray[np.float32]
    images: NDArray[np.uint8]

    def noise(self) -> NDArray[np.float32]:
        return draw(self.seeds, self.x.shape[2:], slices=self.table.noise_slices)

    def condition(self) -> dict[str, NDArray[np.int64]]:
        return {} if self.labels is None else {"class_labels": self.labels}


def _read(student: StudentFolder, golden: Golden) -> _Record:
    """Parse a golden file. ManifestError if it is not what the manifest says."""
    manifest, batch = student.manifest, golden.batch
    latents, factor = manifest.latents, manifest.postprocess.pixel_shuffle
    height, width = golden.height or latents.height, golden.width or latents.width
    try:
        arrays = npz_arrays(student.read(golden.file), golden.file)
        record = _Record(
            manifest,
            manifest.step_table(golden.num_inference_steps),
            [(int(seed), int(index)) for seed, index in arrays["seeds"]],
            arrays["class_labels"].astype(np.int64) if manifest.condition is not None else None,
            [int(row) for row in arrays["rows"]],
            arrays["x"].astype(np.float32),
            arrays["f"].astype(np.float32),
            arrays["images"].astype(np.uint8),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ManifestError(
            f"{golden.file} in {student.path} cannot be read: {error}; export the student again"
        ) from error
    states = (len(record.rows), batch, latents.channels, height, width)
    pictures = (batch, height * factor, width * factor, latents.channels // factor**2)
    labels = batch if record.labels is None else len(record.labels)
    shapes = (record.x.shape, record.f.shape, record.images.shape, len(record.seeds), labels, record.rows[:1])
    if shapes != (states, states, pictures, batch, batch, [0]):
        raise ManifestError(f"{golden.file} in {student.path} has arrays of other shapes; export the student again")
    return record


def _check_noise(record: _Record) -> dict[str, Any]:
    start = record.noise()[0] * np.float32(record.table.init_scale)
    return _row("noise", None, record, start, record.x[0], NOISE)


def _check_denoiser(runtime: Runtime, record: _Record) -> dict[str, Any]:
    outputs = []
    for row, x in zip(record.rows, record.x, strict=True):
        t = np.full((len(x),), record.table.timesteps[row], dtype=np.float32)
        outputs.append(runtime.run({"sample": x, "timestep": t, **record.condition()})["f"])
    threshold = THRESHOLDS[runtime.info.precision][0]
    return _row("denoiser", runtime.info, record, np.stack(outputs), record.f, threshold)


def _check_loop(runtime: Runtime, record: _Record) -> dict[str, Any]:
    def network(x: NDArray[np.float32], t: NDArray[np.float32], condition: Any) -> NDArray[np.float32]:
        return runtime.run({"sample": x, "timestep": t, **condition})["f"]

    latents = sample(network, record.table, record.noise(), record.condition())
    images = to_uint8(latents, record.manifest.postprocess)
    row = _row("loop", runtime.info, record, images, record.images, THRESHOLDS[runtime.info.precision][1])
    nonfinite = int(np.size(latents) - np.isfinite(latents).sum())
    return row | {"nonfinite": nonfinite, "passed": row["passed"] and nonfinite == 0}


def _check_generator(runtime: Runtime, record: _Record) -> dict[str, Any]:
    inputs: dict[str, NDArray[Any]] = {
        "noise": record.noise(),
        "table": record.table.rows,
        "init_scale": record.table.scale,
        **record.condition(),
    }
    images = runtime.run(inputs)["images"]
    return _row("generator", runtime.info, record, images, record.images, THRESHOLDS[runtime.info.precision][1])


def _row(
    component: str,
    info: RuntimeInfo | None,
    record: _Record,
    value: NDArray[Any],
    reference: NDArray[Any],
    threshold: Threshold,
) -> dict[str, Any]:
    """One row of the report: `value` against torch's `reference`."""
    measured, expected = value.astype(np.float64), reference.astype(np.float64)
    pictures = reference.dtype == np.uint8
    if value.shape != reference.shape:
        measured = np.full_like(expected, math.nan)
    difference = np.abs(measured - expected)
    error, scale = _rms(difference), _rms(expected)
    figures = {
        "max_abs": float(difference.max()),
        "mean_abs": float(difference.mean()),
        "relative_rmse": error / scale if scale else error,
        "psnr": (20.0 * math.log10(255.0 / error) if error else math.inf) if pictures else math.nan,
    }
    height, width = record.images.shape[1:3]
    nonfinite = int(measured.size - np.isfinite(measured).sum())
    return {
        "component": component,
        "precision": info.precision if info else "fp32",
        "runtime": info.runtime if info else "numpy",
        "device": info.device if info else "cpu",
        "num_inference_steps": record.table.num_inference_steps,
        "batch": len(record.seeds),
        "size": f"{height}x{width}",
        **{name: figure if math.isfinite(figure) else None for name, figure in figures.items()},
        "nonfinite": nonfinite,
        "measure": threshold.measure,
        "threshold": threshold.bound,
        "passed": threshold.passed(figures[threshold.measure]) and nonfinite == 0,
        "reason": None,
    }


def _rms(value: NDArray[np.float64]) -> float:
    return float(np.sqrt(np.mean(np.square(value))))
