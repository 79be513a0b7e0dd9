"""The server process: the students' application, from start to clean shutdown."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from redif_sdk.pipeline import FastPipeline
from redif_sdk.serving.app import create_app
from redif_sdk.serving.listening import listen
from redif_sdk.serving.local import LocalBackend
from redif_sdk.serving.metrics import Metrics
from redif_sdk.serving.settings import ServeSettings

__all__ = ["serve"]


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
    listen(
        create_app(backend, settings, metrics),
        host=host,
        port=port,
        started=started,
        log_level=log_level,
        forwarded_allow_ips=forwarded_allow_ips,
        grace_seconds=int(settings.timeout_s) + 5,
    )
