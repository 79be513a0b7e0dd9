"""Guidance that each call chooses: per-image conditions to the inputs of a graph that takes the scale as one.

Classifier-free guidance calls the network twice for a guided image, and once for any other, in one batch of rows. The
first B rows are the images with their own conditions, in order; after them comes one row with the null condition for
each image that is guided. So the graph takes, beside `sample` (B, C, H, W) and `timestep` (B,):

- each condition (R, ...), R rows from B to 2 B;
- `guidance_rows` (R,) int64: the image that a row is of;
- `null_rows` (B,) int64: the row of an image's null condition, or its own where it is not guided;
- `guidance_scale` (B,) float32;
- of an inpainting student `mask_latents` and `masked_image_latents` (B, ...), which both rows of an image share.

f of image i is u + scale (c - u), with c of row i and u of row ``null_rows[i]``; where these are one, f is c exactly.

Everybody else handles per-image arrays: the conditions, `guidance_scale`, and the null conditions as `null.NAME`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from redif_sdk.artifact.manifest import GUIDANCE_ROWS, GUIDANCE_SCALE, NULL_ROWS
from redif_sdk.artifact.records import TensorSpec

__all__ = ["NULL", "GuidedInputs", "is_guiding"]

NULL = "null."  # before the name of a condition


def is_guiding(scale: Any) -> Any:
    """Where a guidance scale calls for a second network call: above 1, as in diffusers."""
    return scale > 1


class GuidedInputs:
    """Turns per-image inputs into those of a graph; those of a graph without such guidance stay as they are.

    Args:
        specs: The graph's inputs, or its conditions alone.
    """

    def __init__(self, specs: Sequence[TensorSpec]) -> None:
        shapes = {spec.name: spec.shape for spec in specs}
        self._by_rows = GUIDANCE_ROWS in shapes
        self._conditions = [name for name, shape in shapes.items() if shape[:1] == ["rows"] and name != GUIDANCE_ROWS]

    def axes(self) -> dict[str, int]:
        """The batch axis of the per-image inputs that the graph itself takes in rows."""
        return {name: 0 for condition in self._conditions for name in (condition, NULL + condition)}

    def __call__(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """The graph's inputs."""
        if not self._by_rows:
            return dict(inputs)
        scale = inputs[GUIDANCE_SCALE]
        batch, guided = len(scale), np.flatnonzero(is_guiding(scale))
        images = np.arange(batch, dtype=np.int64)
        nulls = images.copy()
        nulls[guided] = batch + np.arange(len(guided))
        own = {name: value for name, value in inputs.items() if not name.startswith(NULL)}
        if len(guided):
            own |= {
                name: np.concatenate([inputs[name], inputs[NULL + name][guided]], dtype=inputs[name].dtype)
                for name in self._conditions
            }
        return own | {GUIDANCE_ROWS: np.concatenate([images, guided]), NULL_ROWS: nulls}
