"""The pool of (noise, condition) and the teacher's output for each: computed once, cached on disk, read by index.

The reward is paired: the student sees the very noise that made the teacher's output. Training noises come from training
slots, evaluation noises from the deployer's slots, so the two never meet (``redif_sdk.sampling.noise``).
"""

from __future__ import annotations

import hashlib
import io
import math
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from redif_sdk.artifact.atomic import atomic_write
from redif_sdk.cache import cache_folder
from redif_sdk.distill.compute import random as draws
from redif_sdk.distill.teachers.base import Teacher
from redif_sdk.errors import InvalidRequest
from redif_sdk.sampling.noise import TRAINING_SLOT, noise

BANK_FILE = "bank.npz"
HELD_OUT_SEED = 2026
BATCH, CHUNK = 128, 512  # entries that the teacher is asked for at once on a CPU, and of a file of the cache
LARGEST_PATH = 4 << 30  # bytes
PIXEL_BANK_SIZES = {"train": 4096, "held_out": 2000}


@dataclass(frozen=True)
class Pairs:
    """``noise`` and ``target`` (N, C, H, W) float32 latents, ``condition`` (N,) int64 or None.

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

    def to(self, device: torch.device | str) -> Pairs:
        """The same pairs on ``device``; the indices stay, since noise is drawn from them on the CPU."""
        condition, states = (None if part is None else part.to(device) for part in (self.condition, self.states))
        return Pairs(self.noise.to(device), self.target.to(device), condition, self.index, self.stream, states)

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


def _pairs(teacher: Teacher, target: Tensor, split: str, seed: int, low: int = 0) -> Pairs:
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
    empty = _pairs(teacher, torch.empty(count, 0), split, seed, low)
    outputs, states = [], []
    for part in _cut(empty, _batch(device)):
        labels = None if part.condition is None else part.condition.to(device)
        output, path = teacher.follow(part.noise.to(device), labels, times)
        outputs.append(output.cpu())
        states.append(path.cpu())
        if on_batch:
            on_batch(len(part))
    return replace(empty, target=torch.cat(outputs), states=torch.cat(states) if times else None)


def _batch(device: torch.device | str) -> int:
    """Entries that the teacher is asked for at once: a GPU takes a whole piece, since small batches leave it idle."""
    return BATCH if torch.device(device).type == "cpu" else CHUNK


def _cut(pairs: Pairs, size: int) -> list[Pairs]:
    return [pairs[low : low + size] for low in range(0, len(pairs), size)]


def path_fits(teacher: Teacher, count: int) -> bool:
    """Whether the whole path of ``count`` samples may lie in the cache, as float16; else states at asked times do."""
    return 2 * count * len(teacher.grid()) * math.prod(teacher.shape) <= LARGEST_PATH


def with_states(teacher: Teacher, pairs: Pairs, times: Sequence[float], *, cache: Path | None = None) -> Pairs:
    """``pairs`` with their ``states`` at ``times``, of `Teacher.grid`: from the cache, or the teacher once more.

    That takes as many network calls as the pairs did, unless `get` was told that the path will be wanted. They are
    sampled where the pairs are, kept in pieces, and shared by students of other steps where the whole path fits.
    """
    kept = teacher.grid() if path_fits(teacher, len(pairs)) else list(times)
    places = [kept.index(float(t)) for t in times]
    with draws.first_before_others():
        states = [_states(teacher, piece, kept, places, cache_folder(cache)) for piece in _cut(pairs, CHUNK)]
    return replace(pairs, states=torch.cat(states).float().to(pairs.noise.device))


def _states(
    teacher: Teacher,
    piece: Pairs,
    times: Sequence[float],
    places: Sequence[int],
    cache: Path,
    on_batch: Callable[[int], object] | None = None,
) -> Tensor:
    """A piece's states at those ``places`` among ``times``, float16; all of ``times`` are kept."""
    path = _path_file(teacher, piece, times, cache)
    found = _kept(path, (len(piece), len(times), *teacher.shape), places)
    if found is not None:
        return found
    parts = []
    for part in _cut(piece, _batch(piece.noise.device)):
        parts.append(teacher.follow(part.noise, part.condition, times)[1].half())
        if on_batch:
            on_batch(len(part))
    states = torch.cat(parts)
    _keep(path, states)
    return states[:, places]


def _path_file(teacher: Teacher, piece: Pairs, times: Sequence[float], cache: Path) -> Path | None:
    """Where the states of a piece of the pool are kept; None: nowhere, their origin is not known."""
    if not teacher.identity or piece.index is None:
        return None
    entries = hashlib.sha256(piece.index.numpy().tobytes()).hexdigest()
    return _file(cache, "path", f"{teacher.identity} {teacher.num_inference_steps} {piece.stream} {entries} {times} 1")


def _file(cache: Path, kind: str, key: str) -> Path:
    return cache / f"{kind}-{hashlib.sha256(key.encode()).hexdigest()[:24]}.npy"


def _kept(path: Path | None, shape: tuple[int, ...], places: Sequence[int] | None = None) -> Tensor | None:
    """What a file of the cache holds, of a path at ``places`` alone; None: nothing of that shape."""
    if path is None or not path.is_file():
        return None
    found = np.load(path, mmap_mode="r", allow_pickle=False)
    if found.shape != shape:
        return None
    return torch.from_numpy(np.array(found if places is None else found[:, places]))


def _keep(path: Path | None, values: Tensor) -> None:
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    np.save(buffer, values.cpu().numpy())
    atomic_write(path, buffer.getvalue())


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


def _pieces(teacher: Teacher, count: int, split: str, seed: int, cache: Path) -> list[tuple[int, int, Path]]:
    """The files of a pool: (first entry, entries, file) each. Pools of other sizes share them."""
    pieces = [(low, min(CHUNK, count - low)) for low in range(0, count, CHUNK)]
    named = f"{teacher.identity} {teacher.num_inference_steps} {split} {seed}"
    return [(low, size, _file(cache, "pairs", f"{named} {low} {size} 2")) for low, size in pieces]


def is_there(teacher: Teacher, count: int, split: str, *, seed: int = 0, cache: Path | None = None) -> bool:
    """Whether :func:`get` would find these pairs without asking the teacher."""
    if seed == 0 and shipped(teacher, count, split) is not None:
        return True
    pieces = _pieces(teacher, count, split, seed, cache_folder(cache))
    return bool(teacher.identity) and all(path.is_file() for _, _, path in pieces)


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
    path: bool = False,
) -> tuple[Pairs, int]:
    """The pairs, from the shipped bank, the cache, or the teacher; and how many teacher calls they took (ever).

    ``split`` is "train" or "held_out"; ``device`` is where the teacher samples. A bank's calls are counted although
    this run did not spend them. What was sampled is kept piece by piece, so that a run that was killed goes on.
    ``path``: `with_states` will be asked for these pairs; keep what it needs of the sampling.
    """
    with draws.first_before_others():
        return _get(teacher, count, split, seed, rebuild, cache_folder(cache), device, on_batch, path)


def _get(
    teacher: Teacher,
    count: int,
    split: str,
    seed: int,
    rebuild: bool,
    cache: Path,
    device: torch.device | str,
    on_batch: Callable[[int], object] | None,
    path: bool,
) -> tuple[Pairs, int]:
    if count < 1:
        raise InvalidRequest(f"the pool needs at least one pair, not {count}")
    calls = count * teacher.num_inference_steps * teacher.calls_per_step
    grid = teacher.grid() if path and path_fits(teacher, count) else []
    if not rebuild and seed == 0:
        bank = shipped(teacher, count, split)
        if bank is not None:
            for piece in _cut(bank, CHUNK) if grid else []:
                _states(teacher, piece.to(device), grid, [0], cache, on_batch)
            return bank, calls
    if not teacher.identity:
        return compute(teacher, count, split, seed=seed, device=device, on_batch=on_batch), calls
    targets = []
    for low, size, file in _pieces(teacher, count, split, seed, cache):
        target = None if rebuild and draws.rank() == 0 else _kept(file, (size, *teacher.shape))
        if target is None:
            made = compute(teacher, size, split, seed=seed, low=low, device=device, on_batch=on_batch, times=grid)
            target = made.target
            if made.states is not None:
                _keep(_path_file(teacher, made, grid, cache), made.states.half())
            _keep(file, target)
        targets.append(target)
    return _pairs(teacher, torch.cat(targets), split, seed), calls
