"""What the size of a network decides where the settings leave it open, so that billions of weights can be trained."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from redif_sdk.distill.compute.device import chosen_device, has_bf16
from redif_sdk.distill.compute.lora import adapted, adapter_weights
from redif_sdk.distill.config import DistillConfig
from redif_sdk.distill.teachers.base import Teacher
from redif_sdk.distill.teachers.ranges import guided_over
from redif_sdk.distill.teachers.weights import LARGE
from redif_sdk.errors import InvalidRequest
from redif_sdk.memory import free_memory, gib
from redif_sdk.models.denoiser import Denoiser, inner_of

__all__ = ["check_memory", "half_of", "network_to_train", "sized"]

LORA_RANK = 64  # of large networks, LCM-LoRA's (Luo et al. 2023, arXiv 2311.05556)
MICRO_BATCH = 8  # images that a large network takes at once on a GPU; on a CPU 1, which is no faster with more


def sized(config: DistillConfig, teacher: Teacher) -> tuple[DistillConfig, Teacher]:
    """``config`` with nothing left open, and ``teacher`` in its micro-batches.

    Networks of more than `LARGE` weights are trained by adapters, in micro-batches, with gradient checkpointing. Where
    the settings have a range of guidance scales, the teacher is guided over it.

    Raises:
        InvalidRequest, UnsupportedModel: the teacher cannot be guided over that range, or its student not take it.
    """
    if config.guidance_range is not None:
        teacher = guided_over(teacher, *config.guidance_range)
    weights = sum(weight.numel() for weight in teacher.frozen_student().parameters())
    large = weights > LARGE
    kind = chosen_device(config.device).type
    chosen: dict[str, Any] = {
        "lora_rank": LORA_RANK if large else 0,
        "micro_batch_size": (1 if kind == "cpu" else MICRO_BATCH) if large else 0,
        "gradient_checkpointing": large,
    }
    open_settings = {name: value for name, value in chosen.items() if getattr(config, name) is None}
    config = config.model_copy(update=open_settings)
    return config, replace(teacher, micro_batch=config.micro_batch_size or 0)


def half_of(config: DistillConfig) -> torch.dtype | None:
    """In which dtype a large teacher's network is held, where training does not change it; None: float32."""
    native = config.precision == "auto" and has_bf16(chosen_device(config.device).type)
    return torch.bfloat16 if config.lora_rank != 0 and (native or config.precision == "bf16") else None


def check_memory(config: DistillConfig, teacher: Teacher) -> None:
    """Refuse a large network that cannot be trained in the memory that is free on the device, as far as its weights,
    their gradients, optimiser and moving average tell. Activations come on top.

    Raises:
        InvalidRequest: it does not fit; the message has the numbers.
    """
    count = sum(weight.numel() for weight in teacher.frozen_student().parameters())
    device = chosen_device(config.device)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory()
    if count <= LARGE or free is None:
        return
    # beside the teacher's own, which are there: of all weights the student's, gradient, AdamW's two, the average's
    needed = 20 * count
    if config.lora_rank:
        needed = 4 * count + 20 * adapter_weights(teacher.frozen_student(), config.lora_rank)  # merged at the end
    if needed > free:
        ways = "lower lora_rank, or use a machine with more"
        if not config.lora_rank:
            ways = f"train adapters (--lora-rank {LORA_RANK}), or use a machine with more"
        how = f"by adapters of rank {config.lora_rank}" if config.lora_rank else "with all its weights"
        raise InvalidRequest(
            f"training {teacher.name} ({count / 1e9:.1f} billion weights) {how} takes {gib(needed)} of memory beside "
            f"the teacher, and {gib(free)} are free; {ways}"
        )


def network_to_train(teacher: Teacher, config: DistillConfig, start: nn.Module | None = None) -> nn.Module:
    """A network to train as ``config`` says: of the teacher's weights, or of those of ``start``.

    Raises:
        RuntimeError: the start is another network.
        UnsupportedModel: it takes no adapters.
    """
    shared = bool(config.lora_rank) and start is None and not config.shard
    network = teacher.frozen_student() if shared else teacher.make_student()
    if start is not None:
        network.load_state_dict(start.state_dict())
    if isinstance(network, Denoiser):
        network.micro_batch = config.micro_batch_size or 0
    if config.gradient_checkpointing:
        inner: Any = inner_of(network)
        if getattr(inner, "_supports_gradient_checkpointing", False):
            inner.enable_gradient_checkpointing()
        elif isinstance(network, Denoiser):
            network.recompute = True
    return adapted(network, config.lora_rank, config.seed) if config.lora_rank else network
