"""The server process: uvicorn around the application, from start to clean shutdown."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Mapping
from typing import Any

import uvicorn

from redif_sdk.errors import InvalidRequest
from redif_sdk.pipeline import FastPipeline
from redif_sdk.serving.app import create_app
from redif_sdk.serving.local import LocalBackend
from redif_sdk.serving.metrics import Metrics
from redif_sdk.serving.settings import ServeSettings

__all__ = ["serve"]

_log = logging.getLogger(__name__)


class _Server(uvicorn.Server):
    """uvicorn, which reports its address once it listens."""

    def __init__(self, config: uvicorn.Config, started: Callable[[str], None]) -> None:
        super().__init__(config)
        self._started = started

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        if self.started:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            self._started(f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}")


def serve(
    pipelines: Mapping[str, FastPipeline],
    settings: ServeSettings,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    log_level: str = "info",
    forwarded_allow_ips: str | None = None,
    started: Callable[[str], None] = lambda address: None,
) -> None:
    """Serve until SIGTERM or SIGINT, then finish what was accepted and return.

    Args:
        pipelines: the students by name.
        settings: batching and limits.
        host: address to listen on.
        port: port to listen on; 0 for a free one.
        log_level: as uvicorn's.
        forwarded_allow_ips: addresses, separated by commas, of proxies whose ``X-Forwarded-Proto`` and
            ``X-Forwarded-For`` are believed; "*" for all; None: ``FORWARDED_ALLOW_IPS``, else this machine's loopback.
        started: called with the URL once requests are accepted.

    Raises InvalidRequest if the address is not available.
    """
    metrics = Metrics()
    backend = LocalBackend(pipelines, settings, metrics.batch)
    config = uvicorn.Config(
        create_app(backend, settings, metrics),
        host=host,
        port=port,
        access_log=False,  # the application logs its own
        log_config=None,
        log_level=log_level,
        ws="none",
        server_header=False,
        forwarded_allow_ips=forwarded_allow_ips,
        timeout_keep_alive=20,
        timeout_graceful_shutdown=int(settings.timeout_s) + 5,
    )
    server = _Server(config, started)
    # uvicorn raises the signal again after its clean shutdown; being asked to stop is not a failure.
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        server.run()
    except SystemExit as error:  # uvicorn could not bind, and logged why
        raise InvalidRequest(f"cannot listen on {host}:{port}; is the port in use? give another --port") from error
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if not server.started:
        raise InvalidRequest(f"cannot listen on {host}:{port}; is the port in use? give another --port")
