"""Server-sent events, with the names that OpenAI's client knows."""

from __future__ import annotations

import json
import time
from base64 import b64encode
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from typing import Any

from sse_starlette import EventSourceResponse, ServerSentEvent
from sse_starlette.sse import AppStatus

from redif_sdk.serving.backend import ImageJob

__all__ = ["EventStream", "gone_client", "image_event"]

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

AppStatus.enable_automatic_graceful_drain = False  # a server that stops finishes its streams, which all end


def image_event(job: ImageJob, data: bytes, output_format: str, index: int | None) -> dict[str, Any]:
    """The event of preview `index` (from 0), or of the finished image for None."""
    about = "image_generation" if job.source is None else "image_edit"
    event = {
        "type": f"{about}.completed" if index is None else f"{about}.partial_image",
        "b64_json": b64encode(data).decode(),
        "background": "opaque",
        "created_at": int(time.time()),
        "output_format": output_format,
        "quality": "auto",
        "size": f"{job.width}x{job.height}",
    }
    if index is not None:
        return event | {"partial_image_index": index}
    return event | {"seeds": [[job.seed, job.index]], "model": job.model}


class EventStream(EventSourceResponse):
    """Sends each event as it comes; stops when the client leaves. Calls `finished(whether it left)` once at the end."""

    def __init__(self, events: AsyncIterator[dict[str, Any]], finished: Callable[[bool], None]) -> None:
        async def lines() -> AsyncIterator[ServerSentEvent]:
            async for event in events:
                yield ServerSentEvent(json.dumps(event), event=event["type"], sep="\n")

        async def leave(_: MutableMapping[str, Any]) -> None:
            self._left = True

        super().__init__(lines(), ping=0, sep="\n", client_close_handler_callable=leave)
        self._left = False
        self._finished = finished

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._finished(self._left)


async def gone_client(receive: Receive) -> None:
    """Return when the client has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        continue
