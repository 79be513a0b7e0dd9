"""One command in a process of its own: its wall seconds, its peak memory, and what it printed."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Sequence
from pathlib import Path

__all__ = ["Measured", "PeakMemory", "measured"]


class Measured(dict[str, float]):
    """``seconds``, ``peak_rss`` and ``peak_anonymous`` (bytes); ``output`` is what went to standard output."""

    output: str


def measured(command: Sequence[str]) -> Measured:
    """Run a command to its end.

    Raises:
        SystemExit: it failed.
    """
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    memory = PeakMemory(process.pid)
    output = process.communicate()[0]
    found = Measured(seconds=time.perf_counter() - began, **memory.stop())
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed with exit code {process.returncode}")
    found.output = output
    return found


class PeakMemory:
    """Watches the memory of a process, ten times a second."""

    def __init__(self, pid: int) -> None:
        self._status = Path(f"/proc/{pid}/status")
        self._peaks = {"peak_rss": 0, "peak_anonymous": 0}
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def _watch(self) -> None:
        while not self._done.wait(0.1):
            try:
                lines = dict(line.split(":", 1) for line in self._status.read_text().splitlines())
            except OSError:
                return
            for peak, field in (("peak_rss", "VmHWM"), ("peak_anonymous", "RssAnon")):
                if field in lines:
                    self._peaks[peak] = max(self._peaks[peak], 1024 * int(lines[field].split()[0]))

    def stop(self) -> dict[str, int]:
        """The peaks in bytes: resident, and of it the process's own."""
        self._done.set()
        self._thread.join()
        return self._peaks
