"""Golden outputs: what torch computes for a few inputs, recorded at export, so that the parity gate needs no torch.

One compressed ``.npz`` holds, for one step table and one batch of B pictures: ``seeds`` (B, 2) uint64, ``rows`` (R,)
int64, the rows looked at, ``x`` and ``f`` (R, B, C, H, W) float32, the network's input and output there, and ``images``
(B, H', W', C') uint8. Of a student with a decoder also ``latents`` (B, C, H, W) float32, the final ones. Of one that is
asked for classes ``class_labels`` (B,) int64; of one that is asked by prompts ``prompts`` (B,) text, ``tokens.NAME``
(B, L) int64, the text encoder's inputs, and ``conditions.NAME`` (B, ...) float32, its outputs. `recorded.py` reads it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from redif_sdk.artifact.manifest import Manifest
from redif_sdk.artifact.records import Golden
from redif_sdk.export.conditions import Conditions
from redif_sdk.export.onnx import Denoiser
from redif_sdk.models.families import LatentDecoder
from redif_sdk.sampling.loop import run_steps
from redif_sdk.sampling.noise import noise as draw
from redif_sdk.sampling.table import StepTable

__all__ = ["BATCHES", "FOLDER", "Size", "record"]

BATCHES = (1, 8)
FOLDER = "golden"
SEED = 0
MOST_ROWS = 4  # of a long table, so that the files stay small

Size = tuple[int, int]  # height and width of latents


def record(
    denoiser: Denoiser,
    decoder: LatentDecoder | None,
    conditions: Conditions,
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
                indices = range(first, first + batch)
                arrays = _asked(conditions, manifest, indices)
                arrays |= _run(denoiser, decoder, conditions, manifest, manifest.step_table(steps), indices, size)
                np.savez_compressed(folder / file, **arrays)  # type: ignore[arg-type]
                other = {} if size == own else {"height": size[0], "width": size[1]}
                entries.append(Golden(file=file, num_inference_steps=steps, batch=batch, **other))
                first += batch
    return entries


def _asked(conditions: Conditions, manifest: Manifest, indices: range) -> dict[str, NDArray[Any]]:
    """What the pictures are asked for, on its way from a class or a prompt to the network's inputs."""
    given = {name: value.numpy() for name, value in conditions.of(indices).items()}
    if manifest.text is None:
        return given
    prompts = conditions.prompts(indices)
    tokens = {f"tokens.{name}": value for name, value in conditions.tokens(prompts).items()}
    return {"prompts": np.array(prompts), **tokens, **{f"conditions.{name}": value for name, value in given.items()}}


@torch.no_grad()
def _run(
    denoiser: Denoiser,
    decoder: LatentDecoder | None,
    conditions: Conditions,
    manifest: Manifest,
    table: StepTable,
    indices: range,
    size: Size,
) -> dict[str, NDArray[Any]]:
    """Pictures `indices` of `SEED`, in torch from the noise to the uint8 images."""
    seeds = [(SEED, index) for index in indices]
    noise = torch.from_numpy(draw(seeds, (manifest.latents.channels, *size), slices=table.noise_slices))
    asked = conditions.of(indices).values()
    steps = table.num_inference_steps
    rows = sorted({round(row) for row in np.linspace(0, steps - 1, min(steps, MOST_ROWS))})
    states, outputs = [], []

    def predict(k: int, x: Tensor) -> Tensor:
        f = denoiser(x, torch.full((len(x),), float(table.timesteps[k])), *asked)
        if k in rows:
            states.append(x)
            outputs.append(f)
        clean: Tensor = table.clean(k, x, f)
        return clean

    x = run_steps(table, table.start(noise[0]), noise, predict)
    arrays = {
        "seeds": np.array(seeds, dtype=np.uint64),
        "rows": np.array(rows, dtype=np.int64),
        "x": torch.stack(states).numpy(),
        "f": torch.stack(outputs).numpy(),
        "images": _pictures(x, decoder, manifest).numpy(),
    }
    return arrays if decoder is None else arrays | {"latents": x.numpy()}


def _pictures(x: Tensor, decoder: LatentDecoder | None, manifest: Manifest) -> Tensor:
    """Latents (B, C, H, W) to pictures, uint8 (B, H', W', C')."""
    if decoder is None:
        pictures = torch.nn.functional.pixel_shuffle(x, manifest.postprocess.pixel_shuffle)
    else:  # one after another: an autoencoder takes gigabytes for a batch
        pictures = torch.cat([decoder(one) for one in x.split(1)])
    low, high = manifest.postprocess.value_range
    levels = (pictures - low) * (255 / (high - low))
    return levels.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
