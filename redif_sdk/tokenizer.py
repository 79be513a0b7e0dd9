"""Prompts to token ids, with the `tokenizers` package and from a student's checked bytes.

The ids are those of transformers with ``padding="max_length", truncation=True``, which diffusers' pipelines ask for.
`inputs/` checks prompts; the text encoder's graph takes the ids.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding
from tokenizers import Tokenizer as Backend

from redif_sdk.artifact.folder import StudentFolder
from redif_sdk.artifact.records import Tokenizer
from redif_sdk.errors import InvalidRequest, ManifestError, UnsupportedModel

__all__ = ["Chunks", "PromptTokenizer", "prepared", "split", "token_ids"]

Floats = NDArray[np.float32]

#: A server keeps this logger silent: its messages quote prompts.
_log = logging.getLogger(__name__)


#: Tokens of CLIP's vocabulary, whose words end with this.
_END = "</w>"
_SENTENCES, _PHRASES = (".</w>",), (".</w>", ",</w>", ";</w>", ":</w>")


class Chunks(NamedTuple):
    """Prompts in chunks of a text encoder's length L.

    Attributes:
        ids: The text encoder's inputs by name, each int64 (N, L).
        weights: Of each token, float32 (N, L).
        owners: The prompt of each chunk; those of one follow each other.
        ends: The place of each chunk's first end token.
    """

    ids: dict[str, NDArray[np.int64]]
    weights: NDArray[np.float32]
    owners: list[int]
    ends: list[int]


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

    def __call__(self, prompts: Sequence[str], *, warn: bool = True) -> dict[str, NDArray[np.int64]]:
        """The text encoder's inputs by name: ids, and a mask for encoders that take one, each int64 (B, max_length).

        A prompt that is too long is cut, and the part that was cut is logged as a warning, unless `warn` is off.

        Raises:
            InvalidRequest: The tokenizer cannot encode a prompt.
        """
        arrays: dict[str, NDArray[np.int64]] = {}
        for part, backend in self._parts:
            rows = []
            for prompt in prompts:
                ids, mask, cut = token_ids(backend, part, prompt)
                rows.append((ids, mask))
                if cut is not None and warn:
                    _warn(part, cut)
            empty = np.zeros((0, part.max_length), dtype=np.int64)
            arrays[part.input] = np.stack([ids for ids, _ in rows]) if rows else empty
            if part.mask is not None:
                arrays[part.mask] = np.stack([mask for _, mask in rows]) if rows else empty
        return arrays

    def chunked(self, prompts: Sequence[Sequence[tuple[str, float]]], *, long: bool) -> Chunks:
        """The text encoder's inputs of prompts in fragments (text, weight), in chunks of its length.

        Fragments are tokenised one by one. Only CLIP's tokenizers are meant, which agree on the places of tokens.

        Args:
            prompts: Each a prompt's fragments.
            long: As many chunks as a prompt needs; else one, and what is too long is cut, with a warning.
        """
        found = [self._chunks(part, backend, prompts, long=long) for part, backend in self._parts]
        ids = {part.input: value for (part, _), (value, *_) in zip(self._parts, found, strict=True)}
        _, weights, owners, ends = found[-1]
        return Chunks(ids, weights, owners, ends)

    def _chunks(
        self, part: Tokenizer, backend: Backend, prompts: Sequence[Sequence[tuple[str, float]]], *, long: bool
    ) -> tuple[NDArray[np.int64], Floats, list[int], list[int]]:
        """Of one tokenizer: ids, weights, and of each chunk its prompt and the place of its end."""
        begin, *end = _encode(backend, "").ids
        room = part.max_length - 1 - len(end)
        chunks: list[list[tuple[int, float]]] = []
        owners: list[int] = []
        for place, fragments in enumerate(prompts):
            tokens = [(token, weight) for text, weight in fragments for token in _all_ids(backend, text)]
            sizes = split([backend.id_to_token(token) or "" for token, _ in tokens], room) if long else [room]
            if len(tokens) > room and not long:
                _warn(part, f"{len(tokens) - room} tokens at the end")
            first = 0
            for size in sizes:
                chunks.append(tokens[first : first + size])
                owners.append(place)
                first += size
        ids = np.full((len(chunks), part.max_length), part.pad_token_id, dtype=np.int64)
        weights = np.ones(ids.shape, np.float32)
        for row, chunk in enumerate(chunks):
            whole = [(begin, 1.0), *chunk, *((token, 1.0) for token in end)]
            ids[row, : len(whole)], weights[row, : len(whole)] = zip(*whole, strict=True)
        return ids, weights, owners, [row.tolist().index(end[0]) for row in ids]


def split(tokens: Sequence[str], room: int) -> list[int]:
    """The sizes of the chunks of a prompt.

    Args:
        tokens: Of the prompt, as the vocabulary writes them, without begin and end.
        room: The most of a chunk.
    """
    sizes: list[int] = []
    left = list(tokens)
    while len(left) > room:
        sizes.append(_end_of_chunk(left[:room]))
        left = left[sizes[-1] :]
    return [*sizes, len(left)]


def _end_of_chunk(tokens: Sequence[str]) -> int:
    """How many of the tokens that fit are taken."""
    tests: tuple[Callable[[str], bool], ...] = (
        lambda token: token in _SENTENCES,
        lambda token: token in _PHRASES,
        lambda token: token.endswith(_END),
    )
    for test in tests:
        for place in reversed(range(len(tokens))):
            if test(tokens[place]):
                return place + 1
    return len(tokens)


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


def _all_ids(backend: Backend, text: str) -> list[int]:
    """The ids of a text of any length, without begin and end."""
    encoding = _encode(backend, text)
    return [token for part in (encoding, *encoding.overflowing) for token in part.ids[1:-1]]


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
