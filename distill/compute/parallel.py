"""Sharded training (PyTorch's FSDP2): of weights, gradients and optimiser state each process keeps a part.

The network, its EMA and the optimiser are sharded; the teacher and auxiliary networks are whole on every process. What
is saved is whole too, so a run may be looked at anywhere.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from redif_sdk.distill.compute import random as draws
from redif_sdk.errors import InvalidRequest

#: The methods that look at the student's weights through its calls alone; the others copy the network.
METHODS = ("redif", "regression", "draft", "dmd")
WHOLE = StateDictOptions(full_state_dict=True)


def refuse(method: str, kl: float) -> None:
    """Raises InvalidRequest for what cannot be sharded."""
    if method not in METHODS or kl:
        what = f"kl {kl:g}" if kl and method in METHODS else f"the method {method}"
        raise InvalidRequest(f"{what} keeps a copy of the network, which cannot be sharded; leave shard off")


def shard(network: nn.Module, device: torch.device) -> None:
    """Shard ``network`` in place over all processes: each element of its lists of blocks by itself, then the rest."""
    mesh = init_device_mesh(device.type, (draws.world(),))
    for block in _blocks(network):
        fully_shard(block, mesh=mesh)
    fully_shard(network, mesh=mesh, reshard_after_forward=True)


def _blocks(module: nn.Module) -> list[nn.Module]:
    """The elements of the outermost lists of blocks that hold weights."""
    found: list[nn.Module] = []
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            found += [block for block in child if any(True for _ in block.parameters())]
        else:
            found += _blocks(child)
    return found


def is_sharded(network: nn.Module) -> bool:
    """Whether each process keeps a part of ``network``: then all of them must call it together."""
    return any(isinstance(parameter, DTensor) for parameter in network.parameters())


def local(parameters: Iterable[Tensor]) -> list[Tensor]:
    """What this process keeps of each parameter."""
    return [p.data.to_local() if isinstance(p.data, DTensor) else p.data for p in parameters]


def total(norm: Tensor) -> Tensor:
    """A norm over the gradients of all processes."""
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def weights(network: nn.Module) -> dict[str, Any]:
    """The whole state dict; every process must ask."""
    return get_model_state_dict(network, options=WHOLE)


def states(network: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimiser's whole state; every process must ask. Empty before its first step, which asking would make."""
    return {} if not optimizer.state else get_optimizer_state_dict(network, optimizer, options=WHOLE)


def restore(network: nn.Module, state: dict[str, Any]) -> None:
    """Take :func:`weights` back."""
    set_model_state_dict(network, state, options=WHOLE)


def restore_states(network: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Take :func:`states` back."""
    if state:
        set_optimizer_state_dict(network, optimizer, state, options=WHOLE)
