"""What a card says of plain diffusers: the lines that sample the student with stock classes, where some compute it.

First-order DPM-Solver at a table's own times is DDIM, LCMScheduler is consistency multistep; the flow scheduler takes
the times as sigmas. What the last row's r is besides 1 is a gain on the output.
"""

from __future__ import annotations

from redif_sdk.artifact.manifest import Manifest
from redif_sdk.artifact.records import TextCondition
from redif_sdk.card.text import python_string
from redif_sdk.sampling.table import StepTable

__all__ = ["no_plain_diffusers", "plain_diffusers"]

#: What first-order DPM-Solver of diffusers takes; it has no score and no raw EDM output.
_PLAIN_PREDICTIONS = {
    "ddim": frozenset({"epsilon", "v_prediction", "sample"}),
    "consistency": frozenset({"epsilon", "v_prediction", "sample"}),
    "flow-euler": frozenset({"flow"}),
}

#: Pipelines that take times, and those that take sigmas.
_TIME_PIPELINES = frozenset(
    {"StableDiffusionPipeline", "StableDiffusionXLPipeline", "PixArtAlphaPipeline", "PixArtSigmaPipeline"}
)
_FLOW_PIPELINES = frozenset({"StableDiffusion3Pipeline", "FluxPipeline"})


def plain_diffusers(manifest: Manifest, place: str) -> str:
    """The lines that sample the first table with stock classes; empty where none of them computes it."""
    row = manifest.tables[0]
    if (
        row.prediction_type not in _PLAIN_PREDICTIONS.get(row.sampler, frozenset())
        or row.stochastic != (row.sampler == "consistency" and row.num_inference_steps > 1)
        or row.init_scale != 1
        or (row.sampler != "flow-euler" and any(not float(time).is_integer() for time in row.timesteps))
        or abs(float(row.rows[-1, 4])) > 1e-6
    ):
        return ""
    if manifest.text is not None:
        return _pipeline(manifest, manifest.text, row, place)
    return _network(manifest, row, place) if manifest.network.class_path == "diffusers.UNet2DModel" else ""


def _network(manifest: Manifest, row: StepTable, place: str) -> str:
    """A network and a scheduler, stepped."""
    kind, options, times, note = _stock_scheduler(row)
    guidance, last = manifest.network.guidance, row.rows[-1]
    latents, shuffle = manifest.latents, manifest.postprocess.pixel_shuffle
    low, high = manifest.postprocess.value_range
    label = ", class_labels=torch.tensor([0])" if manifest.classes else ""
    first = f"[:, :{latents.channels}]"  # networks with a learned variance give twice as many
    predict = f"f = unet(x, t{label}).sample{first}"
    if guidance:
        unasked = f"unet(x, t, class_labels=torch.tensor([{guidance.null_class}])).sample{first}"
        predict = f"asked = unet(x, t{label}).sample{first}\n        unasked = {unasked}"
        predict += f"\n        f = unasked + {guidance.scale!r} * (asked - unasked)"
    gained = "x" if abs(float(last[3]) - 1) <= 1e-6 else f"{round(float(last[3]), 6)!r} * x"
    pictures = f"torch.nn.functional.pixel_shuffle({gained}, {shuffle})" if shuffle > 1 else f"({gained})"
    source = python_string(place)
    return f"""With plain diffusers, {row.num_inference_steps} step{"s" * (row.num_inference_steps > 1)}{note}:

```python
import torch
from diffusers import {kind}, UNet2DModel

source = {source}
unet = UNet2DModel.from_pretrained(source, subfolder={python_string(manifest.network.folder)})
scheduler = {kind}.from_pretrained(
    source, subfolder="scheduler"{options}
)
scheduler.set_timesteps({times})
x = torch.randn(1, {latents.channels}, {latents.height}, {latents.width})
for t in scheduler.timesteps:
    with torch.no_grad():
        {predict}
    x = scheduler.step(f, t, x).prev_sample
images = {pictures}.clamp({low!r}, {high!r})
```"""


def _pipeline(manifest: Manifest, text: TextCondition, row: StepTable, place: str) -> str:
    """A pipeline with a stock scheduler: it cannot have a gain, and takes times or sigmas by its family."""
    name, network = manifest.network.pipeline or "", manifest.network
    flow = row.sampler == "flow-euler"
    if name not in (_FLOW_PIPELINES if flow else _TIME_PIPELINES) or abs(float(row.rows[-1, 3]) - 1) > 1e-6:
        return ""
    kind, options, times, note = _stock_scheduler(row)
    if flow:
        options += ", use_dynamic_shifting=False"
    scale = network.guidance.scale if network.guidance else network.embedded_guidance
    height, width, _ = manifest.image_shape
    more = ""
    if network.guidance and network.guidance.null_prompt:
        more = f"\n    negative_prompt={python_string(network.guidance.null_prompt)},"
    if name.startswith("PixArt"):  # its pipeline would choose another size, and rewrite the prompt
        more += "\n    use_resolution_binning=False,\n    clean_caption=False,"
    return f"""With plain diffusers, {row.num_inference_steps} step{"s" * (row.num_inference_steps > 1)}{note}:

```python
from diffusers import {kind}, {name}

source = {python_string(place)}
scheduler = {kind}.from_pretrained(
    source, subfolder="scheduler"{options}
)
pipe = {name}.from_pretrained(source, scheduler=scheduler)
image = pipe(
    {python_string(text.examples[0])},
    {times},
    guidance_scale={1.0 if scale is None else scale!r},{more}
    height={height},
    width={width},
).images[0]
```"""


def _stock_scheduler(table: StepTable) -> tuple[str, str, str, str]:
    """Of the scheduler that runs `table`: its class, its options, what sets its times, and what to say beside it."""
    times = f"timesteps={[int(time) for time in table.timesteps]}"
    if table.sampler == "consistency":
        note = " (it draws other noise between the steps than FastPipeline does)" if table.stochastic else ""
        return "LCMScheduler", "", times, note
    if table.sampler == "flow-euler":
        sigmas = [round(-float(row[2]), 7) for row in table.rows]  # x0 = x - sigma f
        return "FlowMatchEulerDiscreteScheduler", ", shift=1.0", f"sigmas={sigmas}", ""
    options = ', solver_order=1, algorithm_type="dpmsolver++", final_sigmas_type="zero"'
    return "DPMSolverMultistepScheduler", options, times, ""


def no_plain_diffusers(manifest: Manifest) -> str:
    """Why there are no such lines, where there is something to say."""
    if manifest.tables[0].prediction_type == "score":
        return "Its network predicts the score, which no stock diffusers scheduler takes."
    return ""
