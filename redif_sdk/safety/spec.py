"""What a classifier takes and what its numbers mean: `FilterSpec`, from a JSON file or from arguments."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from redif_sdk.errors import InvalidRequest
from redif_sdk.textfile import read_json_file

__all__ = ["FilterSpec", "found_beside"]

Side = Annotated[int, Field(ge=1, le=4096, strict=True)]
Three = tuple[float, float, float]

LARGEST_JSON = 1 << 20  # bytes


class FilterSpec(BaseModel):
    """How images become the classifier's input, and when its output says no.

    An image (RGB; grey is repeated, transparency dropped) is resized to `resize`, its centre of `size` is cut out, and
    a value v of 0 to 1 becomes ``(v * white - mean) / std``. The score is the sum of `classes` in the output, after
    `activation`. An image whose score is above `threshold` (or is NaN) is flagged.

    Attributes:
        size: (height, width) of the classifier's input.
        resize: (height, width) before the centre is cut out; None: `size`.
        layout: "NCHW" or "NHWC".
        channels: "RGB" or "BGR"; mean and std have that order.
        white: the value of white before mean and std: 1 or 255.
        mean: of each channel.
        std: of each channel.
        jpeg_quality: images are compressed as JPEG in between, for classifiers that were trained on such; None: not.
        input: name of the input; None: the only one.
        output: name of the output; None: the first.
        activation: what is applied to the output: "none", "softmax" or "sigmoid".
        classes: the columns of the output whose sum is the score.
        threshold: scores above it are flagged.
        action: "black": a flagged image is made black; "raise": `UnsafeContent` is raised.
        batch: largest number of images per run of the classifier.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    size: tuple[Side, Side]
    resize: tuple[Side, Side] | None = None
    layout: Literal["NCHW", "NHWC"] = "NCHW"
    channels: Literal["RGB", "BGR"] = "RGB"
    white: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    mean: Three = (0.0, 0.0, 0.0)
    std: Three = (1.0, 1.0, 1.0)
    jpeg_quality: Annotated[int, Field(ge=1, le=100, strict=True)] | None = None
    input: str | None = None
    output: str | None = None
    activation: Literal["none", "softmax", "sigmoid"] = "none"
    classes: Annotated[tuple[Annotated[int, Field(ge=0, strict=True)], ...], Field(min_length=1)]
    threshold: Annotated[float, Field(allow_inf_nan=False)] = 0.5
    action: Literal["black", "raise"] = "black"
    batch: Annotated[int, Field(ge=1, le=256, strict=True)] = 16

    @model_validator(mode="after")
    def _sound(self) -> Self:
        if 0 in self.std:
            raise ValueError("std holds 0")
        if len(set(self.classes)) != len(self.classes):
            raise ValueError("classes names a column twice")
        if self.resize is not None and any(a < b for a, b in zip(self.resize, self.size, strict=True)):
            raise ValueError("resize is smaller than size, which is cut out of it")
        return self

    @classmethod
    def of(cls, fields: Mapping[str, Any], where: str) -> FilterSpec:
        """The checked spec. Raises InvalidRequest that names `where` and the field."""
        try:
            return cls.model_validate(dict(fields))
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(map(str, first["loc"]))
            said = first["msg"].removeprefix("Value error, ")
            known = f"; known: {', '.join(cls.model_fields)}" if first["type"] == "extra_forbidden" else ""
            raise InvalidRequest(f"{where}: {f'{name}: ' if name else ''}{said}{known}") from error


def found_beside(source: Path) -> tuple[Path, dict[str, Any]]:
    """(the ONNX file, the fields of its spec) of what a user names.

    Args:
        source: An ONNX file, with its spec in the JSON file of the same name beside it (``nsfw.onnx`` and
            ``nsfw.json``); or the JSON file, whose ``model`` names the ONNX file, relative to it (default: the ONNX
            file of the same name).

    Raises:
        InvalidRequest: A file that is there cannot be read, or is no JSON object.
    """
    is_json = source.suffix.lower() == ".json"
    file = source if is_json else source.with_suffix(".json")
    if not is_json and not file.exists():
        return source, {}
    fields = read_json_file(file, "the description of a safety filter", limit=LARGEST_JSON)
    if not isinstance(fields, dict):
        raise InvalidRequest(f"{file} is not a JSON object; describe the safety filter in one")
    model = fields.pop("model", None)
    if model is not None and not isinstance(model, str):
        raise InvalidRequest(f"{file}: model is {model!r:.60}; give the name of the ONNX file")
    if is_json:
        source = file.parent / model if model is not None else file.with_suffix(".onnx")
    return source, fields
