"""Prompts in chunks of a text encoder's length, whose states lie one after another along the tokens.

They are split (`redif_sdk.tokenizer`) and put together (`weighting.py`) as by compel with
``truncate_long_prompts=False``: a chunk ends after the last full stop that fits, else after other punctuation, else
after a word, and every chunk has the first one's state at its end token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from redif_sdk.artifact.manifest import Manifest
from redif_sdk.errors import InvalidRequest
from redif_sdk.runtimes.guided import NULL

__all__ = ["check_length", "equally_long", "takes_chunks"]


def takes_chunks(manifest: Manifest) -> bool:
    """Whether a student's encoded prompts can be put together of chunks: its text encoders are CLIP's alone."""
    text = manifest.text
    if text is None:
        return False
    lengths = {part.max_length for part in text.tokenizers if part.mask is None}
    kinds = [encoder.class_path.rpartition(".")[2] for encoder in text.encoders]
    return {text.tensors[0].shape[1]} == lengths and all(kind.startswith("CLIPText") for kind in kinds)


def check_length(manifest: Manifest, tokens: int) -> None:
    """Check the number of tokens of encoded prompts.

    Raises:
        InvalidRequest: They are several chunks, and the student's graphs take one; or no whole chunks.
    """
    text = manifest.text
    assert text is not None
    own = text.tensors[0].shape[1]
    assert isinstance(own, int)
    whole = tokens > 0 and tokens % own == 0
    if text.long_prompts and not whole:
        raise InvalidRequest(f"encoded prompts have {tokens} tokens; give a multiple of {own}")
    if not text.long_prompts and whole and tokens > own and takes_chunks(manifest):
        raise InvalidRequest(
            f"encoded prompts have {tokens} tokens, and the graphs of {manifest.name} take {own}; export it again with "
            "redif export --long-prompts"
        )


def equally_long(
    conditions: dict[str, NDArray[Any]], states: str, filler: Callable[[], NDArray[np.float32]]
) -> dict[str, NDArray[Any]]:
    """The conditions with the states of prompts and null prompts of one length: the shorter ones end with chunks of
    `filler` (L, D)."""
    names = [name for name in (states, NULL + states) if name in conditions]
    most = max((conditions[name].shape[1] for name in names), default=0)
    found = dict(conditions)
    for name in names:
        value = conditions[name]
        if value.shape[1] < most:
            one, missing = filler(), most - value.shape[1]
            found[name] = np.concatenate([value, np.tile(one, (len(value), missing // len(one), 1))], 1)
    return found
