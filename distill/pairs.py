"""The pool of (noise, condition) and the teacher's output for each: computed once, cached on disk, read by index.

The reward is paired: the student sees the very noise that made the teacher's output. Training noises come from training
slots, evaluation noises from the deployer's slots, so the two never meet (``redif_sdk.noise``).
"""

from __future__ import annotations

import hashlib
import io
import os
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from redif_sdk.distill import draws
from redif_sdk.distill.teacher import Teacher
from redif_sdk.errors import InvalidRequest
from redif_sdk.files import atomic_write
from redif_sdk.noise import TRAINING_SLOT, noise

BANK_FILE = "bank.npz"
HELD_OUT_SEED = 2026
PIXEL_BANK_SIZES = {"train": 4096, "held_out": 2000}


@dataclass(frozen=True)
class Pairs:
    """``noise`` and ``target`` (N, C, H, W) float32 latents, ``condition`` (N,) int64 or None.

    ``index`` (N,) int64 and ``stream`` (seed, first slot) say which noise it is, so that a sampler that draws noise
    between its rows has the slots that follow.
    """

    noise: Tensor
    target: Tensor
    condition: Tensor | None
    index: Tensor | None = None
    stream: tuple[int, int] = (0, TRAINING_SLOT)

    def __len__(self) -> int:
        return len(self.noise)

    def __getitem__(self, index: Tensor | slice) -> Pairs:
        condition, own = (None if part is None else part[index] for part in (self.condition, self.index))
        return Pairs(self.noise[index], self.target[index], condition, own, self.stream)

    def to(self, device: torch.device | str) -> Pairs:
        """The same pairs on ``device``; the indices stay, since noise is drawn from them on the CPU."""
        condition = None if self.condition is None else self.condition.to(device)
        return Pairs(self.noise.to(device), self.target.to(device), condition, self.index, self.stream)

    def slices(self, count: int) -> Tensor:
        """``count`` slices of noise (count, N, C, H, W); the first is ``noise``.

        Raises:
            InvalidRequest: more than one is asked for, and where the noise came from is not known.
        """
        if count == 1:
            return self.noise[None]
        if self.index is None:
            raise InvalidRequest("these pairs do not know their noise's index; take them from pairs.get")
        seed, slot = self.stream
        channels, height, width = self.noise.shape[1:]
        keys = [(seed, int(i)) for i in self.index]
        drawn = noise(keys, (channels, height, width), slices=count, first_slot=slot)
        return torch.from_numpy(drawn).to(self.noise.device)


def _stream(split: str, seed: int) -> tuple[int, int]:
    """The seed and the first slot of a split's noises."""
    return (seed, TRAINING_SLOT) if split == "train" else (HELD_OUT_SEED, 0)


def _pairs(teacher: Teacher, target: Tensor, split: str, seed: int) -> Pairs:
    count = len(target)
    start, index = pool_noise(teacher.shape, count, split, seed), torch.arange(count)
    return Pairs(start, target, teacher.labels(np.arange(count)), index, _stream(split, seed))


def pool_noise(shape: tuple[int, int, int], count: int, split: str, seed: int = 0) -> Tensor:
    """The pool's starting noise, (count, C, H, W): image i is (seed, i), in a training or a deployment slot."""
    key, slot = _stream(split, seed)
    return torch.from_numpy(noise([(key, i) for i in range(count)], shape, first_slot=slot)[0])


def compute(
    teacher: Teacher,
    count: int,
    split: str,
    *,
    seed: int = 0,
    batch_size: int = 128,
    device: torch.device | str = "cpu",
    on_batch: Callable[[int], object] | None = None,
) -> Pairs:
    """Sample the teacher on the pool: ``count`` x its steps x its calls a step network calls, on ``device``."""
    start = pool_noise(teacher.shape, count, split, seed)
    condition = teacher.labels(np.arange(count))
    outputs = []
    for low in range(0, count, batch_size):
        part = slice(low, low + batch_size)
        labels = None if condition is None else condition[part].to(device)
        outputs.append(teacher.sample(start[part].to(device), labels).cpu())
        if on_batch:
            on_batch(len(outputs[-1]))
    return _pairs(teacher, torch.cat(outputs), split, seed)


def shipped(teacher: Teacher, count: int, split: str) -> Pairs | None:
    """The bank that lies beside a shipped teacher, if it holds ``count`` entries of ``split``: uint8 images, or of a
    latent model float16 latents."""
    if teacher.folder is None or not (teacher.folder / BANK_FILE).is_file():
        return None
    try:
        with (teacher.folder / BANK_FILE).open("rb") as handle, np.load(handle, allow_pickle=False) as bank:
            if str(bank["fingerprint"]) != teacher.identity or len(bank[split]) < count:
                return None
            kept = torch.from_numpy(bank[split][:count]).float()
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise InvalidRequest(
            f"{teacher.folder / BANK_FILE} cannot be read ({error}); recompute it with --rebuild-bank"
        ) from error
    target = kept if teacher.decode is not None else teacher.latents_of(kept / 127.5 - 1)
    return _pairs(teacher, target, split, 0)


def _cache_file(teacher: Teacher, count: int, split: str, seed: int, cache: Path) -> Path:
    key = f"{teacher.identity} {teacher.num_inference_steps} {split} {seed} {count} 1"
    return cache / f"pairs-{hashlib.sha256(key.encode()).hexdigest()[:24]}.npy"


def cache_folder() -> Path:
    return Path(os.environ.get("REDIF_CACHE", Path.home() / ".cache" / "redif"))


def is_there(teacher: Teacher, count: int, split: str, *, seed: int = 0, cache: Path | None = None) -> bool:
    """Whether :func:`get` would find these pairs without asking the teacher."""
    if seed == 0 and shipped(teacher, count, split) is not None:
        return True
    return bool(teacher.identity) and _cache_file(teacher, count, split, seed, cache or cache_folder()).is_file()


def get(
    teacher: Teacher,
    count: int,
    split: str,
    *,
    seed: int = 0,
    rebuild: bool = False,
    cache: Path | None = None,
    device: torch.device | str = "cpu",
    on_batch: Callable[[int], object] | None = None,
) -> tuple[Pairs, int]:
    """The pairs, from the shipped bank, the cache, or the teacher; and how many teacher calls they took (ever).

    ``split`` is "train" or "held_out"; ``device`` is where the teacher samples. A bank's calls are counted although
    this run did not spend them.
    """
    with draws.first_before_others():
        return _get(teacher, count, split, seed, rebuild, cache or cache_folder(), device, on_batch)


def _get(
    teacher: Teacher,
    count: int,
    split: str,
    seed: int,
    rebuild: bool,
    cache: Path,
    device: torch.device | str,
    on_batch: Callable[[int], object] | None,
) -> tuple[Pairs, int]:
    if count < 1:
        raise InvalidRequest(f"the pool needs at least one pair, not {count}")
    calls = count * teacher.num_inference_steps * teacher.calls_per_step
    if not rebuild and seed == 0:
        bank = shipped(teacher, count, split)
        if bank is not None:
            return bank, calls
    if not teacher.identity:
        return compute(teacher, count, split, seed=seed, device=device, on_batch=on_batch), calls
    path = _cache_file(teacher, count, split, seed, cache)
    if path.is_file() and not (rebuild and draws.rank() == 0):
        target = torch.from_numpy(np.load(path, allow_pickle=False))
        if target.shape == (count, *teacher.shape):
            return _pairs(teacher, target, split, seed), calls
    pairs = compute(teacher, count, split, seed=seed, device=device, on_batch=on_batch)
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    np.save(buffer, pairs.target.numpy())
    atomic_write(path, buffer.getvalue())
    return pairs, calls
