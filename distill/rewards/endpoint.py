"""A black-box reward: an HTTP server that is sent images and answers with numbers.

It can be a classifier in another language, people who vote, the size of a file. It needs no gradient; the
policy-gradient estimators work with it. `EndpointReward` describes request and response.
"""

from __future__ import annotations

import base64
import io
import json
import math
import time
from typing import Any
from urllib.parse import urlsplit

import httpx
import torch
from torch import Tensor

from redif_sdk.errors import InvalidRequest, RuntimeUnavailable, TrainingDiverged
from redif_sdk.images import to_pil

__all__ = ["EndpointReward", "is_endpoint"]

LARGEST_ANSWER = 1 << 24  # bytes
_FIRST_WAIT = 0.5  # seconds before the second attempt; doubled for each one after it
_PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})


def is_endpoint(name: str) -> bool:
    """Whether a reward's name is a URL."""
    return name.startswith(("http://", "https://"))


class EndpointReward:
    """POSTs ``{"images": [PNG as base64, ...], "targets": [...], "class_labels": [...] or null}``.

    The answer is ``{"rewards": [number, ...]}``, one for each image, higher is better. null or NaN means that an image
    could not be judged: it gets the lowest reward of its batch, and is counted in `unjudged`.

    `timeout` is in seconds, for each attempt. Failed connections, time-outs and temporary statuses (429, 5xx) are
    retried `retries` times with growing pauses. Raises InvalidRequest for a refusal or a malformed answer,
    RuntimeUnavailable when all attempts failed, TrainingDiverged if no image was judged.
    """

    def __init__(self, url: str, *, timeout: float = 30.0, retries: int = 4) -> None:
        parts = urlsplit(url)
        if not is_endpoint(url) or not parts.hostname:
            raise InvalidRequest(f"{url!r:.200} is not the URL of a reward; give http://HOST:PORT/PATH")
        if timeout <= 0 or retries < 0:
            raise InvalidRequest(f"timeout is {timeout} and retries {retries}; give more than 0, and at least 0")
        self.url, self.timeout, self.retries = url, timeout, retries
        self.name = f"{parts.scheme}://{parts.hostname}{f':{parts.port}' if parts.port else ''}{parts.path}"
        self.unjudged = 0

    @torch.no_grad()
    def __call__(self, images: Tensor, targets: Tensor, condition: Tensor | None) -> Tensor:
        """``images`` and ``targets`` (B, C, H, W) in [-1, 1], ``condition`` (B,) int64 or None -> (B,) float32."""
        body = {
            "images": _encoded(images),
            "targets": _encoded(targets),
            "class_labels": None if condition is None else condition.tolist(),
        }
        answer = self._ask(json.dumps(body).encode())
        values = answer.get("rewards") if isinstance(answer, dict) else None
        if not isinstance(values, list) or len(values) != len(images):
            count = len(values) if isinstance(values, list) else "no list of"
            raise InvalidRequest(f"the reward {self.name} answered {count} rewards for {len(images)} images")
        if not all(
            value is None or (isinstance(value, int | float) and not isinstance(value, bool)) for value in values
        ):
            raise InvalidRequest(f"the reward {self.name} answered with a value that is not a number: {values!r:.100}")
        judged = [float(value) for value in values if value is not None and math.isfinite(value)]
        if not judged:
            raise TrainingDiverged(f"the reward {self.name} judged none of {len(images)} images; look at its log")
        self.unjudged += len(values) - len(judged)
        lowest = min(judged)
        finite = [lowest if value is None or not math.isfinite(value) else float(value) for value in values]
        return torch.tensor(finite, dtype=torch.float32)

    def _ask(self, body: bytes) -> Any:
        """The answer to `body`, decoded from JSON; None if it is too long."""
        said = ""
        with httpx.Client(timeout=self.timeout, headers={"Content-Type": "application/json"}) as client:
            for attempt in range(self.retries + 1):
                if attempt:
                    time.sleep(_FIRST_WAIT * 2 ** (attempt - 1))
                try:
                    with client.stream("POST", self.url, content=body) as response:
                        data = _limited(response)
                except httpx.TransportError as error:
                    said = " ".join(str(error).split()) or type(error).__name__
                    continue
                if response.status_code not in _PASSING:
                    return self._decoded(response.status_code, data)
                said = _excerpt(response.status_code, data)
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


def _encoded(images: Tensor) -> list[str]:
    """Images (B, C, H, W) in [-1, 1] as base64 PNG."""
    levels = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()
    encoded = []
    for image in to_pil(levels):
        buffer = io.BytesIO()
        image.save(buffer, format="PNG", compress_level=1)
        encoded.append(base64.b64encode(buffer.getvalue()).decode())
    return encoded
