"""Where pairs come from: a shipped teacher's bank, the cache on disk, or the teacher, whose samples are then kept.

The cache holds files of `CHUNK` entries under names that hash what they depend on, so pools of other sizes share them
and a run that was killed goes on.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from redif_sdk.artifact.atomic import atomic_write
from redif_sdk.cache import cache_folder, done_without
from redif_sdk.distill.compute import random as draws
from redif_sdk.distill.pool.pairs import Pairs, batch_of, chunk_of, compute, in_parts, pairs_of
from redif_sdk.distill.teachers.base import Teacher
from redif_sdk.errors import InvalidRequest

BANK_FILE = "bank.npz"
LARGEST_PATH = 4 << 30  # bytes
PIXEL_BANK_SIZES = {"train": 4096, "held_out": 2000}


def path_fits(teacher: Teacher, count: int) -> bool:
    """Whether the cache keeps the whole path of ``count`` samples, as float16; else the states at the wanted times."""
    return 2 * count * len(teacher.grid()) * math.prod(teacher.shape) <= LARGEST_PATH


def with_states(teacher: Teacher, pairs: Pairs, times: Sequence[float], *, cache: Path | None = None) -> Pairs:
    """``pairs`` with their ``states`` at ``times``, of `Teacher.grid`: from the cache, or the teacher once more.

    That takes as many network calls as the pairs did, unless `get` was told that the path will be wanted. They are
    sampled where the pairs are, kept in pieces, and shared by students of other steps where the whole path fits.
    """
    kept = teacher.grid() if path_fits(teacher, len(pairs)) else list(times)
    places = [kept.index(float(t)) for t in times]
    with draws.main_process_first():
        folder = cache_folder(cache)
        states = [_states(teacher, piece, kept, places, folder) for piece in in_parts(pairs, chunk_of(teacher))]
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
    found = _read(path, (len(piece), len(times), *teacher.shape), places)
    if found is not None:
        return found
    parts = []
    for part in in_parts(piece, batch_of(teacher, piece.noise.device)):
        parts.append(teacher.follow(part.noise, part.condition, times)[1].half())
        if on_batch:
            on_batch(len(part))
    states = torch.cat(parts)
    _write(path, states)
    return states[:, places]


def _path_file(teacher: Teacher, piece: Pairs, times: Sequence[float], cache: Path) -> Path | None:
    """Where the states of a piece of the pool are kept; None: nowhere, their origin is not known."""
    if not teacher.identity or piece.index is None:
        return None
    entries = hashlib.sha256(piece.index.numpy().tobytes()).hexdigest()
    return _file(cache, "path", f"{teacher.identity} {teacher.num_inference_steps} {piece.stream} {entries} {times} 2")


def _file(cache: Path, kind: str, key: str) -> Path:
    return cache / f"{kind}-{hashlib.sha256(key.encode()).hexdigest()[:24]}.npy"


def _read(path: Path | None, shape: tuple[int, ...], places: Sequence[int] | None = None) -> Tensor | None:
    """What a file of the cache holds, of a path at ``places`` alone; None: nothing of that shape."""
    if path is None or not os.access(path, os.R_OK):  # False also where nothing may be read
        return None
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):  # cut short, or not to be read
        return None
    if found.shape != shape:
        return None
    return torch.from_numpy(np.array(found if places is None else found[:, places]))


def _write(path: Path | None, values: Tensor) -> None:
    if path is None:
        return
    buffer = io.BytesIO()
    np.save(buffer, values.cpu().numpy())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, buffer.getvalue())
    except OSError as error:
        done_without(path.parent, error)


def shipped(teacher: Teacher, count: int, split: str) -> Pairs | None:
    """The bank that lies beside a shipped teacher, if it holds ``count`` entries of ``split``: uint8 images, or of a
    latent model float16 latents."""
    if teacher.folder is None or not (teacher.folder / BANK_FILE).is_file():
        return None
    if teacher.num_inference_steps != teacher.extra.get("num_inference_steps", teacher.num_inference_steps):
        return None  # the bank is of the steps that the folder names
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
    return pairs_of(teacher, target, split, 0)


def _pieces(teacher: Teacher, count: int, split: str, seed: int, cache: Path) -> list[tuple[int, int, Path]]:
    """The files of a pool: (first entry, entries, file) each. Pools of other sizes share them."""
    chunk = chunk_of(teacher)
    pieces = [(low, min(chunk, count - low)) for low in range(0, count, chunk)]
    named = f"{teacher.identity} {teacher.num_inference_steps} {split} {seed}"
    return [(low, size, _file(cache, "pairs", f"{named} {low} {size} 3")) for low, size in pieces]


def is_there(teacher: Teacher, count: int, split: str, *, seed: int = 0, cache: Path | None = None) -> bool:
    """Whether :func:`get` would find these pairs without sampling the teacher."""
    if seed == 0 and shipped(teacher, count, split) is not None:
        return True
    pieces = _pieces(teacher, count, split, seed, cache_folder(cache))
    return bool(teacher.identity) and all(os.access(path, os.R_OK) for _, _, path in pieces)


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
    ``path``: `with_states` will be called with these pairs; keep what it needs of the sampling.

    Raises:
        InvalidRequest: ``count`` is not positive, or the shipped bank cannot be read.
    """
    if count < 1:
        raise InvalidRequest(f"the pool needs at least one pair, not {count}")
    folder = cache_folder(cache)
    calls = count * teacher.num_inference_steps * teacher.calls_per_step
    grid = teacher.grid() if path and path_fits(teacher, count) else []
    with draws.main_process_first():
        bank = shipped(teacher, count, split) if not rebuild and seed == 0 else None
        if bank is not None:
            for piece in in_parts(bank, chunk_of(teacher)) if grid else []:
                _states(teacher, piece.to(device), grid, [0], folder, on_batch)
            return bank, calls
        if not teacher.identity:
            return compute(teacher, count, split, seed=seed, device=device, on_batch=on_batch), calls
        targets = []
        for low, size, file in _pieces(teacher, count, split, seed, folder):
            target = None if rebuild and draws.rank() == 0 else _read(file, (size, *teacher.shape))
            if target is None:
                made = compute(teacher, size, split, seed=seed, low=low, device=device, on_batch=on_batch, times=grid)
                target = made.target
                if made.states is not None:
                    _write(_path_file(teacher, made, grid, folder), made.states.half())
                _write(file, target)
            targets.append(target)
        return pairs_of(teacher, torch.cat(targets), split, seed), calls
