"""The settings of a server: batching, limits and API keys. Checked once, when it starts."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from redif_sdk.errors import InvalidRequest

__all__ = ["KEYS", "ServeSettings", "keys_of_environment"]

KEYS = "REDIF_API_KEYS"
_ROOT_PATH = re.compile(r"(/(?!\.{1,2}(/|$))[A-Za-z0-9._~-]+)+")


def keys_of_environment() -> tuple[str, ...]:
    """The API keys in ``REDIF_API_KEYS``, separated by commas or newlines (others can read a command line)."""
    return tuple(key.strip() for key in os.environ.get(KEYS, "").replace(",", "\n").splitlines() if key.strip())


@dataclass(frozen=True)
class ServeSettings:
    """Batching and limits of a server. Raises InvalidRequest for a value that is not allowed.

    Attributes:
        max_batch: largest number of images per engine call.
        max_wait_ms: milliseconds that the first image of a batch waits for others while the engine is idle; while it
            computes, the next batch gathers anyway.
        concurrency: simultaneous engine calls per student.
        max_queue: largest number of images accepted and not yet answered; requests beyond it get status 429.
        max_images: largest number of images per request.
        max_pixels: largest number of pixels per image, for students with free sizes.
        timeout_s: seconds for one request.
        max_body_bytes: largest request body of JSON.
        max_upload_bytes: largest request body with images.
        api_keys: the keys that are accepted; empty: no key is needed.
        cors_origins: origins whose pages may send requests from a browser.
        kept_bytes: total size of the images kept for URLs.
        kept_s: seconds that they are kept.
        marks: whether files say that they were generated, and by what.
        root_path: the path below which a proxy publishes the server, such as "/images"; empty: none.
    """

    max_batch: int = 8
    max_wait_ms: float = 2.0
    concurrency: int = 1
    max_queue: int = 256
    max_images: int = 16
    max_pixels: int = 1 << 22
    timeout_s: float = 60.0
    max_body_bytes: int = 1 << 16
    max_upload_bytes: int = 1 << 24
    api_keys: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    kept_bytes: int = 1 << 26
    kept_s: float = 3600.0
    root_path: str = ""
    marks: bool = True

    def __post_init__(self) -> None:
        for name in (
            "max_batch",
            "concurrency",
            "max_queue",
            "max_images",
            "max_pixels",
            "max_body_bytes",
            "max_upload_bytes",
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InvalidRequest(f"{name} is {value!r}; give an integer of at least 1")
        if not 0 <= self.max_wait_ms <= 10_000:
            raise InvalidRequest(f"max_wait_ms is {self.max_wait_ms!r}; give milliseconds from 0 to 10000")
        if not 0 < self.timeout_s <= 86_400:
            raise InvalidRequest(f"timeout_s is {self.timeout_s!r}; give seconds, more than 0 and at most a day")
        if self.max_images > self.max_queue:
            raise InvalidRequest(
                f"max_images is {self.max_images}, more than max_queue, {self.max_queue}; a request of that size would "
                f"always be refused"
            )
        if self.root_path and not _ROOT_PATH.fullmatch(self.root_path):
            raise InvalidRequest(
                f"root_path is {self.root_path!r:.100}; give a path as the proxy has it, such as /images, and no "
                f"slash at its end"
            )
        if any(not key.isascii() or not key.isprintable() or " " in key or len(key) < 8 for key in self.api_keys):
            raise InvalidRequest("an API key must be at least 8 printable ASCII characters without spaces")
