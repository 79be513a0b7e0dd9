"""Paired rewards in the features of pretrained networks: EfficientNet-Lite0, CLIP's and DINO's image encoders.

EfficientNet-Lite0 is also the judge of this project's own figures: a student trained with "lpips" must be judged by
another network, and the benchmark refuses it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from redif_sdk.distill.measures.features import _efficientnet
from redif_sdk.distill.rewards.batch import Batch
from redif_sdk.distill.rewards.feature import period
from redif_sdk.errors import InvalidRequest, first_line

LAYERS = (0, 2, 4, 10)  # blocks of EfficientNet-Lite0, at 1/2, 1/4, 1/8 and 1/16 of the size
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def pixel_values(images: Tensor, size: int, mean: Tensor, std: Tensor) -> Tensor:
    """Images (N, C, H, W) in [-1, 1] as transformers' image encoders take them: (N, 3, size, size), standardised."""
    pixels = F.interpolate(images.expand(-1, 3, -1, -1), size=(size, size), mode="bicubic", antialias=True)
    return ((pixels.clamp(-1, 1) + 1) / 2 - mean) / std


class LpipsReward:
    """Minus the distance of LPIPS (Zhang et al. 2018, eq. 1, all weights 1) on EfficientNet-Lite0's maps."""

    name = "lpips"
    paired = True

    def _maps(self, images: Tensor) -> list[Tensor]:
        network, maps = _efficientnet().to(images.device), []
        pixels = images * (127.5 / 128) + 0.5 / 128  # the network's own (level - 127) / 128
        if min(images.shape[-2:]) < 32:
            pixels = F.interpolate(pixels, size=(32, 32), mode="bilinear", align_corners=False)
        x = network._swish(network._bn0(network._conv_stem(pixels.expand(-1, 3, -1, -1))))
        for index, block in enumerate(network._blocks[: LAYERS[-1] + 1]):
            x = block(x)
            if index in LAYERS:
                maps.append(F.normalize(x, dim=1, eps=1e-6))
        return maps

    def __call__(self, batch: Batch) -> Tensor:
        images, targets = batch.images, batch.targets
        repeats = period(targets)
        distance = torch.zeros(len(images), device=images.device)
        for ours, theirs in zip(self._maps(images), self._maps(targets[:repeats]), strict=True):
            wanted = theirs.repeat(len(images) // repeats, 1, 1, 1)
            distance = distance + (ours - wanted).pow(2).sum(1).mean((1, 2))
        return -distance


class EmbeddingReward:
    """Cosine similarity of an image encoder's embeddings of the student's and the teacher's image: (B,)."""

    paired = True

    def __init__(self, network: Any, name: str, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        self.network, self.name = network.eval().requires_grad_(False), name
        self.mean, self.std = (torch.tensor(values).view(1, 3, 1, 1) for values in (mean, std))
        self.size = int(network.config.image_size)

    def _embed(self, images: Tensor) -> Tensor:
        if self.mean.device != images.device:
            self.network, self.mean, self.std = (part.to(images.device) for part in (self.network, self.mean, self.std))
        out = self.network(pixel_values=pixel_values(images, self.size, self.mean, self.std))
        embedding = getattr(out, "image_embeds", None)
        return F.normalize(out.pooler_output if embedding is None else embedding, dim=1)

    def __call__(self, batch: Batch) -> Tensor:
        images, targets = batch.images, batch.targets
        repeats = period(targets)
        wanted = self._embed(targets[:repeats]).repeat(len(images) // repeats, 1)
        return (self._embed(images) * wanted).sum(1)


def pretrained(name: str) -> EmbeddingReward:
    """ "clip:SOURCE" or "dino:SOURCE", SOURCE a folder of transformers or a Hub id.

    Raises:
        InvalidRequest: transformers is not installed, or SOURCE holds no such model.
    """
    kind, _, source = name.partition(":")
    try:
        from transformers import AutoModel, CLIPVisionModelWithProjection
    except ImportError as error:
        raise InvalidRequest(f"the reward {kind} needs transformers; pip install transformers") from error
    try:
        if kind == "clip":
            model: Any = CLIPVisionModelWithProjection.from_pretrained(source)
            return EmbeddingReward(model, f"clip:{Path(source).name}", CLIP_MEAN, CLIP_STD)
        model = AutoModel.from_pretrained(source)
        return EmbeddingReward(model, f"dino:{Path(source).name}", IMAGENET_MEAN, IMAGENET_STD)
    except (OSError, ValueError, AttributeError) as error:
        raise InvalidRequest(f"{source} holds no model for the reward {kind}: {first_line(error, None)}") from error
