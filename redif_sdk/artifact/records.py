"""The parts of ``redif.json``: one model for each record, and the types that their fields share."""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, WithJsonSchema, model_validator

from redif_sdk.artifact.paths import check_kind, check_name
from redif_sdk.errors import InvalidRequest

__all__ = [
    "LONGEST_PROMPT",
    "MOST_CONDITIONS",
    "STRICT",
    "ArrayCondition",
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
    "is_condition_name",
    "is_plain_text",
]

LONGEST_PROMPT = 10_000  # characters
MOST_CONDITIONS = 8  # arrays that a student is conditioned on
LARGEST_CONDITION = 1 << 24  # values of one of them for an image

#: Other inputs and outputs of a student's graphs, and arrays of its golden files.
_TAKEN = {"sample", "timestep", "f", "noise", "table", "init_scale", "images", "guidance_scale", "guidance_rows"}
_TAKEN |= {"null_rows", "nag_scale", "x", "rows", "seeds", "prompts", "latents", "encoded"}
_CONDITION = re.compile("[A-Za-z][A-Za-z0-9_]{0,59}")

LARGEST_EXTENT = 65536
_LARGEST_COUNT = (1 << 63) - 1

#: Characters that a terminal, an editor or a page may take for a command or for another order of the text.
_UNPRINTABLE = re.compile(
    "[\x00-\x1f\x7f-\x9f\xad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff"
    "\ufeff\ufff9-\uffff\U000e0000-\U000e0fff]"
)


def is_plain_text(text: str) -> bool:
    """Whether names and texts of a manifest may hold `text`."""
    return _UNPRINTABLE.search(text) is None


def is_condition_name(name: str) -> bool:
    """Whether an array that a student is conditioned on may have this name: no other input of its graphs has it."""
    return _CONDITION.fullmatch(name) is not None and name not in _TAKEN


def _check_text(text: str) -> str:
    if found := _UNPRINTABLE.search(text):
        raise ValueError(f"it holds the character U+{ord(found[0]):04X}, which is not allowed in names and texts")
    return text


_PATH = {"type": "string", "pattern": "^[A-Za-z0-9_][A-Za-z0-9_.+=@-]*(/[A-Za-z0-9_][A-Za-z0-9_.+=@-]*){0,7}$"}
SafePath = Annotated[str, AfterValidator(check_kind), WithJsonSchema(_PATH)]
SafeFolder = Annotated[str, AfterValidator(check_name), WithJsonSchema(_PATH)]
Text = Annotated[str, Field(max_length=1000), AfterValidator(_check_text)]
Prompt = Annotated[str, Field(max_length=LONGEST_PROMPT), AfterValidator(_check_text)]
Positive = Annotated[int, Field(ge=1, le=_LARGEST_COUNT)]
Extent = Annotated[int, Field(ge=1, le=LARGEST_EXTENT)]
Count = Annotated[int, Field(ge=0, le=_LARGEST_COUNT)]
Precision = Literal["fp32", "fp16", "bf16", "int8", "int8wo", "int4wo"]
Component = Literal["text_encoder", "denoiser", "decoder", "encoder", "generator", "nag"]


#: How every model of ``redif.json`` reads: an unknown field, infinity or NaN is an error.
STRICT = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)


class _Part(BaseModel):
    model_config = STRICT


class TeacherInfo(_Part):
    """The teacher that the student was distilled from, and how it samples."""

    id: Text
    revision: Text | None = None
    hash: Text | None = None  # of the teacher's weights
    num_inference_steps: Positive
    guidance_scale: float = 1.0


class Budget(_Part):
    """The cost of the distillation. One network call is one forward-equivalent, a gradient sample three."""

    teacher_calls: Count = 0
    student_calls: Count = 0
    gradient_samples: Count = 0
    forward_equivalents: float = 0.0
    updates: Count = 0
    seconds: float = 0.0


class CheckFigures(_Part):
    """How the student stood after ``update`` updates (0: untrained): its error, and a reward that stays the same."""

    update: Count
    error: Annotated[float, Field(ge=0)]
    reward: float | None = None


class Checks(_Part):
    """What the checks of a run found, on the same ``pairs`` for all of them.

    ``held_out``: the pairs were kept from training. ``measure``: squared error of paired outputs, where the value range
    is [-1, 1]; or half the energy distance, of samplers that draw noise. ``start`` is the untrained student, ``kept``
    the update whose weights the student has, ``worse`` whether the run ended worse than it began.
    ``forward_equivalents`` is what the checks cost.
    """

    pairs: Positive
    held_out: bool
    measure: Literal["squared", "energy"]
    start: CheckFigures
    end: CheckFigures
    best: CheckFigures
    kept: Count
    worse: bool
    forward_equivalents: Annotated[float, Field(ge=0)] = 0.0


class Distillation(_Part):
    """How the student was made.

    ``estimator``: how the gradient of the reward was estimated, of methods that have one. ``configuration``: every
    setting of the run by name, as JSON; a value that is not JSON, such as a callable, is its name. Both since 1.3.
    ``checks``: how the run began and ended, since 1.4.
    """

    method: Text
    estimator: Text | None = None
    rewards: Annotated[list[Text], Field(max_length=100)] = []
    seed: int
    budget: Budget
    versions: dict[Text, Text] = {}  # package -> version
    configuration: Annotated[dict[Text, Any], Field(max_length=200)] = {}
    checks: Checks | None = None


class Latents(_Part):
    """The network's input for one image: (channels, height, width).

    `dynamic` names the axes that may differ, by multiples of `multiple` (2^n for a network that halves its input n
    times) and up to `largest` (for networks whose table of positions ends).
    """

    channels: Extent
    height: Extent
    width: Extent
    dynamic: list[Literal["height", "width"]] = []
    multiple: Extent = 1
    largest: Extent | None = None

    def size(self, height: int | None, width: int | None, scale: int = 1) -> tuple[int, int]:
        """(height, width) of the latents for an image.

        Args:
            height: Of the image, in pixels; None: the student's own.
            width: Of the image, in pixels; None: the student's own.
            scale: Pixels a latent on each side.

        Raises:
            InvalidRequest: The student does not make that size; the message has the valid ones.
        """
        return self._extent("height", height, scale), self._extent("width", width, scale)

    def _extent(self, axis: Literal["height", "width"], pixels: int | None, scale: int) -> int:
        own: int = getattr(self, axis)
        if pixels is None or pixels == own * scale:
            return own
        if axis not in self.dynamic:
            raise InvalidRequest(f"{axis}={pixels} is not supported; the student makes images of {axis} {own * scale}")
        unit, most = self.multiple * scale, (self.largest or LARGEST_EXTENT) * scale
        if pixels < unit or pixels % unit or pixels > most:
            raise InvalidRequest(f"{axis}={pixels} is not supported; give a multiple of {unit} up to {most}")
        return pixels // scale


class TensorSpec(_Part):
    """A graph's input or output. A fixed axis is a number, a free one has a name."""

    name: Text
    dtype: Text
    shape: Annotated[list[Count | Text], Field(max_length=16)]


class Condition(_Part):
    """The condition of a class-conditional student: a class from 0 to ``num_classes - 1``, which may have a name."""

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

    A prompt has `max_length` ids: longer ones are cut (the last id stays the end token), shorter ones are padded with
    `pad_token_id`. `mask` names the input that is 1 at tokens and 0 at padding, for encoders that take one.
    With `lowercase`, prompts are stripped and lower-cased first, as in PixArt's pipeline.
    """

    file: SafePath
    input: Text = "input_ids"
    mask: Text | None = None
    max_length: Extent
    pad_token_id: Count
    lowercase: bool = False


class TextEncoder(_Part):
    """The class that loads a text encoder for training and export, and its folder. Deployment does not import it."""

    class_path: Text  # e.g. "transformers.CLIPTextModel"
    folder: SafeFolder


class TextCondition(_Part):
    """The condition of a text-to-image student: a prompt.

    The text encoder's graph turns the tokenizers' ids into `tensors`; the denoiser and the generator take these by
    name. With `long_prompts` they take the states of several chunks of a prompt, one after another along the tokens,
    in place of the first tensor (since 1.8).
    """

    kind: Literal["text"]
    tokenizers: Annotated[list[Tokenizer], Field(min_length=1, max_length=4)]
    encoders: Annotated[list[TextEncoder], Field(min_length=1, max_length=4)]
    tensors: Annotated[list[TensorSpec], Field(min_length=1, max_length=8)]  # their first axis is "batch"
    examples: Annotated[list[Prompt], Field(min_length=1, max_length=100)]  # prompts that it was trained for
    long_prompts: bool = False

    @model_validator(mode="after")
    def _named_once(self) -> TextCondition:
        names = [tensor.name for tensor in self.tensors]
        inputs = [name for part in self.tokenizers for name in (part.input, part.mask) if name is not None]
        for kind in (names, inputs):
            if len(set(kind)) != len(kind):
                raise ValueError(f"a tensor is named twice: {', '.join(kind)}")
        if any(not tensor.shape or tensor.shape[0] != "batch" for tensor in self.tensors):
            raise ValueError("the first axis of an encoded prompt's tensor is not batch")
        return self


class ArrayCondition(_Part):
    """The condition of a student that takes a user's own arrays by name, such as a low-resolution image (since 1.8).

    The denoiser and the generator take `tensors` by name. `examples` is an ``.npz`` of a few rows that the student was
    trained on: arrays ``conditions.NAME`` (N, ...), each with the same number of rows.
    """

    kind: Literal["arrays"]
    tensors: Annotated[list[TensorSpec], Field(min_length=1, max_length=MOST_CONDITIONS)]
    examples: SafePath

    @model_validator(mode="after")
    def _arrays(self) -> ArrayCondition:
        names = [tensor.name for tensor in self.tensors]
        if len(set(names)) != len(names):
            raise ValueError(f"a condition is named twice: {', '.join(names)}")
        for tensor in self.tensors:
            if not is_condition_name(tensor.name):
                raise ValueError(f"{tensor.name!r} cannot name a condition")
            if tensor.dtype not in ("float32", "int64"):
                raise ValueError(f"the condition {tensor.name} is {tensor.dtype}, not float32 or int64")
            fixed = [side for side in tensor.shape[1:] if isinstance(side, int)]
            if tensor.shape[:1] != ["batch"] or len(fixed) != len(tensor.shape) - 1:
                raise ValueError(f"the condition {tensor.name} has axes {tensor.shape}; all but batch must be fixed")
            if (size := math.prod(fixed)) > LARGEST_CONDITION:
                raise ValueError(f"the condition {tensor.name} has {size} values; the limit is {LARGEST_CONDITION}")
        return self


class Decoder(_Part):
    """The network that decodes latents, an autoencoder's decoder: `scale` pixels a latent on each side.

    Its input is latents / `scaling_factor` + `shift_factor`.
    """

    class_path: Text  # e.g. "diffusers.AutoencoderKL"
    folder: SafeFolder
    scale: Extent
    channels: Extent = 3
    scaling_factor: float = 1.0
    shift_factor: float = 0.0


class Postprocess(_Part):
    """Latents to images: torch's pixel shuffle or a decoder, then `value_range` is mapped to 0..255.

    Values are clipped, and rounded half to even.
    """

    pixel_shuffle: Annotated[int, Field(ge=1, le=256)] = 1
    value_range: tuple[float, float] = (-1.0, 1.0)
    decoder: Decoder | None = None

    @property
    def scale(self) -> int:
        """Pixels a latent, on each side."""
        return self.decoder.scale if self.decoder else self.pixel_shuffle

    def channels(self, latents: int) -> int:
        """Channels of the image for that many channels of latents."""
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

    u is the network's output for the class ``null_class``, c for the requested one: two network calls a step. For a
    text-to-image student u is the output for ``null_prompt``, or with ``null_zeros`` for zeros as the encoded prompt.
    """

    scale: Annotated[float, Field(gt=0)]
    null_class: Count = 0
    null_prompt: Prompt | None = None
    null_zeros: bool = False

    def mix(self, asked: Any, unasked: Any) -> Any:
        """The guided output f from c (`asked`) and u (`unasked`), arrays or tensors of one shape."""
        return unasked + self.scale * (asked - unasked)

    @property
    def is_on(self) -> bool:
        """Whether images are guided unless a caller says otherwise: 1 means no guidance, as in diffusers."""
        return self.scale != 1


def calls_per_step(guidance: Guidance | None) -> int:
    """Network calls for one image and step: 2 under guidance."""
    return 2 if guidance and guidance.is_on else 1


class Network(_Part):
    """The class that loads the network for training and export, and its folder. Deployment does not import it.

    ``guidance``: an image takes two network calls a step, whose outputs are mixed (an imported guided pipeline;
    distilled students need none). ``embedded_guidance``: the guidance scale that a network takes as an input (Flux,
    LCM). ``guidance_inputs``: the graphs take the scale as an input, and for ``guidance`` the null condition too, so
    that each call chooses them; what is recorded here is the default (since 1.7). ``guidance_range``: the least and the
    largest scale that a distilled network takes as an input (since 1.8). ``inpainting``: the network takes, beside the
    latents, a mask and the latents of the masked image, so that every call needs an image and a mask (since 1.8).
    ``pipeline``: the diffusers class that loads the folder, if it is more than network and scheduler. ``call``: a
    network of diffusers is called by its family, any other as ``network(x, t, condition)``; of such a network
    ``class_path`` is a name for people, and nothing imports it (since 1.4).
    """

    class_path: Text  # e.g. "diffusers.UNet2DModel"
    folder: SafeFolder
    guidance: Guidance | None = None
    embedded_guidance: float | None = None
    guidance_range: tuple[float, float] | None = None
    guidance_inputs: bool = False
    inpainting: bool = False
    pipeline: Text | None = None  # e.g. "StableDiffusionPipeline"
    call: Literal["diffusers", "x, t, condition"] = "diffusers"

    @property
    def calls_per_step(self) -> int:
        """Network calls for one image and step."""
        return calls_per_step(self.guidance)

    @property
    def is_own(self) -> bool:
        """Whether its class is somebody's own, so that a module must be given to train or export it again."""
        return self.call != "diffusers"


class Graph(_Part):
    """One ONNX graph. `data` names the files that hold its weights where these do not fit into `file`."""

    component: Component
    precision: Precision
    file: SafePath
    data: Annotated[list[SafePath], Field(max_length=64)] = []
    opset: Positive
    inputs: Annotated[list[TensorSpec], Field(max_length=64)]
    outputs: Annotated[list[TensorSpec], Field(max_length=64)]


class Golden(_Part):
    """Inputs and torch outputs recorded at export (``.npz``; the arrays are described in `redif_sdk.export.golden`).

    `height` and `width` are those of the latents; None: the student's own.
    """

    file: SafePath
    num_inference_steps: Positive
    batch: Positive
    height: Extent | None = None
    width: Extent | None = None


class FileEntry(_Part):
    """A file of the student, with its size and SHA-256."""

    path: SafePath
    bytes: Count
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
