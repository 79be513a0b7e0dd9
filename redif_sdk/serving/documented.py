"""What ``/openapi.json`` says of the answers: their fields, their kinds of content, and the errors of each route."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from redif_sdk.serving.encode import MEDIA_TYPES

__all__ = ["FILE", "HEALTHY", "IMAGES", "METRICS", "MODEL", "MODELS", "READY"]

Responses = dict[int | str, dict[str, Any]]  # as FastAPI's routes take them


class ErrorDetail(BaseModel):
    """What is wrong, and what to do. `param` is the field at fault, where it is one."""

    message: str
    type: str
    param: str | None
    code: str | None


class Error(BaseModel):
    """An error in the shape of OpenAI's API."""

    error: ErrorDetail


class ImageEntry(BaseModel):
    """One image: a file in base64, or the URL of one, as `response_format` asks."""

    b64_json: str | None = None
    url: str | None = None


class Images(BaseModel):
    """The images of a request, in order; `seeds` has (seed, index) of each, which as `seed` give them again."""

    created: int
    data: list[ImageEntry]
    background: str
    output_format: str
    size: str
    model: str
    num_inference_steps: int
    seeds: list[tuple[int, int]]


class Model(BaseModel):
    """A student: OpenAI's fields, and what it supports."""

    id: str
    object: str
    created: int
    owned_by: str
    task: str
    licence: str
    digest: str
    num_inference_steps: list[int]
    size: str
    free_sizes: bool
    num_classes: int | None
    class_names: list[str] | None
    example_prompts: list[str] | None
    guidance_scale: float | None
    inpainting: bool


class Models(BaseModel):
    """The students of a server."""

    object: str
    data: list[Model]


class Health(BaseModel):
    """The state of the process, or of the engines."""

    status: str


def _error(description: str) -> dict[str, Any]:
    return {"model": Error, "description": description}


def _answer(model: type[BaseModel], description: str) -> dict[str, Any]:
    return {"model": model, "description": description}


_METHOD: Responses = {405: _error("The method is not supported; `Allow` names those that are.")}
_KEY: Responses = {401: _error("No valid API key."), **_METHOD}
_UNKNOWN: Responses = {404: _error("There is no such model.")}
_EVENT = {
    "type": "object",
    "description": "A server-sent event. Its data are JSON: an image in `b64_json`, or of an `error` what is wrong.",
    "properties": {"event": {"type": "string"}, "data": {"type": "string", "contentMediaType": "application/json"}},
    "required": ["event", "data"],
}
_EVENTS = {"text/event-stream": {"schema": _EVENT}}
_FILES = {kind: {"schema": {"type": "string", "format": "binary"}} for kind in MEDIA_TYPES.values()}

#: The answers of the routes that generate images.
IMAGES: Responses = {
    200: {**_answer(Images, "The images; with `stream`, server-sent events."), "content": _EVENTS},
    400: _error("A field is wrong: `param` names it, and the message what it can be."),
    **_KEY,
    **_UNKNOWN,
    408: _error("The body did not arrive in time."),
    413: _error("The body is too large."),
    415: _error("The body is of another type, or compressed."),
    429: _error("The queue is full: try again after `Retry-After` seconds."),
    "4XX": _error("Something else is wrong with the request."),  # and so FastAPI adds no 422, which is never sent
    500: _error("The images could not be generated."),
    503: _error("The server is starting or stopping."),
    504: _error("The images were not ready in time."),
}
MODELS: Responses = {200: _answer(Models, "The students."), **_KEY}
MODEL: Responses = {
    200: _answer(Model, "The student."),
    **_KEY,
    **_UNKNOWN,
    "4XX": _error("Something else is wrong with the request."),
}
FILE: Responses = {
    200: {"description": "The file.", "content": _FILES},
    404: _error("There is no such image, or it is no longer kept."),
    "4XX": _error("Something else is wrong with the request."),
}
HEALTHY: Responses = {200: _answer(Health, "The process responds."), **_METHOD}
READY: Responses = {
    200: _answer(Health, "Images can be generated."),
    **_METHOD,
    503: _answer(Health, "The server is starting or stopping."),
}
METRICS: Responses = {
    200: {"description": "The metrics.", "content": {"text/plain": {"schema": {"type": "string"}}}},
    **_METHOD,
}
