"""Prompts -> what the network takes of them, by a pipeline's tokenizers and text encoders as in its ``encode_prompt``.

Training tokenises with transformers, deployment with `tokenizers` alone (`redif_sdk.tokenizer`). Both must give equal
ids, so that is tried here on prompts of many kinds, and a tokenizer with which they differ is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from redif_sdk.artifact.records import TensorSpec, TextCondition, TextEncoder, Tokenizer
from redif_sdk.distill.teachers.config_keys import check_text_config
from redif_sdk.distill.teachers.weights import check_weights
from redif_sdk.errors import UnsupportedModel
from redif_sdk.models.families import ENCODERS, LAYOUTS, TextEncoders
from redif_sdk.models.hollow import computing
from redif_sdk.models.prompts import Prompts
from redif_sdk.tokenizer import prepared, token_ids

__all__ = ["Encode", "Part", "text_of"]

EXAMPLES = 16  # of the prompts, in the manifest: what demo and golden outputs draw
LONGEST_LENGTH = 1 << 20  # tokens; transformers writes 10^30 where a tokenizer has no limit

#: Prompts on which both tokenizers must agree.
PROBES = (
    "",
    "a",
    "A Red HEART, with   spaces\tand\nlines ",
    "naïve café, 東京, кошка, 😀, l'été",
    "numbers 12345 and #1.5%",
    "the cat and the dog in the house " * 100,
)

#: (text encoder, tokenizer, longest prompt) by attributes; None: as long as the tokenizer and the encoder say.
Part = tuple[str, str, int | None]


class Encode:
    """Prompts -> tensors by the pipeline's tokenizers and text encoders."""

    def __init__(self, tokenizers: Sequence[tuple[Any, Tokenizer]], encoders: TextEncoders) -> None:
        self.tokenizers, self.encoder, self.encoders = tokenizers, encoders, encoders.encoders

    def __call__(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        inputs = []
        device = next(self.encoder.parameters()).device
        for tokenizer, spec in self.tokenizers:
            ids, mask = _tokenised(tokenizer, spec, prompts)
            inputs += [ids, *([mask] if spec.mask else [])]
        outputs = self.encoder(*(ids.to(device) for ids in inputs))
        return dict(zip(self.encoder.names, outputs, strict=True))

    def eval(self) -> Encode:
        self.encoder.eval()
        return self

    def requires_grad_(self, on: bool) -> Encode:
        self.encoder.requires_grad_(on)
        return self


def text_of(
    pipeline: Any, parts: Sequence[Part], *, optional: Sequence[str] = (), masked: bool = False
) -> tuple[Encode, Callable[[Prompts], TextCondition]]:
    """What encodes prompts, and what makes the manifest's description once there are prompts.

    Args:
        pipeline: diffusers' own, of a class in `LAYOUTS`.
        parts: its text encoders and tokenizers, in the pipeline's order.
        optional: text encoders that may be left out.
        masked: the text encoder takes a mask, and prompts are lower-cased.

    Raises:
        UnsupportedModel: a part is missing, of another class, or has a setting that is not supported.
        InvalidRequest: a text encoder has no weights.
    """
    encoders, specs, tokenizers, described = [], [], [], []
    name = type(pipeline).__name__
    length = width = 0
    for place, (encoder_name, tokenizer_name, longest) in enumerate(parts):
        encoder, tokenizer = getattr(pipeline, encoder_name), getattr(pipeline, tokenizer_name)
        if encoder is None or tokenizer is None:
            if encoder_name in optional and encoder is None:
                length += longest or 0
                continue
            raise UnsupportedModel(f"the pipeline has no {encoder_name} or {tokenizer_name}; load it whole")
        _check_encoder(encoder, encoder_name, LAYOUTS[name][0])
        most = longest if longest is not None else _own_length(encoder, tokenizer, tokenizer_name)
        length += most if place != 1 else 0  # SD3: CLIP's two side by side, T5's after them
        suffix = f"_{place + 1}" if place else ""
        spec = Tokenizer(
            file=f"{tokenizer_name}/tokenizer.json",
            input=f"input_ids{suffix}",
            mask="attention_mask" if masked else None,
            max_length=most,
            pad_token_id=_pad(tokenizer, tokenizer_name),
            lowercase=masked,
        )
        _check_vocabulary(tokenizer, tokenizer_name, encoder, encoder_name)
        _check_tokenizer(tokenizer, spec, tokenizer_name)
        encoders.append(computing(encoder))
        specs.append(spec)
        tokenizers.append((tokenizer, spec))
        described.append(TextEncoder(class_path=f"transformers.{type(encoder).__name__}", folder=encoder_name))
    _check_lengths(LAYOUTS[name][0], specs)
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

    return Encode(tokenizers, stack), condition


def _check_encoder(encoder: Any, name: str, layout: str) -> None:
    """Raise unless a text encoder is of a known class, whole, and has no setting that only some loaders honour."""
    kind = type(encoder).__name__
    if kind not in ENCODERS:
        raise UnsupportedModel(f"the pipeline's {name} is a {kind}, which is not supported; use {', '.join(ENCODERS)}")
    check_weights(encoder, f"the pipeline's {name}")
    check_text_config(encoder.config, name, layout)


def _own_length(encoder: Any, tokenizer: Any, name: str) -> int:
    """The longest prompt in tokens: the tokenizer's limit, or the text encoder's own where that is lower."""
    limits = [getattr(tokenizer, "model_max_length", None), getattr(encoder.config, "max_position_embeddings", None)]
    known = [int(limit) for limit in limits if isinstance(limit, int | float) and 0 < limit < LONGEST_LENGTH]
    if not known:
        raise UnsupportedModel(f"{name} has no model_max_length; set it in tokenizer_config.json")
    return min(known)


def _pad(tokenizer: Any, name: str) -> int:
    if tokenizer.pad_token_id is None:
        raise UnsupportedModel(f"the pipeline's {name} has no pad token; set pad_token in tokenizer_config.json")
    return int(tokenizer.pad_token_id)


def _check_vocabulary(tokenizer: Any, tokenizer_name: str, encoder: Any, encoder_name: str) -> None:
    """Raise UnsupportedModel where a token has no embedding, so that some prompts could not be encoded."""
    there, last = encoder.get_input_embeddings().num_embeddings, max(tokenizer.get_vocab().values())
    if last >= there:
        raise UnsupportedModel(
            f"the pipeline's {tokenizer_name} has token ids up to {last} and the {encoder_name} {there} embeddings; "
            "use the tokenizer that belongs to it, or resize_token_embeddings"
        )


def _check_lengths(layout: str, specs: Sequence[Tokenizer]) -> None:
    """Raise UnsupportedModel where two encoders' states lie side by side, and their prompts are not equally long."""
    if layout in ("sdxl", "sd3") and len({spec.max_length for spec in specs[:2]}) > 1:
        lengths = ", ".join(f"{spec.file.partition('/')[0]} {spec.max_length}" for spec in specs[:2])
        raise UnsupportedModel(f"the tokenizers have different limits ({lengths}); set model_max_length to one number")


def _tokenised(tokenizer: Any, spec: Tokenizer, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """(B, length) int64 ids and mask, as transformers has them."""
    texts = [prompt.lower().strip() if spec.lowercase else prompt for prompt in prompts]
    found = tokenizer(
        texts,
        padding="max_length",
        max_length=spec.max_length,
        truncation=True,
        return_attention_mask=True,
        return_tensors="pt",
    )
    return found.input_ids, found.attention_mask


def _check_tokenizer(tokenizer: Any, spec: Tokenizer, name: str) -> None:
    """Raise UnsupportedModel where deployment would not give the ids, and the mask, that transformers gives."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UnsupportedModel(f"the pipeline's {name} is no fast tokenizer, so it has no tokenizer.json")
    probes = [*PROBES, *(f"a {token} b" for token in tokenizer.all_special_tokens[:8])]
    deployed = prepared(backend.to_str(), spec, f"the pipeline's {name}")
    for probe in probes:
        ids, mask = _tokenised(tokenizer, spec, [probe])
        ours, our_mask, _ = token_ids(deployed, spec, probe)
        if ids[0].tolist() != ours.tolist() or (spec.mask and mask[0].tolist() != our_mask.tolist()):
            raise UnsupportedModel(
                f"the pipeline's {name} has a setting that tokenizer.json does not carry (padding_side is "
                f"{tokenizer.padding_side}, truncation_side {tokenizer.truncation_side}), so a student would read "
                f"{probe[:20]!r} differently; set both to right, and save the tokenizer again"
            )
