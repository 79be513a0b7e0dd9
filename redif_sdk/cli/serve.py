"""The command ``redif serve``. The server is imported when it runs."""

from __future__ import annotations

from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any

import typer

from redif_sdk.cli.terminal import (
    Device,
    NoMarks,
    Precision,
    Quiet,
    Runtime,
    SafetyFilterFile,
    StudentRevision,
    StudentsArgument,
    Threads,
    black_filter,
    console_for,
    listed,
)
from redif_sdk.errors import InvalidRequest
from redif_sdk.serving.settings import KEYS, ServeSettings, keys_of_environment
from redif_sdk.textfile import read_lines

__all__ = ["serve_command"]

LEVELS = ("debug", "info", "warning", "error")

CorsOrigins = Annotated[
    list[str] | None,
    typer.Option(metavar="ORIGIN,...", help="Origins whose pages may call the server from a browser."),
]
RootPath = Annotated[
    str, typer.Option(metavar="PATH", help="Path below which a proxy publishes the server, such as /images.")
]
ForwardedAllowIps = Annotated[
    str | None,
    typer.Option(metavar="IP,...", help="Proxies whose X-Forwarded headers are believed; * = all. Default: 127.0.0.1."),
]


def serve_command(
    students: StudentsArgument,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 = all of this machine's.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 = a free one.")] = 8000,
    max_batch: Annotated[int, typer.Option(help="Largest batch for one call of the engine.")] = 8,
    max_wait_ms: Annotated[float, typer.Option(help="How long an idle engine waits for more images, in ms.")] = 2.0,
    max_queue: Annotated[
        int, typer.Option(help="Maximum images in the queue; beyond it requests are answered with 429.")
    ] = 256,
    max_images: Annotated[int, typer.Option(help="Maximum images per request.")] = 16,
    timeout: Annotated[float, typer.Option(help="Time limit of a request, in seconds.")] = 60.0,
    api_keys_file: Annotated[
        Path | None,
        typer.Option(help=f"File of API keys, one a line; or set {KEYS} (comma-separated). Default: no keys."),
    ] = None,
    cors_origin: CorsOrigins = None,
    root_path: RootPath = "",
    forwarded_allow_ips: ForwardedAllowIps = None,
    runtime: Runtime = "auto",
    device: Device = "auto",
    precision: Precision = "auto",
    threads: Threads = None,
    no_marks: NoMarks = False,
    safety_filter: SafetyFilterFile = None,
    revision: StudentRevision = None,
    log_level: Annotated[str, typer.Option(help=f"{', '.join(LEVELS)}; logs are JSON lines on stderr.")] = "info",
    quiet: Quiet = False,
) -> None:
    """Serve students over HTTP (OpenAI's images API).

    On SIGTERM, accepted requests are finished first. Concurrent requests are batched; the image of a seed does not
    depend on the batch.
    """
    if log_level not in LEVELS:
        raise InvalidRequest(f"--log-level is {log_level!r}; use one of {', '.join(LEVELS)}")
    try:
        from redif_sdk.serving.server import serve
    except ModuleNotFoundError as error:
        raise InvalidRequest(f'{error.name} is not installed; pip install "redif-sdk[serve]"') from error
    from redif_sdk.pipeline import FastPipeline
    from redif_sdk.serving.logs import log_to_stderr

    settings = ServeSettings(
        max_batch=max_batch,
        max_wait_ms=max_wait_ms,
        max_queue=max_queue,
        max_images=max_images,
        timeout_s=timeout,
        api_keys=_keys(api_keys_file),
        cors_origins=tuple(listed(cors_origin)),
        root_path=root_path.rstrip("/"),
        marks=not no_marks,
    )
    log_to_stderr("error" if quiet else log_level)
    options: dict[str, Any] = {"runtime": runtime, "device": device, "precision": precision, "num_threads": threads}
    options |= {"revision": revision, "safety_filter": black_filter(safety_filter, threads)}
    pipelines: dict[str, FastPipeline] = {}
    for pipeline in (FastPipeline.from_pretrained(student, **options) for student in students):
        name = pipeline.manifest.name
        if name in pipelines:
            raise InvalidRequest(f"two students are named {name}; serve them from two servers, or rename one")
        pipelines[name] = pipeline
    console = console_for(None, quiet)
    if not settings.api_keys and not _is_loopback(host):
        console.print(f"anybody who reaches {host} can use the server: no API key is set ({KEYS}, --api-keys-file)")

    def started(address: str) -> None:
        behind = f", published below {settings.root_path}" if settings.root_path else ""
        console.print(f"{', '.join(pipelines)} at {address} (API: {address}/docs){behind}", soft_wrap=True)
        console.file.flush()

    serve(
        pipelines,
        settings,
        host=host,
        port=port,
        log_level=log_level,
        forwarded_allow_ips=forwarded_allow_ips,
        started=started,
    )


def _keys(file: Path | None) -> tuple[str, ...]:
    """The keys of the file, or else of the environment."""
    if file is None:
        return keys_of_environment()
    keys = tuple(text for _, text in read_lines(file, "the API keys, one a line", limit=1 << 20))
    if not keys:
        raise InvalidRequest(f"{file} holds no API key; write one a line")
    return keys


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
