"""The middleware around the application: API keys, body size, and a log line and a count for every request.

Plain ASGI, so that it sees the messages of the server itself, a client that disconnects among them.
"""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from time import monotonic
from typing import Any

from asgi_correlation_id import CorrelationIdMiddleware, correlation_id
from starlette.responses import JSONResponse

from redif_sdk.serving.admission import Keys
from redif_sdk.serving.metrics import Metrics
from redif_sdk.serving.settings import ServeSettings

__all__ = ["Guard", "Prefix", "RequestId", "error_body", "route_path"]

_log = logging.getLogger(__name__)

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

PROTECTED = "/v1/"
UPLOADS = ("/v1/images/edits", "/v1/images/variations")
UNPROTECTED = "/v1/images/files/"  # the file names are secret
BODY_SECONDS = 30.0  # for a client to send its body
DRAINED = 1 << 20  # bytes beyond the limit that are read nevertheless: a proxy that still sends would miss the answer
_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_CLOSE = {"connection": "close"}

TYPES = {401: "authentication_error", 429: "rate_limit_error", 503: "unavailable_error", 504: "timeout_error"}

logging.getLogger("asgi_correlation_id").setLevel(logging.ERROR)  # it warns of every id that it replaces


def error_body(status: int, message: str, *, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """An error in the shape of OpenAI's API."""
    kind = TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def route_path(scope: MutableMapping[str, Any]) -> str:
    """The path below the application's prefix (``root_path``), whether the proxy removed the prefix or not."""
    path, root = str(scope["path"]), str(scope.get("root_path", ""))
    return path[len(root) :] if path == root or path.startswith(f"{root}/") else path


class Prefix:
    """Tells the application the path below which a proxy publishes it, for URLs and for routing."""

    def __init__(self, app: Application, root_path: str) -> None:
        self._app = app
        self._root_path = root_path

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope["root_path"] = self._root_path
        await self._app(scope, receive, send)


class RequestId(CorrelationIdMiddleware):
    """Gives every response an ``X-Request-Id``: the client's own, if it is a plain one, or a random one."""

    def __init__(self, app: Application) -> None:
        super().__init__(
            app,
            header_name="X-Request-Id",
            generator=lambda: secrets.token_hex(8),
            validator=lambda given: _ID.fullmatch(given) is not None,
        )


class Guard:
    """Answers 401, 408 and 413 itself; passes everything else on, with the body read."""

    def __init__(self, app: Application, settings: ServeSettings, metrics: Metrics) -> None:
        self._app = app
        self._settings = settings
        self._metrics = metrics
        self._keys = Keys(settings.api_keys)

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun = monotonic()
        status = 0

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            if (refusal := self._refusal(scope)) is not None:
                await refusal(scope, receive, watched)
                return
            unread = await self._body(scope, receive)
            if isinstance(unread, JSONResponse):
                await unread(scope, receive, watched)
            elif unread is not None:
                await self._app(scope, _replay(unread, receive), watched)
        except Exception as error:  # every failure is answered, counted and logged
            _log.error("request failed", exc_info=error)
            if status:
                raise
            await _error(500, "the server failed; see its log")(scope, receive, watched)
        finally:
            self._record(scope, status or 499, monotonic() - begun)

    def _record(self, scope: MutableMapping[str, Any], status: int, seconds: float) -> None:
        # The pattern of the route: counted by path, every path that is asked for would make a series of its own.
        route = getattr(scope.get("route"), "path", "other")
        self._metrics.requests.labels(route, str(status)).observe(seconds)
        fields = {"request_id": correlation_id.get(), "method": scope["method"], "path": scope["path"]}
        fields |= {"status": status, "ms": round(seconds * 1000, 2)}
        _log.info("request", extra=fields | scope.get("state", {}).get("log", {}))

    def _refusal(self, scope: MutableMapping[str, Any]) -> JSONResponse | None:
        """The answer to a request without a valid key, where one is needed."""
        path, authorization = route_path(scope), dict(scope["headers"]).get(b"authorization", b"").decode("latin-1")
        open_path = not path.startswith(PROTECTED) or path.startswith(UNPROTECTED)
        if open_path or self._keys.allow(authorization):
            return None
        message = "no valid API key was given; send Authorization: Bearer KEY"
        return _error(401, message, {"www-authenticate": "Bearer"})

    async def _body(self, scope: MutableMapping[str, Any], receive: Receive) -> bytes | JSONResponse | None:
        """The body of a request; a refusal if it is too large or too slow; None if the client left."""
        upload = route_path(scope) in UPLOADS
        limit = self._settings.max_upload_bytes if upload else self._settings.max_body_bytes
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        too_large = _error(413, f"the body has more than {limit} bytes; send less", _CLOSE)
        if declared.isdigit() and int(declared[:20]) > limit + DRAINED:
            return too_large
        body, size, more = bytearray(), 0, True
        try:
            async with asyncio.timeout(BODY_SECONDS):
                while more and size <= limit + DRAINED:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    size += len(message.get("body", b""))
                    if size <= limit:
                        body += message.get("body", b"")
                    more = message.get("more_body", False)
        except TimeoutError:
            return _error(408, f"the body did not arrive within {BODY_SECONDS:.0f} s", _CLOSE)
        return bytes(body) if size <= limit else too_large


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body again, and then what the server says."""
    unread = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return unread.pop() if unread else await receive()

    return replay


def _error(status: int, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse(error_body(status, message), status, headers)
