"""Server-sent events, with the names that OpenAI's client knows."""

from __future__ import annotations

import asyncio
import json
import time
from base64 import b64encode
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from typing import Any

from starlette.responses import Response

from redif_sdk.serving.backend import Picture

__all__ = ["EventStream", "gone_client", "partial_event"]

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


def partial_event(picture: Picture, data: bytes, output_format: str, index: int | None) -> dict[str, Any]:
    """Preview `index` (from 0) of a picture, or the picture itself for None."""
    event = {
        "type": "image_generation.completed" if index is None else "image_generation.partial_image",
        "b64_json": b64encode(data).decode(),
        "background": "opaque",
        "created_at": int(time.time()),
        "output_format": output_format,
        "quality": "auto",
        "size": f"{picture.width}x{picture.height}",
    }
    if index is not None:
        return event | {"partial_image_index": index}
    return event | {"seeds": [[picture.seed, picture.index]], "model": picture.model}


class EventStream(Response):
    """Sends each event as it comes; a client that leaves ends it. `finished(whether it left)` is called once."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[dict[str, Any]], finished: Callable[[bool], None]) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._finished = finished

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        left = True
        try:
            sending = asyncio.create_task(self._send(send))
            leaving = asyncio.create_task(gone_client(receive))
            try:
                await asyncio.wait({sending, leaving}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                ended = sending.done() and not sending.cancelled()
                sending.cancel()
                leaving.cancel()
                await asyncio.gather(sending, leaving, return_exceptions=True)
            left = not ended
            if ended:
                sending.result()  # raises what went wrong
        finally:
            self._finished(left)

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for event in self._events:
            text = f"event: {event['type']}\ndata: {json.dumps(event)}\n\n"
            await send({"type": "http.response.body", "body": text.encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def gone_client(receive: Receive) -> None:
    """Return when the client has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        continue
