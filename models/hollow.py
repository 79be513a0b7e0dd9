"""Networks without their weights: copies that are traced, or that read each layer's weights when it is called.

A hollow tensor has shape, dtype and device, and one NaN for all its values. So a network of any size is traced in a few
megabytes, and whatever computes with a weight that was not read gives NaN, not a plausible image.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "as_stored",
    "computing",
    "files_of",
    "hollow",
    "is_streamed",
    "keep_mapped",
    "original",
    "stored",
    "streamed",
    "to_train",
]

_ORIGINAL, _MAPPED = "_redif_original", "_redif_mapped"


def hollow(module: nn.Module, dtype: torch.dtype | None = None, *, in_float32: Collection[str] = ()) -> nn.Module:
    """A copy of ``module`` whose floating-point parameters and buffers are hollow.

    Args:
        module: It is not changed, and its tensors are not read.
        dtype: Of the hollow tensors; None: as they are.
        in_float32: Names of parameters that are float32 in any case.
    """
    memo: dict[int, Any] = {}
    for name, parameter in module.named_parameters():
        if parameter.is_floating_point():
            chosen = torch.float32 if name in in_float32 else dtype
            memo[id(parameter)] = _stand_in(nn.Parameter(_empty(parameter, chosen), requires_grad=False), parameter)
    for buffer in module.buffers():
        memo[id(buffer)] = _stand_in(_empty(buffer, dtype), buffer) if buffer.is_floating_point() else buffer
    # what a streamed part was made of is not copied
    memo |= {id(vars(part)[_ORIGINAL]): None for part in module.modules() if is_streamed(part)}
    made = copy.deepcopy(module, memo)
    for part in made.modules():
        vars(part).pop(_ORIGINAL, None)
        for hooks in (part._forward_pre_hooks, part._forward_hooks):
            for key in [key for key, hook in hooks.items() if isinstance(hook, _Fill)]:
                del hooks[key]
    return made


def stored(tensor: Tensor) -> Tensor:
    """The tensor that a hollow one stands for; any other is itself."""
    found: Tensor = getattr(tensor, "stored", tensor)
    return found


def streamed(module: nn.Module) -> nn.Module:
    """A hollow float32 copy of ``module`` that computes: each layer's weights are read and cast while it is called.

    Its memory is that of the largest layer beside what ``module`` holds, which may be mapped files in another dtype. A
    network that uses a layer's weights without calling the layer gives NaN.
    """
    made = hollow(module, torch.float32)
    for part in made.modules():
        own = [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]
        kept = {name: tensor for name, tensor in own if hasattr(tensor, "stored")}
        if kept:
            part.register_forward_pre_hook(_Fill(kept, read=True), prepend=True)
            part.register_forward_hook(_Fill(kept, read=False), always_call=True)
    vars(made)[_ORIGINAL] = (module,)  # in a tuple, so that it is no part of the module
    return made


@contextmanager
def as_stored(kind: Any) -> Iterator[None]:
    """Let transformers load all weights in one dtype: of T5 it would copy some to float32 beside float16."""
    kept = kind._keep_in_fp32_modules
    kind._keep_in_fp32_modules = None
    try:
        yield
    finally:
        kind._keep_in_fp32_modules = kept


def is_streamed(module: nn.Module) -> bool:
    """Whether a module was made by :func:`streamed`."""
    return vars(module).get(_ORIGINAL) is not None


def original(module: nn.Module) -> nn.Module:
    """The module that a streamed one was made of; any other is itself."""
    found: nn.Module = vars(module).get(_ORIGINAL, (module,))[0]
    return found


def keep_mapped(module: nn.Module, files: Sequence[Path]) -> nn.Module:
    """Mark a module whose weights are to stay where they are, in the dtype that they have: in mapped ``files``."""
    vars(module)[_MAPPED] = _Mapped(tuple(files), _places(module))
    return module


def files_of(module: nn.Module) -> tuple[Path, ...]:
    """The files that hold the weights of a module as they are; none, where it was not mapped, or changed since."""
    found = vars(module).get(_MAPPED)
    return found.files if found is not None and found.places == _places(module) else ()


def computing(module: nn.Module) -> nn.Module:
    """What is called in place of ``module``: a streamed copy where its weights are to stay where they are."""
    return streamed(module) if vars(module).get(_MAPPED) else module


def to_train(module: nn.Module) -> nn.Module:
    """A copy of ``module`` in float32 that can be trained; a streamed one is itself, and is not trained."""
    return module if is_streamed(module) else copy.deepcopy(module).float().requires_grad_(True)


def _empty(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return torch.full((), torch.nan, dtype=dtype or tensor.dtype, device=tensor.device).expand(tensor.shape)


def _stand_in(made: Any, tensor: Tensor) -> Any:
    made.stored = stored(tensor)
    return made


@dataclass(frozen=True)
class _Mapped:
    """The files of a module's weights, and where each weight lay when it was loaded."""

    files: tuple[Path, ...]
    places: tuple[tuple[int, int], ...]


def _places(module: nn.Module) -> tuple[tuple[int, int], ...]:
    """The address of each weight, and how often it was written in place."""
    return tuple((weight.data_ptr(), weight._version) for weight in module.parameters())


@dataclass(frozen=True, eq=False)
class _Fill:
    """A hook that puts a layer's weights into it, or their hollow stand-ins."""

    kept: dict[str, Tensor]  # the stand-ins by name
    read: bool

    def __call__(self, module: nn.Module, *given: Any) -> None:
        for name, tensor in self.kept.items():
            holder: dict[str, Any] = module._parameters if name in module._parameters else module._buffers
            value = stored(tensor).to(torch.float32) if self.read else tensor
            is_parameter = holder is module._parameters and not isinstance(value, nn.Parameter)
            holder[name] = nn.Parameter(value, requires_grad=False) if is_parameter else value
