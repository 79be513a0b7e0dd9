"""Server-sent events as bytes: their format, and what ends a stream."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from typing import Any

import pytest
import uvicorn
from sse_starlette.sse import AppStatus

from redif_sdk.serving.events import EventStream


def streamed(events: AsyncIterator[dict[str, Any]], leaves_after: int | None = None) -> tuple[bytes, list[bool]]:
    """The body of a stream, and what `finished` was called with. The client leaves after that many messages."""
    sent: list[dict[str, Any]] = []
    finished: list[bool] = []
    left = asyncio.Event()

    async def receive() -> dict[str, Any]:
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)
        if len(sent) == leaves_after:
            left.set()

    asyncio.run(EventStream(events, finished.append)({"type": "http", "method": "POST"}, receive, send))
    assert dict(sent[0]["headers"])[b"content-type"].startswith(b"text/event-stream")
    return b"".join(message["body"] for message in sent[1:]), finished


async def numbers(count: int) -> AsyncIterator[dict[str, Any]]:
    for number in range(count):
        for _ in range(10):
            await asyncio.sleep(0)
        yield {"type": "number", "value": number}


def test_an_event_is_its_name_and_its_json() -> None:
    body, finished = streamed(numbers(2))
    assert body == b"".join(b'event: number\ndata: {"type": "number", "value": %d}\n\n' % number for number in range(2))
    assert finished == [False]


def test_a_client_that_leaves_ends_the_stream() -> None:
    body, finished = streamed(numbers(10**9), leaves_after=3)
    assert body.startswith(b"event: number\n")
    assert finished == [True]


def test_a_server_that_stops_finishes_its_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AppStatus, "should_exit", False)
    server = uvicorn.Server(uvicorn.Config("unused:app"))
    server.handle_exit(signal.SIGTERM, None)
    assert server.should_exit
    body, finished = streamed(numbers(3))
    assert body.count(b"event: number\n") == 3
    assert finished == [False]
