"""How rewards that are servers are asked: with retries, in several requests at once, and never for ever."""

from __future__ import annotations

import base64
import io
import json
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx
import torch
from torch import Tensor

from redif_sdk.errors import InvalidRequest, RuntimeUnavailable, TrainingDiverged
from redif_sdk.images import to_pil

__all__ = ["Server", "encoded", "is_address", "judged", "public_name"]

LARGEST_ANSWER = 1 << 24  # bytes
LONGEST_PAUSE = 60.0  # seconds, whatever Retry-After says
FIRST_PAUSE = 0.5  # before the second attempt; doubled for each one after it
PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})

T = TypeVar("T")
R = TypeVar("R")


def is_address(name: str) -> bool:
    """Whether a reward's name is a URL."""
    return name.startswith(("http://", "https://"))


def public_name(url: str) -> str:
    """A URL without user, password, query and fragment.

    Raises:
        InvalidRequest: it is no URL of a server.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        parts, port = urlsplit(""), None
    if not is_address(url) or not parts.hostname:
        raise InvalidRequest(f"{url!r:.200} is not the URL of a reward; give http://HOST:PORT/PATH")
    return f"{parts.scheme}://{parts.hostname}{f':{port}' if port else ''}{parts.path}"


@dataclass
class Server:
    """A server that is sent JSON.

    Attributes:
        url: of the requests.
        timeout: seconds that an attempt may take.
        retries: attempts after the first. Failed connections, time-outs and temporary statuses (429, 5xx) are tried
            again, after pauses that grow, or as long as the answer's ``Retry-After``.
        concurrency: requests at once.
        headers: of every request, beside the content type.
    """

    url: str
    timeout: float = 30.0
    retries: int = 4
    concurrency: int = 4
    headers: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.name = public_name(self.url)
        if self.timeout <= 0 or self.retries < 0 or self.concurrency < 1:
            raise InvalidRequest(
                f"timeout is {self.timeout}, retries {self.retries}, concurrency {self.concurrency}; "
                "give more than 0, at least 0, and at least 1"
            )

    def ask_all(self, bodies: Sequence[dict[str, Any]], read: Callable[[Any, int], R]) -> list[R]:
        """What ``read(answer, place)`` makes of the answer to each of ``bodies``, in their order.

        Raises:
            InvalidRequest: the server refuses one, or answers with no JSON.
            RuntimeUnavailable: all attempts at one failed.
        """
        headers = {"Content-Type": "application/json", **self.headers}
        with (
            httpx.Client(timeout=self.timeout, headers=headers) as client,
            ThreadPoolExecutor(min(self.concurrency, len(bodies))) as pool,
        ):
            futures = [pool.submit(self._ask, client, json.dumps(body).encode()) for body in bodies]
            try:
                return [read(future.result(), place) for place, future in enumerate(futures)]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _ask(self, client: httpx.Client, body: bytes) -> Any:
        """The answer to ``body``, decoded from JSON; None if it is too long."""
        said, pause = "", FIRST_PAUSE
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(pause)
            pause = FIRST_PAUSE * 2**attempt
            try:
                with client.stream("POST", self.url, content=body) as response:
                    data = _limited(response)
            except httpx.TransportError as error:
                said = " ".join(str(error).split()) or type(error).__name__
                continue
            if response.status_code not in PASSING:
                return self._decoded(response.status_code, data)
            said = _excerpt(response.status_code, data)
            pause = max(pause, _retry_after(response))
        raise RuntimeUnavailable(
            f"the reward {self.name} did not answer, {self.retries + 1} times ({said}); start it, then --resume"
        )

    def _decoded(self, status: int, data: bytes) -> Any:
        if status != 200:
            raise InvalidRequest(f"the reward {self.name} refused the images ({_excerpt(status, data)})")
        try:
            return json.loads(data) if len(data) <= LARGEST_ANSWER else None
        except ValueError as error:
            raise InvalidRequest(f"the reward {self.name} answered with no JSON: {data[:100]!r}") from error


def judged(name: str, values: Sequence[float | None]) -> tuple[Tensor, Tensor]:
    """A score (N,) float32, and which of its images were judged (N,): the others got the lowest value there is.

    Raises:
        TrainingDiverged: no image was judged.
    """
    known = torch.tensor([value is not None and math.isfinite(value) for value in values])
    if not known.any():
        raise TrainingDiverged(f"the reward {name} judged none of {len(values)} images; look at its log")
    score = torch.tensor([math.inf if value is None else value for value in values], dtype=torch.float32)
    return torch.where(known, score, score[known].min()), known


def encoded(images: Tensor) -> list[str]:
    """Images (N, C, H, W) in [-1, 1] as base64 PNG."""
    levels = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()
    found = []
    for image in to_pil(levels):
        buffer = io.BytesIO()
        image.save(buffer, format="PNG", compress_level=1)
        found.append(base64.b64encode(buffer.getvalue()).decode())
    return found


def _retry_after(response: httpx.Response) -> float:
    """The seconds that an answer asks to wait, at most `LONGEST_PAUSE`; 0: it does not ask."""
    try:
        return min(LONGEST_PAUSE, max(0.0, float(response.headers.get("Retry-After", 0))))
    except ValueError:  # a date
        return 0.0


def _limited(response: httpx.Response) -> bytes:
    """The body of a response, no further than a little over `LARGEST_ANSWER`."""
    data = bytearray()
    for piece in response.iter_bytes():
        data += piece
        if len(data) > LARGEST_ANSWER:
            break
    return bytes(data)


def _excerpt(status: int, data: bytes) -> str:
    return f"status {status}: {data[:300].decode(errors='replace')}"
