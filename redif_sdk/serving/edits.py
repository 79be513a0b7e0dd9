"""Requests that begin with an image: OpenAI's ``images/edits`` and ``images/variations``, as forms with files."""

from __future__ import annotations

from typing import Annotated, Any

import python_multipart  # noqa: F401  starlette reads forms with it, and says so only at the first request
from fastapi import Request
from pydantic import Field, ValidationError
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException

from redif_sdk.serving.api import ImageRequest
from redif_sdk.serving.backend import Source
from redif_sdk.serving.body import BadBody, field_message

__all__ = ["EditRequest", "edit_of", "form_schema"]

MOST_FIELDS, MOST_FILES = 40, 20
_NUMBERS = ("n", "output_compression", "seed", "num_inference_steps", "class_label", "partial_images")


class EditRequest(ImageRequest):
    """The fields of ``POST /v1/images/edits`` beside its files ``image`` and ``mask``: those of a generation, and
    `strength`, ours: the share of the steps that are run from the image."""

    strength: Annotated[float, Field(gt=0, le=1)] | None = None


async def edit_of(request: Request, *, mask: bool) -> tuple[EditRequest, Source]:
    """The fields and files of a form.

    Args:
        request: The request, whose body was bounded before.
        mask: Whether a file ``mask`` is taken.

    Raises:
        BadBody: It is no form, or a field is wrong, twice there, or unknown.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "multipart/form-data":
        raise BadBody(f"Content-Type is {kind or 'missing'}; send a form with files (curl: -F image=@FILE)", status=415)
    try:
        form = await request.form(max_files=MOST_FILES, max_fields=MOST_FIELDS)
    except (MultiPartException, HTTPException) as error:
        said = getattr(error, "message", None) or getattr(error, "detail", "")
        raise BadBody(f"the form cannot be read: {said}") from None
    try:
        return await _read(form, mask=mask)
    finally:
        await form.close()


async def _read(form: FormData, *, mask: bool) -> tuple[EditRequest, Source]:
    images = await _files(form, ("image", "image[]"))
    masks = await _files(form, ("mask",)) if mask else []
    if len(images) != 1:
        raise BadBody(f"image: {len(images)} files were sent; send one, as in -F image=@FILE", param="image")
    if len(masks) > 1:
        raise BadBody(f"mask: {len(masks)} files were sent; send one", param="mask")
    taken = {"image", "image[]", *(["mask"] if mask else [])}
    fields = _fields(form, taken)
    try:
        asked = EditRequest.model_validate(fields)
    except ValidationError as error:
        errors = [{**found, "loc": ("body", *found["loc"])} for found in error.errors()]
        message, param = field_message(errors, [*EditRequest.model_fields, *sorted(taken - {"image[]"})])
        raise BadBody(message, param=param) from None
    return asked, Source(images[0], masks[0] if masks else None, asked.strength)


async def _files(form: FormData, names: tuple[str, ...]) -> list[bytes]:
    found = []
    for name in names:
        for part in form.getlist(name):
            if not isinstance(part, UploadFile):
                raise BadBody(f"{name} is text; send a file, as in -F {name}=@FILE", param=name)
            found.append(await part.read())
    return found


def _fields(form: FormData, files: set[str]) -> dict[str, Any]:
    """The fields that are text, with numbers and booleans as such."""
    found: dict[str, Any] = {}
    for name, value in form.multi_items():
        if name in files:
            continue
        if isinstance(value, UploadFile):
            raise BadBody(f"{name:.100} is a file; only {', '.join(sorted(files))} may be", param=name[:100])
        if name in found:
            raise BadBody(f"{name:.100} is given twice; give it once", param=name[:100])
        digits = value.strip().lstrip("-")
        if name in _NUMBERS and digits.isascii() and digits.isdecimal() and len(digits) <= MOST_FIELDS:
            found[name] = int(value)
        elif name == "stream" and value in ("true", "false"):
            found[name] = value == "true"
        else:
            found[name] = value
    return found


def form_schema(*, mask: bool) -> dict[str, Any]:
    """What the documentation says of the form: a field that is left out has no value, and none has several."""
    file = {"type": "string", "format": "binary"}
    properties: dict[str, Any] = {"image": file, **({"mask": file} if mask else {})}
    for name, field in EditRequest.model_json_schema()["properties"].items():
        kinds = [kind for kind in field["anyOf"] if kind["type"] not in ("null", "array")]
        properties[name] = {"title": field["title"], **(kinds[0] if len(kinds) == 1 else {"anyOf": kinds})}
    schema = {"type": "object", "properties": properties, "required": ["image"], "additionalProperties": False}
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}
