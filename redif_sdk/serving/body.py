"""The body of an image request, checked before anything reads it: its headers, its encoding, its JSON.

Every refusal names the header, the place in the JSON, or the field.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Coroutine, Sequence
from email.message import Message
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute

__all__ = ["BadBody", "CheckedRoute", "field_message", "parse_body"]

_MOST_DIGITS = 40  # of an integer; no field takes more, and a message would be full of them
_EXCERPT = 20  # characters


class BadBody(Exception):  # noqa: N818  # not an error of the server
    """A body that is no request. `status`: 400 or 415; `param`: the field, where one is at fault."""

    def __init__(self, message: str, *, status: int = 400, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param = status, param


class CheckedRoute(APIRoute):
    """A route whose JSON body is checked by `parse_body`, instead of by FastAPI."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The handler, behind the check."""
        handle = super().get_route_handler()

        async def checked(request: Request) -> Response:
            content = request.headers.get("content-type"), request.headers.get("content-encoding")
            request._json = parse_body(await request.body(), *content)
            return await handle(request)

        return checked


def parse_body(body: bytes, content_type: str | None, content_encoding: str | None) -> dict[str, Any]:
    """The JSON object in a body. Raises BadBody."""
    if (content_encoding or "identity").strip().lower() not in ("", "identity"):
        raise BadBody(
            f"Content-Encoding: {shown(content_encoding or '')} is not supported; send the body uncompressed",
            status=415,
        )
    _check_type(content_type)
    if not body.strip():
        raise BadBody('the body is empty; send a JSON object, as in {"prompt": "..."}')
    try:
        text = body.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadBody(f"the body is not UTF-8: byte {error.start} is 0x{body[error.start]:02x}") from None
    try:
        found = json.loads(text, object_pairs_hook=_object, parse_constant=_constant, parse_int=_integer)
    except json.JSONDecodeError as error:
        near = text[error.pos : error.pos + _EXCERPT]
        place = f"line {error.lineno}, column {error.colno}" + (f", at {near!r}" if near else ", where it ends")
        raise BadBody(f"the body is not JSON: {error.msg} in {shown(place)}") from None
    except RecursionError:
        raise BadBody("the body is not a request: its JSON is nested too deep; send an object of fields") from None
    if not isinstance(found, dict):
        raise BadBody(f"the body is a JSON {_KINDS.get(type(found), 'number')}; send an object of fields")
    return found


_KINDS: dict[type, str] = {list: "array", str: "string", bool: "boolean", type(None): "null"}


def _check_type(content_type: str | None) -> None:
    """Raise BadBody unless the header says JSON. Pages of strangers cannot send that without being asked first."""
    remedy = "send Content-Type: application/json (curl: -H 'Content-Type: application/json')"
    if not content_type:
        raise BadBody(f"the Content-Type header is missing; {remedy}", status=415)
    header = Message()
    header["content-type"] = content_type
    kind = header.get_content_type()
    if header.get_content_maintype() != "application" or not (kind == "application/json" or kind.endswith("+json")):
        raise BadBody(f"Content-Type is {shown(content_type)}; {remedy}", status=415)
    charset = str(header.get_param("charset", "utf-8")).lower()
    if charset not in ("utf-8", "utf8", "us-ascii"):
        raise BadBody(f"Content-Type names the charset {shown(charset)}; send JSON as UTF-8", status=415)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise BadBody(f"{shown(name)} is given twice in the body; give it once", param=shown(name))
        found[name] = value
    return found


def _constant(name: str) -> Any:
    raise BadBody(f"the body holds {name}, which is not JSON; give a number")


def _integer(digits: str) -> int | float:
    return int(digits) if len(digits) <= _MOST_DIGITS else math.inf  # which no field takes


def field_message(errors: Sequence[Any], fields: Sequence[str]) -> tuple[str, str | None]:
    """(message, field) for the errors of pydantic in a request whose fields are `fields`."""
    first = errors[0]
    where = shown(".".join(str(part) for part in first["loc"][1:2]))
    if first["type"] == "extra_forbidden":
        return f"{where}: there is no such field; use {', '.join(fields)}", where
    said = dict.fromkeys(error["msg"] for error in errors if error["loc"][:2] == first["loc"][:2])
    return f"{where or 'the body'}: {'; or: '.join(said)}", where or None


def shown(text: str) -> str:
    """`text` for a message: short, printable, and of characters that UTF-8 has."""
    cut = text if len(text) <= 100 else f"{text[:100]}..."
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in cut)
