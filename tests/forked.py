"""``redif`` in processes of its own that need not import torch: each is forked from a server that did, once."""

from __future__ import annotations

import multiprocessing
import os
import sys
from multiprocessing.context import ForkServerProcess
from pathlib import Path

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    [
        "redif_sdk.cli.main",
        "redif_sdk.distill.student.distilling",
        "redif_sdk.distill.training.loop",
        "diffusers.models.unets.unet_2d",
        "diffusers.pipelines.ddim.pipeline_ddim",
    ]
)


def start(arguments: list[str], environment: dict[str, str], said: Path) -> ForkServerProcess:
    """Begin ``redif`` with ``arguments``, on one thread. What it prints goes into the file ``said``."""
    process = PROCESSES.Process(target=_run, args=(arguments, {"OMP_NUM_THREADS": "1", **environment}, said))
    process.start()
    return process


def _run(arguments: list[str], environment: dict[str, str], said: Path) -> None:
    import torch

    from redif_sdk.cli.main import main

    with said.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(environment)
    torch.set_num_threads(1)
    sys.argv = ["redif", *arguments]
    main()
