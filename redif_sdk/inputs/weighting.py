"""Prompts with weights, in compel's syntax: ``a (red heart)1.4 on a table-``.

``word+`` and ``word++`` count 1.1 and 1.21 times, ``word-`` 0.9 times, ``(several words)1.4`` and ``"words"++`` as
written, and groups nest. A backslash takes a character as it is. Compel's operators (``.blend()`` and the like) are not
supported.

The arithmetic is compel's with ``DownweightMode.REMOVE``: a token's state goes from that of the empty prompt to its own
by its weight, and for each fragment below 1 the result is mixed with the states of the prompt without it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from redif_sdk.errors import InvalidRequest

if TYPE_CHECKING:
    from redif_sdk.tokenizer import Chunks

__all__ = ["Fragment", "joined", "mixed", "parsed", "without"]

MORE, LESS = 1.1, 0.9
LARGEST_WEIGHT = 100.0
DEEPEST = 32  # groups inside each other

_WORD = re.compile(r"(?:[^\s()\\+-]|\\.|[+-](?=[^\s()\",.+=-]))+|[+-]+|.", re.DOTALL)
_QUOTED = re.compile(r'"((?:[^"\\]|\\.)*)"', re.DOTALL)
_REST = re.compile(r"\S*")
_NUMBER = re.compile(r"\d+(?:\.\d+)?|\.\d+")
_OPERATOR = re.compile(r"\.(?:blend|and|add|swap|attend)\(")


class Fragment(NamedTuple):
    """A part of a prompt.

    Attributes:
        text: Words, without syntax.
        weight: 1 is as usual.
    """

    text: str
    weight: float


def parsed(prompt: str) -> list[Fragment]:
    """The fragments of a prompt; neighbours of equal weight are one.

    Raises:
        InvalidRequest: Parentheses do not match, a weight is too large, or it has another of compel's operators.
    """
    if found := _OPERATOR.search(prompt):
        raise InvalidRequest(
            f"{found[0]}...) is not supported in prompts with weights; write (words)1.2, word+ or word-"
        )
    fragments, end = _group(prompt, 0, 0)
    if end < len(prompt):
        raise InvalidRequest(f"{prompt!r:.100} has a ) too many; write \\) for one that is no group")
    joined: list[Fragment] = []
    for fragment in fragments:
        if not fragment.weight <= LARGEST_WEIGHT:
            raise InvalidRequest(f"{fragment.text!r:.60} has the weight {fragment.weight:g}; give at most 100")
        if joined and math.isclose(joined[-1].weight, fragment.weight):
            joined[-1] = Fragment(f"{joined[-1].text} {fragment.text}", fragment.weight)
        else:
            joined.append(fragment)
    return joined or [Fragment("", 1.0)]


def _group(prompt: str, start: int, depth: int) -> tuple[list[Fragment], int]:
    """The fragments from `start` to the parenthesis that ends the group, or to the end; and where that is."""
    if depth > DEEPEST:
        raise InvalidRequest(f"a prompt has groups deeper than {DEEPEST}; write fewer parentheses")
    found: list[Fragment] = []
    place = start
    while place < len(prompt) and prompt[place] != ")":
        if prompt[place] == "(":
            inner, end = _group(prompt, place + 1, depth + 1)
            if end >= len(prompt):
                raise InvalidRequest(f"{prompt!r:.100} has a ( without its ); write \\( for one that is no group")
            weight, place = _weight(prompt, end + 1, numbers=True)
            found += [Fragment(fragment.text, fragment.weight * weight) for fragment in inner]
            continue
        if prompt[place].isspace():
            place += 1
            continue
        if quoted := _QUOTED.match(prompt, place):
            inner, _ = _group(quoted[1], 0, depth + 1)
            weight, place = _weight(prompt, quoted.end(), numbers=True)
            found += [Fragment(fragment.text, fragment.weight * weight) for fragment in inner]
            continue
        text, weight, place = _word(prompt, place, depth)
        found.append(Fragment(re.sub(r"\\(.)", r"\1", text), weight))
    return found, place


def _word(prompt: str, place: int, depth: int) -> tuple[str, float, int]:
    """The word at `place`, its weight, and where both end. Outside groups, f(x) is one word."""
    piece = _WORD.match(prompt, place)
    assert piece is not None
    text = piece[0]
    weight, end = _weight(prompt, piece.end(), numbers=False)
    if end == piece.end() and depth == 0 and prompt[end : end + 1] == "(":
        rest = _REST.match(prompt, end)
        assert rest is not None
        return text + rest[0], 1.0, rest.end()
    return text, weight, end


def _weight(prompt: str, place: int, *, numbers: bool) -> tuple[float, int]:
    """The weight that is written at `place`, and where it ends."""
    end = place
    while end < len(prompt) and prompt[end] == prompt[place] and prompt[end] in "+-":
        end += 1
    if end > place:
        return (MORE if prompt[place] == "+" else LESS) ** (end - place), end
    if numbers and (number := _NUMBER.match(prompt, place)):
        return float(number[0]), number.end()
    return 1.0, place


def without(fragments: Sequence[Fragment]) -> list[list[Fragment]]:
    """For each fragment of a weight below 1, the prompt without it."""
    return [
        [*fragments[:place], *fragments[place + 1 :]] or [Fragment("", 1.0)]
        for place, fragment in enumerate(fragments)
        if fragment.weight < 1
    ]


def mixed(
    fragments: Sequence[Fragment],
    states: NDArray[np.float32],
    empty: NDArray[np.float32],
    weights: NDArray[np.float32],
) -> NDArray[np.float32]:
    """The states of a weighted prompt, (L, D).

    Args:
        fragments: The prompt.
        states: (1 + n, L, D), of the prompt, and of it without each of the n fragments below 1 (`without`).
        empty: (L, D), of the empty prompt.
        weights: (1 + n, L), of each token.
    """
    weighted = np.where(weights[..., None] == 1, states, empty + (states - empty) * weights[..., None])
    low = [max(fragment.weight, 1e-5) for fragment in fragments if fragment.weight < 1]
    shares = np.array([1.0, *(math.tan((1 - weight) * math.pi / 2) for weight in low)], np.float32)
    result: NDArray[np.float32] = np.tensordot(shares / shares.sum(), weighted, axes=1).astype(np.float32)
    return result


def joined(prompts: Sequence[Sequence[Fragment]], states: NDArray[np.float32], chunks: Chunks) -> NDArray[np.float32]:
    """The states of weighted prompts of several chunks, (B, C L, D): C is the most chunks of any.

    Args:
        prompts: The fragments of each.
        states: (N, L, D), of the chunks.
        chunks: Of each prompt, and of it without each of its fragments below 1 (`without`); and last of the empty one,
            with which shorter prompts are filled up.
    """
    owners, empty = np.array(chunks.owners), states[-1]
    most = int(np.bincount(owners).max())
    found, row = [], 0
    for fragments in prompts:
        rows = range(row, row + 1 + len(without(fragments)))
        row = rows.stop
        places = [np.flatnonzero(owners == own) for own in rows]
        fill = [np.concatenate([own, np.full(most - len(own), len(states) - 1)]) for own in places]
        width = most * states.shape[1]
        whole = np.stack([states[own].reshape(width, -1) for own in fill])
        weights = np.stack([chunks.weights[own].reshape(width) for own in fill])
        result = mixed(fragments, whole, np.tile(empty, (most, 1)), weights)
        first, *others = (place * states.shape[1] + chunks.ends[chunk] for place, chunk in enumerate(places[0]))
        result[others] = result[first]
        found.append(result)
    return np.stack(found)
