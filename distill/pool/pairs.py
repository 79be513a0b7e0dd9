"""Pairs of (noise, condition) and the teacher's output for it, and how they are sampled.

The reward is paired: the student sees the very noise that made the teacher's output. Training noises come from training
slots, evaluation noises from the deployer's slots, so the two never meet (``redif_sdk.sampling.noise``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from redif_sdk.distill.teachers.base import Teacher
from redif_sdk.errors import InvalidRequest
from redif_sdk.models.scales import places_of
from redif_sdk.sampling.noise import TRAINING_SLOT, noise

Sample = Callable[[Tensor, Tensor | None], Tensor]  # (noise, condition) -> outputs

HELD_OUT_SEED = 2026
CHUNK_OF_LARGE = 16  # entries in a cache's file of a teacher that works in micro-batches
BATCH, CHUNK = 128, 512  # entries that the teacher samples at once on a CPU; on a GPU, which is also a cache file's


@dataclass(frozen=True)
class Pairs:
    """``noise`` and ``target`` (N, C, H, W) float32 latents, ``condition`` (N,) int64 or None: what networks take, with
    a guidance scale where each has its own (`redif_sdk.models.scales`).

    ``states`` (N, K, C, H, W): where each pair's teacher stood at the times of the student's K rows (`with_states`).
    ``index`` (N,) int64 and ``stream`` (seed, first slot) say which noise it is, so that a sampler that draws noise
    between its rows has the slots that follow.
    """

    noise: Tensor
    target: Tensor
    condition: Tensor | None
    index: Tensor | None = None
    stream: tuple[int, int] = (0, TRAINING_SLOT)
    states: Tensor | None = None

    def __len__(self) -> int:
        return len(self.noise)

    def __getitem__(self, index: Tensor | slice) -> Pairs:
        more = (self.condition, self.index, self.states)
        condition, own, states = (None if part is None else part[index] for part in more)
        return Pairs(self.noise[index], self.target[index], condition, own, self.stream, states)

    @property
    def places(self) -> Tensor | None:
        """The classes or the places of prompts (N,) int64, without guidance scales."""
        return None if self.condition is None else places_of(self.condition)

    def to(self, device: torch.device | str) -> Pairs:
        """The same pairs on ``device``; the indices stay, since noise is drawn from them on the CPU."""
        condition, states = (None if part is None else part.to(device) for part in (self.condition, self.states))
        return Pairs(self.noise.to(device), self.target.to(device), condition, self.index, self.stream, states)

    def slices(self, count: int) -> Tensor:
        """``count`` slices of noise (count, N, C, H, W); the first is ``noise``.

        Raises:
            InvalidRequest: ``count`` is above 1, and where the noise came from is not known.
        """
        if count == 1:
            return self.noise[None]
        if self.index is None:
            raise InvalidRequest("these pairs do not know their noise's index; take them from pool.get")
        seed, slot = self.stream
        channels, height, width = self.noise.shape[1:]
        keys = [(seed, int(i)) for i in self.index]
        drawn = noise(keys, (channels, height, width), slices=count, first_slot=slot)
        return torch.from_numpy(drawn).to(self.noise.device)


def _stream(split: str, seed: int) -> tuple[int, int]:
    """The seed and the first slot of a split's noises."""
    return (seed, TRAINING_SLOT) if split == "train" else (HELD_OUT_SEED, 0)


def pairs_of(teacher: Teacher, target: Tensor, split: str, seed: int, low: int = 0) -> Pairs:
    """The pairs of the outputs ``target`` (N, C, H, W), which are those of the entries from ``low`` on."""
    entries = np.arange(low, low + len(target))
    start = pool_noise(teacher.shape, len(entries), split, seed, low)
    return Pairs(start, target, teacher.labels(entries), torch.from_numpy(entries), _stream(split, seed))


def pool_noise(shape: tuple[int, int, int], count: int, split: str, seed: int = 0, low: int = 0) -> Tensor:
    """The starting noise of ``count`` entries from ``low`` on, (count, C, H, W): image i is (seed, i), in a training or
    a deployment slot."""
    key, slot = _stream(split, seed)
    return torch.from_numpy(noise([(key, i) for i in range(low, low + count)], shape, first_slot=slot)[0])


def compute(
    teacher: Teacher,
    count: int,
    split: str,
    *,
    seed: int = 0,
    low: int = 0,
    device: torch.device | str = "cpu",
    on_batch: Callable[[int], object] | None = None,
    times: Sequence[float] = (),
) -> Pairs:
    """Sample the teacher on ``count`` entries of the pool from entry ``low`` on, on ``device``.

    ``count`` x its steps x its calls a step network calls. With the states at ``times``, if there are any."""
    empty = pairs_of(teacher, torch.empty(count, 0), split, seed, low)
    found = _each(lambda noise, condition: teacher.follow(noise, condition, times), empty, teacher, device, on_batch)
    outputs, states = (torch.cat(part) for part in zip(*found, strict=True))
    return replace(empty, target=outputs, states=states if times else None)


@torch.no_grad()
def compute_by(
    sample: Sample,
    teacher: Teacher,
    count: int,
    split: str,
    *,
    device: torch.device | str = "cpu",
    on_batch: Callable[[int], object] | None = None,
) -> Pairs:
    """The first ``count`` entries of ``teacher``'s pool with the outputs of ``sample`` in place of its own."""
    empty = pairs_of(teacher, torch.empty(count, 0), split, 0)
    found = _each(lambda noise, condition: (sample(noise, condition),), empty, teacher, device, on_batch)
    return replace(empty, target=torch.cat([output for (output,) in found]))


def _each(
    sample: Callable[[Tensor, Tensor | None], tuple[Tensor, ...]],
    pairs: Pairs,
    teacher: Teacher,
    device: torch.device | str,
    on_batch: Callable[[int], object] | None,
) -> list[tuple[Tensor, ...]]:
    """What ``sample`` gives for each batch of noises and conditions, on the CPU."""
    found = []
    for part in in_parts(pairs, batch_of(teacher, device)):
        labels = None if part.condition is None else part.condition.to(device)
        found.append(tuple(value.cpu() for value in sample(part.noise.to(device), labels)))
        if on_batch:
            on_batch(len(part))
    return found


def batch_of(teacher: Teacher, device: torch.device | str) -> int:
    """Entries that the teacher samples at once: its micro-batch where it has one; on a GPU a whole chunk, since small
    batches leave it idle."""
    return teacher.micro_batch or (BATCH if torch.device(device).type == "cpu" else CHUNK)


def chunk_of(teacher: Teacher) -> int:
    """Entries in a file of the cache: few of a large teacher, since what a killed run had not written is lost."""
    return CHUNK_OF_LARGE if teacher.micro_batch else CHUNK


def in_parts(pairs: Pairs, size: int) -> list[Pairs]:
    """``pairs`` in order, in parts of at most ``size``."""
    return [pairs[low : low + size] for low in range(0, len(pairs), size)]
