"""How well an image fits its prompt, by a model of transformers: CLIP score, PickScore, SigLIP, BLIP's ITM head."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from redif_sdk.distill.rewards.batch import Batch
from redif_sdk.distill.rewards.perceptual import CLIP_MEAN, CLIP_STD, pixel_values
from redif_sdk.errors import InvalidRequest, first_line

__all__ = ["PREFIX", "PromptScore"]

PREFIX = "prompt-score:"
CONTRASTIVE = ("CLIPModel", "SiglipModel", "Siglip2Model")
MATCHING = ("BlipForImageTextRetrieval",)


class PromptScore:
    """A model's own score of an image and its prompt: (N,), with a gradient in the images.

    Of models that compare embeddings (CLIP, PickScore, SigLIP): scale x cosine, and SigLIP's bias. Of BLIP's head for
    image-text matching, on which ImageReward is built: the logit that both belong together, over the other.
    """

    def __init__(
        self, model: Any, tokenizer: Any, name: str, *, mean: tuple[float, ...], std: tuple[float, ...]
    ) -> None:
        self.model, self.tokenizer, self.name = model.eval().requires_grad_(False), tokenizer, name
        self.mean, self.std = (torch.tensor(values).view(1, 3, 1, 1) for values in (mean, std))
        self.size = int(model.config.vision_config.image_size)
        self.contrastive = type(model).__name__ in CONTRASTIVE

    @classmethod
    def load(cls, source: str) -> PromptScore:
        """From a folder of transformers, or a Hub id.

        Raises:
            InvalidRequest: transformers is not installed, or ``source`` holds no such model.
        """
        try:
            import transformers
        except ImportError as error:
            raise InvalidRequest(f'the reward {PREFIX} needs transformers; pip install "redif-sdk[distill]"') from error
        model = None
        try:
            (kind, *_) = transformers.AutoConfig.from_pretrained(source).architectures or ["model without a class"]
            if kind in (*CONTRASTIVE, *MATCHING):
                model = getattr(transformers, kind).from_pretrained(source)
                tokenizer = transformers.AutoTokenizer.from_pretrained(source)
        except (OSError, ValueError, AttributeError) as error:
            raise InvalidRequest(f"{source} cannot be loaded for {PREFIX}: {first_line(error, None)}") from error
        if model is None:
            raise InvalidRequest(
                f"{source} is a {kind}, which gives no score of an image and a prompt that is known; use "
                f"{', '.join((*CONTRASTIVE, *MATCHING))}, or a reward of your own"
            )
        mean, std = _normalisation(source)
        return cls(model, tokenizer, f"{PREFIX}{Path(source).name}", mean=mean, std=std)

    def __call__(self, batch: Batch) -> Tensor:
        """The scores of ``batch``: (N,) float32.

        Raises:
            InvalidRequest: its images have no prompts, nor class names.
        """
        subjects = batch.prompts or batch.class_names
        if subjects is None:
            raise InvalidRequest(f"the reward {self.name} needs prompts or class names, and the teacher has none")
        device = batch.images.device
        if self.mean.device != device:
            self.model, self.mean, self.std = (part.to(device) for part in (self.model, self.mean, self.std))
        pixels = pixel_values(batch.images, self.size, self.mean, self.std)
        each = sorted(set(subjects))
        places = torch.tensor([each.index(subject) for subject in subjects], device=device)
        return self._compared(pixels, each, places) if self.contrastive else self._matched(pixels, each, places)

    def _tokens(self, texts: list[str]) -> dict[str, Tensor]:
        longest = getattr(self.model.config.text_config, "max_position_embeddings", 77)
        padding = "longest" if type(self.model).__name__ in ("CLIPModel", *MATCHING) else "max_length"  # as trained
        found = self.tokenizer(texts, padding=padding, truncation=True, max_length=longest, return_tensors="pt")
        return {
            name: ids.to(self.mean.device) for name, ids in found.items() if name in ("input_ids", "attention_mask")
        }

    def _compared(self, pixels: Tensor, texts: list[str], places: Tensor) -> Tensor:
        with torch.no_grad():  # prompts have no gradient
            told = _embedding(self.model.get_text_features(**self._tokens(texts)))[places]
        seen = _embedding(self.model.get_image_features(pixel_values=pixels))
        score = self.model.logit_scale.exp() * (F.normalize(seen, dim=1) * F.normalize(told, dim=1)).sum(1)
        bias = getattr(self.model, "logit_bias", 0.0)
        return (score + bias).float()

    def _matched(self, pixels: Tensor, texts: list[str], places: Tensor) -> Tensor:
        tokens = {name: ids[places] for name, ids in self._tokens(texts).items()}
        logits = self.model(pixel_values=pixels, use_itm_head=True, **tokens).itm_score
        return (logits[:, 1] - logits[:, 0]).float()


def _embedding(output: Any) -> Tensor:
    """The tensor itself, or of newer transformers the pooled one."""
    found: Tensor = output if isinstance(output, Tensor) else output.pooler_output
    return found


def _normalisation(source: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Means and deviations of a model's pixels in [0, 1]: what its preprocessor says, else CLIP's."""
    from transformers.utils import cached_file

    found = cached_file(source, "preprocessor_config.json", _raise_exceptions_for_missing_entries=False)
    if found is None:
        return CLIP_MEAN, CLIP_STD
    config = json.loads(Path(found).read_text("utf-8"))
    return tuple(config.get("image_mean", CLIP_MEAN)), tuple(config.get("image_std", CLIP_STD))
