"""The parts of ``redif.json``: one model for each record, and the types that their fields share."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, WithJsonSchema, model_validator

from redif_sdk.artifact.paths import check_kind, check_name
from redif_sdk.errors import InvalidRequest

__all__ = [
    "STRICT",
    "Budget",
    "Component",
    "Condition",
    "Decoder",
    "Distillation",
    "FileEntry",
    "Golden",
    "Graph",
    "Guidance",
    "Latents",
    "Network",
    "Postprocess",
    "Precision",
    "TeacherInfo",
    "TensorSpec",
    "Text",
    "TextCondition",
    "TextEncoder",
    "Tokenizer",
    "calls_per_step",
]

LARGEST_EXTENT = 65536
_LARGEST_COUNT = (1 << 63) - 1

#: What a terminal, an editor or a page takes for a command, or for another order of the letters.
_UNPRINTABLE = re.compile(
    "[\x00-\x1f\x7f-\x9f\xad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff"
    "\ufeff\ufff9-\uffff\U000e0000-\U000e0fff]"
)


def _check_text(text: str) -> str:
    if found := _UNPRINTABLE.search(text):
        raise ValueError(f"it holds the character U+{ord(found[0]):04X}, which no name or text may")
    return text


_PATH = {"type": "string", "pattern": "^[A-Za-z0-9_][A-Za-z0-9_.+=@-]*(/[A-Za-z0-9_][A-Za-z0-9_.+=@-]*){0,7}$"}
SafePath = Annotated[str, AfterValidator(check_kind), WithJsonSchema(_PATH)]
SafeFolder = Annotated[str, AfterValidator(check_name), WithJsonSchema(_PATH)]
Text = Annotated[str, Field(max_length=1000), AfterValidator(_check_text)]
Positive = Annotated[int, Field(ge=1, le=_LARGEST_COUNT)]
Extent = Annotated[int, Field(ge=1, le=LARGEST_EXTENT)]
Count = Annotated[int, Field(ge=0, le=_LARGEST_COUNT)]
Precision = Literal["fp32", "fp16", "bf16", "int8"]
Component = Literal["text_encoder", "denoiser", "decoder", "generator"]


#: How every model of ``redif.json`` reads: an unknown field, infinity or NaN is an error.
STRICT = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)


class _Part(BaseModel):
    model_config = STRICT


class TeacherInfo(_Part):
    """Where the student was distilled from, and how its teacher samples."""

    id: Text
    revision: Text | None = None
    hash: Text | None = None  # of the teacher's weights
    num_inference_steps: Positive
    guidance_scale: float = 1.0


class Budget(_Part):
    """What the distillation cost. One network call is one forward-equivalent, a gradient sample three."""

    teacher_calls: Count = 0
    student_calls: Count = 0
    gradient_samples: Count = 0
    forward_equivalents: float = 0.0
    updates: Count = 0
    seconds: float = 0.0


class Distillation(_Part):
    """How the student was made."""

    method: Text
    rewards: Annotated[list[Text], Field(max_length=100)] = []
    seed: int
    budget: Budget
    versions: dict[Text, Text] = {}  # package -> version


class Latents(_Part):
    """The network's own input, one image: (channels, height, width). `dynamic` names the axes that may differ.

    They differ by whole multiples of `multiple`: a network that halves its input n times needs 2^n. `largest`: the most
    that either may be, for networks whose table of places ends.
    """

    channels: Extent
    height: Extent
    width: Extent
    dynamic: list[Literal["height", "width"]] = []
    multiple: Extent = 1
    largest: Extent | None = None

    def size(self, height: int | None, width: int | None, scale: int = 1) -> tuple[int, int]:
        """(height, width) of latents for a picture of that size, `scale` pixels a latent; None: the student's own.

        Raises InvalidRequest, naming what there could be.
        """
        return self._extent("height", height, scale), self._extent("width", width, scale)

    def _extent(self, axis: Literal["height", "width"], pixels: int | None, scale: int) -> int:
        own: int = getattr(self, axis)
        if pixels is None or pixels == own * scale:
            return own
        if axis not in self.dynamic:
            raise InvalidRequest(f"{axis} is {pixels}; this student makes pictures of {axis} {own * scale} alone")
        unit, most = self.multiple * scale, (self.largest or LARGEST_EXTENT) * scale
        if pixels < unit or pixels % unit or pixels > most:
            raise InvalidRequest(f"{axis} is {pixels}; give a multiple of {unit} up to {most}")
        return pixels // scale


class TensorSpec(_Part):
    """A graph's input or output; an axis is a number, or the name of what it runs over."""

    name: Text
    dtype: Text
    shape: Annotated[list[Count | Text], Field(max_length=16)]


class Condition(_Part):
    """What an image is asked for by: a class from 0 to ``num_classes - 1``, which may have a name."""

    kind: Literal["class"] = "class"
    num_classes: Annotated[int, Field(ge=1, le=1_000_000)]
    class_names: Annotated[list[Text], Field(max_length=100_000)] | None = None

    @model_validator(mode="after")
    def _one_name_a_class(self) -> Condition:
        if self.class_names is not None and len(self.class_names) != self.num_classes:
            raise ValueError(f"{len(self.class_names)} class names for {self.num_classes} classes")
        if self.class_names is not None and len(set(self.class_names)) != self.num_classes:
            raise ValueError("two classes have the same name")
        return self


class Tokenizer(_Part):
    """Prompts to token ids: Hugging Face's ``tokenizer.json``, and how ids become the text encoder's input `input`.

    A prompt has `max_length` ids: longer ones are cut (the last id stays the end's), shorter ones are padded with
    `pad_token_id`. `mask` names the input that is 1 at tokens and 0 at padding, of encoders that take one.
    With `lowercase` prompts are stripped and lower-cased first, as PixArt's pipeline does.
    """

    file: SafePath
    input: Text = "input_ids"
    mask: Text | None = None
    max_length: Extent
    pad_token_id: Count
    lowercase: bool = False


class TextEncoder(_Part):
    """The class that loads a text encoder, and its folder; a deployer never imports it."""

    class_path: Text  # e.g. "transformers.CLIPTextModel"
    folder: SafeFolder


class TextCondition(_Part):
    """What an image is asked for by: a prompt. The text encoder's graph makes `tensors` of the tokenizers' ids, and
    the denoiser and the generator take them by name."""

    kind: Literal["text"]
    tokenizers: Annotated[list[Tokenizer], Field(min_length=1, max_length=4)]
    encoders: Annotated[list[TextEncoder], Field(min_length=1, max_length=4)]
    tensors: Annotated[list[TensorSpec], Field(min_length=1, max_length=8)]  # their first axis is "batch"
    examples: Annotated[list[Text], Field(min_length=1, max_length=100)]  # prompts that it can draw

    @model_validator(mode="after")
    def _named_once(self) -> TextCondition:
        names = [tensor.name for tensor in self.tensors]
        inputs = [name for part in self.tokenizers for name in (part.input, part.mask) if name is not None]
        for kind in (names, inputs):
            if len(set(kind)) != len(kind):
                raise ValueError(f"a tensor is named twice: {', '.join(kind)}")
        if any(not tensor.shape or tensor.shape[0] != "batch" for tensor in self.tensors):
            raise ValueError("a tensor that prompts become has no batch axis first")
        return self


class Decoder(_Part):
    """The network that turns latents into pictures, `scale` pixels a latent on each side: an autoencoder's decoder,
    given latents / `scaling_factor` + `shift_factor`."""

    class_path: Text  # e.g. "diffusers.AutoencoderKL"
    folder: SafeFolder
    scale: Extent
    channels: Extent = 3
    scaling_factor: float = 1.0
    shift_factor: float = 0.0


class Postprocess(_Part):
    """Latents to pictures: torch's pixel shuffle or a decoder, then `value_range` to 0..255, clipped and rounded half
    to even."""

    pixel_shuffle: Annotated[int, Field(ge=1, le=256)] = 1
    value_range: tuple[float, float] = (-1.0, 1.0)
    decoder: Decoder | None = None

    @property
    def scale(self) -> int:
        """Pixels a latent, on each side."""
        return self.decoder.scale if self.decoder else self.pixel_shuffle

    def channels(self, latents: int) -> int:
        """Channels of the picture of so many channels of latents."""
        return self.decoder.channels if self.decoder else latents // self.pixel_shuffle**2

    @model_validator(mode="after")
    def _rising(self) -> Postprocess:
        if self.value_range[1] <= self.value_range[0]:
            raise ValueError("value_range must rise")
        if self.decoder is not None and self.pixel_shuffle != 1:
            raise ValueError("latents are either decoded or pixel-shuffled")
        return self


class Guidance(_Part):
    """Classifier-free guidance (Ho and Salimans 2022, eq. 6 with w + 1 = scale): f = u + scale (c - u).

    u is the network's output for the class ``null_class``, c for the asked one: two network calls a step. Where
    prompts ask, u is that of ``null_prompt``, or with ``null_zeros`` of zeros in place of what a prompt becomes.
    """

    scale: Annotated[float, Field(gt=0)]
    null_class: Count = 0
    null_prompt: Text | None = None
    null_zeros: bool = False

    def mix(self, asked: Any, unasked: Any) -> Any:
        """f of the network's two outputs, arrays or tensors of one shape."""
        return unasked + self.scale * (asked - unasked)


def calls_per_step(guidance: Guidance | None) -> int:
    """Network calls on one image for each step."""
    return 2 if guidance else 1


class Network(_Part):
    """The class that loads the network for training, and its folder. A deployer never imports it.

    ``guidance``: the graphs call the network twice a step and mix the two (an imported guided pipeline; distilled
    students need none). ``embedded_guidance``: the scale that a network takes as an input of its own (Flux, LCM).
    ``pipeline``: the class of diffusers that loads the folder, where it is more than network and scheduler.
    """

    class_path: Text  # e.g. "diffusers.UNet2DModel"
    folder: SafeFolder
    guidance: Guidance | None = None
    embedded_guidance: float | None = None
    pipeline: Text | None = None  # e.g. "StableDiffusionPipeline"

    @property
    def calls_per_step(self) -> int:
        return calls_per_step(self.guidance)


class Graph(_Part):
    """One compiled graph. `data` names the files that hold its weights where they do not fit into `file` itself."""

    component: Component
    precision: Precision
    file: SafePath
    data: Annotated[list[SafePath], Field(max_length=64)] = []
    opset: Positive
    inputs: Annotated[list[TensorSpec], Field(max_length=64)]
    outputs: Annotated[list[TensorSpec], Field(max_length=64)]


class Golden(_Part):
    """Inputs and torch outputs recorded at export (``.npz``; the arrays are described in `redif_sdk.export.golden`).

    `height` and `width` are of its latents; None: the student's own.
    """

    file: SafePath
    num_inference_steps: Positive
    batch: Positive
    height: Extent | None = None
    width: Extent | None = None


class FileEntry(_Part):
    path: SafePath
    bytes: Count
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
