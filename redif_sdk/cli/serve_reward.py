"""The command ``redif serve-reward``. The server is imported when it runs."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from redif_sdk.cli.terminal import Quiet, console_for
from redif_sdk.errors import InvalidRequest

__all__ = ["serve_reward_command"]


def serve_reward_command(
    scorer: Annotated[str, typer.Argument(metavar="MODULE:FUNCTION", help="The function; or FILE.py:FUNCTION.")],
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 = all of this machine's.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 = a free one.")] = 8001,
    max_images: Annotated[int, typer.Option(min=1, help="Maximum images per request.")] = 256,
    quiet: Quiet = False,
) -> None:
    """Serve a function of yours as a reward.

    redif distill MODEL --reward http://HOST:PORT/score asks it. It takes what it names of images, targets (PIL),
    prompts, class_labels and class_names, each a list, and gives a list of numbers, or several by name.
    """
    try:
        from redif_sdk.reward_server.app import create_app, load_scorer
        from redif_sdk.serving.listening import listen
    except ModuleNotFoundError as error:
        raise InvalidRequest(f'{error.name} is not installed; pip install "redif-sdk[serve]"') from error
    sys.path.insert(0, "")  # a module of the folder in which the command was called
    console = console_for(None, quiet)

    def started(address: str) -> None:
        console.print(f"{scorer} is asked at {address}/score (API: {address}/docs)", soft_wrap=True)
        console.file.flush()

    listen(create_app(load_scorer(scorer), max_images=max_images), host=host, port=port, started=started)
