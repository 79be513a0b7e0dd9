"""What is let in: a bounded number of pictures, and whoever has a key."""

from __future__ import annotations

import hashlib
import hmac
import math
from collections import deque
from collections.abc import Sequence
from time import monotonic

from redif_sdk.serving.metrics import Metrics

__all__ = ["Admission", "Busy", "Keys"]

_REMEMBERED = 64  # answers
_LONGEST_WAIT = 60  # seconds that anybody is told to wait


class Busy(Exception):  # noqa: N818  # it is no error of the server
    """The queue is full. `retry_after`: seconds, whole."""

    def __init__(self, pending: int, retry_after: int = 1) -> None:
        super().__init__(f"{pending} pictures are waiting, as many as may; try again in {retry_after} s")
        self.retry_after = retry_after


class Admission:
    """Counts the pictures that were accepted and not answered."""

    def __init__(self, limit: int, metrics: Metrics) -> None:
        self._limit, self._metrics, self._pending = limit, metrics, 0
        self._answered: deque[tuple[float, int]] = deque(maxlen=_REMEMBERED)  # when, and how many pictures

    @property
    def pending(self) -> int:
        return self._pending

    def enter(self, pictures: int) -> None:
        """Accept that many pictures. Raises Busy where they are too many."""
        if self._pending + pictures > self._limit:
            self._metrics.rejected.inc()
            raise Busy(self._pending, self._wait())
        self._change(pictures)

    def leave(self, pictures: int) -> None:
        """They were answered, or nobody waits for them any more."""
        self._change(-pictures)
        self._answered.append((monotonic(), pictures))

    def _wait(self) -> int:
        """Seconds, whole, in which what is waiting should be done, at the pace of the last answers."""
        if len(self._answered) < 2:
            return 1
        seconds = max(monotonic() - self._answered[0][0], 1e-3)
        pace = sum(pictures for _, pictures in self._answered) / seconds
        return min(max(math.ceil(self._pending / max(pace, 1e-9)), 1), _LONGEST_WAIT)

    def _change(self, pictures: int) -> None:
        self._pending += pictures
        self._metrics.pending.set(self._pending)


class Keys:
    """The API keys, held as digests: comparing takes the same time whatever was given."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    def allow(self, authorization: str | None) -> bool:
        """Whether the header ``Authorization: Bearer KEY`` holds one of the keys, or none is needed."""
        if not self._digests:
            return True
        scheme, _, key = (authorization or "").partition(" ")
        given = hashlib.sha256(key.strip().encode()).digest()
        matches = [hmac.compare_digest(given, digest) for digest in self._digests]
        return scheme.lower() == "bearer" and any(matches)
