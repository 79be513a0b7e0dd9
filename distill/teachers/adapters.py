"""diffusers' pipelines as teachers. One table says how each differs; everything else is the same for all of them.

A pipeline of your own is one function, registered under its class's name::

    @register("MyPipeline")
    def mine(pipeline, **options) -> Teacher: ...

docs/adapters.md has a whole one. What a network is fed and how it is called is `redif_sdk.models.families`' business;
no method knows of any pipeline.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from redif_sdk.artifact.records import Condition, Decoder, Latents, Postprocess
from redif_sdk.distill.teachers.base import AtGuidance, Teacher, fingerprint, register, supported
from redif_sdk.distill.teachers.components import check_pipeline
from redif_sdk.distill.teachers.config_keys import check_config
from redif_sdk.distill.teachers.known_schedulers import full_config, noise_process, usual_steps
from redif_sdk.distill.teachers.own_scheduler import OwnScheduler
from redif_sdk.distill.teachers.ranges import guided_over
from redif_sdk.distill.teachers.registry import adapted
from redif_sdk.distill.teachers.sizes import check_decoder, check_sizes
from redif_sdk.distill.teachers.text import Part, text_of
from redif_sdk.distill.teachers.weights import check_weights
from redif_sdk.errors import InvalidRequest, UnsupportedModel
from redif_sdk.models.denoiser import Denoiser, StudentOf
from redif_sdk.models.families import AUTOENCODERS, LatentDecoder
from redif_sdk.models.hollow import computing
from redif_sdk.models.prompts import Prompts
from redif_sdk.models.scales import takes_scale

__all__ = ["register", "supported"]


@dataclass(frozen=True)
class _Kind:
    """How one class of text-to-image pipelines differs from the others.

    Attributes:
        network: the denoiser's attribute.
        parts: (text encoder, tokenizer, longest prompt) by attributes; None: as long as the tokenizer says.
        steps, guidance: the pipeline's own defaults.
        packed: the network sees 2 x 2 latents as one, so its channels are four times theirs.
        embedded: the network takes the guidance scale as an input where its configuration says so.
        optional: a text encoder that may be left out.
        masked: the text encoder takes a mask, and the network too; prompts are lower-cased.
        shifted: latents are shifted before they are decoded; other pipelines ignore the autoencoder's shift_factor.
        variance: the network may make a variance besides, of which the pipeline takes no notice.
        sized: the pipeline tells its scheduler the image's size, for a shift that depends on it.
        paints: the network may take a mask and a masked image besides the latents, as further channels.
    """

    network: str
    parts: tuple[Part, ...]
    steps: int = 50
    guidance: float = 1.0
    packed: bool = False
    embedded: float | None = None
    optional: tuple[str, ...] = ()
    masked: bool = False
    shifted: bool = False
    variance: bool = False
    sized: bool = False
    paints: bool = False

    @property
    def used(self) -> list[str]:
        """The pipeline's parts that are used."""
        return [self.network, "vae", "scheduler", *(name for part in self.parts for name in part[:2])]


_CLIP = ("text_encoder", "tokenizer", None)
_CLIP_2 = ("text_encoder_2", "tokenizer_2", None)
_KINDS = {
    "StableDiffusionPipeline": _Kind("unet", (_CLIP,), 50, 7.5),
    "LatentConsistencyModelPipeline": _Kind("unet", (_CLIP,), 4, embedded=8.5),
    "StableDiffusionXLPipeline": _Kind("unet", (_CLIP, _CLIP_2), 50, 5.0),
    "StableDiffusionInpaintPipeline": _Kind("unet", (_CLIP,), 50, 7.5, paints=True),
    "StableDiffusionXLInpaintPipeline": _Kind("unet", (_CLIP, _CLIP_2), 50, 7.5, paints=True),
    "StableDiffusion3Pipeline": _Kind(
        "transformer",
        (_CLIP, _CLIP_2, ("text_encoder_3", "tokenizer_3", 256)),
        28,
        7.0,
        optional=("text_encoder_3",),
        shifted=True,
        sized=True,
    ),
    "FluxPipeline": _Kind(
        "transformer",
        (_CLIP, ("text_encoder_2", "tokenizer_2", 512)),
        28,
        packed=True,
        embedded=3.5,
        shifted=True,
        sized=True,
    ),
    "PixArtAlphaPipeline": _Kind(
        "transformer", (("text_encoder", "tokenizer", 120),), 20, 4.5, masked=True, variance=True
    ),
    "PixArtSigmaPipeline": _Kind(
        "transformer", (("text_encoder", "tokenizer", 300),), 20, 4.5, masked=True, variance=True
    ),
}


@register(*_KINDS)
def text_to_image(
    pipeline: Any,
    *,
    prompts: Sequence[str] | None = None,
    height: int | None = None,
    width: int | None = None,
    num_inference_steps: int | None = None,
    about: Mapping[str, Any] | None = None,
) -> Teacher:
    """A text-to-image pipeline as a teacher on ``prompts``: its network, guidance, sampler and decoder.

    Args:
        prompts: what the student is trained to draw, as many as there can be.
        height, width: of an image in pixels; None: the pipeline's own.
        about: what the folder's ``redif_teacher.json`` says.

    Raises:
        InvalidRequest: no prompts, or a size that the autoencoder does not take.
        UnsupportedModel: a part of the pipeline that no table of steps can say.
    """
    name, about = type(pipeline).__name__, dict(about or {})
    kind = _KINDS[name]
    network: Any = getattr(pipeline, kind.network)
    texts = prompts if prompts is not None else about.get("prompts")
    if texts is None:
        raise InvalidRequest(f"a {name} draws prompts: give those to distil it on, with --prompts FILE, one a line")
    scheduler_config = full_config(pipeline.scheduler)
    scale = int(pipeline.vae_scale_factor)
    check_pipeline(pipeline, kind.used)
    _check_networks(pipeline, kind.network)
    latents = _latents(pipeline, network, kind, scale, height, width)
    decoder = _decoder(pipeline.vae, scale, shifted=kind.shifted)
    encoders, described = text_of(pipeline, kind.parts, optional=kind.optional, masked=kind.masked)
    bank = Prompts(texts, encoders, null_zeros=bool(pipeline.config.get("force_zeros_for_empty_prompt", False)))
    condition = described(bank)
    tokens = latents.height * latents.width // 4 if kind.sized else None
    schedule, prediction_type, shift = noise_process(scheduler_config, image_tokens=tokens)
    own = OwnScheduler(pipeline.scheduler, schedule, prediction_type, flux=kind.packed, shift=shift)
    embedded = (kind.embedded or kind.guidance) if takes_scale(network) else None
    inpainting = kind.paints and network.config.in_channels != latents.channels
    told = {"rows": bank, "scale": scale, "inpainting": inpainting}
    _check_calls(pipeline, network, latents, decoder, bank.shapes(), embedded, inpainting=inpainting)
    network = computing(network)
    for part in (network, encoders, pipeline.vae):
        part.eval().requires_grad_(False)
    teacher = Teacher(
        name=about.get("name", name),
        predict=_predict(network, embedded, told),
        schedule=schedule,
        prediction_type=prediction_type,
        shift=shift,
        latents=latents,
        condition=condition,
        prompts=bank,
        postprocess=Postprocess(decoder=decoder),
        decode=_latent_decoder(pipeline.vae, decoder),
        num_inference_steps=num_inference_steps
        or about.get("num_inference_steps", usual_steps(scheduler_config, kind.steps)),
        make_student=_students(network, embedded, told),
        network_folder=kind.network,
        licence=about.get("licence", "unknown"),
        scheduler_config=scheduler_config,
        own=own,
        sampler=own.sampler(),
        fingerprint=fingerprint([network, *encoders.encoders], scheduler_config, bank.digest),
        embedded_guidance=embedded,
        at_guidance=None if embedded is None else _at_guidance(network, told),
        pipeline=pipeline,
        inpainting=inpainting,
        extra={
            "null_class": bank.null,
            "null_prompt": "",
            "null_zeros": bank.null_zeros,
            "guidable": kind.guidance != 1,
            **about,
        },
    )
    return teacher.guided(about.get("guidance_scale", embedded if embedded is not None else kind.guidance))


NULL_CLASS = 1000  # that DiTPipeline gives its network for guidance, however many classes there are


@register("DiTPipeline")
def class_to_image(
    pipeline: Any,
    *,
    prompts: Sequence[str] | None = None,
    height: int | None = None,
    width: int | None = None,
    num_inference_steps: int | None = None,
    about: Mapping[str, Any] | None = None,
) -> Teacher:
    """DiT: a class-conditional transformer on an autoencoder's latents. Class 1000 means 'no class', or the
    one after the last where there are fewer."""
    about, network = dict(about or {}), pipeline.transformer
    if prompts is not None or height is not None or width is not None:
        raise InvalidRequest("a DiTPipeline draws classes at one size; it takes no prompts, height or width")
    config, scale = network.config, 2 ** (len(pipeline.vae.config.block_out_channels) - 1)
    classes = config.num_embeds_ada_norm
    check_pipeline(pipeline, ("transformer", "vae", "scheduler"))
    _check_networks(pipeline, "transformer")
    _check_channels(network, pipeline.vae, config.in_channels, variance=True)
    latents = Latents(channels=config.in_channels, height=config.sample_size, width=config.sample_size)
    decoder = _decoder(pipeline.vae, scale, shifted=False)
    _check_calls(pipeline, network, latents, decoder, None, None)
    scheduler_config = full_config(pipeline.scheduler)
    schedule, prediction_type, shift = noise_process(scheduler_config)
    own = OwnScheduler(pipeline.scheduler, schedule, prediction_type, shift=shift)
    network = computing(network)
    for part in (network, pipeline.vae):
        part.eval().requires_grad_(False)
    teacher = Teacher(
        name=about.get("name", "DiT"),
        predict=_predict(network, None, {"scale": scale}),
        schedule=schedule,
        prediction_type=prediction_type,
        shift=shift,
        latents=latents,
        condition=Condition(kind="class", num_classes=classes, class_names=about.get("class_names")),
        postprocess=Postprocess(decoder=decoder),
        decode=_latent_decoder(pipeline.vae, decoder),
        num_inference_steps=num_inference_steps or about.get("num_inference_steps", usual_steps(scheduler_config, 50)),
        make_student=_students(network, None, {"scale": scale}),
        network_folder="transformer",
        licence=about.get("licence", "unknown"),
        scheduler_config=scheduler_config,
        own=own,
        sampler=own.sampler(),
        fingerprint=fingerprint([network], scheduler_config),
        pipeline=pipeline,
        extra={"null_class": min(classes, NULL_CLASS), "guidable": True, **about},
    )
    return teacher.guided(about.get("guidance_scale", 4.0))


def _latent_decoder(vae: nn.Module, decoder: Decoder) -> LatentDecoder:
    """The autoencoder as latents in float32 need it; the pipeline is a copy, or its folder's own."""
    called = computing(vae)
    if called is vae:
        nn.Module.to(vae, torch.float32)
    return LatentDecoder(called, decoder.scaling_factor, decoder.shift_factor).eval()


def _predict(
    network: nn.Module, embedded: float | None, told: Mapping[str, Any]
) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """The teacher's function: in the network's own precision, float32 out. ``told``: further options of `Denoiser`."""
    denoiser = Denoiser(network, diffusers_call=True, embedded_guidance=embedded, **told)
    dtype = next(network.parameters()).dtype

    @torch.no_grad()
    def predict(x: Tensor, t: Tensor, condition: Tensor | None) -> Tensor:
        f: Tensor = denoiser.to(x.device)(x.to(dtype), t, condition)
        return f.float()

    return predict


def _students(network: nn.Module, embedded: float | None, told: Mapping[str, Any]) -> StudentOf:
    return StudentOf(network, {"embedded_guidance": embedded, **told})


def _at_guidance(network: nn.Module, told: Mapping[str, Any]) -> AtGuidance:
    """Of a network that takes the guidance scale as an input: `predict` and `make_student` at a scale."""
    return lambda embedded: (_predict(network, embedded, told), _students(network, embedded, told))


def _latents(pipeline: Any, network: Any, kind: _Kind, scale: int, height: int | None, width: int | None) -> Latents:
    size: Any = network.config.get("sample_size") or pipeline.default_sample_size
    own = (size, size) if isinstance(size, int) else tuple(size)
    if len(own) != 2 or not all(isinstance(side, int) for side in own):
        raise UnsupportedModel(f"the network's sample_size is {size!r:.50}; it must be one number or two")
    sides = []
    for axis, pixels, default in (("height", height, own[0]), ("width", width, own[1])):
        unit = scale * (2 if kind.packed else 1)
        if pixels is not None and (pixels < unit or pixels % unit):
            raise InvalidRequest(f"{axis} is {pixels}; give a multiple of {unit}")
        sides.append(default if pixels is None else pixels // scale)
    channels = network.config.in_channels // (4 if kind.packed else 1)
    if kind.paints and channels == 2 * pipeline.vae.config.latent_channels + 1:
        channels = pipeline.vae.config.latent_channels  # then a mask, then the masked image
        if network.config.get("out_channels") != channels:
            raise UnsupportedModel(
                f"the inpainting network makes {network.config.get('out_channels')} channels, and the autoencoder "
                f"decodes {channels}; use one with out_channels {channels}"
            )
    else:
        _check_channels(network, pipeline.vae, channels, variance=kind.variance)
    return Latents(channels=channels, height=sides[0], width=sides[1])


def _check_networks(pipeline: Any, name: str) -> None:
    """Raise for a network or an autoencoder that is not whole, is quantised, or has an unknown setting."""
    for part in ("vae", name):
        network = getattr(pipeline, part)
        if network is None:
            raise UnsupportedModel(f"the pipeline has no {part}; load it whole")
        check_weights(network, f"the pipeline's {part}")
        check_config(network, part)
    if any(getattr(block, factor, None) for block in getattr(network, "up_blocks", ()) for factor in _FREE_U):
        raise UnsupportedModel("FreeU is on, which a saved network does not have; call disable_freeu() first")


def _check_calls(
    pipeline: Any,
    network: Any,
    latents: Latents,
    decoder: Decoder,
    conditions: Mapping[str, Sequence[int]] | None,
    embedded: float | None,
    *,
    inpainting: bool = False,
) -> None:
    """Raise unless the network and the autoencoder take these latents. ``conditions``: of prompts; None: classes."""
    if pipeline.config.get("requires_aesthetics_score"):
        raise UnsupportedModel(
            "the pipeline's network takes an aesthetic score (requires_aesthetics_score), as SDXL's refiner does, "
            "which is not supported; use a base model"
        )
    if embedded is None and type(pipeline).__name__ == "LatentConsistencyModelPipeline":
        raise UnsupportedModel(
            "the network of a LatentConsistencyModelPipeline must take the guidance scale, and time_cond_proj_dim is "
            "not set in its config.json; load it as a StableDiffusionPipeline"
        )
    shape = (latents.channels, latents.height, latents.width)
    classes = conditions is None
    given: dict[str, Any] = {"classes": classes, "embedded": embedded, "inpainting": inpainting}
    check_sizes(network, shape, conditions or {}, scale=decoder.scale, **given)
    check_decoder(pipeline.vae, shape, decoder.scale, decoder.channels)


def _check_channels(network: Any, vae: Any, channels: int, *, variance: bool) -> None:
    """Raise UnsupportedModel unless a network takes and makes as many channels as the autoencoder decodes."""
    if channels != vae.config.latent_channels:
        raise UnsupportedModel(
            f"the network takes {channels} channels and the autoencoder has {vae.config.latent_channels}: "
            "it takes more than noise and a prompt (editing, upscaling), which is not supported; load an inpainting "
            "network as a StableDiffusionInpaintPipeline or StableDiffusionXLInpaintPipeline"
        )
    given = network.config.in_channels
    made = network.config.get("out_channels") or given
    if made != given and not (variance and made == 2 * given):
        raise UnsupportedModel(
            f"the network takes {given} channels and makes {made}, which its pipeline does not decode; use one with "
            "out_channels equal to in_channels"
        )


_FREE_U = ("s1", "s2", "b1", "b2")  # attributes that enable_freeu sets, and no file holds


def _decoder(vae: Any, scale: int, *, shifted: bool) -> Decoder:
    config, kind = vae.config, type(vae).__name__
    if kind not in AUTOENCODERS:
        raise UnsupportedModel(
            f"the pipeline's vae is a {kind}, which is not supported; use {' or '.join(AUTOENCODERS)}"
        )
    if config.get("latents_mean") is not None or config.get("latents_std") is not None:
        raise UnsupportedModel("the autoencoder normalises its latents channel by channel, which is not supported")
    factor, shift = config.get("scaling_factor"), (config.get("shift_factor") or 0.0) if shifted else 0.0
    for name, value in (("scaling_factor", factor), ("shift_factor", shift)):
        if not isinstance(value, int | float) or not math.isfinite(value) or (value == 0 and name == "scaling_factor"):
            raise UnsupportedModel(
                f"the autoencoder's {name} is {value!r:.50}; it must be a number, and no 0 to divide by"
            )
    return Decoder(
        class_path=f"diffusers.{kind}",
        folder="vae",
        scale=scale,
        channels=config.out_channels,
        scaling_factor=float(factor),
        shift_factor=float(shift),
    )


def drawing(teacher: Teacher, prompts: Sequence[str]) -> Teacher:
    """A text-to-image teacher on other prompts, with everything else as it is.

    Raises:
        InvalidRequest: it draws none, or these cannot be used.
    """
    if teacher.prompts is None or teacher.pipeline is None:
        raise InvalidRequest(f"{teacher.name} draws no prompts")
    scale = teacher.postprocess.scale
    made = adapted(
        teacher.pipeline,
        prompts=prompts,
        height=teacher.latents.height * scale,
        width=teacher.latents.width * scale,
        num_inference_steps=teacher.num_inference_steps,
        about={key: value for key, value in teacher.extra.items() if key != "null_class"},  # a place after the prompts
    )
    kept = {name: getattr(teacher, name) for name in ("name", "revision", "folder", "micro_batch", "schedule")}
    again: Teacher = replace(made, **kept).in_range(teacher.postprocess.value_range)
    again = again.guided(teacher.guidance_scale)
    return again if teacher.guidance_range is None else guided_over(again, *teacher.guidance_range)
