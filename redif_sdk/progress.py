"""What a long command says while it works: bars on a terminal, else one line a stage and one every 30 seconds.

Everything goes to standard error, so that standard output is the result's.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, TextIO

__all__ = ["Progress", "Show"]

EVERY = 30.0  # seconds between lines where there is no terminal


class Show(Protocol):
    """Reports how far a stage is."""

    def __call__(self, done: float | None, note: str | Mapping[str, float] = "", /) -> None:
        """``done``: the share that is done, 0 to 1, if known. ``note``: a few words, or training's figures."""


@dataclass
class Progress:
    """The display of one command.

    Args:
        quiet: show nothing; seconds are counted all the same.
        file: where lines and bars go; default: standard error.
        every: seconds between lines where ``file`` is no terminal.
    """

    quiet: bool = False
    file: TextIO | None = None
    every: float = EVERY
    seconds: dict[str, float] = field(default_factory=dict)  # title of a stage -> how long it took

    @property
    def stream(self) -> TextIO:
        """Where it writes."""
        return self.file or sys.stderr

    def say(self, line: str) -> None:
        """One line, unless quiet."""
        if not self.quiet:
            print(line, file=self.stream, flush=True)

    @contextmanager
    def stage(self, title: str) -> Iterator[Show]:
        """One stage of the work. Yields the function that reports how far it is; it need not be called."""
        began = time.monotonic()
        display = self._nothing if self.quiet else self._bars if self.stream.isatty() else self._lines
        with display(title) as show:
            yield show
        self.seconds[title] = round(self.seconds.get(title, 0.0) + time.monotonic() - began, 1)

    @contextmanager
    def _nothing(self, title: str) -> Iterator[Show]:
        yield lambda done, note="", /: None

    @contextmanager
    def _bars(self, title: str) -> Iterator[Show]:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bars

        columns = (
            TextColumn("{task.description:<34}"),
            BarColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Bars(*columns, console=Console(file=self.stream)) as bars:
            task = bars.add_task(title, total=None, note="")

            def show(done: float | None, note: str | Mapping[str, float] = "", /) -> None:
                bars.update(task, total=None if done is None else 1.0, completed=done or 0.0, note=_text(note))

            yield show
            bars.update(task, total=1.0, completed=1.0)

    @contextmanager
    def _lines(self, title: str) -> Iterator[Show]:
        self.say(title)
        began, over = time.monotonic(), threading.Event()
        latest: list[Any] = [None, ""]

        def show(done: float | None, note: str | Mapping[str, float] = "", /) -> None:
            latest[:] = done, note

        def tick() -> None:
            while not over.wait(self.every):
                done, note = latest
                parts = [
                    "" if done is None else f"{100 * done:.0f} %",
                    _text(note),
                    f"{time.monotonic() - began:.0f} s",
                ]
                self.say(f"{title}: {', '.join(filter(None, parts))}")

        ticker = threading.Thread(target=tick, name="progress", daemon=True)
        ticker.start()
        try:
            yield show
        finally:
            over.set()
            ticker.join()


def _text(note: str | Mapping[str, float]) -> str:
    if isinstance(note, str):
        return note
    return f"mse {note['mse']:.4f}" if "mse" in note else ""
