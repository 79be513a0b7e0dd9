"""``redif_teacher.json``: what a teacher's folder says that diffusers has no place for. Written by hand, so checked."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from redif_sdk.artifact.records import is_plain_text
from redif_sdk.errors import InvalidRequest
from redif_sdk.textfile import folded, read_json_file

__all__ = ["read_facts"]

LONGEST_NAME = 1000  # characters

Whole = Annotated[int, Field(strict=True, ge=1)]


class _Facts(BaseModel):
    """The fields that are read; others are kept as they are."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    name: Annotated[str, Field(strict=True, max_length=LONGEST_NAME)] | None = None
    licence: Annotated[str, Field(strict=True, max_length=LONGEST_NAME)] | None = None
    num_classes: Whole | None = None
    class_names: list[Annotated[str, Field(strict=True, max_length=LONGEST_NAME)]] | None = None
    null_class: Annotated[int, Field(strict=True, ge=0)] | None = None
    null_prompt: Annotated[str, Field(strict=True)] | None = None
    null_zeros: Annotated[bool, Field(strict=True)] | None = None
    num_inference_steps: Whole | None = None
    pixel_shuffle: Whole | None = None
    guidance_scale: Annotated[float, Field(ge=0)] | None = None
    value_range: tuple[float, float] | None = None
    prompts: list[Annotated[str, Field(strict=True)]] | None = None


def read_facts(path: Path) -> dict[str, Any]:
    """The fields of a ``redif_teacher.json``, with the white space of names folded.

    Raises:
        InvalidRequest: The file cannot be read, or a field is wrong; the message names both.
    """
    found = read_json_file(path, "what it says of the teacher")
    if not isinstance(found, dict):
        raise InvalidRequest(f"{path} holds a {type(found).__name__}; give an object of named fields")
    try:
        _Facts.model_validate(found)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise InvalidRequest(f"{path}: {where}: {first['msg']}; correct the field") from error
    facts = {key: value for key, value in found.items() if value is not None}
    for field in ("name", "licence"):
        if field in facts:
            facts[field] = _plain(facts[field], field, path)
    if "class_names" in facts:
        facts["class_names"] = _class_names(facts, path)
    return facts


def _class_names(facts: dict[str, Any], path: Path) -> list[str]:
    names = [_plain(name, f"class_names.{place}", path) for place, name in enumerate(facts["class_names"])]
    for place, name in enumerate(names):
        if name in names[:place]:
            raise InvalidRequest(f"{path}: the class name {name!r:.60} is there twice; give every class its own")
    classes = facts.get("num_classes", len(names))
    if len(names) != classes:
        raise InvalidRequest(f"{path}: {len(names)} class names for {classes} classes; give one a class")
    return names


def _plain(text: str, field: str, path: Path) -> str:
    text = folded(text)
    if not text or not is_plain_text(text):
        raise InvalidRequest(f"{path}: {field} is {text!r:.60}; give visible characters")
    return text
