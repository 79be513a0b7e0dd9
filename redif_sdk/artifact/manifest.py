"""``redif.json``: what a student folder holds, with the hash of every file.

Its parts are in `records.py`, its bytes and digest in `digest.py`; `folder.py` checks that a folder's files are those
that its manifest lists.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, PrivateAttr, ValidationError, WithJsonSchema, model_validator

from redif_sdk.artifact.digest import digest_of, encode
from redif_sdk.artifact.paths import MOST_FILES
from redif_sdk.artifact.records import (
    STRICT,
    ArrayCondition,
    Condition,
    Distillation,
    FileEntry,
    Golden,
    Graph,
    Latents,
    Network,
    Postprocess,
    TeacherInfo,
    TensorSpec,
    Text,
    TextCondition,
)
from redif_sdk.artifact.untrusted import json as strict_json
from redif_sdk.errors import IntegrityError, InvalidRequest, ManifestError
from redif_sdk.sampling.table import COLUMNS, MAX_ROWS, PREDICTION_TYPES, StepTable

__all__ = [
    "CARD_LIMIT",
    "CARD_NAME",
    "FORMAT_VERSION",
    "GUIDANCE_ROWS",
    "GUIDANCE_SCALE",
    "MANIFEST_NAME",
    "MASKED_LATENTS",
    "MASK_LATENTS",
    "NULL_ROWS",
    "TASKS",
    "Manifest",
]

FORMAT_VERSION = "1.8"
MANIFEST_NAME = "redif.json"
CARD_NAME = "README.md"
#: Inputs of graphs that are guided at run time (`redif_sdk.runtimes.guided`).
GUIDANCE_SCALE, GUIDANCE_ROWS, NULL_ROWS = "guidance_scale", "guidance_rows", "null_rows"
#: Inputs of the graphs of an inpainting student, by the size of latents: 1 where an image is painted anew, and the
#: encoded image with these places grey.
MASK_LATENTS, MASKED_LATENTS = "mask_latents", "masked_image_latents"

#: What a student does, by the kind of its condition.
TASKS: dict[str | None, Literal["unconditional", "class-conditional", "text-to-image", "array-conditional"]] = {
    None: "unconditional",
    "class": "class-conditional",
    "text": "text-to-image",
    "arrays": "array-conditional",
}

CARD_LIMIT = 1 << 20  # bytes of it that are read
UNLISTED = frozenset({MANIFEST_NAME, CARD_NAME.lower(), ".gitattributes"})  # in lower case

#: Bounds of what a reader allocates, in values: the latents of one image, its noise over all steps, and the noise of
#: all golden files together.
LARGEST_LATENTS = 1 << 26
LARGEST_NOISE = 1 << 28
LARGEST_GOLDEN = 1 << 25

_NUMBER = {"type": "number"}
_TABLE = {
    "type": "object",
    "description": "One sampler: K rows of coefficients (redif_sdk.sampling.table.StepTable).",
    "properties": {
        "sampler": {"type": "string", "maxLength": 100},
        "prediction_type": {"enum": list(PREDICTION_TYPES)},
        "init_scale": _NUMBER,
        "columns": {"const": list(COLUMNS)},
        "rows": {
            "type": "array",
            "minItems": 1,
            "maxItems": MAX_ROWS,
            "items": {"type": "array", "minItems": len(COLUMNS), "maxItems": len(COLUMNS), "items": _NUMBER},
        },
    },
    "required": ["sampler", "prediction_type", "init_scale", "columns", "rows"],
    "additionalProperties": False,
}


class Manifest(BaseModel):
    """The whole of ``redif.json``. `files` and `digest` are filled in by `write_manifest`."""

    model_config = STRICT

    format_version: Annotated[str, Field(pattern=r"^1\.\d{1,4}$")] = FORMAT_VERSION
    name: Text
    licence: Text
    task: Literal["unconditional", "class-conditional", "text-to-image", "array-conditional"]
    teacher: TeacherInfo | None = None
    distillation: Distillation | None = None
    step_tables: Annotated[
        list[dict[str, Any]],
        Field(min_length=1, max_length=64),
        WithJsonSchema({"type": "array", "minItems": 1, "maxItems": 64, "items": _TABLE}),
    ]
    latents: Latents
    condition: Annotated[Condition | TextCondition | ArrayCondition, Field(discriminator="kind")] | None = None
    postprocess: Postprocess = Postprocess()
    network: Network
    graphs: Annotated[list[Graph], Field(max_length=64)] = []
    golden: Annotated[list[Golden], Field(max_length=1000)] = []
    files: Annotated[list[FileEntry], Field(max_length=MOST_FILES)] = []
    metrics: list[dict[str, Any]] = []
    verification: list[dict[str, Any]] = []
    digest: str = ""

    @model_validator(mode="after")
    def _consistent(self) -> Manifest:
        steps = self.supported_steps
        if len(set(steps)) != len(steps):
            raise ValueError("two step tables have the same number of steps")
        if self.task != TASKS[self.condition.kind if self.condition else None]:
            raise ValueError(f"task {self.task!r} does not go with condition {self.condition!r}")
        network = self.network
        if network.guidance_inputs and not (
            network.embedded_guidance is not None or (network.guidance and self.condition)
        ):
            raise ValueError("guidance_inputs without guidance or embedded_guidance")
        if network.guidance_range is not None:
            (low, high), own = network.guidance_range, network.embedded_guidance
            if not (own is not None and 0 <= low <= own <= high):
                raise ValueError(f"the default guidance scale {own} is not in guidance_range, {low:g} to {high:g}")
        if network.inpainting and (self.text is None or self.postprocess.decoder is None):
            raise ValueError("network.inpainting without prompts or a decoder")
        if self.latents.channels % self.postprocess.pixel_shuffle**2:
            raise ValueError(
                f"{self.latents.channels} channels cannot be pixel-shuffled by {self.postprocess.pixel_shuffle}"
            )
        paths = [entry.path.casefold() for entry in self.files]
        if len(set(paths)) != len(paths):
            raise ValueError("a file is listed twice")
        if not UNLISTED.isdisjoint(paths):
            raise ValueError(f"{', '.join(sorted(UNLISTED & set(paths)))} cannot be listed: it is not hashed")
        kinds = [(graph.component, graph.precision) for graph in self.graphs]
        if len(set(kinds)) != len(kinds):
            raise ValueError("two graphs are of the same component and precision")
        latents = self.latents.channels * self.latents.height * self.latents.width
        if latents > LARGEST_LATENTS:
            raise ValueError(f"the latents of an image have {latents} values; the limit is {LARGEST_LATENTS}")
        most = max(table.noise_slices for table in self.tables)
        if most * latents > LARGEST_NOISE:
            raise ValueError(f"an image takes {most * latents} values of noise; the limit is {LARGEST_NOISE}")
        recorded = [golden.file for golden in self.golden]
        if len(set(recorded)) != len(recorded):
            raise ValueError("a golden file is named twice")
        values = sum(
            golden.batch * (golden.height or self.latents.height) * (golden.width or self.latents.width)
            for golden in self.golden
        )
        if most * self.latents.channels * values > LARGEST_GOLDEN:
            raise ValueError(f"the golden files take more than {LARGEST_GOLDEN} values of noise")
        return self

    _parsed: tuple[list[dict[str, Any]], list[StepTable]] | None = PrivateAttr(default=None)

    @property
    def tables(self) -> list[StepTable]:
        """The step tables, parsed once."""
        if self._parsed is None or self._parsed[0] is not self.step_tables:  # a copy may have been given others
            self._parsed = self.step_tables, [StepTable.from_dict(table) for table in self.step_tables]
        return self._parsed[1]

    @property
    def is_large(self) -> bool:
        """Whether the network's weights lie beside its graphs, being large: an image takes seconds."""
        return any(graph.data for graph in self.graphs if graph.component == "denoiser")

    @property
    def supported_steps(self) -> list[int]:
        """The numbers of steps that have a table, in the manifest's order; the first is the default."""
        return [table.num_inference_steps for table in self.tables]

    def step_table(self, num_inference_steps: int | None = None) -> StepTable:
        """The table of that many steps; None: the first one.

        Raises:
            InvalidRequest: There is none; the message has the valid numbers.
        """
        if num_inference_steps is None:
            return self.tables[0]
        for table in self.tables:
            if table.num_inference_steps == num_inference_steps:
                return table
        have = ", ".join(str(steps) for steps in self.supported_steps)
        raise InvalidRequest(
            f"num_inference_steps={num_inference_steps!r} is not supported by {self.name}; choose from {have}"
        )

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of an image, by default."""
        scale = self.postprocess.scale
        return self.latents.height * scale, self.latents.width * scale, self.postprocess.channels(self.latents.channels)

    @property
    def classes(self) -> Condition | None:
        """The condition of a class-conditional student, else None."""
        return self.condition if isinstance(self.condition, Condition) else None

    @property
    def text(self) -> TextCondition | None:
        """The condition of a text-to-image student, else None."""
        return self.condition if isinstance(self.condition, TextCondition) else None

    @property
    def arrays(self) -> ArrayCondition | None:
        """The condition of a student that takes a user's own arrays, else None."""
        return self.condition if isinstance(self.condition, ArrayCondition) else None

    @property
    def condition_tensors(self) -> list[TensorSpec]:
        """The conditioning inputs of the denoiser and the generator: class_labels, the encoded prompts' tensors, or a
        user's own arrays."""
        if isinstance(self.condition, TextCondition | ArrayCondition):
            return self.condition.tensors
        return [TensorSpec(name="class_labels", dtype="int64", shape=["batch"])] if self.condition else []

    @property
    def takes_long_prompts(self) -> bool:
        """Whether the graphs take prompts of several chunks."""
        return self.text is not None and self.text.long_prompts

    @property
    def condition_inputs(self) -> list[TensorSpec]:
        """`condition_tensors` as the denoiser and the generator take them: with a free axis of tokens where they take
        long prompts."""
        if not self.takes_long_prompts:
            return self.condition_tensors
        states, *others = self.condition_tensors
        return [states.model_copy(update={"shape": ["batch", "tokens", *states.shape[2:]]}), *others]

    @property
    def image_tensors(self) -> list[TensorSpec]:
        """What the denoiser and the generator of an inpainting student take of an image and its mask; else nothing."""
        if not self.network.inpainting:
            return []
        latents = self.latents
        sides = [axis if axis in latents.dynamic else getattr(latents, axis) for axis in ("height", "width")]
        channels = {MASK_LATENTS: 1, MASKED_LATENTS: latents.channels}
        return [
            TensorSpec(name=name, dtype="float32", shape=["batch", count, *sides]) for name, count in channels.items()
        ]

    @property
    def guidance_at_run_time(self) -> Literal["classifier-free", "embedded"] | None:
        """How a call may choose its guidance: by two network calls, by an input of the network, or not."""
        if not self.network.guidance_inputs:
            return None
        return "embedded" if self.network.embedded_guidance is not None else "classifier-free"

    @property
    def takes_nag(self) -> bool:
        """Whether there is a graph that takes negative prompts by normalised attention guidance."""
        return any(graph.component == "nag" for graph in self.graphs)

    @property
    def default_guidance(self) -> float:
        """The guidance scale of a call that does not say one; 1: none."""
        network = self.network
        if network.embedded_guidance is not None:
            return network.embedded_guidance
        return network.guidance.scale if network.guidance else 1.0

    @property
    def graph_conditions(self) -> list[TensorSpec]:
        """The inputs of the denoiser's and the generator's graph beside the state, its time, the table and the noise.

        With classifier-free guidance at run time, `runtimes.guided` says what these are.
        """
        painted = self.image_tensors
        if self.guidance_at_run_time is None:
            return [*self.condition_inputs, *painted]
        scale = TensorSpec(name=GUIDANCE_SCALE, dtype="float32", shape=["batch"])
        if self.guidance_at_run_time == "embedded":
            return [*self.condition_inputs, *painted, scale]
        rows = [spec.model_copy(update={"shape": ["rows", *spec.shape[1:]]}) for spec in self.condition_inputs]
        return [
            *rows,
            *painted,
            TensorSpec(name=GUIDANCE_ROWS, dtype="int64", shape=["rows"]),
            TensorSpec(name=NULL_ROWS, dtype="int64", shape=["batch"]),
            scale,
        ]

    def graph(self, component: str, precision: str) -> Graph | None:
        """The graph of that component and precision, or None."""
        for graph in self.graphs:
            if (graph.component, graph.precision) == (component, precision):
                return graph
        return None

    def digested(self) -> Manifest:
        """A copy with its digest filled in."""
        return self.model_copy(update={"digest": digest_of(self.model_dump(mode="json"))})

    def to_bytes(self) -> bytes:
        """The bytes of ``redif.json``."""
        return encode(self.model_dump(mode="json"))

    @classmethod
    def from_bytes(cls, data: bytes, where: str = MANIFEST_NAME) -> Manifest:
        """Parse and check the bytes of ``redif.json``; `where` names it in errors.

        Raises:
            ManifestError: They are not a valid manifest, or of a version that this release does not read.
            IntegrityError: They were altered.
        """
        document = strict_json.parse(data, where)
        version = document.get("format_version")
        major, _, _ = version.partition(".") if isinstance(version, str) else ("", "", "")
        if major != FORMAT_VERSION.partition(".")[0]:
            raise ManifestError(
                f"{where} has format_version {version!r}; this release reads {FORMAT_VERSION}: update redif-sdk"
            )
        # The bytes must be exactly those that `to_bytes` writes, so that even an altered blank is noticed.
        if document.get("digest") != digest_of(document) or encode(document) != data:
            raise IntegrityError(f"{where} was altered: it does not match its own digest; fetch or export it again")
        try:
            return cls.model_validate_json(data, strict=True)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"])
            newer = "" if version == FORMAT_VERSION else f" (it is of format {version}: update redif-sdk)"
            raise ManifestError(f"{where} is not a valid manifest: {field}: {first['msg']}{newer}") from error
