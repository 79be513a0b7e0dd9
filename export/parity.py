"""The comparisons of the parity gate: one part of a student, run again, against torch's recorded outputs.

Each check returns one row of the report, judged by `THRESHOLDS`. `verify.py` chooses the checks and the engines.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from redif_sdk.export.golden import Arrays, GoldenRecord, lengthened
from redif_sdk.images import from_uint8, to_uint8
from redif_sdk.runtimes import Runtime
from redif_sdk.sampling.loop import sample

__all__ = [
    "FIELDS",
    "THRESHOLDS",
    "Threshold",
    "check_decoder",
    "check_denoiser",
    "check_encoder",
    "check_generator",
    "check_long",
    "check_loop",
    "check_nag",
    "check_noise",
    "check_text_encoder",
    "check_tokenizer",
]

Measure = Literal["relative_rmse", "max_abs", "psnr"]


@dataclass(frozen=True)
class Threshold:
    """A bound on one measure: the least for "psnr" (dB), the most for the others."""

    measure: Measure
    bound: float

    def passed(self, value: float) -> bool:
        """Whether `value` is within the bound; NaN never is."""
        return value >= self.bound if self.measure == "psnr" else value <= self.bound


#: By precision: the threshold of a network's output, and that of images (max_abs in levels of 255).
THRESHOLDS: Mapping[str, tuple[Threshold, Threshold]] = {
    "fp32": (Threshold("relative_rmse", 1e-4), Threshold("max_abs", 1)),
    "fp16": (Threshold("relative_rmse", 1e-2), Threshold("psnr", 45)),
    "bf16": (Threshold("relative_rmse", 1e-1), Threshold("psnr", 30)),
    "int8": (Threshold("relative_rmse", 2e-1), Threshold("psnr", 30)),
    "int8wo": (Threshold("relative_rmse", 1e-1), Threshold("psnr", 30)),
    "int4wo": (Threshold("relative_rmse", 3e-1), Threshold("psnr", 20)),
}
EXACT = Threshold("max_abs", 0)

#: The fields of a row, in order.
FIELDS = (
    *("component", "precision", "runtime", "device", "num_inference_steps", "batch", "size"),
    *("max_abs", "mean_abs", "relative_rmse", "psnr", "nonfinite", "measure", "threshold", "passed", "reason"),
)

Row = dict[str, Any]


def check_noise(record: GoldenRecord) -> Row:
    """The noise, drawn again, must be identical."""
    start = record.table.start(record.noise()[0])
    return _row("noise", "numpy", record, start, record.x[0], EXACT)


def check_tokenizer(tokenize: Callable[[list[str]], Arrays], record: GoldenRecord) -> Row:
    """The prompts, tokenised again, must give identical ids."""
    found = tokenize(record.prompts)
    value, expected = (np.concatenate([side[name] for name in record.tokens], 1) for side in (found, record.tokens))
    return _row("tokenizer", "tokenizers", record, value, expected, EXACT)


def check_text_encoder(runtime: Runtime, record: GoldenRecord) -> Row:
    """The encoded prompts of the recorded ids; the row of the worst tensor."""
    outputs, threshold = runtime.run(record.tokens), THRESHOLDS[runtime.info.precision][0]
    rows = [
        _row("text_encoder", runtime, record, outputs[name], expected, threshold)
        for name, expected in record.conditions.items()
        if name in outputs
    ]
    return max(rows, key=lambda row: (not row["passed"], row["relative_rmse"] or 0.0))


def check_denoiser(runtime: Runtime, record: GoldenRecord) -> Row:
    """The network's output at each recorded step."""
    outputs = []
    for row, x in zip(record.rows, record.x, strict=True):
        t = np.full((len(x),), record.table.timesteps[row], dtype=np.float32)
        outputs.append(runtime.run({"sample": x, "timestep": t, **record.conditions})["f"])
    return _row("denoiser", runtime, record, np.stack(outputs), record.f, THRESHOLDS[runtime.info.precision][0])


def check_long(runtime: Runtime, record: GoldenRecord) -> Row:
    """The network's output for prompts of two chunks at each recorded step."""
    assert record.long_f is not None
    conditions = lengthened(record.conditions, record.manifest.condition_tensors[0].name)
    outputs = []
    for row, x in zip(record.rows, record.x, strict=True):
        t = np.full((len(x),), record.table.timesteps[row], dtype=np.float32)
        outputs.append(runtime.run({"sample": x, "timestep": t, **conditions})["f"])
    return _row("long", runtime, record, np.stack(outputs), record.long_f, THRESHOLDS[runtime.info.precision][0])


def check_nag(runtime: Runtime, record: GoldenRecord) -> Row:
    """The network's output with negative prompts at each recorded step."""
    own = {name: value for name, value in record.nag.items() if name != "nag.f"}
    outputs = []
    for row, x in zip(record.rows, record.x, strict=True):
        t = np.full((len(x),), record.table.timesteps[row], dtype=np.float32)
        outputs.append(runtime.run({"sample": x, "timestep": t, **record.conditions, **own})["f"])
    return _row("nag", runtime, record, np.stack(outputs), record.nag["nag.f"], THRESHOLDS[runtime.info.precision][0])


def check_decoder(runtime: Runtime, record: GoldenRecord) -> Row:
    """The images decoded from the recorded latents."""
    assert record.latents is not None
    return _images("decoder", runtime, record, runtime.run({"latents": record.latents})["sample"])


def check_encoder(runtime: Runtime, record: GoldenRecord) -> Row:
    """The latents of the recorded images."""
    assert record.encoded is not None
    latents = runtime.run({"image": from_uint8(record.images, record.manifest.postprocess)})["latents"]
    return _row("encoder", runtime, record, latents, record.encoded, THRESHOLDS[runtime.info.precision][0])


def check_loop(runtime: Runtime, decoder: Runtime | None, record: GoldenRecord) -> Row:
    """The images of the denoiser and the sampling loop in numpy, decoded if there is a decoder."""

    def network(x: NDArray[np.float32], t: NDArray[np.float32], condition: Any) -> NDArray[np.float32]:
        return runtime.run({"sample": x, "timestep": t, **condition})["f"]

    latents = sample(network, record.table, record.noise(), record.conditions)
    decoded = latents if decoder is None else decoder.run({"latents": latents})["sample"]
    return _images("loop", runtime, record, decoded)


def check_generator(runtime: Runtime, record: GoldenRecord) -> Row:
    """The images of the fused graph."""
    inputs: Arrays = {
        "noise": record.noise(),
        "table": record.table.rows,
        "init_scale": record.table.scale,
        **record.conditions,
    }
    images = runtime.run(inputs)["images"]
    return _row("generator", runtime, record, images, record.images, THRESHOLDS[runtime.info.precision][1])


def _images(component: str, runtime: Runtime, record: GoldenRecord, values: NDArray[np.float32]) -> Row:
    """The row of images given as floats, since values that are not finite do not show in uint8."""
    images = to_uint8(values, record.manifest.postprocess)
    row = _row(component, runtime, record, images, record.images, THRESHOLDS[runtime.info.precision][1])
    nonfinite = int(np.size(values) - np.isfinite(values).sum())
    return row | {"nonfinite": nonfinite, "passed": row["passed"] and nonfinite == 0}


def _row(
    component: str,
    runtime: Runtime | str,
    record: GoldenRecord,
    value: NDArray[Any],
    reference: NDArray[Any],
    threshold: Threshold,
) -> Row:
    """One row of the report: `value` against torch's `reference`. `runtime` is a name for checks without an engine."""
    info = None if isinstance(runtime, str) else runtime.info
    measured, expected = value.astype(np.float64), reference.astype(np.float64)
    images = reference.dtype == np.uint8
    if value.shape != reference.shape:
        measured = np.full_like(expected, math.nan)
    difference = np.abs(measured - expected)
    error, scale = _rms(difference), _rms(expected)
    figures = {
        "max_abs": float(difference.max()),
        "mean_abs": float(difference.mean()),
        "relative_rmse": error / scale if scale else error,
        "psnr": (20.0 * math.log10(255.0 / error) if error else math.inf) if images else math.nan,
    }
    height, width = record.images.shape[1:3]
    nonfinite = int(measured.size - np.isfinite(measured).sum())
    return {
        "component": component,
        "precision": info.precision if info else "fp32",
        "runtime": info.runtime if info else runtime,
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
