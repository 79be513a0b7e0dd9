"""Low-rank adapters (Hu et al. 2021, arXiv 2106.09685) by peft: train few weights, save an ordinary network.

Every linear and convolutional layer gets W + (rank-r product), which starts at zero. Adapters are merged into the
weights when training ends, so a student's folder and its graphs look as any other's. The weights beside the adapters
are not trained, so the teacher, the student and its copies share them, and a checkpoint leaves them out.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from redif_sdk.errors import UnsupportedModel
from redif_sdk.models.copies import sharing

__all__ = ["adapted", "adapter_weights", "apart", "load_trained", "merged", "trained", "twin"]


def adapted(network: nn.Module, rank: int, seed: int) -> nn.Module:
    """``network`` with adapters of ``rank``; they alone are trainable. At first it computes what it did before.

    Raises:
        UnsupportedModel: it has no layer that takes an adapter, or peft is not installed.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise UnsupportedModel("lora_rank needs peft; pip install 'redif-sdk[distill]'") from error
    names = list(_layers(network))
    if not names:
        raise UnsupportedModel(f"{type(network).__name__} has no linear or convolutional layer; train it without LoRA")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        wrapped: nn.Module = get_peft_model(network, LoraConfig(r=rank, lora_alpha=rank, target_modules=names))
    return wrapped


def adapter_weights(network: nn.Module, rank: int) -> int:
    """How many weights the adapters of ``rank`` have."""
    shapes = (layer.weight.shape for layer in _layers(network).values())
    return sum(rank * (shape[0] + shape[1:].numel()) for shape in shapes)


def _layers(network: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    """The layers that get adapters, by name."""
    # peft has none for grouped convolutions whose groups do not divide the rank
    return {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)
    }


def merged(network: nn.Module) -> nn.Module:
    """An ordinary network in float32 that computes what ``network`` does; itself, if it has no adapters.

    The argument is kept.
    """
    if not _has_adapters(network):
        return network
    wrapped: Any = nn.Module.to(copy.deepcopy(network), torch.float32)
    plain: nn.Module = wrapped.merge_and_unload()
    return plain


def twin(network: nn.Module) -> nn.Module:
    """A copy that is not trained. Where ``network`` has adapters, it shares the weights beside them."""
    return sharing(network).requires_grad_(False)


def apart(first: nn.Module, second: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """The weights of two networks of one class that they do not share, each in the same order."""
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    own = [(one, other) for one, other in pairs if one is not other]
    return [one for one, _ in own], [other for _, other in own]


def trained(network: nn.Module) -> dict[str, Tensor]:
    """The state dict without what training leaves as it is: the adapters alone, where there are any."""
    state: dict[str, Tensor] = network.state_dict()
    return {name: value for name, value in state.items() if _is_adapter(name)} if _has_adapters(network) else state


def load_trained(network: nn.Module, state: dict[str, Tensor]) -> None:
    """Take :func:`trained` back.

    Raises:
        RuntimeError: it is of another network.
    """
    missing, unexpected = network.load_state_dict(state, strict=not _has_adapters(network))
    if unexpected or any(_is_adapter(name) for name in missing):
        raise RuntimeError(f"these are other adapters: {[*unexpected, *filter(_is_adapter, missing)][:3]}")


def _has_adapters(network: nn.Module) -> bool:
    return hasattr(network, "merge_and_unload")


def _is_adapter(name: str) -> bool:
    return ".lora_" in name
