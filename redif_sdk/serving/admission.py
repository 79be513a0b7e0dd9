"""Admission control: queue limit and API keys."""

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
_LONGEST_WAIT = 60  # largest Retry-After, in seconds


class Busy(Exception):  # noqa: N818  # not an error of the server
    """The queue is full. `retry_after`: whole seconds."""

    def __init__(self, pending: int, retry_after: int = 1) -> None:
        super().__init__(f"the queue is full ({pending} images are waiting); try again in {retry_after} s")
        self.retry_after = retry_after


class Admission:
    """Counts the images that were accepted and not yet answered."""

    def __init__(self, limit: int, metrics: Metrics) -> None:
        self._limit, self._metrics, self._pending = limit, metrics, 0
        self._answered: deque[tuple[float, int]] = deque(maxlen=_REMEMBERED)  # (time, number of images)

    @property
    def pending(self) -> int:
        return self._pending

    def enter(self, images: int) -> None:
        """Accept `images` images. Raises Busy if the queue would exceed its limit."""
        if self._pending + images > self._limit:
            self._metrics.rejected.inc()
            raise Busy(self._pending, self._wait())
        self._change(images)

    def leave(self, images: int) -> None:
        """Take `images` images out: they were answered, or their client left."""
        self._change(-images)
        self._answered.append((monotonic(), images))

    def _wait(self) -> int:
        """Whole seconds until the queue should be done, at the rate of the last answers."""
        if len(self._answered) < 2:
            return 1
        seconds = max(monotonic() - self._answered[0][0], 1e-3)
        rate = sum(images for _, images in self._answered) / seconds
        return min(max(math.ceil(self._pending / max(rate, 1e-9)), 1), _LONGEST_WAIT)

    def _change(self, images: int) -> None:
        self._pending += images
        self._metrics.pending.set(self._pending)


class Keys:
    """The API keys, kept as digests and compared in constant time."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    def allow(self, authorization: str | None) -> bool:
        """Whether the header ``Authorization: Bearer KEY`` holds one of the keys, or no keys are set."""
        if not self._digests:
            return True
        scheme, _, key = (authorization or "").partition(" ")
        given = hashlib.sha256(key.strip().encode()).digest()
        matches = [hmac.compare_digest(given, digest) for digest in self._digests]
        return scheme.lower() == "bearer" and any(matches)
