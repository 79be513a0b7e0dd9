"""The code blocks of a page of docs/, and running them in order as a reader would.

A block with a title that ends in .py is a file to save. One with the title "install" is not run (its extras are
checked). One with the title "first terminal" is a server: it runs until the page ends. Every other block is run as it
stands, bash with ``set -e``, Python as a script of its own. Ports are replaced by free ones.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
_FENCE = re.compile(r"^```(\w+)(?: title=\"([^\"]+)\")?[^\n]*\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_HEAD = re.compile(r"\A---\n(.*?)^---\n", re.DOTALL | re.MULTILINE)
_PORT = re.compile(r"\b800[0-9]\b")


class Block(NamedTuple):
    """A fenced block."""

    language: str
    title: str
    code: str


def blocks(page: Path, *languages: str) -> list[Block]:
    """The blocks of a page in these languages, in order."""
    found = (Block(*match.groups("")) for match in _FENCE.finditer(page.read_text(encoding="utf-8")))
    return [block for block in found if block.language in languages]


def head(page: Path) -> dict[str, str]:
    """The front matter of a page, its lines as NAME: VALUE."""
    found = _HEAD.match(page.read_text(encoding="utf-8"))
    return dict(line.split(": ", 1) for line in found[1].splitlines()) if found else {}


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def _environment() -> dict[str, str]:
    scripts = sysconfig.get_path("scripts")
    return os.environ | {"PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}


def _command(block: Block) -> list[str]:
    return (
        ["bash", "-euo", "pipefail", "-c", block.code]
        if block.language == "bash"
        else [sys.executable, "-c", block.code]
    )


@contextmanager
def _server(block: Block, folder: Path, ports: list[int]) -> Iterator[None]:
    """The block's process while the rest of the page runs; it ends as Ctrl-C ends it."""
    with (folder / "first-terminal.log").open("wb") as log:
        process = subprocess.Popen(
            _command(block), cwd=folder, env=_environment(), stdout=log, stderr=log, start_new_session=True
        )
        try:
            port = next(port for port in ports if str(port) in block.code)
            for _ in range(1200):
                with socket.socket() as one:
                    if one.connect_ex(("127.0.0.1", port)) == 0:
                        break
                assert process.poll() is None, (folder / "first-terminal.log").read_text()
                time.sleep(0.1)
            yield
        finally:
            os.killpg(process.pid, signal.SIGINT)
            process.wait(60)


def run_page(page: Path, folder: Path) -> dict[str, float]:
    """Run a page's blocks in ``folder``; what one prints is in the message where it fails. Returns seconds by block."""
    ports = {found: _free_port() for block in blocks(page, "bash") for found in _PORT.findall(block.code)}
    seconds: dict[str, float] = {}
    with ExitStack() as servers:
        for block in blocks(page, "bash", "python"):
            block = block._replace(code=_PORT.sub(lambda found: str(ports.get(found[0], found[0])), block.code))
            if block.title.endswith(".py"):
                (folder / block.title).write_text(block.code, encoding="utf-8")
            elif block.title == "first terminal":
                servers.enter_context(_server(block, folder, list(ports.values())))
            elif block.title != "install":
                begun = time.monotonic()
                done = subprocess.run(
                    _command(block), cwd=folder, env=_environment(), capture_output=True, text=True, timeout=3600
                )
                assert done.returncode == 0, f"{page.name}:\n{block.code}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
                seconds[block.code.strip().splitlines()[0]] = time.monotonic() - begun
    return seconds
