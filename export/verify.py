"""The parity gate: do the graphs compute what torch computed at export? Needs numpy and an engine, no torch.

Every file's hash is checked first, then each graph in each engine against the golden outputs. Nothing is written. The
thresholds stand in one table, `THRESHOLDS`.
"""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from redif_sdk.errors import ManifestError
from redif_sdk.images import to_uint8
from redif_sdk.manifest import Golden, Manifest, StudentFolder
from redif_sdk.noise import noise as draw
from redif_sdk.runtimes import Runtime, RuntimeInfo, installed, load, resolve
from redif_sdk.steps import StepTable, sample

__all__ = ["THRESHOLDS", "Threshold", "summary", "verify"]

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


def verify(folder: str | Path, runtimes: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Check every hash, then every graph in every engine (default: the installed ones) against the golden outputs.

    Returns one row a check: component ("noise", drawn anew; "denoiser", the network's output at each recorded row;
    "loop", the pictures of the denoiser stepped in numpy; "generator", those of the fused graph), precision, runtime,
    device, num_inference_steps, batch, size, max_abs, mean_abs, relative_rmse, psnr (dB), nonfinite (values), measure
    and threshold (what was asked of it), passed. An undefined figure, such as the psnr of equal pictures, is None.

    Raises IntegrityError for an altered, missing or additional file, ManifestError for a student that was not exported,
    RuntimeUnavailable without an engine. A failed check is no error here: see ``passed``.
    """
    student = StudentFolder(folder)
    student.check_all()
    manifest = student.manifest
    if not manifest.graphs or not manifest.golden:
        raise ManifestError(f"{folder} has no graphs to verify; run redif export {folder}")
    engines = [resolve(name) for name in runtimes] if runtimes is not None else installed() or [resolve("auto")]
    records = [_read(student, golden) for golden in manifest.golden]
    rows = [_check_noise(record) for record in records]
    for engine in engines:
        for graph in manifest.graphs:
            runtime = load(engine, student, graph)
            for record in records:
                if graph.component == "denoiser":
                    rows += [_check_denoiser(runtime, record), _check_loop(runtime, record)]
                else:
                    rows.append(_check_generator(runtime, record))
    return rows


def summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """The failed rows in one line."""
    return "; ".join(
        f"{row['component']} {row['precision']} on {row['runtime']}, {row['num_inference_steps']} steps, batch "
        f"{row['batch']}: {row['measure']} {_text(row[row['measure']])}, threshold {row['threshold']:g}"
        + (f", {row['nonfinite']} values not finite" if row["nonfinite"] else "")
        for row in rows
        if not row["passed"]
    )


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
        latents = self.manifest.latents
        shape = (latents.channels, latents.height, latents.width)
        return draw(self.seeds, shape, slices=self.table.noise_slices)

    def condition(self) -> dict[str, NDArray[np.int64]]:
        return {} if self.labels is None else {"class_labels": self.labels}


def _read(student: StudentFolder, golden: Golden) -> _Record:
    """Parse a golden file. ManifestError if it is not what the manifest says."""
    manifest, batch = student.manifest, golden.batch
    latents = manifest.latents
    try:
        with np.load(io.BytesIO(student.read(golden.file)), allow_pickle=False) as arrays:
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
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ManifestError(
            f"{golden.file} in {student.path} cannot be read: {error}; export the student again"
        ) from error
    states = (len(record.rows), batch, latents.channels, latents.height, latents.width)
    labels = batch if record.labels is None else len(record.labels)
    shapes = (record.x.shape, record.f.shape, record.images.shape, len(record.seeds), labels, record.rows[:1])
    if shapes != (states, states, (batch, *manifest.image_shape), batch, batch, [0]):
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
        "init_scale": np.asarray(record.table.init_scale, dtype=np.float32),
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
    height, width, _ = record.manifest.image_shape
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
    }


def _rms(value: NDArray[np.float64]) -> float:
    return float(np.sqrt(np.mean(np.square(value))))
