"""The demo as a Space of the Hub runs it: ``app.py`` of `redif push --space` calls `run`, and nothing else."""

from __future__ import annotations

import os
import threading
from pathlib import Path

from redif_sdk.artifact.folder import StudentFolder
from redif_sdk.demo.app import DemoSettings, build_demo, launch
from redif_sdk.demo.present import card_text
from redif_sdk.demo.studio import Studio
from redif_sdk.pipeline import FastPipeline

__all__ = ["run"]


def run(source: str, revision: str | None = None) -> None:
    """Show the student in a folder beside ``app.py``, or on the Hub at `revision`, until the process is ended.

    It listens where the Space says (GRADIO_SERVER_NAME, GRADIO_SERVER_PORT); a private student needs the secret
    HF_TOKEN. Raises ManifestError, IntegrityError, HubError.
    """
    pipeline = FastPipeline.from_pretrained(source, revision=revision)
    name = pipeline.manifest.name
    folder = StudentFolder(source) if Path(source).is_dir() else None
    studio = Studio({name: pipeline})
    studio.warm_up()
    demo = build_demo(studio, {name: card_text(pipeline.manifest, folder)}, DemoSettings(concurrency=1))
    port = int(os.environ.get("GRADIO_SERVER_PORT", "7860"))
    print(f"{name} at {launch(demo, host=os.environ.get('GRADIO_SERVER_NAME', '0.0.0.0'), port=port)}", flush=True)
    threading.Event().wait()
