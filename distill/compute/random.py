"""Random numbers and sums that do not depend on how many processes train together.

Every process draws what the whole batch needs, from the same generator, and keeps its own slice; sums are over all of
them. So N processes at one global batch take the path of one process (``torch.distributed``, started by ``accelerate
launch`` or ``torchrun``). With one process these are ``torch.randn``, ``torch.randint`` and the mean. The generator
is the CPU's, so that a run on another device draws the same.
"""

from __future__ import annotations

import atexit
import gc
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.tensor import DTensor

from redif_sdk.errors import InvalidRequest

T = TypeVar("T")


def init_distributed() -> None:
    """Join the processes that were launched together, if there are any; they part when the interpreter ends."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        from accelerate import PartialState

        PartialState(cpu=not torch.cuda.is_available())
        atexit.register(_part)


def _part() -> None:
    """Else the threads of the process group may outlive the interpreter, which then aborts after the work is done."""
    if dist.is_initialized():
        gc.collect()  # networks that are sharded hold their group, in circles
        dist.destroy_process_group()


@contextmanager
def main_process_first() -> Iterator[None]:
    """The first process runs the block before the others do, who find what it left on disk."""
    if world() == 1:
        yield
        return
    from accelerate import PartialState

    with PartialState().main_process_first():
        yield


def world() -> int:
    """How many processes train together; 1 without ``torch.distributed``."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This process's place among them; the first is 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def share(count: int, what: str = "batch_size") -> slice:
    """This process's part of ``count``.

    Raises:
        InvalidRequest: the processes cannot share it equally.
    """
    if count % world():
        raise InvalidRequest(f"{what} {count} cannot be shared by {world()} processes; choose a multiple of {world()}")
    part = count // world()
    return slice(rank() * part, (rank() + 1) * part)


def _whole(shape: Sequence[int], dim: int) -> tuple[int, ...]:
    return tuple(size * world() if place == dim else size for place, size in enumerate(shape))


def _mine(whole: Tensor, dim: int) -> Tensor:
    return whole if world() == 1 else whole.chunk(world(), dim)[rank()]


def normal(shape: Sequence[int], generator: torch.Generator, device: torch.device, *, dim: int = 0) -> Tensor:
    """Standard normal, ``shape`` being this process's; the batch is dimension ``dim``."""
    return _mine(torch.randn(_whole(shape, dim), generator=generator), dim).to(device)


def integers(low: int, high: int, count: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """(count,) int64 in [low, high)."""
    return _mine(torch.randint(low, high, (count * world(),), generator=generator), 0).to(device)


def mean(value: Tensor) -> Tensor:
    """The mean of ``value`` over all elements and processes: a scalar, without a gradient."""
    total = value.detach().mean()
    if world() > 1:
        dist.all_reduce(total)
        total = total / world()
    return total


def _place() -> torch.device:
    """Where the processes' messages must lie: NCCL carries a GPU's memory alone (no GPU was at hand to try)."""
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")


def averaged(figures: dict[str, float]) -> dict[str, float]:
    """Each figure's mean over the processes."""
    if world() == 1:
        return figures
    means = torch.tensor(list(figures.values()), dtype=torch.float64, device=_place())
    dist.all_reduce(means)
    return dict(zip(figures, (means / world()).tolist(), strict=True))


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Each gradient becomes its mean over the processes; one that lacks it here counts as 0."""
    if world() == 1:
        return
    wanted = [p for p in parameters if p.requires_grad and not isinstance(p, DTensor)]  # FSDP averages its own
    if not wanted:
        return
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in wanted])
    dist.all_reduce(flat)
    for parameter, part in zip(wanted, (flat / world()).split([p.numel() for p in wanted]), strict=True):
        parameter.grad = part.view_as(parameter).clone()


def gathered(value: Tensor) -> Tensor:
    """All processes' ``value`` one after the other along the batch."""
    if world() == 1:
        return value
    parts = [torch.empty_like(value) for _ in range(world())]
    dist.all_gather(parts, value.contiguous())
    return torch.cat(parts)


def agreed(*values: float) -> list[float]:
    """The first process's ``values``: what depends on a clock must be the same for all."""
    if world() == 1:
        return list(values)
    told = torch.tensor(values, dtype=torch.float64, device=_place())
    dist.broadcast(told, 0)
    return [float(value) for value in told]


def from_first(make: Callable[[], T], *, together: bool = False) -> T:
    """What ``make`` returns on the first process, on all of them; the others do not call it.

    Args:
        make: its value must pickle, and hold no tensor of a GPU.
        together: every process calls ``make``, since it calls a sharded network; the first one's value counts.
    """
    if world() == 1:
        return make()
    held = [make() if together or rank() == 0 else None]
    dist.broadcast_object_list(held, src=0, device=_place())
    value: Any = held[0]
    return cast("T", value)
