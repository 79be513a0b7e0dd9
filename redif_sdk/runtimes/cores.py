"""Spreading a batch over the cores of a CPU.

One image is computed fastest by several threads together. Several images are computed faster by one thread for each,
since threads that share a small operation wait for one another (figures: docs/performance.md). So a batch of at least
as many images as there are workers is cut into pieces, each computed by one thread; so is every call that starts while
another one runs. Pieces have few sizes, for engines that compile a graph for each shape.
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
from redif_sdk.runtimes.guided import GuidedInputs

__all__ = ["LARGEST_PIECE", "Arrays", "Batches", "Workers", "pieces"]

Arrays = dict[str, NDArray[Any]]

#: Images in one piece. Larger pieces are no faster: their activations leave the processor's cache.
LARGEST_PIECE = 4


def pieces(batch: int, workers: int) -> list[int]:
    """The sizes of the pieces of `batch` images: powers of two up to `LARGEST_PIECE`, as even as possible."""
    sizes: list[int] = []
    while batch >= workers:
        size = min(LARGEST_PIECE, 1 << (batch // workers).bit_length() - 1)
        rounds = batch // (size * workers)
        sizes += [size] * (rounds * workers)
        batch -= rounds * workers * size
    return sizes + [1] * batch


class Batches:
    """Cuts a graph's inputs, and joins its outputs, along their batch axes.

    Inputs are per image; `inputs_of` makes what the graph takes, of a whole batch or of a piece.
    """

    def __init__(self, graph: Graph) -> None:
        self.inputs_of = GuidedInputs(graph.inputs)
        self._axes = {spec.name: spec.shape.index("batch") for spec in graph.inputs if "batch" in spec.shape}
        self._axes |= self.inputs_of.axes()
        self._first, self._first_axis = next(iter(self._axes.items()))
        self._outputs = {spec.name: spec.shape.index("batch") for spec in graph.outputs if "batch" in spec.shape}

    def size(self, inputs: Mapping[str, NDArray[Any]]) -> int:
        """The batch size of `inputs`."""
        return int(inputs[self._first].shape[self._first_axis])

    def cut(self, inputs: Mapping[str, NDArray[Any]], sizes: list[int]) -> list[Arrays]:
        """The inputs of each piece, contiguous. An input without a batch axis goes to every piece."""
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
        """The outputs of all pieces, joined."""
        if len(outputs) == 1:
            return outputs[0]
        return {
            name: np.concatenate([piece[name] for piece in outputs], axis=self._outputs[name]) for name in outputs[0]
        }


class Workers:
    """A pool of `number` threads, shared by all calls of one loaded graph."""

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
        on_all_threads: Callable[[Mapping[str, NDArray[Any]]], Arrays],
        on_one_thread: Callable[[Arrays], Arrays],
    ) -> Arrays:
        """Compute a batch, in one call or in pieces.

        Args:
            batches: The batch axes of the graph.
            inputs: The graph's inputs by name.
            on_all_threads: Computes the whole batch; used for a small batch while no other call runs.
            on_one_thread: Computes a piece; called from several threads at once.

        Returns:
            The graph's outputs by name.
        """
        with self._lock:
            self._calls += 1
            alone = self._calls == 1
        try:
            batch = batches.size(inputs)
            if alone and batch < self.number:
                return on_all_threads(inputs)
            cut = batches.cut(inputs, pieces(batch, self.number))
            if self.number == 1:
                return batches.join([on_one_thread(piece) for piece in cut])
            with self._lock:
                pool = self._pool
            return batches.join(list(pool.map(on_one_thread, cut)))
        finally:
            with self._lock:
                self._calls -= 1
