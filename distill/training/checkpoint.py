"""A run on disk: its checkpoint, whole or not at all, and the lock that keeps a second run out of the folder.

Every update draws from a generator that depends on (seed, update) alone, and a checkpoint holds everything else, so a
run that was killed and resumed gives the same bits as one that was not (budget in updates, same threads).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import nn

from redif_sdk.artifact.atomic import atomic_file
from redif_sdk.distill.compute import parallel as sharding
from redif_sdk.distill.compute import random as draws
from redif_sdk.distill.compute.lora import load_trained, trained
from redif_sdk.distill.config import DistillConfig
from redif_sdk.distill.rewards.protocol import name_of
from redif_sdk.distill.teachers.base import Teacher
from redif_sdk.distill.teachers.value_range import UNIT
from redif_sdk.errors import InvalidRequest

__all__ = ["CHECKPOINT", "identity", "read", "restore_weights", "run_lock", "save_state", "weights_of", "write"]

CHECKPOINT, LOCK = "checkpoint.pt", "run.lock"
ADDRESS = re.compile(r"https?://[^/#?]*")
#: What may differ between a run and the one that resumes it; a reward is compared by what it is called.
FREE = {"checkpoint_seconds", "reward", "tracker", "device", "keep", "micro_batch_size", "gradient_checkpointing"}


@contextmanager
def run_lock(folder: Path | None) -> Iterator[None]:
    """Hold ``folder`` for one run, on the first process; None: nothing is held. It is freed when the process ends.

    A process that holds the folder already may take it again.

    Raises:
        InvalidRequest: another process holds it.
    """
    if folder is None or draws.rank():
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK, timeout=0, is_singleton=True)
    try:
        lock.acquire()
    except Timeout as error:
        raise InvalidRequest(
            f"another run is writing to {folder}; wait until it ends, or choose another output"
        ) from error
    try:
        yield
    finally:
        lock.release()


def save_state(state: dict[str, Any], path: Path) -> None:
    """``torch.save``, whole or not at all."""
    with atomic_file(path) as file:
        torch.save(state, file)


def identity(config: DistillConfig, teacher: Teacher) -> str:
    """What a checkpoint must have in common with the run that resumes it."""
    settings = config.model_dump(mode="json", fallback=str)
    fixed = {name: value for name, value in settings.items() if name not in FREE}
    more: dict[str, Any] = {
        "reward": _called(config.get("reward")),
        "teacher": teacher.identity,
        "processes": draws.world(),
    }
    if teacher.data is not None:
        more["conditions"] = teacher.data.digest
    if (value_range := teacher.postprocess.value_range) != UNIT:
        more["value_range"] = value_range
    return json.dumps(fixed | more)


def _called(spec: Any) -> str:
    """A reward, or several, by name: a function has another address in each process, and a server may have moved."""
    if isinstance(spec, Mapping):
        return str({_called(reward): weight for reward, weight in spec.items()})
    if isinstance(spec, (list, tuple)):
        return str([_called(reward) for reward in spec])
    if isinstance(spec, str) or spec is None:
        return ADDRESS.sub("http://", str(spec))
    return name_of(spec)


def weights_of(
    network: nn.Module, ema: nn.Module, optimizer: torch.optim.Optimizer, *, sharded: bool
) -> dict[str, Any]:
    """The whole state of what is trained: of adapters, they alone. Where it is sharded every process must call."""
    if not sharded:
        return {"network": trained(network), "ema": trained(ema), "optimizer": optimizer.state_dict()}
    return {
        "network": sharding.weights(network),
        "ema": sharding.weights(ema),
        "optimizer": sharding.states(network, optimizer),
    }


def restore_weights(
    state: dict[str, Any], network: nn.Module, ema: nn.Module, optimizer: torch.optim.Optimizer, *, sharded: bool
) -> None:
    """Take :func:`weights_of` back, in place."""
    if not sharded:
        load_trained(network, state["network"])
        load_trained(ema, state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        return
    sharding.restore(network, state["network"])
    sharding.restore(ema, state["ema"])
    sharding.restore_states(network, optimizer, state["optimizer"])


def write(folder: Path, state: dict[str, Any]) -> None:
    """Replace the folder's checkpoint by ``state``."""
    folder.mkdir(parents=True, exist_ok=True)
    save_state(state, folder / CHECKPOINT)


def read(folder: Path | None, wanted: str, device: torch.device) -> dict[str, Any] | None:
    """The folder's checkpoint, on ``device``; None: there is none.

    Args:
        wanted: the :func:`identity` of the run that resumes.

    Raises:
        InvalidRequest: it is of a run with other settings.
    """
    if folder is None or not (folder / CHECKPOINT).is_file():
        return None
    state: dict[str, Any] = torch.load(folder / CHECKPOINT, map_location=device, weights_only=True)
    if state["config"] != wanted:
        raise InvalidRequest(
            f"the checkpoint in {folder} is of a run with other settings; "
            "resume with the same ones, or remove the folder to start anew"
        )
    return state
