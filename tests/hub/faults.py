"""What can go wrong on call: the faults that strike requests, and the wire that breaks after so many bytes."""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Refuse:
    """Answer with `status`, and do nothing. `code` is the X-Error-Code; `headers` as given."""

    status: int
    message: str = "refused by the stand-in"
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class CutUpload:
    """Drop the connection when `after` bytes of the request's body were read. The request is not carried out."""

    after: int


@dataclass(frozen=True)
class CutDownload:
    """Promise the whole body, send `after` bytes of it, drop the connection (`reset`: by RST, else as if it ended)."""

    after: int
    reset: bool = False


@dataclass(frozen=True)
class LoseAnswer:
    """Carry the request out, and drop the connection without an answer."""

    reset: bool = False


@dataclass(frozen=True)
class Truncate:
    """Send only `keep` bytes of the body, and a Content-Length that fits them."""

    keep: int


@dataclass(frozen=True)
class Corrupt:
    """Flip every bit of the body's byte `at` (negative: from the end). The length and all headers stay true."""

    at: int = 0


Action = Refuse | CutUpload | CutDownload | LoseAnswer | Truncate | Corrupt


@dataclass
class Fault:
    """An action for requests whose method and path (as sent, with the query) match, past the first `after` of them."""

    action: Action
    method: str
    path: str
    after: int
    times: int | None
    seen: int = 0
    struck: int = 0


class Faults:
    """The faults that are set. A request meets the first that matches it and is not used up."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._faults: list[Fault] = []

    def add(
        self, action: Action, *, method: str | None = None, path: str = "", after: int = 0, times: int | None = 1
    ) -> Fault:
        """Let `action` strike `times` times (None: always), past the first `after` requests that match.

        Both are regular expressions; `method` must match whole, `path` anywhere. Without `method`: those that have a
        body to spoil, or all.
        """
        if method is None:
            method = {CutUpload: "POST|PUT", CutDownload: "GET", Truncate: "GET", Corrupt: "GET"}.get(
                type(action), ".*"
            )
        fault = Fault(action, method, path, after, times)
        with self._lock:
            self._faults.append(fault)
        return fault

    def clear(self) -> None:
        with self._lock:
            self._faults.clear()

    def match(self, method: str, path: str) -> Action | None:
        with self._lock:
            for fault in self._faults:
                if not re.fullmatch(fault.method, method) or not re.search(fault.path, path):
                    continue
                fault.seen += 1
                if fault.seen > fault.after and (fault.times is None or fault.struck < fault.times):
                    fault.struck += 1
                    return fault.action
        return None


class Wire:
    """Counts the bytes of bodies, both ways, and breaks after a budget of them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._left: int | None = None
        self.passed = 0
        self.reset = False

    @property
    def broken(self) -> bool:
        return self._left == 0

    def budget(self, total: int | None, reset: bool = False) -> None:
        with self._lock:
            self._left, self.reset = total, reset

    def take(self, wanted: int) -> tuple[int, bool]:
        """How many of `wanted` bytes may pass, and whether the wire is broken after them."""
        with self._lock:
            allowed = wanted if self._left is None else min(wanted, self._left)
            self.passed += allowed
            if self._left is not None:
                self._left -= allowed
            return allowed, self._left == 0
