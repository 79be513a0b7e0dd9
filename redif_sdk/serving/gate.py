"""What stands before the application, on every request: keys, the size of a body, a request's id, logs and counts.

Plain ASGI, so that a request is seen as the server gives it, and a client that goes away is noticed.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from time import monotonic
from typing import Any

from redif_sdk.serving.admission import Keys
from redif_sdk.serving.metrics import Metrics
from redif_sdk.serving.settings import ServeSettings

__all__ = ["Gate", "error_body"]

_log = logging.getLogger(__name__)

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

PROTECTED = "/v1/"
UNPROTECTED = "/v1/images/files/"  # their names are secret
BODY_SECONDS = 30.0  # that a client may take to send a body
_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")

TYPES = {401: "authentication_error", 429: "rate_limit_error", 503: "unavailable_error", 504: "timeout_error"}


def error_body(status: int, message: str, *, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """An error as OpenAI's API has it."""
    kind = TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


class Gate:
    """The middleware. Answers 401, 408 and 413 itself; passes everything else on, with the body read."""

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
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        request_id = given.decode() if _ID.fullmatch(given) else secrets.token_hex(8)
        scope.setdefault("state", {})["request_id"] = request_id
        status = 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            await self._pass(scope, headers, receive, answer)
        finally:
            seconds = monotonic() - begun
            # The route's own pattern, since any path may be asked for and each would become a series of its own.
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.requests.labels(route, str(status or 499)).observe(seconds)
            fields = {
                "request_id": request_id,
                "method": scope["method"],
                "path": scope["path"],
                "status": status or 499,
                "ms": round(seconds * 1000, 2),
                **scope["state"].get("log", {}),
            }
            _log.info("request", extra={"fields": fields})

    async def _pass(
        self, scope: MutableMapping[str, Any], headers: dict[bytes, bytes], receive: Receive, send: Send
    ) -> None:
        path = scope["path"]
        if path.startswith(PROTECTED) and not path.startswith(UNPROTECTED):
            authorization = headers.get(b"authorization", b"").decode("latin-1")
            if not self._keys.allow(authorization):
                refusal = error_body(401, "no valid API key was given; send Authorization: Bearer KEY")
                await _answer(send, 401, refusal, (b"www-authenticate", b"Bearer"))
                return
        limit = self._settings.max_body_bytes
        body = b""
        try:
            async with asyncio.timeout(BODY_SECONDS):
                declared = headers.get(b"content-length", b"0")
                more = True
                while more and len(body) <= limit:
                    if declared.isdigit() and int(declared[:20]) > limit:
                        body = bytes(limit + 1)
                        break
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return
                    body += message.get("body", b"")
                    more = message.get("more_body", False)
        except TimeoutError:
            await _answer(send, 408, error_body(408, f"the body did not arrive within {BODY_SECONDS:.0f} s"), CLOSE)
            return
        if len(body) > limit:
            await _answer(send, 413, error_body(413, f"the body has more than {limit} bytes; send less"), CLOSE)
            return
        unread = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return unread.pop() if unread else await receive()

        started = False

        async def watched(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, replay, watched)
        except Exception as error:  # nothing that breaks inside may go unanswered, uncounted or untold in the log
            _log.error("request failed", exc_info=error)
            if started:
                raise
            await _answer(send, 500, error_body(500, "the server failed; its log says why"))


CLOSE = (b"connection", b"close")


async def _answer(send: Send, status: int, body: dict[str, Any], *headers: tuple[bytes, bytes]) -> None:
    data = json.dumps(body).encode()
    start = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(data)), *headers]
    await send({"type": "http.response.start", "status": status, "headers": start})
    await send({"type": "http.response.body", "body": data})
