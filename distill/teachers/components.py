"""Which parts of a pipeline are used, which may be left out, and which are refused.

A pipeline with a part that is neither would give other images than its own, so it is never taken.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from redif_sdk.errors import InvalidRequest, UnsupportedModel

__all__ = ["HARMLESS", "check_pipeline", "check_tokenizer_files", "check_used", "left_out", "network_class"]

_log = logging.getLogger(__name__)

#: Parts that a pipeline's images do not need -> what is lost without them.
HARMLESS = {
    "safety_checker": "students do not filter their images",
    "feature_extractor": "",  # reads images, for the safety checker and for prompts that are images
    "image_encoder": "",  # of prompts that are images; a network that needs them is refused
}
_SENTENCEPIECE = "spiece.model"


def left_out(name: str, parts: Iterable[str]) -> list[str]:
    """Those of ``parts`` that are left out; a loss is said in one line of the log."""
    found = [part for part in parts if part in HARMLESS]
    for part in found:
        if HARMLESS[part]:
            _log.warning("the %s of %s is left out: %s", part, name, HARMLESS[part])
    return found


def check_used(name: str, used: Iterable[str], parts: Mapping[str, tuple[str, str]]) -> None:
    """Raise UnsupportedModel for a part that is neither used nor known to be harmless.

    Args:
        name: of the pipeline, for the message.
        used: the parts that its adapter uses.
        parts: all that it has, as (library, class).
    """
    known = {*used, *HARMLESS}
    if others := [f"{part} ({kind})" for part, (_, kind) in parts.items() if part not in known]:
        raise UnsupportedModel(
            f"{name} also has {', '.join(others)}, which is not used here, so its images would be others; use a "
            "pipeline without it, or write an adapter (docs/adapters.md)"
        )


def check_pipeline(pipeline: Any, used: Iterable[str]) -> None:
    """`check_used` of a pipeline object. Where a safety checker is left out, that is said in one line."""
    name = type(pipeline).__name__
    there = {part: value for part, value in _components(pipeline).items() if value is not None}
    check_used(name, used, {part: ("", type(value).__name__) for part, value in there.items()})
    left_out(name, there)


def _components(pipeline: Any) -> Mapping[str, Any]:
    """The parts of a pipeline by name; of what is no pipeline of diffusers, its public attributes that are networks."""
    found = getattr(pipeline, "components", None)
    if isinstance(found, Mapping):
        return found
    return {name: value for name, value in vars(pipeline).items() if name[:1] != "_" and isinstance(value, nn.Module)}


def network_class(library: str, name: str) -> Any:
    """The class of a part if it is a network of diffusers or transformers that loads from a folder, else None.

    Raises:
        InvalidRequest: the library has no such class.
    """
    if library not in ("diffusers", "transformers"):
        return None
    kind = getattr(importlib.import_module(library), name, None)
    if kind is None:
        raise InvalidRequest(f"model_index.json names {library}.{name}, which the installed {library} does not have")
    return kind if isinstance(kind, type) and issubclass(kind, nn.Module) and hasattr(kind, "from_pretrained") else None


def check_tokenizer_files(kind: str, folder: Path) -> None:
    """Raise InvalidRequest for a tokenizer that is a SentencePiece model alone where that package is not installed."""
    alone = "Tokenizer" in kind and (folder / _SENTENCEPIECE).is_file() and not (folder / "tokenizer.json").is_file()
    if alone and importlib.util.find_spec("sentencepiece") is None:
        raise InvalidRequest(
            f"{folder} holds {_SENTENCEPIECE} and no tokenizer.json, and reading it needs the package sentencepiece; "
            'pip install "redif-sdk[distill]"'
        )
