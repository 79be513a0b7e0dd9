"""Torch networks to ONNX graphs: the denoiser, the text encoders, the decoder.

Inputs, outputs and precisions of each graph are defined here. `networks.py` loads the networks, `trace.py` calls
torch's exporter, `fuse.py` adds the sampling loop, `store.py` writes files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from redif_sdk.artifact.manifest import GUIDANCE_SCALE, Manifest
from redif_sdk.artifact.records import TensorSpec
from redif_sdk.errors import UnsupportedModel
from redif_sdk.export.conditions import ExampleConditions
from redif_sdk.export.guidance import add_guidance
from redif_sdk.export.networks import load_network
from redif_sdk.export.precision import DTYPES, int8_model
from redif_sdk.export.trace import trace_graph
from redif_sdk.export.weight_only import WEIGHT_ONLY, weight_only
from redif_sdk.export.weights import LazyModel
from redif_sdk.models.denoiser import tensor_of
from redif_sdk.models.families import (
    PAINTING,
    LatentDecoder,
    LatentEncoder,
    TextEncoders,
    call_network,
    is_supported,
)
from redif_sdk.models.hollow import hollow
from redif_sdk.runtimes.guided import NULL, is_guiding

__all__ = [
    "GraphDenoiser",
    "decoder_model",
    "denoiser_model",
    "largest_extent",
    "load_network",
    "part_precision",
    "size_multiple",
    "text_encoder_model",
    "traced_denoiser",
]


class GraphDenoiser(torch.nn.Module):
    """A network with one signature: sample (B, C, H, W), timestep (B,), its conditions (B, ...) -> f (B, C, H, W).

    Args:
        network: A network of a known family (`families.call_network`). Any other is called as
            ``network(sample, timestep, NAME=...)`` with each of `conditions` by its name, and returns a tensor, a
            tuple, or an object with ``.sample``.
        channels: C. Networks that learn their variance return 2C channels, of which f is the first C.
        dtype: Of the network's weights; inputs and f are float32 in any case.
        conditions: The names of the conditions.
        guidance: How a call may choose its guidance (`Manifest.guidance_at_run_time`).
        scale: Pixels a latent on each side.
        by_place: The network is called as ``network(sample, timestep, condition)`` with the one condition, or None.
        by_name: And that condition is a dictionary of all of them by name.
    """

    def __init__(
        self,
        network: torch.nn.Module,
        channels: int,
        dtype: torch.dtype = torch.float32,
        *,
        conditions: Sequence[str] = ("class_labels",),
        guidance: Literal["classifier-free", "embedded"] | None = None,
        scale: int = 1,
        by_place: bool = False,
        by_name: bool = False,
    ) -> None:
        super().__init__()
        self.network = network
        self.by_place = by_place
        self.by_name = by_name
        self.channels = channels
        self.guidance = guidance
        self.dtype = dtype
        self.conditions = tuple(conditions)
        self.scale = scale

    @classmethod
    def of(cls, network: torch.nn.Module, manifest: Manifest) -> GraphDenoiser:
        """The denoiser of a student."""
        return cls(
            network,
            manifest.latents.channels,
            conditions=[spec.name for spec in (*manifest.condition_tensors, *manifest.image_tensors)],
            guidance=manifest.guidance_at_run_time,
            scale=manifest.postprocess.scale,
            by_place=manifest.network.is_own,
            by_name=manifest.arrays is not None,
        )

    def bare(self, network: torch.nn.Module, dtype: torch.dtype) -> GraphDenoiser:
        """The same module around another copy of the network."""
        return GraphDenoiser(
            network,
            self.channels,
            dtype=dtype,
            conditions=self.conditions,
            guidance=self.guidance,
            scale=self.scale,
            by_place=self.by_place,
            by_name=self.by_name,
        )

    def forward(self, sample: Tensor, timestep: Tensor, *conditions: Tensor) -> Tensor:
        """f, float32 (B, C, H, W), of one call; `conditions` in the order of their names, then an embedded scale (B,).

        Classifier-free guidance is added to the graph (`guidance.py`); in torch, `guided` has it.
        """
        _check_batch(sample, timestep, *conditions)
        return self._call(sample, timestep, dict(zip((*self.conditions, GUIDANCE_SCALE), conditions, strict=False)))

    def guided(self, sample: Tensor, timestep: Tensor, given: Mapping[str, Tensor]) -> Tensor:
        """f of per-image conditions by name, as `redif_sdk.runtimes.guided` describes them: the graph's reference."""
        nulls = {name.removeprefix(NULL): value for name, value in given.items() if name.startswith(NULL)}
        own = {name: value for name, value in given.items() if not name.startswith(NULL)}
        if self.guidance != "classifier-free":
            return self._call(sample, timestep, own)
        scale = own.pop(GUIDANCE_SCALE).view(-1, 1, 1, 1)
        asked = self._call(sample, timestep, own)
        if not nulls:
            return asked
        unasked = self._call(sample, timestep, {**nulls, **{name: own[name] for name in PAINTING if name in own}})
        return torch.where(is_guiding(scale), unasked + scale * (asked - unasked), asked)

    def _call(self, sample: Tensor, timestep: Tensor, given: dict[str, Tensor]) -> Tensor:
        x = sample.to(self.dtype)
        scales = given.pop(GUIDANCE_SCALE, None)
        if self.by_place:
            cast = {name: v.to(self.dtype) if v.is_floating_point() else v for name, v in given.items()}
            condition = cast if self.by_name else next(iter(cast.values()), None)
            return tensor_of(self.network(x, timestep, condition))[:, : self.channels].float()
        if is_supported(self.network):
            return call_network(self.network, x, timestep, given, scales, self.scale).float()
        given = {name: v.to(self.dtype) if v.is_floating_point() else v for name, v in given.items()}
        return tensor_of(self.network(x, timestep, **given))[:, : self.channels].float()


class _InDtype(torch.nn.Module):
    """A module with weights in another dtype, whose inputs and outputs are float32 and integers."""

    def __init__(self, module: torch.nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.module = module
        self.dtype = dtype

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        _check_batch(*inputs)
        given = (value.to(self.dtype) if value.is_floating_point() else value for value in inputs)
        outputs = self.module(*given)
        return tuple(value.float() for value in ((outputs,) if isinstance(outputs, Tensor) else outputs))


def _check_batch(first: Tensor, *others: Tensor) -> None:
    """Tell torch.export that all have one batch size; it would find out too late by itself."""
    for other in others:
        torch._check(other.shape[0] == first.shape[0])


# ---------------------------------------------------------------------- the three graphs


def denoiser_model(
    denoiser: GraphDenoiser, manifest: Manifest, precision: str = "fp32", conditions: ExampleConditions | None = None
) -> LazyModel:
    """The denoiser's graph with a free batch axis: sample, timestep and the conditions by name -> f.

    Args:
        denoiser: The denoiser in float32.
        manifest: The student's manifest.
        precision: Of `PRECISIONS`. Floating-point inputs and f are float32 in each.
        conditions: Conditions of the images on which int8 is calibrated; required for int8.

    Raises:
        ExportError: torch's exporter or the quantiser failed.
    """
    if precision == "int8":
        assert conditions is not None
        return LazyModel(int8_model(denoiser_model(denoiser, manifest).filled(), manifest, conditions))
    if precision in WEIGHT_ONLY:
        return weight_only(denoiser_model(denoiser, manifest), precision)
    model = traced_denoiser(denoiser, manifest, precision)
    if denoiser.guidance == "classifier-free":
        add_guidance(model.proto, manifest.graph_conditions)
    return model


def traced_denoiser(
    denoiser: GraphDenoiser,
    manifest: Manifest,
    precision: str,
    more: Sequence[TensorSpec] = (),
    around: Callable[[GraphDenoiser], torch.nn.Module] = lambda denoiser: denoiser,
) -> LazyModel:
    """The graph of one call, in a precision of floating-point weights.

    Args:
        denoiser: The denoiser in float32.
        manifest: The student's manifest.
        precision: Of the weights.
        more: Further inputs.
        around: What takes these.
    """
    network = denoiser.bare(_in_dtype(denoiser.network, DTYPES[precision]), DTYPES[precision])
    x = _state(manifest, "sample", manifest.latents.channels)
    times = TensorSpec(name="timestep", dtype="float32", shape=["batch"])
    inputs = [x, times, *manifest.condition_inputs, *manifest.image_tensors]
    if denoiser.guidance == "embedded":
        inputs.append(manifest.graph_conditions[-1])
    outputs = [x.model_copy(update={"name": "f"})]
    model = trace_graph(around(network), manifest, [*inputs, *more], outputs, precision)
    model.proto.graph.name = "denoiser"
    return model


def text_encoder_model(encoders: TextEncoders, manifest: Manifest, precision: str = "fp32") -> LazyModel:
    """The text encoders' graph with a free batch axis: token ids and masks -> encoded prompts, float32."""
    if precision in WEIGHT_ONLY:
        return weight_only(text_encoder_model(encoders, manifest), precision)
    assert manifest.text is not None
    names = [
        (name, part.max_length)
        for part in manifest.text.tokenizers
        for name in (part.input, part.mask)
        if name is not None
    ]
    inputs = [TensorSpec(name=name, dtype="int64", shape=["batch", length]) for name, length in names]
    module = _InDtype(_in_dtype(encoders, DTYPES[precision]), DTYPES[precision])
    model = trace_graph(module, manifest, inputs, manifest.text.tensors, precision)
    model.proto.graph.name = "text_encoder"
    return model


def decoder_model(decoder: LatentDecoder, manifest: Manifest, precision: str = "fp32") -> LazyModel:
    """The decoder's graph with a free batch axis: latents -> sample in the manifest's value range, both float32."""
    latents = _state(manifest, "latents", manifest.latents.channels)
    return _autoencoder_model("decoder", decoder, manifest, [latents, _image(manifest, "sample")], precision)


def encoder_model(encoder: LatentEncoder, manifest: Manifest, precision: str = "fp32") -> LazyModel:
    """The encoder's graph with a free batch axis: image, in the manifest's value range, -> latents, both float32."""
    latents = _state(manifest, "latents", manifest.latents.channels)
    return _autoencoder_model("encoder", encoder, manifest, [_image(manifest, "image"), latents], precision)


def _autoencoder_model(
    name: str, half: torch.nn.Module, manifest: Manifest, sides: Sequence[TensorSpec], precision: str
) -> LazyModel:
    """The graph of one half of an autoencoder, from the first of ``sides`` to the second."""
    if precision in WEIGHT_ONLY:
        return weight_only(_autoencoder_model(name, half, manifest, sides, "fp32"), precision)
    module = _InDtype(_in_dtype(half, DTYPES[precision]), DTYPES[precision])
    model = trace_graph(module, manifest, sides[:1], sides[1:], precision)
    model.proto.graph.name = name
    return model


def part_precision(component: str, precision: str, manifest: Manifest, decoder: LatentDecoder | None = None) -> str:
    """The precision of a component in a student of `precision`.

    Only the denoiser is int8; beside it, its graph with negative prompts, text encoders, decoder and encoder stay fp32.
    Only the denoiser's weights are int4; those of the others are int8. SDXL's decoder and encoder stay fp32 in fp16
    students too, where they overflow unless their configuration says otherwise (``force_upcast``, which diffusers reads
    in SDXL's pipelines only).
    """
    if component == "denoiser" or (component == "nag" and precision != "int8"):
        return precision
    if precision in WEIGHT_ONLY:
        return "int8wo"
    xl = (manifest.network.pipeline or "").startswith("StableDiffusionXL")
    config: Any = getattr(decoder.autoencoder, "config", {}) if decoder is not None else {}
    overflows = component in ("decoder", "encoder") and xl and bool(config.get("force_upcast"))
    return "fp32" if precision == "int8" or (precision == "fp16" and overflows) else precision


def _state(manifest: Manifest, name: str, channels: int) -> TensorSpec:
    """The latents as a graph's input; free axes have names."""
    latents = manifest.latents
    sides = [axis if axis in latents.dynamic else getattr(latents, axis) for axis in ("height", "width")]
    return TensorSpec(name=name, dtype="float32", shape=["batch", channels, *sides])


def _image(manifest: Manifest, name: str) -> TensorSpec:
    """The images of the latents as a graph's input or output."""
    scale, channels = manifest.postprocess.scale, manifest.postprocess.channels(manifest.latents.channels)
    latents = _state(manifest, name, manifest.latents.channels)
    sides = [f"image_{side}" if isinstance(side, str) else side * scale for side in latents.shape[2:]]
    return TensorSpec(name=name, dtype="float32", shape=["batch", channels, *sides])


def _in_dtype(module: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """The module in `dtype`, to be traced: its weights are read when the graph is written.

    Weights that transformers keeps in float32 beside float16 (T5's ``wo``, which overflows) stay in float32.
    """
    in_float32 = set(_kept_in_float32(module)) if dtype == torch.float16 else ()
    return hollow(module, dtype, in_float32=in_float32)


def _kept_in_float32(module: torch.nn.Module) -> Iterator[str]:
    for prefix, part in module.named_modules():
        kept = set(getattr(part, "_keep_in_fp32_modules", None) or ())
        for name, _ in part.named_parameters() if kept else ():
            if kept & set(name.split(".")):
                yield f"{prefix}.{name}" if prefix else name


# ---------------------------------------------------------------------- sizes

#: Transformers whose patch positions fit several sizes, with the config field of the patch size (None: 2).
_PATCHES = {"SD3Transformer2DModel": "patch_size", "FluxTransformer2DModel": None}


def largest_extent(network: torch.nn.Module) -> int | None:
    """The most rows or columns of the network's input, or None if there is no limit. Stable Diffusion 3 has a table of
    patch positions, which it crops to the image."""
    config: Any = getattr(network, "config", None)
    if any(kind.__name__ == "SD3Transformer2DModel" for kind in type(network).__mro__):
        return int(config["pos_embed_max_size"]) * int(config["patch_size"])
    return None


def size_multiple(network: torch.nn.Module) -> int:
    """The number that height and width of the network's input must be multiples of: 2^(times it halves them), or the
    side of a patch.

    Raises:
        UnsupportedModel: That is not known for the network, or its positions are made for one size.
    """
    blocks = getattr(network, "down_blocks", None)
    if blocks is not None:
        return 2 ** sum(getattr(block, "downsamplers", None) is not None for block in blocks)
    config: Any = getattr(network, "config", None)
    for kind in type(network).__mro__:
        if kind.__name__ in _PATCHES:
            field = _PATCHES[kind.__name__]
            return 2 if field is None else int(config[field])
    if is_supported(network):
        raise UnsupportedModel(
            f"{type(network).__name__} has patch positions for one size only; export it without sizes"
        )
    raise UnsupportedModel(
        f"{type(network).__name__} has no down_blocks, so the sizes that it takes are not known; "
        f"set latents.multiple in the manifest"
    )
