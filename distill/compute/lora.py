"""Low-rank adapters (Hu et al. 2021, arXiv 2106.09685) by peft: train few weights, save an ordinary network.

Every linear and convolutional layer gets W + (rank-r product), which starts at zero. Adapters are merged into the
weights when training ends, so a student's folder and its graphs look as any other's.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from redif_sdk.errors import UnsupportedModel


def adapted(network: nn.Module, rank: int, seed: int) -> nn.Module:
    """``network`` with adapters of ``rank``; they alone are trainable. At first it computes what it did before.

    Raises:
        UnsupportedModel: it has no layer that takes an adapter, or peft is not installed.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise UnsupportedModel("lora_rank needs peft; pip install 'redif-sdk[distill]'") from error
    # peft has no adapters for grouped convolutions whose groups do not divide the rank
    names = [
        name
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)
    ]
    if not names:
        raise UnsupportedModel(f"{type(network).__name__} has no linear or convolutional layer; train it without LoRA")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        wrapped: nn.Module = get_peft_model(network, LoraConfig(r=rank, lora_alpha=rank, target_modules=names))
    return wrapped


def merged(network: nn.Module) -> nn.Module:
    """An ordinary network that computes what ``network`` does; itself, if it has no adapters. The argument is kept."""
    if not hasattr(network, "merge_and_unload"):
        return network
    wrapped: Any = copy.deepcopy(network)
    plain: nn.Module = wrapped.merge_and_unload()
    return plain
