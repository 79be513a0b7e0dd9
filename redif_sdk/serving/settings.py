"""What a server may be told: batching, bounds and who may ask. Checked once, when it starts."""

from __future__ import annotations

import os
from dataclasses import dataclass

from redif_sdk.errors import InvalidRequest

__all__ = ["KEYS", "ServeSettings", "keys_of_environment"]

KEYS = "REDIF_API_KEYS"


def keys_of_environment() -> tuple[str, ...]:
    """The API keys of ``REDIF_API_KEYS``, with commas or line ends between: a command line can be read by others."""
    return tuple(key.strip() for key in os.environ.get(KEYS, "").replace(",", "\n").splitlines() if key.strip())


@dataclass(frozen=True)
class ServeSettings:
    """How pictures are batched, and what is refused.

    `max_batch`: most pictures a call of the engine. `max_wait_ms`: how long the first picture of a batch waits for
    others while the engine is idle; while it computes, what comes gathers anyway. `concurrency`: engine calls at once,
    for each student. `max_queue`: most pictures that are accepted and not answered; what would exceed it gets 429.
    `max_images`: most pictures a request. `max_pixels`: of one picture, of students with free sizes. `timeout_s`: for
    one request. `max_body_bytes`: of a request. `api_keys`: who may ask; none: everybody. `cors_origins`: pages that
    may ask from a browser. `kept_bytes` and `kept_s`: how much, and how long, pictures are kept that were asked for as
    a URL. Raises InvalidRequest.
    """

    max_batch: int = 8
    max_wait_ms: float = 2.0
    concurrency: int = 1
    max_queue: int = 256
    max_images: int = 16
    max_pixels: int = 1 << 22
    timeout_s: float = 60.0
    max_body_bytes: int = 1 << 16
    api_keys: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    kept_bytes: int = 1 << 26
    kept_s: float = 3600.0

    def __post_init__(self) -> None:
        for name in ("max_batch", "concurrency", "max_queue", "max_images", "max_pixels", "max_body_bytes"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InvalidRequest(f"{name} is {value!r}; give a whole number of at least 1")
        if not 0 <= self.max_wait_ms <= 10_000:
            raise InvalidRequest(f"max_wait_ms is {self.max_wait_ms!r}; give milliseconds from 0 to 10000")
        if not 0 < self.timeout_s <= 86_400:
            raise InvalidRequest(f"timeout_s is {self.timeout_s!r}; give seconds, more than 0 and at most a day")
        if self.max_images > self.max_queue:
            raise InvalidRequest(
                f"max_images is {self.max_images}, more than the queue of {self.max_queue}; such a request could never "
                f"be accepted"
            )
        if any(not key.isascii() or not key.isprintable() or " " in key or len(key) < 8 for key in self.api_keys):
            raise InvalidRequest("an API key must be at least 8 printable ASCII characters without blanks")
