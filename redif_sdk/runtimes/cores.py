"""A batch over the cores of a CPU: which pieces it is cut into, and who runs them.

A network's call on one picture gains from several threads; on several pictures it gains more from one thread a picture,
since threads that share a small operation wait for one another (docs/performance.md has the figures). So a batch of at
least as many pictures as there are workers is cut into pieces that one thread each computes, and so is everything that
is asked for while another call is under way. Pieces have few sizes, for engines that compile one graph a shape.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from redif_sdk.artifact.records import Graph

__all__ = ["LARGEST_PIECE", "Arrays", "Batches", "Workers", "pieces"]

Arrays = dict[str, NDArray[Any]]

#: Pictures that one thread computes at once. Larger pieces are no faster: their activations leave the cache.
LARGEST_PIECE = 4


def pieces(batch: int, workers: int) -> list[int]:
    """The sizes, powers of two up to `LARGEST_PIECE`, that `batch` pictures are cut into: as even as can be."""
    sizes: list[int] = []
    while batch >= workers:
        size = min(LARGEST_PIECE, 1 << (batch // workers).bit_length() - 1)
        rounds = batch // (size * workers)
        sizes += [size] * (rounds * workers)
        batch -= rounds * workers * size
    return sizes + [1] * batch


class Batches:
    """The batch axis of a graph's inputs and outputs, by which both are cut and joined."""

    def __init__(self, graph: Graph) -> None:
        self._axes = {spec.name: spec.shape.index("batch") for spec in graph.inputs if "batch" in spec.shape}
        self._first, self._first_axis = next(iter(self._axes.items()))
        self._outputs = {spec.name: spec.shape.index("batch") for spec in graph.outputs if "batch" in spec.shape}

    def size(self, inputs: Mapping[str, NDArray[Any]]) -> int:
        """The number of pictures that `inputs` ask for."""
        return int(inputs[self._first].shape[self._first_axis])

    def cut(self, inputs: Mapping[str, NDArray[Any]], sizes: list[int]) -> list[Arrays]:
        """The inputs of each piece, contiguous; what has no batch axis goes to all."""
        ends = np.cumsum(sizes)
        return [
            {
                name: np.ascontiguousarray(value.take(range(end - size, end), self._axes[name]))
                if name in self._axes
                else value
                for name, value in inputs.items()
            }
            for size, end in zip(sizes, ends, strict=True)
        ]

    def join(self, outputs: list[Arrays]) -> Arrays:
        """The outputs of all pieces in one."""
        if len(outputs) == 1:
            return outputs[0]
        return {
            name: np.concatenate([piece[name] for piece in outputs], axis=self._outputs[name]) for name in outputs[0]
        }


class Workers:
    """As many threads as there are cores to use, for all calls of one loaded graph together."""

    def __init__(self, number: int) -> None:
        self.number = number
        self._lock = Lock()
        self._calls = 0

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self.number, thread_name_prefix="redif")

    def run(
        self,
        batches: Batches,
        inputs: Mapping[str, NDArray[Any]],
        wide: Callable[[Mapping[str, NDArray[Any]]], Arrays],
        narrow: Callable[[Arrays], Arrays],
    ) -> Arrays:
        """Compute `inputs`: by `wide`, all cores at once, if they are few and nobody else asks; else by `narrow`.

        `narrow` is called from several threads at once, with as many pictures as `pieces` gives.
        """
        with self._lock:
            self._calls += 1
            alone = self._calls == 1
        try:
            batch = batches.size(inputs)
            if alone and batch < self.number:
                return wide(inputs)
            cut = batches.cut(inputs, pieces(batch, self.number))
            if self.number == 1:
                return batches.join([narrow(piece) for piece in cut])
            with self._lock:
                pool = self._pool
            return batches.join(list(pool.map(narrow, cut)))
        finally:
            with self._lock:
                self._calls -= 1
