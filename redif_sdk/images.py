"""Images: latents to arrays in numpy, as the fused graph does it in ONNX, arrays to PIL, and the output of a call.

Latents of a student with a decoder are decoded by a graph first. No file is read or written here.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from redif_sdk.artifact.manifest import Manifest
from redif_sdk.artifact.records import Postprocess
from redif_sdk.marks.xmp import Mark, marked

__all__ = [
    "PipelineOutput",
    "contact_sheet",
    "converted",
    "from_uint8",
    "pixel_shuffle",
    "pixel_unshuffle",
    "scale_and_offset",
    "seconds_of_stages",
    "to_pil",
    "to_uint8",
]


@dataclass(frozen=True)
class PipelineOutput:
    """The result of a call.

    Attributes:
        images: a list of PIL images, or an array or tensor, depending on `output_type`.
        seeds: (seed, image index) of each image; passed as ``seed=``, they give the same images again.
        timings: seconds by stage: noise, text (tokens and text encoder; text-to-image students only), network, output,
            total.
        runtime_info: what computed the images; see `FastPipeline.runtime_info`.
    """

    images: Any
    seeds: list[tuple[int, int]]
    timings: dict[str, float]
    runtime_info: dict[str, Any]


def seconds_of_stages(manifest: Manifest, *times: float) -> dict[str, float]:
    """The seconds of each stage of a call, from the times at which they begin and end."""
    stages = {name: times[k + 1] - times[k] for k, name in enumerate(("noise", "text", "network", "output"))}
    if manifest.text is None:  # there is no such stage, but a microsecond
        stages["noise"] += stages.pop("text")
    return stages | {"total": times[-1] - times[0]}


def pixel_shuffle(x: NDArray[np.float32], factor: int) -> NDArray[np.float32]:
    """(B, C f^2, H, W) -> (B, C, H f, W f), in the order of torch's ``pixel_shuffle`` (ONNX DepthToSpace, CRD)."""
    if factor == 1:
        return x
    batch, channels, height, width = x.shape
    blocks = x.reshape(batch, channels // factor**2, factor, factor, height, width)
    return blocks.transpose(0, 1, 4, 2, 5, 3).reshape(batch, channels // factor**2, height * factor, width * factor)


def pixel_unshuffle(x: NDArray[Any], factor: int) -> NDArray[Any]:
    """The inverse of `pixel_shuffle`: (B, C, H f, W f) -> (B, C f^2, H, W)."""
    if factor == 1:
        return x
    batch, channels, height, width = x.shape
    blocks = x.reshape(batch, channels, height // factor, factor, width // factor, factor)
    return blocks.transpose(0, 1, 3, 5, 2, 4).reshape(batch, -1, height // factor, width // factor)


def from_uint8(images: NDArray[np.uint8], postprocess: Postprocess) -> NDArray[np.float32]:
    """What `to_uint8` makes ``images``, uint8 (B, H, W, C), of: (B, C', H', W') float32."""
    scale, offset = scale_and_offset(postprocess)
    values = (images.transpose(0, 3, 1, 2).astype(np.float32) - offset) / scale
    return np.ascontiguousarray(pixel_unshuffle(values, postprocess.pixel_shuffle))


def scale_and_offset(postprocess: Postprocess) -> tuple[np.float32, np.float32]:
    """(a, b) such that a x + b takes `value_range` to 0..255."""
    low, high = postprocess.value_range
    return np.float32(255.0 / (high - low)), np.float32(-255.0 * low / (high - low))


def to_uint8(x: NDArray[np.float32], postprocess: Postprocess) -> NDArray[np.uint8]:
    """Latents or decoded latents (B, C, H, W) to images, uint8 (B, H', W', C').

    The values are pixel-shuffled, scaled, clipped, and rounded half to even.
    """
    scale, offset = scale_and_offset(postprocess)
    levels = np.rint(np.clip(pixel_shuffle(x, postprocess.pixel_shuffle) * scale + offset, 0.0, 255.0))
    # NaN becomes 0, on every processor alike; a plain cast would be undefined.
    return np.ascontiguousarray(np.nan_to_num(levels, nan=0.0).astype(np.uint8).transpose(0, 2, 3, 1))


def to_pil(images: NDArray[np.uint8]) -> list[Image.Image]:
    """Images, uint8 (B, H, W, C) with C = 1 (grey, mode "L"), 3 or 4, to PIL."""
    return [Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image) for image in images]


def converted(made: NDArray[Any], output_type: str, marks: Sequence[Mark] = ()) -> Any:
    """Images, uint8 (B, H, W, C), as a caller wants them: "pil", "np" or "pt" (in [0, 1]); else ``made`` as it is.

    PIL's have ``marks``, one each, where there are any.
    """
    if output_type == "pil":
        images = to_pil(made)
        return [marked(image, [mark]) for image, mark in zip(images, marks, strict=True)] if marks else images
    if output_type not in ("np", "pt"):
        return made
    shares = made.astype(np.float32) / np.float32(255)
    if output_type == "np":
        return shares
    torch = importlib.import_module("torch")  # which who asks for its tensors has
    return torch.from_numpy(np.ascontiguousarray(shares.transpose(0, 3, 1, 2)))


def contact_sheet(images: Sequence[Image.Image], columns: int | None = None) -> Image.Image:
    """One image of all `images`, which have one size, in rows of `columns` (default: as square as possible)."""
    columns = columns or math.ceil(math.sqrt(len(images)))
    width, height = images[0].size
    rows = math.ceil(len(images) / columns)
    sheet = Image.new(images[0].mode, (columns * width, rows * height))
    for index, image in enumerate(images):
        sheet.paste(image, (index % columns * width, index // columns * height))
    return sheet
