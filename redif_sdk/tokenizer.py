"""Prompts to token ids, by the `tokenizers` package alone and from a student's checked bytes.

The ids are those of transformers with ``padding="max_length", truncation=True``, which diffusers' pipelines ask for.
What a prompt may be is `request.py`'s business, and what ids become the text encoder's graph's.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding
from tokenizers import Tokenizer as Backend

from redif_sdk.artifact.folder import StudentFolder
from redif_sdk.artifact.records import Tokenizer
from redif_sdk.errors import InvalidRequest, ManifestError, UnsupportedModel

__all__ = ["PromptTokenizer"]

#: A server keeps this logger silent: what it says quotes prompts.
_log = logging.getLogger(__name__)


class PromptTokenizer:
    """The tokenizers of a student that is asked by prompts. Safe to use from several threads."""

    def __init__(self, student: StudentFolder) -> None:
        """Raises UnsupportedModel for a student without prompts, IntegrityError for a file that was altered,
        ManifestError for one that is no tokenizer."""
        text = student.manifest.text
        if text is None:
            raise UnsupportedModel(f"{student.path} takes no prompts, so it has no tokenizer")
        self._parts = [(part, _load(student, part)) for part in text.tokenizers]

    def __call__(self, prompts: Sequence[str]) -> dict[str, NDArray[np.int64]]:
        """The text encoder's inputs by name: ids, and the mask where one is taken, each int64 (B, max_length).

        What is cut of a prompt that is too long is logged as a warning.
        """
        arrays: dict[str, NDArray[np.int64]] = {}
        for part, backend in self._parts:
            ids = np.full((len(prompts), part.max_length), part.pad_token_id, dtype=np.int64)
            mask = np.zeros_like(ids)
            for row, prompt in enumerate(prompts):
                text = prompt.lower().strip() if part.lowercase else prompt
                encoding = _encode(backend, text)
                found = encoding.ids
                ids[row, : len(found)] = found
                mask[row, : len(found)] = 1
                if encoding.overflowing:
                    _warn(part, _cut(text, encoding))
            arrays[part.input] = ids
            if part.mask is not None:
                arrays[part.mask] = mask
        return arrays


def _load(student: StudentFolder, part: Tokenizer) -> Backend:
    """The tokenizer of a file, which may have kept another length or padding: here both are the manifest's."""
    where = f"{part.file} in {student.path}"
    data = student.read(part.file)
    try:
        backend = Backend.from_str(data.decode())
        backend.no_padding()
        backend.enable_truncation(part.max_length)
    except Exception as error:  # the package has no errors of its own: all of them are plain Exceptions
        raise ManifestError(f"{where} is no tokenizer that can be used: {error!s:.200}; export it again") from error
    if backend.num_special_tokens_to_add(False) >= part.max_length:
        raise ManifestError(f"{where} has no room for a prompt in {part.max_length} tokens; export it again")
    return backend


def _encode(backend: Backend, text: str) -> Encoding:
    try:
        return backend.encode(text)
    except Exception as error:  # as above
        raise InvalidRequest(f"a prompt has no tokens here ({error!s:.200}); give another one") from error


def _cut(text: str, encoding: Encoding) -> str:
    """The end of a prompt that has no token."""
    first = encoding.overflowing[0]
    begins = [
        start for (start, _), special in zip(first.offsets, first.special_tokens_mask, strict=True) if not special
    ]
    return text[begins[0] :] if begins else ""


def _warn(part: Tokenizer, cut: str) -> None:
    _log.warning(
        "the following part of the prompt was cut off, because %s takes %d tokens: %r",
        part.input,
        part.max_length,
        cut[:1000],
    )
