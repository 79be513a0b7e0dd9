"""uvicorn around an application, from start to clean shutdown."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

import uvicorn

from redif_sdk.errors import InvalidRequest

__all__ = ["listen"]


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


def listen(
    app: Any,
    *,
    host: str,
    port: int,
    started: Callable[[str], None] = lambda address: None,
    log_level: str = "info",
    forwarded_allow_ips: str | None = None,
    grace_seconds: int = 30,
) -> None:
    """Serve the ASGI application ``app`` until SIGTERM or SIGINT, then finish what was accepted and return.

    Args:
        app: the application, which logs its own requests.
        host, port: to listen on; port 0 is a free one.
        started: called with the URL once requests are accepted.
        log_level: as uvicorn's.
        forwarded_allow_ips: as uvicorn's.
        grace_seconds: that requests may take when the server is asked to stop.

    Raises:
        InvalidRequest: the address is not available.
    """
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        access_log=False,  # the application logs its own
        log_config=None,
        log_level=log_level,
        ws="none",
        server_header=False,
        forwarded_allow_ips=forwarded_allow_ips,
        timeout_keep_alive=20,
        timeout_graceful_shutdown=grace_seconds,
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
