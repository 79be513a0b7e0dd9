"""Golden outputs: what torch computes for a few inputs, recorded at export, so that the parity gate needs no torch.

One compressed ``.npz`` holds, for one step table and one batch of B pictures: ``seeds`` (B, 2) uint64, ``class_labels``
(B,) int64 of a conditional student, ``rows`` (R,) int64, the rows looked at, ``x`` and ``f`` (R, B, C, H, W) float32,
the network's input and output there, and ``images`` (B, H', W', C') uint8. The reader is in `verify.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from redif_sdk.export.onnx import Denoiser
from redif_sdk.manifest import Golden, Manifest
from redif_sdk.noise import noise as draw
from redif_sdk.steps import StepTable

__all__ = ["BATCHES", "FOLDER", "Size", "record"]

BATCHES = (1, 8)
FOLDER = "golden"
SEED = 0
MOST_ROWS = 4  # of a long table, so that the files stay small

Size = tuple[int, int]  # height and width of latents


def record(
    denoiser: Denoiser,
    manifest: Manifest,
    folder: Path,
    batches: Sequence[int] = BATCHES,
    sizes: Sequence[Size] = (),
) -> list[Golden]:
    """Write the golden files of every table, batch and further size into `folder`, and return their entries."""
    (folder / FOLDER).mkdir()
    own = (manifest.latents.height, manifest.latents.width)
    entries = []
    for steps in manifest.supported_steps:
        first = 0
        for size in dict.fromkeys((own, *sizes)):
            for batch in batches:
                place = "" if size == own else f"-{size[0]}x{size[1]}"
                file = f"{FOLDER}/steps-{steps}-batch-{batch}{place}.npz"
                arrays = _run(denoiser, manifest, manifest.step_table(steps), range(first, first + batch), size)
                np.savez_compressed(folder / file, **arrays)  # type: ignore[arg-type]
                other = {} if size == own else {"height": size[0], "width": size[1]}
                entries.append(Golden(file=file, num_inference_steps=steps, batch=batch, **other))
                first += batch
    return entries


@torch.no_grad()
def _run(denoiser: Denoiser, manifest: Manifest, table: StepTable, indices: range, size: Size) -> dict[str, np.ndarray]:
    """The arrays of one file: pictures `indices` of `SEED`, in torch from the noise to the uint8 images."""
    shape, shuffle = (manifest.latents.channels, *size), manifest.postprocess.pixel_shuffle
    seeds = [(SEED, index) for index in indices]
    noise = torch.from_numpy(draw(seeds, shape, slices=table.noise_slices))
    labels = None
    if manifest.condition is not None:
        labels = torch.tensor([index % manifest.condition.num_classes for index in indices])
    steps = table.num_inference_steps
    rows = sorted({round(row) for row in np.linspace(0, steps - 1, min(steps, MOST_ROWS))})
    x = noise[0] * table.init_scale
    states, outputs = [], []
    for k in range(steps):
        f = denoiser(x, torch.full((len(x),), float(table.timesteps[k])), labels)
        if k in rows:
            states.append(x)
            outputs.append(f)
        x = table.advance(k, x, table.clean(k, x, f), noise[min(k + 1, len(noise) - 1)])
    low, high = manifest.postprocess.value_range
    pictures = (torch.nn.functional.pixel_shuffle(x, shuffle) - low) * (255 / (high - low))
    arrays = {
        "seeds": np.array(seeds, dtype=np.uint64),
        "rows": np.array(rows, dtype=np.int64),
        "x": torch.stack(states).numpy(),
        "f": torch.stack(outputs).numpy(),
        "images": pictures.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy(),
    }
    return arrays if labels is None else arrays | {"class_labels": labels.numpy()}
