"""Prompts to token ids, with the `tokenizers` package and from a student's checked bytes.

The ids are those of transformers with ``padding="max_length", truncation=True``, which diffusers' pipelines ask for.
`inputs/` checks prompts; the text encoder's graph takes the ids.
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

__all__ = ["PromptTokenizer", "prepared", "token_ids"]

Floats = NDArray[np.float32]

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
            rows = []
            for prompt in prompts:
                ids, mask, cut = token_ids(backend, part, prompt)
                rows.append((ids, mask))
                if cut is not None:
                    _warn(part, cut)
            empty = np.zeros((0, part.max_length), dtype=np.int64)
            arrays[part.input] = np.stack([ids for ids, _ in rows]) if rows else empty
            if part.mask is not None:
                arrays[part.mask] = np.stack([mask for _, mask in rows]) if rows else empty
        return arrays

    def weighted(self, prompts: Sequence[Sequence[tuple[str, float]]]) -> tuple[dict[str, NDArray[np.int64]], Floats]:
        """The text encoder's inputs of prompts in fragments (text, weight), and each token's weight, float32 (B, L).

        Fragments are tokenised one by one. Only CLIP's tokenizers are meant, which agree on the places of tokens.
        """
        arrays: dict[str, NDArray[np.int64]] = {}
        weights: Floats = np.zeros((0, 0), np.float32)
        for part, backend in self._parts:
            begin, *end = _encode(backend, "").ids
            ids = np.full((len(prompts), part.max_length), part.pad_token_id, dtype=np.int64)
            weights = np.ones(ids.shape, np.float32)
            for row, fragments in enumerate(prompts):
                tokens = [(token, weight) for text, weight in fragments for token in _encode(backend, text).ids[1:-1]]
                if len(tokens) > (room := part.max_length - 1 - len(end)):
                    _warn(part, f"{len(tokens) - room} tokens at the end")
                tokens = [(begin, 1.0), *tokens[:room], *((token, 1.0) for token in end)]
                ids[row, : len(tokens)], weights[row, : len(tokens)] = zip(*tokens, strict=True)
            arrays[part.input] = ids
        return arrays, weights


def token_ids(
    backend: Backend, part: Tokenizer, prompt: str
) -> tuple[NDArray[np.int64], NDArray[np.int64], str | None]:
    """The ids and the mask of one prompt, each int64 (max_length,), and what was cut off, if it is too long.

    Raises:
        InvalidRequest: The tokenizer cannot encode it.
    """
    text = prompt.lower().strip() if part.lowercase else prompt
    encoding = _encode(backend, text)
    ids = np.full(part.max_length, part.pad_token_id, dtype=np.int64)
    mask = np.zeros_like(ids)
    ids[: len(encoding.ids)] = encoding.ids
    mask[: len(encoding.ids)] = 1
    return ids, mask, _cut(text, encoding) if encoding.overflowing else None


def _load(student: StudentFolder, part: Tokenizer) -> Backend:
    return prepared(student.read(part.file), part, f"{part.file} in {student.path}")


def prepared(data: bytes | str, part: Tokenizer, where: str) -> Backend:
    """The tokenizer of a ``tokenizer.json``, with the manifest's length and without padding, whatever the file says of
    these.

    Raises:
        ManifestError: It is not a tokenizer; ``where`` names it.
    """
    try:
        backend = Backend.from_str(data if isinstance(data, str) else data.decode())
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
