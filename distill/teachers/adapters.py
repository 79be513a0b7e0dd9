"""diffusers' pipelines as teachers. One table says how each differs; everything else is the same for all of them.

A pipeline of your own is one function, registered under its class's name::

    @register("MyPipeline")
    def mine(pipeline, **options) -> Teacher: ...

docs/adapters.md has a whole one. What a network is fed and how it is called is `redif_sdk.models.families`' business;
no method knows of any pipeline.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from redif_sdk.artifact.records import (
    Condition,
    Decoder,
    Latents,
    Postprocess,
    TensorSpec,
    TextCondition,
    TextEncoder,
    Tokenizer,
)
from redif_sdk.distill.teachers.base import AtGuidance, Teacher, fingerprint, register, supported
from redif_sdk.distill.teachers.own_scheduler import noise_process, own_sampler
from redif_sdk.errors import InvalidRequest, UnsupportedModel
from redif_sdk.models.denoiser import Denoiser
from redif_sdk.models.families import LAYOUTS, LatentDecoder, TextEncoders
from redif_sdk.models.prompts import Prompts

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
    """

    network: str
    parts: tuple[tuple[str, str, int | None], ...]
    steps: int = 50
    guidance: float = 1.0
    packed: bool = False
    embedded: float | None = None
    optional: tuple[str, ...] = ()
    masked: bool = False


_CLIP = ("text_encoder", "tokenizer", None)
_CLIP_2 = ("text_encoder_2", "tokenizer_2", None)
_KINDS = {
    "StableDiffusionPipeline": _Kind("unet", (_CLIP,), 50, 7.5),
    "LatentConsistencyModelPipeline": _Kind("unet", (_CLIP,), 4, embedded=8.5),
    "StableDiffusionXLPipeline": _Kind("unet", (_CLIP, _CLIP_2), 50, 5.0),
    "StableDiffusion3Pipeline": _Kind(
        "transformer", (_CLIP, _CLIP_2, ("text_encoder_3", "tokenizer_3", 256)), 28, 7.0, optional=("text_encoder_3",)
    ),
    "FluxPipeline": _Kind(
        "transformer", (_CLIP, ("text_encoder_2", "tokenizer_2", 512)), 28, packed=True, embedded=3.5
    ),
    "PixArtAlphaPipeline": _Kind("transformer", (("text_encoder", "tokenizer", 120),), 20, 4.5, masked=True),
    "PixArtSigmaPipeline": _Kind("transformer", (("text_encoder", "tokenizer", 300),), 20, 4.5, masked=True),
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
    scheduler_config = {"_class_name": type(pipeline.scheduler).__name__, **pipeline.scheduler.config}
    scale = int(pipeline.vae_scale_factor)
    latents = _latents(pipeline, network, kind, scale, height, width)
    encoders, described = _text(pipeline, kind)
    bank = Prompts(
        texts,
        encoders,
        null_zeros=bool(pipeline.config.get("force_zeros_for_empty_prompt", False)),
    )
    condition = described(bank)
    tokens = latents.height * latents.width // 4
    schedule, prediction_type, shift = noise_process(scheduler_config, image_tokens=tokens)
    embedded = (kind.embedded or kind.guidance) if _embeds(network) else None
    for part in (network, encoders, pipeline.vae):
        part.eval().requires_grad_(False)
    decoder = _decoder(pipeline.vae, scale)
    teacher = Teacher(
        name=about.get("name", name),
        predict=_predict(network, bank, embedded, scale),
        schedule=schedule,
        prediction_type=prediction_type,
        shift=shift,
        latents=latents,
        condition=condition,
        prompts=bank,
        postprocess=Postprocess(decoder=decoder),
        decode=LatentDecoder(pipeline.vae, decoder.scaling_factor, decoder.shift_factor).eval(),
        num_inference_steps=num_inference_steps or about.get("num_inference_steps", kind.steps),
        make_student=_student(network, bank, embedded, scale),
        network_folder=kind.network,
        licence=about.get("licence", "unknown"),
        scheduler_config=scheduler_config,
        sampler=own_sampler(pipeline.scheduler, flux=kind.packed, shift=shift),
        fingerprint=fingerprint([network, *encoders.encoders], scheduler_config, bank.digest),
        embedded_guidance=embedded,
        at_guidance=None if embedded is None else _at_guidance(network, bank, scale),
        pipeline=pipeline,
        extra={"null_class": bank.null, "null_prompt": "", "null_zeros": bank.null_zeros, **about},
    )
    return teacher.guided(about.get("guidance_scale", embedded if embedded is not None else kind.guidance))


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
    """DiT: a class-conditional transformer on an autoencoder's latents. The class after the last means 'no class'."""
    about, network = dict(about or {}), pipeline.transformer
    if prompts is not None or height is not None or width is not None:
        raise InvalidRequest("a DiTPipeline draws classes at one size; it takes no prompts, height or width")
    config, scale = network.config, 2 ** (len(pipeline.vae.config.block_out_channels) - 1)
    classes = config.num_embeds_ada_norm
    scheduler_config = {"_class_name": type(pipeline.scheduler).__name__, **pipeline.scheduler.config}
    schedule, prediction_type, shift = noise_process(scheduler_config)
    for part in (network, pipeline.vae):
        part.eval().requires_grad_(False)
    decoder = _decoder(pipeline.vae, scale)
    teacher = Teacher(
        name=about.get("name", "DiT"),
        predict=_predict(network, None, None, scale),
        schedule=schedule,
        prediction_type=prediction_type,
        shift=shift,
        latents=Latents(channels=config.in_channels, height=config.sample_size, width=config.sample_size),
        condition=Condition(kind="class", num_classes=classes, class_names=about.get("class_names")),
        postprocess=Postprocess(decoder=decoder),
        decode=LatentDecoder(pipeline.vae, decoder.scaling_factor, decoder.shift_factor).eval(),
        num_inference_steps=num_inference_steps or about.get("num_inference_steps", 50),
        make_student=_student(network, None, None, scale),
        network_folder="transformer",
        licence=about.get("licence", "unknown"),
        scheduler_config=scheduler_config,
        sampler=own_sampler(pipeline.scheduler),
        fingerprint=fingerprint([network], scheduler_config),
        pipeline=pipeline,
        extra={"null_class": classes, **about},
    )
    return teacher.guided(about.get("guidance_scale", 4.0))


def _predict(
    network: nn.Module, prompts: Prompts | None, embedded: float | None, scale: int
) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """The teacher's function: in the network's own precision, float32 out."""
    denoiser = Denoiser(network, diffusers_call=True, prompts=prompts, embedded_guidance=embedded, scale=scale)
    dtype = next(network.parameters()).dtype

    @torch.no_grad()
    def predict(x: Tensor, t: Tensor, condition: Tensor | None) -> Tensor:
        f: Tensor = denoiser.to(x.device)(x.to(dtype), t, condition)
        return f.float()

    return predict


def _student(network: nn.Module, prompts: Prompts | None, embedded: float | None, scale: int) -> Callable[[], Denoiser]:
    def make() -> Denoiser:
        own = copy.deepcopy(network).float().requires_grad_(True)
        return Denoiser(own, diffusers_call=True, prompts=prompts, embedded_guidance=embedded, scale=scale)

    return make


def _at_guidance(network: nn.Module, prompts: Prompts | None, scale: int) -> AtGuidance:
    """Of a network that takes the guidance scale as an input: `predict` and `make_student` at a scale."""
    return lambda told: (_predict(network, prompts, told, scale), _student(network, prompts, told, scale))


def _embeds(network: Any) -> bool:
    """Whether the network takes the guidance scale as an input."""
    return bool(network.config.get("guidance_embeds")) or network.config.get("time_cond_proj_dim") is not None


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
    if channels != pipeline.vae.config.latent_channels:
        raise UnsupportedModel(
            f"the network takes {channels} channels and the autoencoder has {pipeline.vae.config.latent_channels}: "
            "it takes more than noise and a prompt (inpainting, editing), which is not supported"
        )
    return Latents(channels=channels, height=sides[0], width=sides[1])


def _decoder(vae: Any, scale: int) -> Decoder:
    config = vae.config
    if config.get("latents_mean") is not None or config.get("latents_std") is not None:
        raise UnsupportedModel("the autoencoder normalises its latents channel by channel, which is not supported")
    return Decoder(
        class_path=f"diffusers.{type(vae).__name__}",
        folder="vae",
        scale=scale,
        channels=config.out_channels,
        scaling_factor=float(config.get("scaling_factor") or 1.0),
        shift_factor=float(config.get("shift_factor") or 0.0),
    )


class _Encode:
    """Prompts -> tensors by the pipeline's tokenizers and text encoders, as its own ``encode_prompt`` does."""

    def __init__(self, pipeline: Any, tokenizers: Sequence[tuple[Any, Tokenizer]], encoders: TextEncoders) -> None:
        self.tokenizers, self.encoder, self.encoders = tokenizers, encoders, encoders.encoders

    def __call__(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        inputs = []
        device = next(self.encoder.parameters()).device
        for tokenizer, spec in self.tokenizers:
            texts = [prompt.lower().strip() if spec.lowercase else prompt for prompt in prompts]
            found = tokenizer(
                texts, padding="max_length", max_length=spec.max_length, truncation=True, return_tensors="pt"
            )
            inputs += [found.input_ids, *([found.attention_mask] if spec.mask else [])]
        outputs = self.encoder(*(ids.to(device) for ids in inputs))
        return dict(zip(self.encoder.names, outputs, strict=True))

    def eval(self) -> _Encode:
        self.encoder.eval()
        return self

    def requires_grad_(self, on: bool) -> _Encode:
        self.encoder.requires_grad_(on)
        return self


def _text(pipeline: Any, kind: _Kind) -> tuple[_Encode, Callable[[Prompts], TextCondition]]:
    """What encodes prompts, and what makes the manifest's description once there are prompts."""
    encoders, specs, tokenizers, described = [], [], [], []
    length = width = 0
    for place, (encoder_name, tokenizer_name, longest) in enumerate(kind.parts):
        encoder, tokenizer = getattr(pipeline, encoder_name), getattr(pipeline, tokenizer_name)
        most = longest if longest is not None else int(tokenizer.model_max_length) if tokenizer is not None else 0
        length += most if place != 1 else 0  # SD3: CLIP's two side by side, T5's after them
        if encoder is None or tokenizer is None:
            if encoder_name in kind.optional:
                continue
            raise UnsupportedModel(f"the pipeline has no {encoder_name} or {tokenizer_name}; load it whole")
        suffix = f"_{place + 1}" if place else ""
        spec = Tokenizer(
            file=f"{tokenizer_name}/tokenizer.json",
            input=f"input_ids{suffix}",
            mask="attention_mask" if kind.masked else None,
            max_length=most,
            pad_token_id=tokenizer.pad_token_id or 0,
            lowercase=kind.masked,
        )
        encoders.append(encoder)
        specs.append(spec)
        tokenizers.append((tokenizer, spec))
        described.append(TextEncoder(class_path=f"transformers.{type(encoder).__name__}", folder=encoder_name))
    name = type(pipeline).__name__
    if LAYOUTS[name][0] == "sd3":
        width = pipeline.transformer.config.joint_attention_dim
    stack = TextEncoders(encoders, name, (length, width))

    def condition(prompts: Prompts) -> TextCondition:
        tensors = [
            TensorSpec(name=tensor, dtype="float32", shape=["batch", *shape])
            for tensor, shape in prompts.shapes().items()
        ]
        return TextCondition(
            kind="text", tokenizers=specs, encoders=described, tensors=tensors, examples=prompts.examples(EXAMPLES)
        )

    return _Encode(pipeline, tokenizers, stack), condition


EXAMPLES = 16  # of the prompts, in the manifest: what demo and golden outputs draw
