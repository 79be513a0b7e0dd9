"""A real server in a thread, on a free port, with a real student; and the same pictures from Python."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import uvicorn

from redif_sdk import FastPipeline
from redif_sdk.serving.app import create_app
from redif_sdk.serving.local import LocalBackend
from redif_sdk.serving.metrics import Metrics
from redif_sdk.serving.settings import ServeSettings

# httpx waits five seconds unless told otherwise, and a busy machine is slow.
for _part in ("connect", "read", "write", "pool"):
    setattr(httpx._config.DEFAULT_TIMEOUT_CONFIG, _part, 300.0)


@contextmanager
def running(pipelines: dict[str, FastPipeline], settings: ServeSettings) -> Iterator[str]:
    """The address of a server that stops afterwards."""
    metrics = Metrics()
    app = create_app(LocalBackend(pipelines, settings, metrics.batch), settings, metrics)
    # Longer than a client keeps an idle connection (httpx: 5 s), or the server may close one that is just taken.
    config = uvicorn.Config(app, port=0, log_config=None, access_log=False, ws="none", timeout_keep_alive=60)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        thread.join(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(300)


@pytest.fixture(scope="session")
def pipeline(tiny_student: Path) -> FastPipeline:
    return FastPipeline.from_pretrained(tiny_student, runtime="onnxruntime")


@pytest.fixture(scope="session")
def address(tiny_student: Path, plain_student: Path, pipeline: FastPipeline) -> Iterator[str]:
    """A server with the class-conditional student "tiny" and the unconditional "plain"."""
    plain = FastPipeline.from_pretrained(plain_student, runtime="onnxruntime")
    with running({"tiny": pipeline, "plain": plain}, ServeSettings()) as url:
        yield url
