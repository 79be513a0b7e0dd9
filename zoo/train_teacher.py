"""Train the shipped teachers: ``python -m zoo.train_teacher fashion-mnist -o DIR``, from the repository's root.

An ordinary diffusion model: v-prediction on the cosine schedule, AdamW, EMA. Architectures named ``pixels-*`` see the
images as they are; the others ``pixel_unshuffle(2)`` of them, a permutation, so white noise stays white: cheaper, but
every block of 2 x 2 pixels is made by one place of the network, which leaves a grid. Every batch is a function of its
index, so a run that was killed and resumed takes the same path as one that was not. On a busy CPU two processes of one
thread are faster than one of two threads: ``torchrun --nproc_per_node 2 -m zoo.train_teacher ...``.
"""

from __future__ import annotations

import json
import math
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from accelerate import Accelerator
from diffusers import DDIMScheduler, UNet2DModel
from torch import Tensor
from torch.nn import functional as F

from redif_sdk.distill.compute.device import autocast, cpu_has_bf16
from redif_sdk.distill.evaluation import datasets as data
from redif_sdk.distill.pool import PIXEL_BANK_SIZES
from redif_sdk.distill.training.checkpoint import CHECKPOINT, save_state
from redif_sdk.errors import InvalidRequest
from redif_sdk.progress import Progress
from redif_sdk.results import machine
from zoo.grow_teacher import grow
from zoo.publish_teacher import publish


def _unet(
    channels: tuple[int, ...],
    *,
    layers: int,
    attention: tuple[bool, ...],
    head_dim: int,
    groups: int,
    embedding: int | None = None,
) -> dict[str, Any]:
    """UNet2DModel's arguments; the middle block always attends. ``embedding``: width of time and class, if given."""
    return {
        "block_out_channels": channels,
        "layers_per_block": layers,
        "down_block_types": tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attention),
        "up_block_types": tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attention)),
        "attention_head_dim": head_dim,
        "norm_num_groups": groups,
        "time_embedding_dim": embedding,
    }


ARCHITECTURES: dict[str, tuple[int, dict[str, Any]]] = {
    # name -> pixel shuffle, UNet2DModel's arguments; docs/results/teacher.md has how they compare
    "unet-32-64": (2, _unet((32, 64), layers=2, attention=(False, True), head_dim=32, groups=8)),
    "unet-32-64-mid": (2, _unet((32, 64), layers=2, attention=(False, False), head_dim=64, groups=32)),
    "unet-32-64-96": (2, _unet((32, 64, 96), layers=2, attention=(False, False, False), head_dim=96, groups=32)),
    "unet-64-128": (2, _unet((64, 128), layers=1, attention=(False, False), head_dim=64, groups=32)),
    "pixels-16-32-64": (1, _unet((16, 32, 64), layers=2, attention=(False,) * 3, head_dim=64, groups=16)),
    "pixels-32-32-64": (1, _unet((32, 32, 64), layers=1, attention=(False,) * 3, head_dim=64, groups=32)),
    "pixels-32-64-64": (1, _unet((32, 64, 64), layers=1, attention=(False,) * 3, head_dim=64, groups=32)),
    "pixels-32-64-128": (1, _unet((32, 64, 128), layers=1, attention=(False,) * 3, head_dim=64, groups=32)),
    "pixels-16-32-64-96": (
        1,
        _unet((16, 32, 64, 96), layers=2, attention=(False,) * 4, head_dim=96, groups=16, embedding=128),
    ),
}


def build_network(name: str, split: data.ImageData, pixel_shuffle: int) -> UNet2DModel:
    """A stock class-conditional ``UNet2DModel`` for a data set; its last class is 'no class' (label dropout)."""
    num_classes, channels = len(split.class_names), split.images.shape[1] * pixel_shuffle**2
    return UNet2DModel(
        sample_size=split.images.shape[-1] // pixel_shuffle,
        in_channels=channels,
        out_channels=channels,
        num_class_embeds=num_classes + 1,
        **ARCHITECTURES[name][1],
    )


def build_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
    )


def v_loss(
    network: torch.nn.Module, alphas_cumprod: Tensor, x0: Tensor, labels: Tensor, t: Tensor, noise: Tensor
) -> Tensor:
    """Mean squared error of v = alpha noise - sigma x0 (Salimans and Ho 2022, appendix D), for each sample: (B,)."""
    alpha = alphas_cumprod[t].sqrt().view(-1, 1, 1, 1)
    sigma = (1 - alphas_cumprod[t]).sqrt().view(-1, 1, 1, 1)
    with autocast():
        prediction = network(alpha * x0 + sigma * noise, t.float(), class_labels=labels).sample
    return ((prediction.float() - (alpha * noise - sigma * x0)) ** 2).mean((1, 2, 3))


def train(
    name: str,
    output: Path,
    *,
    architecture: str,
    samples: int,
    batch_size: int,
    learning_rate: float,
    ema_decay: float,
    label_dropout: float,
    seed: int,
    data_dir: str | None,
    checkpoint_seconds: float,
    weight_decay: float = 0.01,
    grow_from: Path | None = None,
) -> UNet2DModel:
    """Train, or continue from ``output/checkpoint.pt``; returns the EMA network and leaves it in the checkpoint.

    ``grow_from``: see `zoo.grow_teacher`. Never through torch.compile, whose 2.13 gives a trunk gradients of 0 on a CPU
    (docs/results/teacher.md).
    """
    torch.manual_seed(seed)
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    rank, world = accelerator.process_index, accelerator.num_processes
    if batch_size % world:
        raise InvalidRequest(f"batch size {batch_size} is not divisible by {world} processes")
    mine = slice(rank * batch_size // world, (rank + 1) * batch_size // world)
    split = data.load(name, "train", data_dir)
    shuffle, checkpoint = ARCHITECTURES[architecture][0], output / CHECKPOINT
    images = F.pixel_unshuffle(torch.tensor(split.images).float() / 127.5 - 1, shuffle)
    labels, classes = torch.tensor(split.labels), len(split.class_names)
    network = build_network(architecture, split, shuffle)
    if grow_from is not None and not checkpoint.is_file():
        grow(network, grow_from)
    ema = build_network(architecture, split, shuffle).requires_grad_(False)
    ema.load_state_dict(network.state_dict())
    alphas_cumprod = build_scheduler().alphas_cumprod
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=weight_decay, fused=True
    )
    updates, start, spent = math.ceil(samples / batch_size), 0, 0.0
    output.mkdir(parents=True, exist_ok=True)
    if checkpoint.is_file():
        state = torch.load(checkpoint, weights_only=True)
        network.load_state_dict(state["network"])
        ema.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        start, spent = state["update"], state["seconds"]
    model = accelerator.prepare_model(network)
    began = saved = time.monotonic()

    def save(update: int) -> None:
        if not accelerator.is_main_process:
            return
        save_state(
            {
                "network": network.state_dict(),
                "ema": ema.state_dict(),
                "optimizer": optimizer.state_dict(),
                "update": update,
                "seconds": spent + time.monotonic() - began,
                "samples": update * batch_size,
                "architecture": architecture,
            },
            checkpoint,
        )

    with Progress(quiet=rank > 0).stage(f"teacher {name}: {updates} updates") as show:
        running = float("nan")
        for update in range(start, updates):
            draw = torch.Generator().manual_seed(seed * 1_000_003 + update)  # the batch depends only on its index
            index = torch.randint(0, len(images), (batch_size,), generator=draw)
            t = torch.randint(0, len(alphas_cumprod), (batch_size,), generator=draw)
            noise = torch.randn((batch_size, *images.shape[1:]), generator=draw)
            dropped = torch.rand(batch_size, generator=draw) < label_dropout
            rate = learning_rate * min(1.0, (update + 1) / 200) * 0.5 * (1 + math.cos(math.pi * update / updates))
            for group in optimizer.param_groups:
                group["lr"] = max(rate, 1e-6)
            wanted = labels[index].masked_fill(dropped, classes)
            loss = v_loss(model, alphas_cumprod, images[index[mine]], wanted[mine], t[mine], noise[mine]).mean()
            optimizer.zero_grad()
            accelerator.backward(loss)
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            decay = min(ema_decay, (1 + update) / (10 + update))
            torch._foreach_lerp_(list(ema.parameters()), [p.data for p in network.parameters()], 1 - decay)
            running = loss.item() if math.isnan(running) else 0.98 * running + 0.02 * loss.item()
            show((update + 1) / updates, f"loss {running:.4f}")
            if time.monotonic() - saved > checkpoint_seconds:
                save(update + 1)
                saved = time.monotonic()
    save(updates)
    return ema


def main(
    name: Annotated[str, typer.Argument(help="The data set: fashion-mnist or emoji.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the checkpoint.")],
    publish_to: Annotated[
        Path | None, typer.Option("--publish", help="Where the teacher's folder goes; default OUTPUT/teacher.")
    ] = None,
    architecture: Annotated[str, typer.Option(help=", ".join(ARCHITECTURES))] = "pixels-16-32-64",
    samples: Annotated[int, typer.Option(help="Training samples to see.")] = 448_000,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
    ema_decay: float = 0.9995,
    label_dropout: float = 0.05,
    seed: int = 0,
    guidance_scale: Annotated[float, typer.Option(help="Classifier-free guidance of the published teacher.")] = 1.5,
    data_dir: Annotated[str | None, typer.Option(help="Folder with the data set's files.")] = None,
    checkpoint_seconds: float = 60.0,
    threads: Annotated[int, typer.Option(help="Torch threads; 0 leaves the default.")] = 0,
    grow_from: Annotated[
        Path | None, typer.Option(help="A teacher's folder whose trunk is the start; default: random weights.")
    ] = None,
) -> None:
    """Train a teacher, then write its folder, bank and card. Run again with the same output folder to resume."""
    if architecture not in ARCHITECTURES:
        raise typer.BadParameter(f"{architecture!r} is not one of {', '.join(ARCHITECTURES)}")
    if threads:
        torch.set_num_threads(threads)
    settings: dict[str, Any] = {
        "architecture": architecture,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "ema_decay": ema_decay,
        "label_dropout": label_dropout,
        "seed": seed,
    }
    network = train(
        name,
        output,
        samples=samples,
        data_dir=data_dir,
        checkpoint_seconds=checkpoint_seconds,
        grow_from=grow_from,
        **settings,
    )
    if int(os.environ.get("RANK", 0)):
        return
    state = torch.load(output / CHECKPOINT, weights_only=True)
    training = {
        **settings,
        "samples": state["samples"],
        "grown_from": f"the weights of {grow_from}" if grow_from else None,
        "seconds": round(state["seconds"], 1),
        "processor": machine()["processor"],
        "precision": "bf16" if cpu_has_bf16() else "fp32",
    }
    total = sum(PIXEL_BANK_SIZES.values())
    done = 0
    with Progress().stage(f"sampling {total} images") as show:

        def on_batch(count: int) -> None:
            nonlocal done
            done += count
            show(done / total)

        figures = publish(
            name,
            network,
            build_scheduler(),
            publish_to or output / "teacher",
            training=training,
            pixel_shuffle=ARCHITECTURES[architecture][0],
            guidance_scale=guidance_scale,
            data_dir=data_dir,
            on_batch=on_batch,
        )
    typer.echo(json.dumps(asdict(figures), indent=1))


if __name__ == "__main__":
    typer.run(main)
