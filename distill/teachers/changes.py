"""What is changed in a pipeline on the way in: LoRA files merged into its weights, another decoder.

diffusers reads LoRA files, with all the key names that it knows: its own and peft's, kohya's, those of LCM-LoRA,
Hyper-SD, Lightning and DMD2. A file that it would use in part is refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from redif_sdk.distill.teachers.folders import load_autoencoder, without_bars
from redif_sdk.errors import InvalidRequest, RedifError, UnsupportedModel, first_line
from redif_sdk.models.copies import adapted_layers, merged, named_parts
from redif_sdk.models.families import AUTOENCODERS

__all__ = ["Lora", "merge_loras", "with_decoder"]

_NAME = "redif"  # of the adapter, until it is merged

_FIRST = re.compile(r"(\.lora_A|[._]lora_down|\.lora\.down|\.lora_linear_layer\.down|\.down)(\.\w+)?\.weight$")


@dataclass(frozen=True)
class Lora:
    """A LoRA in a safetensors file, and how strongly it is added."""

    path: Path
    scale: float = 1.0

    @classmethod
    def parsed(cls, text: str) -> Lora:
        """Of ``FILE`` or ``FILE:SCALE``."""
        head, colon, tail = text.rpartition(":")
        try:
            return cls(Path(head), float(tail)) if colon and not Path(text).is_file() else cls(Path(text))
        except ValueError:
            return cls(Path(text))


def merge_loras(pipeline: Any, loras: Sequence[Lora]) -> None:
    """Add LoRAs to the weights of a pipeline, in the dtype of the weights.

    Weights that are mapped from files are copied where a LoRA changes them; the files stay as they are.

    Raises:
        InvalidRequest: a file is missing, is no safetensors file, or does not belong to this pipeline.
        UnsupportedModel: the pipeline takes no LoRA.
    """
    if not loras:
        return
    kind = type(pipeline).__name__
    if not hasattr(pipeline, "load_lora_weights"):
        raise UnsupportedModel(f"a {kind} takes no LoRA in diffusers; merge it into the weights yourself")
    for lora in loras:
        layers = _layers(lora)
        try:
            with without_bars():
                pipeline.load_lora_weights(
                    str(lora.path.parent),
                    weight_name=lora.path.name,
                    adapter_name=_NAME,
                    local_files_only=True,
                    use_safetensors=True,
                )
        except (MemoryError, RedifError):
            raise
        except Exception as error:  # diffusers' converters raise of many kinds for names that they do not know
            raise InvalidRequest(
                f"the LoRA {lora.path} does not fit a {kind}: {first_line(error)}; use one that was made for this model"
            ) from error
        if (found := _adapted(pipeline)) < layers:
            raise InvalidRequest(
                f"the LoRA {lora.path} changes {layers} layers, and only {found} of them are in this {kind}; use one "
                "that was made for this model"
            )
        pipeline.set_adapters([_NAME], [lora.scale])
        for name, part in named_parts(pipeline):
            merged(part, name)


def with_decoder(pipeline: Any, source: str | Path, *, mapped: bool = False) -> None:
    """Put the autoencoder of a folder in the place of a pipeline's own.

    Raises:
        InvalidRequest: it is not there, or its weights are not whole.
        UnsupportedModel: the pipeline has none, or it is of another class than `AUTOENCODERS`.
    """
    if getattr(pipeline, "vae", None) is None:
        raise UnsupportedModel(f"a {type(pipeline).__name__} has no autoencoder that another could replace")
    pipeline.register_modules(vae=load_autoencoder(source, AUTOENCODERS, mapped=mapped))


def _layers(lora: Lora) -> int:
    """How many layers a file changes."""
    path = lora.path
    if not math.isfinite(lora.scale):
        raise InvalidRequest(f"the scale of the LoRA {path} is {lora.scale}; give a finite number")
    if not path.is_file():
        raise InvalidRequest(f"there is no LoRA {path}; give a safetensors file, as FILE or FILE:SCALE")
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
    except SafetensorError as error:
        raise InvalidRequest(
            f"the LoRA {path} is no safetensors file ({error}); other formats are not read, since they can run code"
        ) from error
    found = len({name[: match.start()] for name in names if (match := _FIRST.search(name))})
    if not found:
        raise InvalidRequest(f"{path} holds no LoRA: none of its {len(names)} tensors has a name of one")
    return found


def _adapted(pipeline: Any) -> int:
    """The layers of a pipeline that have an adapter."""
    return sum(len(adapted_layers(part)) for _, part in named_parts(pipeline))
