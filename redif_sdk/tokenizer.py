"""Prompts to token ids, with the `tokenizers` package and from a student's checked bytes.

The ids are those of transformers with ``padding="max_length", truncation=True``, which diffusers' pipelines ask for.
`inputs.py` checks prompts; the text encoder's graph takes the ids.
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

#: A server keeps this logger silent: its messages quote prompts.
_log = logging.getLogger(__name__)


class PromptTokenizer:
    """The tokenizers of a text-to-image student. Safe to use from several threads.

    Raises:
        UnsupportedModel: The student is not a text-to-image model.
        IntegrityError: A tokenizer's file was altered.
        ManifestError: It is not a tokenizer.
    """

    def __init__(self, student: StudentFolder) -> None:
        text = student.manifest.text
        if text is None:
            raise UnsupportedModel(f"{student.path} is not a text-to-image model, so it has no tokenizer")
        self._parts = [(part, _load(student, part)) for part in text.tokenizers]

    def __call__(self, prompts: Sequence[str]) -> dict[str, NDArray[np.int64]]:
        """The text encoder's inputs by name: ids, and a mask for encoders that take one, each int64 (B, max_length).

        A prompt that is too long is cut, and the part that was cut is logged as a warning.

        Raises:
            InvalidRequest: The tokenizer cannot encode a prompt.
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
    """The tokenizer of a file, with the manifest's length and without padding, whatever the file says of these."""
    where = f"{part.file} in {student.path}"
    data = student.read(part.file)
    try:
        backend = Backend.from_str(data.decode())
        backend.no_padding()
        backend.enable_truncation(part.max_length)
    except Exception as error:  # the package has no errors of its own: all of them are plain Exceptions
        raise ManifestError(f"{where} is not a usable tokenizer: {error!s:.200}; export it again") from error
    if backend.num_special_tokens_to_add(False) >= part.max_length:
        raise ManifestError(f"{where} leaves no room for a prompt in {part.max_length} tokens; export it again")
    return backend


def _encode(backend: Backend, text: str) -> Encoding:
    try:
        return backend.encode(text)
    except Exception as error:  # as above
        raise InvalidRequest(f"a prompt cannot be tokenised ({error!s:.200}); give another one") from error


def _cut(text: str, encoding: Encoding) -> str:
    """The part of a prompt that was cut off."""
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
