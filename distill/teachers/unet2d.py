"""The adapter of a UNet2DModel with its scheduler: DDPM, DDIM, EDM, rectified flow, unconditional or by class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from redif_sdk.artifact.records import Condition, Latents, Postprocess
from redif_sdk.distill.teachers.base import Teacher, fingerprint
from redif_sdk.distill.teachers.components import check_pipeline
from redif_sdk.distill.teachers.config_keys import check_config
from redif_sdk.distill.teachers.folders import UNET_PARTS, UNetFolder
from redif_sdk.distill.teachers.known_schedulers import full_config, make_scheduler, noise_process, usual_steps
from redif_sdk.distill.teachers.own_scheduler import OwnScheduler
from redif_sdk.distill.teachers.registry import UNET_2D, register
from redif_sdk.distill.teachers.sizes import check_channels, check_sizes
from redif_sdk.distill.teachers.weights import check_weights
from redif_sdk.errors import InvalidRequest, UnsupportedModel
from redif_sdk.models.denoiser import Denoiser, StudentOf
from redif_sdk.models.hollow import computing, is_streamed

__all__ = ["pixels"]


@register(UNET_2D)
def pixels(
    pipeline: Any,
    *,
    prompts: Sequence[str] | None = None,
    height: int | None = None,
    width: int | None = None,
    num_inference_steps: int | None = None,
    about: Mapping[str, Any] | None = None,
) -> Teacher:
    """A pipeline that is a UNet2DModel and its scheduler, or a folder of these two (:class:`UNetFolder`), as a teacher.

    Args:
        height, width: of an image in pixels; None: the network's own.
        num_inference_steps: of the teacher's own sampler; None: what ``about`` says, else 50.
        about: what the folder's ``redif_teacher.json`` says.

    Raises:
        InvalidRequest: prompts are given, which this network does not take.
        UnsupportedModel: a class embedding or a sample size that is not supported.
    """
    if isinstance(pipeline, UNetFolder):
        name, written = pipeline.name, pipeline.scheduler
        scheduler = make_scheduler(written)
    else:
        check_pipeline(pipeline, UNET_PARTS)
        scheduler = pipeline.scheduler
        name, written = type(pipeline).__name__, full_config(scheduler)
    scheduler_config = full_config(scheduler)
    if prompts is not None:
        raise InvalidRequest(f"{name} is not a text-to-image model; `prompts` is not supported")
    about, network = dict(about or {}), pipeline.unet
    config, shuffle = network.config, about.get("pixel_shuffle", 1)
    sides = _sides(config, shuffle, height, width)
    _check(network, name, sides, shuffle)
    classes = about.get("num_classes", config.num_class_embeds)
    network = computing(network)
    network = (network if is_streamed(network) else network.float()).eval().requires_grad_(False)
    denoiser = Denoiser(network, diffusers_call=True)

    @torch.no_grad()
    def predict(x: Tensor, t: Tensor, condition: Tensor | None) -> Tensor:
        out: Tensor = denoiser.to(x.device)(x, t, condition)
        return out

    schedule, prediction_type, shift = noise_process(scheduler_config)
    own = OwnScheduler(scheduler, schedule, prediction_type, shift=shift)
    teacher = Teacher(
        name=about.get("name", name),
        predict=predict,
        schedule=schedule,
        prediction_type=prediction_type,
        shift=shift,
        latents=Latents(channels=config.in_channels, height=sides[0], width=sides[1]),
        condition=Condition(kind="class", num_classes=classes, class_names=about.get("class_names"))
        if classes
        else None,
        postprocess=Postprocess(pixel_shuffle=shuffle),
        num_inference_steps=num_inference_steps or about.get("num_inference_steps", usual_steps(scheduler_config, 50)),
        make_student=StudentOf(network),
        licence=about.get("licence", "unknown"),
        scheduler_config=scheduler_config,
        own=own,
        sampler=own.sampler(),
        fingerprint=fingerprint([network], written),
        extra=about,
    )
    return teacher.guided(about.get("guidance_scale", 1.0))


def _sides(config: Any, shuffle: int, height: int | None, width: int | None) -> tuple[int, int]:
    """(height, width) of the network's input for an image of this size in pixels; None: the network's own."""
    size = config.sample_size
    own = [size, size] if isinstance(size, int) else list(size or ())
    if len(own) != 2 or not all(isinstance(side, int) for side in own):
        raise UnsupportedModel(f"the network's sample_size is {size!r:.50}; it must be one number or two")
    for axis, asked in enumerate((height, width)):
        if asked is not None:
            if asked < shuffle or asked % shuffle:
                raise InvalidRequest(f"{'width' if axis else 'height'} is {asked}; give a multiple of {shuffle}")
            own[axis] = asked // shuffle
    return own[0], own[1]


def _check(network: Any, name: str, sides: tuple[int, int], shuffle: int) -> None:
    """Raise for a network that is not whole, has a setting that is not supported, or does not take this size."""
    config = network.config
    if config.class_embed_type is not None:
        raise UnsupportedModel(f"class_embed_type {config.class_embed_type!r} is not supported; only a class table is")
    check_weights(network, f"the unet of {name}")
    check_config(network, "unet")
    check_channels(config, name)
    check_sizes(network, (config.in_channels, *sides), {}, classes=bool(config.num_class_embeds), scale=shuffle)
