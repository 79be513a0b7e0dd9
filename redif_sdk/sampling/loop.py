"""The sampling loop: a step table's rows, one after another. The only one, for numpy arrays and torch tensors alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from redif_sdk.errors import InvalidRequest
from redif_sdk.sampling.table import StepTable

__all__ = ["Network", "OnStep", "iterate_steps", "run_steps", "sample"]

Array = TypeVar("Array")
Array_co = TypeVar("Array_co", covariant=True)
Network = Callable[[NDArray[np.float32], NDArray[np.float32], Any], NDArray[np.float32]]
OnStep = Callable[[int, NDArray[np.float32], NDArray[np.float32]], None]


class Slices(Protocol[Array_co]):
    """Noise: a list of arrays, or one array (N, B, C, H, W)."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Array_co: ...


def iterate_steps(
    table: StepTable,
    x: Array,
    noise: Slices[Array] | None,
    predict: Callable[[int, Array], Array],
    *,
    steps: range | None = None,
) -> Iterator[tuple[int, Array, Array]]:
    """Yield (k, x', x0) after each step: its number, the next state and the clean-image estimate.

    The consumer may write into x' in place; the next step starts from what it holds then.

    Args:
        table: The sampler.
        x: The state that the first step starts from, numpy or torch, (B, C, H, W); see `StepTable.start`.
        noise: Slices of standard normal noise, each of x's shape: step k takes slice min(k + 1, N - 1). None for a
            deterministic table.
        predict: Called as ``predict(k, x)``; returns the clean-image estimate x0 of step k, usually
            ``table.clean(k, x, network(x, t))``.
        steps: The steps to run; None: all of the table.

    Raises:
        InvalidRequest: A step adds noise and ``noise`` is None.
    """
    for k in range(table.num_inference_steps) if steps is None else steps:
        x0 = predict(k, x)
        x = table.advance(k, x, x0, None if noise is None else noise[min(k + 1, len(noise) - 1)])
        yield k, x, x0


def run_steps(
    table: StepTable,
    x: Array,
    noise: Slices[Array] | None,
    predict: Callable[[int, Array], Array],
    *,
    steps: range | None = None,
) -> Array:
    """The state after the last step; the arguments are those of `iterate_steps`."""
    last = x
    for _, last, _ in iterate_steps(table, x, noise, predict, steps=steps):  # noqa: B007
        pass
    return last


def sample(
    network: Network,
    table: StepTable,
    noise: NDArray[np.float32],
    condition: Any = None,
    on_step: OnStep | None = None,
) -> NDArray[np.float32]:
    """Sample with a numpy network by the table.

    Args:
        network: Called as ``network(x, t, condition)`` with x (B, C, H, W) and t (B,), both float32; the first C
            channels of what it returns are f.
        table: The sampler.
        noise: Float32 (N, B, C, H, W), all the randomness there is: slice 0, times ``init_scale``, is the start, and
            step k adds slice min(k + 1, N - 1). N is at least ``table.noise_slices``.
        condition: Passed to the network.
        on_step: Called as ``on_step(k, x, x0)`` after each step, with the new state and the clean-image estimate.

    Returns:
        The final state, float32 (B, C, H, W).

    Raises:
        InvalidRequest: Noise of another shape, or with too few slices for the steps that add noise.
    """
    if noise.ndim != 5 or 0 in noise.shape:
        raise InvalidRequest(f"noise has shape {noise.shape}; give (slices, batch, channels, height, width)")
    if table.stochastic and noise.shape[0] < table.noise_slices:
        raise InvalidRequest(
            f"noise has {noise.shape[0]} slices, but this {table.sampler} table adds noise: give {table.noise_slices}"
        )
    batch, channels = noise.shape[1:3]
    noise = noise.astype(np.float32, copy=False)

    def predict(k: int, x: NDArray[np.float32]) -> NDArray[np.float32]:
        t = np.full((batch,), table.timesteps[k], dtype=np.float32)
        clean: NDArray[np.float32] = table.clean(k, x, network(x, t, condition)[:, :channels])
        return clean

    start: NDArray[np.float32] = table.start(noise[0])
    x = start
    for k, x, x0 in iterate_steps(table, start, noise, predict):
        if on_step is not None:
            on_step(k, x, x0)
    return x
