"""The command ``redif demo``. Gradio is imported when it runs."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from redif_sdk.cli.terminal import (
    C2paCert,
    C2paKey,
    Device,
    Precision,
    Quiet,
    Runtime,
    SafetyFilterFile,
    StudentRevision,
    StudentsArgument,
    Threads,
    black_filter,
    console_for,
    signer_of,
)
from redif_sdk.errors import InvalidRequest

if TYPE_CHECKING:
    from redif_sdk.pipeline import FastPipeline

__all__ = ["demo_command"]


def demo_command(
    students: StudentsArgument,
    teacher: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Teacher to show beside them: a folder made by redif import, or its Hub id."),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 = all of this machine's.")] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(help="Port; default: the first free one from 7860 on.")] = None,
    share: Annotated[
        bool, typer.Option("--share", help="Also serve at a public address, through Gradio's servers.")
    ] = False,
    open_browser: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
    root_path: Annotated[
        str, typer.Option(metavar="PATH", help="Path below which a proxy publishes the page, such as /demo.")
    ] = "",
    max_images: Annotated[int, typer.Option(help="Maximum images per request.")] = 16,
    concurrency: Annotated[int, typer.Option(help="Concurrent requests; others wait.")] = 1,
    max_queue: Annotated[int, typer.Option(help="Maximum requests in the queue; more are refused.")] = 64,
    runtime: Runtime = "auto",
    device: Device = "auto",
    precision: Precision = "auto",
    threads: Threads = None,
    safety_filter: SafetyFilterFile = None,
    c2pa_cert: C2paCert = None,
    c2pa_key: C2paKey = None,
    revision: StudentRevision = None,
    quiet: Quiet = False,
) -> None:
    """Show students in a web page.

    It shows images step by step, the teacher beside them, latency, quality, and the card. It does not need torch: a
    teacher is shown as made by `redif import` and `redif export`.
    """
    from redif_sdk.artifact.folder import StudentFolder
    from redif_sdk.pipeline import FastPipeline

    try:
        from redif_sdk.demo.app import DemoSettings, build_demo, launch
        from redif_sdk.demo.present import card_text
    except ModuleNotFoundError as error:
        raise InvalidRequest(f'{error.name} is not installed; pip install "redif-sdk[demo]"') from error
    from redif_sdk.demo.studio import Studio

    signer, blocking = signer_of(c2pa_cert, c2pa_key), black_filter(safety_filter, threads)

    def load(source: str) -> FastPipeline:
        return FastPipeline.from_pretrained(
            source,
            runtime=runtime,
            device=device,
            precision=precision,
            num_threads=threads,
            revision=revision,
            safety_filter=blocking,
        )

    settings = DemoSettings(max_images, concurrency, max_queue)
    pipelines: dict[str, FastPipeline] = {}
    cards: dict[str, str] = {}
    for source in students:
        pipeline = load(source)
        name = pipeline.manifest.name
        if name in pipelines:
            raise InvalidRequest(f"two students are named {name}; show them in two demos, or rename one")
        pipelines[name] = pipeline
        cards[name] = card_text(pipeline.manifest, StudentFolder(source) if Path(source).is_dir() else None)
    studio = Studio(pipelines, _teacher(teacher, load), max_images=max_images)
    studio.warm_up()
    demo = build_demo(studio, cards, settings, signer=signer)
    address = launch(
        demo, host=host, port=port, share=share, open_browser=open_browser, root_path=root_path.rstrip("/")
    )
    console = console_for(None, quiet)
    console.print(f"{', '.join(pipelines)} at {address} (Ctrl-C ends it)", soft_wrap=True)
    console.file.flush()
    _wait()
    demo.close(verbose=False)


def _wait() -> None:
    """Until the process is told to end."""
    asked = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: asked.set())
    with suppress(KeyboardInterrupt):
        asked.wait()


def _teacher(source: str | None, load: Callable[[str], FastPipeline]) -> FastPipeline | None:
    """The teacher's pipeline. InvalidRequest, with the commands to give, for a pipeline that only torch can run."""
    if source is None:
        return None
    folder = Path(source)
    if folder.is_dir() and (folder / "model_index.json").is_file() and not (folder / "redif.json").is_file():
        raise InvalidRequest(
            f"{folder} is a pipeline that only torch can run; convert it for this demo: "
            f"redif import {folder} --steps 50,4 -o {folder.name}-50, then redif export {folder.name}-50"
        )
    return load(source)
