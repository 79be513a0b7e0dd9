"""The command `redif serve`: what it takes, what it calls, what it prints. It imports the server when it runs."""

from __future__ import annotations

from ipaddress import ip_address
from pathlib import Path
from typing import Annotated

import typer

from redif_sdk.cli.terminal import Quiet, console_for
from redif_sdk.errors import InvalidRequest
from redif_sdk.serving.settings import KEYS, ServeSettings, keys_of_environment

__all__ = ["serve_command"]

LEVELS = ("debug", "info", "warning", "error")


def serve_command(
    students: Annotated[
        list[str], typer.Argument(metavar="DIR...", help="Students' folders, or their ids on the Hub.")
    ],
    host: Annotated[str, typer.Option(help="0.0.0.0 for every address of this machine.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 for a free one.")] = 8000,
    max_batch: Annotated[int, typer.Option(help="Most pictures a call of the engine.")] = 8,
    max_wait_ms: Annotated[float, typer.Option(help="How long an idle engine waits for more pictures.")] = 2.0,
    max_queue: Annotated[int, typer.Option(help="Most pictures waiting; beyond it the answer is 429.")] = 256,
    max_images: Annotated[int, typer.Option(help="Most pictures a request.")] = 16,
    timeout: Annotated[float, typer.Option(help="Seconds for one request.")] = 60.0,
    api_keys_file: Annotated[
        Path | None, typer.Option(help=f"One key a line; or set {KEYS}, with commas between. Default: no keys.")
    ] = None,
    cors_origin: Annotated[
        list[str] | None, typer.Option(help="A page's origin that may ask from a browser; may be repeated.")
    ] = None,
    runtime: Annotated[str, typer.Option(help="auto, onnxruntime, openvino, tensorrt or tensorrt-rtx.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda[:N], dml[:N], coreml, gpu[:N] or npu.")] = "auto",
    precision: Annotated[str, typer.Option(help="auto, fp32, fp16, bf16 or int8.")] = "auto",
    threads: Annotated[int | None, typer.Option(help="CPU threads; default: all that the process may use.")] = None,
    revision: Annotated[str | None, typer.Option(help="Of students on the Hub: a branch, a tag or a commit.")] = None,
    log_level: Annotated[str, typer.Option(help=f"{', '.join(LEVELS)}; JSON lines on standard error.")] = "info",
    quiet: Quiet = False,
) -> None:
    """Serve students over HTTP, by OpenAI's images API. SIGTERM finishes what was accepted, and ends.

    Pictures that are asked for at the same time are computed together, and a seed's picture is the same as alone.
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
        cors_origins=tuple(cors_origin or ()),
    )
    log_to_stderr("error" if quiet else log_level)
    pipelines: dict[str, FastPipeline] = {}
    for student in students:
        pipeline = FastPipeline.from_pretrained(
            student, runtime=runtime, device=device, precision=precision, num_threads=threads, revision=revision
        )
        name = pipeline.manifest.name
        if name in pipelines:
            raise InvalidRequest(f"two students are named {name}; serve them from two servers, or rename one")
        pipelines[name] = pipeline
    console = console_for(None, quiet)
    if not settings.api_keys and not _is_loopback(host):
        console.print(f"anybody who reaches {host} may ask: no API key is set ({KEYS}, --api-keys-file)")

    def started(address: str) -> None:
        console.print(f"{', '.join(pipelines)} at {address} (how to ask: {address}/docs)", soft_wrap=True)
        console.file.flush()

    serve(pipelines, settings, host=host, port=port, log_level=log_level, started=started)


def _keys(file: Path | None) -> tuple[str, ...]:
    """The keys of the file, or else of the environment."""
    if file is None:
        return keys_of_environment()
    keys = tuple(line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip())
    if not keys:
        raise InvalidRequest(f"{file} holds no API key; write one a line")
    return keys


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
