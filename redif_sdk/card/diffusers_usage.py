"""Which stock scheduler and pipeline of diffusers compute a student's first table; the template writes the lines.

First-order DPM-Solver at a table's own times is DDIM, LCMScheduler is consistency multistep; the flow scheduler takes
the times as sigmas. What the last row's r is besides 1 is a gain on the output.
"""

from __future__ import annotations

from dataclasses import dataclass

from redif_sdk.artifact.manifest import Manifest
from redif_sdk.sampling.table import StepTable

__all__ = ["StockSampler", "stock_sampler"]

#: What first-order DPM-Solver of diffusers takes; it has no score and no raw EDM output.
_PREDICTIONS = {
    "ddim": frozenset({"epsilon", "v_prediction", "sample"}),
    "consistency": frozenset({"epsilon", "v_prediction", "sample"}),
    "flow-euler": frozenset({"flow"}),
}
_TIME_PIPELINES = frozenset(
    {"StableDiffusionPipeline", "StableDiffusionXLPipeline", "PixArtAlphaPipeline", "PixArtSigmaPipeline"}
)
_FLOW_PIPELINES = frozenset({"StableDiffusion3Pipeline", "FluxPipeline"})


@dataclass(frozen=True)
class StockSampler:
    """The scheduler that samples a student in plain diffusers.

    Attributes:
        scheduler: its class.
        options: what its ``from_pretrained`` takes besides the folder, as Python.
        times: the argument that sets its times, as Python: ``timesteps=[...]`` or ``sigmas=[...]``.
        gain: the factor on its output.
        own_noise: it draws other noise between the steps than FastPipeline does.
        pipeline: the class of pipelines that calls it; None: the network is called step by step.
    """

    scheduler: str
    options: str
    times: str
    gain: float = 1.0
    own_noise: bool = False
    pipeline: str | None = None


def stock_sampler(manifest: Manifest) -> StockSampler | None:
    """Return what samples the first table with stock classes, or None if no stock class computes it."""
    row, network = manifest.tables[0], manifest.network
    flow = row.sampler == "flow-euler"
    if (
        row.prediction_type not in _PREDICTIONS.get(row.sampler, frozenset())
        or row.stochastic != (row.sampler == "consistency" and row.num_inference_steps > 1)
        or row.init_scale != 1
        or (not flow and any(not float(time).is_integer() for time in row.timesteps))
        or abs(float(row.rows[-1, 4])) > 1e-6
    ):
        return None
    gain = round(float(row.rows[-1, 3]), 6)
    if manifest.text is None:
        return _scheduler(row, gain, None) if network.class_path == "diffusers.UNet2DModel" else None
    if network.pipeline not in (_FLOW_PIPELINES if flow else _TIME_PIPELINES) or gain != 1:
        return None  # a pipeline has no place for a gain
    return _scheduler(row, gain, network.pipeline)


def _scheduler(row: StepTable, gain: float, pipeline: str | None) -> StockSampler:
    times = f"timesteps={[int(time) for time in row.timesteps]}"
    if row.sampler == "consistency":
        return StockSampler("LCMScheduler", "", times, gain, row.stochastic, pipeline)
    if row.sampler == "flow-euler":
        sigmas = f"sigmas={[round(-float(step[2]), 7) for step in row.rows]}"  # x0 = x - sigma f
        options = ", shift=1.0" + (", use_dynamic_shifting=False" if pipeline else "")
        return StockSampler("FlowMatchEulerDiscreteScheduler", options, sigmas, gain, False, pipeline)
    options = ', solver_order=1, algorithm_type="dpmsolver++", final_sigmas_type="zero"'
    return StockSampler("DPMSolverMultistepScheduler", options, times, gain, False, pipeline)
