"""The command `redif demo`: what it takes, what it calls, what it prints. It imports Gradio when it runs."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from redif_sdk.cli.terminal import Quiet, console_for
from redif_sdk.errors import InvalidRequest

if TYPE_CHECKING:
    from redif_sdk.pipeline import FastPipeline

__all__ = ["demo_command"]


def demo_command(
    students: Annotated[
        list[str], typer.Argument(metavar="DIR...", help="Students' folders, or their ids on the Hub.")
    ],
    teacher: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Shown beside them: the teacher as redif import makes it, or its id."),
    ] = None,
    host: Annotated[str, typer.Option(help="0.0.0.0 for every address of this machine.")] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(help="Default: the first that is free from 7860 on.")] = None,
    share: Annotated[bool, typer.Option("--share", help="Also at a public address, through Gradio's servers.")] = False,
    open_browser: Annotated[bool, typer.Option("--open", help="Open it in this machine's browser.")] = False,
    max_images: Annotated[int, typer.Option(help="Most pictures a wish.")] = 16,
    concurrency: Annotated[int, typer.Option(help="Wishes that are worked on at once; others wait.")] = 1,
    max_queue: Annotated[int, typer.Option(help="Most wishes that wait; more are turned away.")] = 64,
    runtime: Annotated[str, typer.Option(help="auto, onnxruntime, openvino, tensorrt or tensorrt-rtx.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda[:N], dml[:N], coreml, gpu[:N] or npu.")] = "auto",
    precision: Annotated[str, typer.Option(help="auto, fp32, fp16, bf16 or int8.")] = "auto",
    threads: Annotated[int | None, typer.Option(help="CPU threads; default: all that the process may use.")] = None,
    revision: Annotated[str | None, typer.Option(help="Of students on the Hub: a branch, a tag or a commit.")] = None,
    quiet: Quiet = False,
) -> None:
    """Show students in a page: pictures as they form, the teacher beside them, latency, quality, and the card.

    Without torch: a teacher is shown as `redif import` made it, with `redif export`.
    """
    from redif_sdk.artifact.folder import StudentFolder
    from redif_sdk.pipeline import FastPipeline

    try:
        from redif_sdk.demo.app import DemoSettings, build_demo, card_text, launch
    except ModuleNotFoundError as error:
        raise InvalidRequest(f'{error.name} is not installed; pip install "redif-sdk[demo]"') from error
    from redif_sdk.demo.studio import Studio

    def load(source: str) -> FastPipeline:
        return FastPipeline.from_pretrained(
            source, runtime=runtime, device=device, precision=precision, num_threads=threads, revision=revision
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
    demo = build_demo(studio, cards, settings)
    address = launch(demo, host=host, port=port, share=share, open_browser=open_browser)
    console = console_for(None, quiet)
    console.print(f"{', '.join(pipelines)} at {address} (Ctrl-C ends it)", soft_wrap=True)
    console.file.flush()
    asked = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: asked.set())
    try:
        asked.wait()
    except KeyboardInterrupt:
        asked.set()
    demo.close(verbose=False)


def _teacher(source: str | None, load: Callable[[str], FastPipeline]) -> FastPipeline | None:
    """The teacher's pipeline. InvalidRequest, with the commands to give, for a pipeline that only torch can run."""
    if source is None:
        return None
    folder = Path(source)
    if folder.is_dir() and (folder / "model_index.json").is_file() and not (folder / "redif.json").is_file():
        raise InvalidRequest(
            f"{folder} is a pipeline that only torch runs; make it one that this demo can show: "
            f"redif import {folder} --steps 50 --steps 4 -o {folder.name}-50, then redif export {folder.name}-50"
        )
    return load(source)
