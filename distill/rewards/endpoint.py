"""A reward that is somebody else's program: a server that is shown pictures and answers with numbers.

It may be anything: a classifier in another language, people who vote, the size of a file. It needs no gradient, and the
estimators that need none work with it. What is asked, and what may be answered, is in `EndpointReward`.
"""

from __future__ import annotations

import base64
import io
import json
import math
import time
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import torch
from torch import Tensor

from redif_sdk.errors import InvalidRequest, RuntimeUnavailable, TrainingDiverged
from redif_sdk.images import to_pil

__all__ = ["EndpointReward", "is_endpoint"]

LARGEST_ANSWER = 1 << 24  # bytes
_FIRST_WAIT = 0.5  # seconds before the second attempt; doubled for each one after it
_PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})


def is_endpoint(name: str) -> bool:
    """Whether a reward's name is the address of one."""
    return name.startswith(("http://", "https://"))


class EndpointReward:
    """POSTs ``{"images": [PNG as base64, ...], "targets": [...], "class_labels": [...] or null}``.

    The answer is ``{"rewards": [number, ...]}``, one for each image, higher is better. null or NaN means that a picture
    could not be judged: it is given the lowest reward of its batch, and counted in `unjudged`.

    Each attempt may take `timeout` seconds. A connection that fails, a time-out and the statuses that pass by
    themselves (429, 5xx) are tried again, `retries` times, with growing pauses. Raises InvalidRequest for a refusal or
    an answer that is none, RuntimeUnavailable when all attempts failed, TrainingDiverged where no picture was judged.
    """

    def __init__(self, url: str, *, timeout: float = 30.0, retries: int = 4) -> None:
        parts = urlsplit(url)
        if not is_endpoint(url) or not parts.hostname:
            raise InvalidRequest(f"{url!r:.200} is no address of a reward; give http://HOST:PORT/PATH")
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
            raise InvalidRequest(f"the reward {self.name} answered something that is no number: {values!r:.100}")
        judged = [float(value) for value in values if value is not None and math.isfinite(value)]
        if not judged:
            raise TrainingDiverged(f"the reward {self.name} judged none of {len(images)} images; look at its log")
        self.unjudged += len(values) - len(judged)
        lowest = min(judged)
        finite = [lowest if value is None or not math.isfinite(value) else float(value) for value in values]
        return torch.tensor(finite, dtype=torch.float32)

    def _ask(self, body: bytes) -> Any:
        wait, said = _FIRST_WAIT, ""
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(wait)
                wait *= 2
            request = Request(self.url, data=body, headers={"Content-Type": "application/json"}, method="POST")
            try:
                with urlopen(request, timeout=self.timeout) as response:
                    data = response.read(LARGEST_ANSWER + 1)
            except HTTPError as error:
                said = f"status {error.code}: {error.read(300).decode(errors='replace')}"
                error.close()
                if error.code not in _PASSING:
                    raise InvalidRequest(f"the reward {self.name} refused the pictures ({said})") from error
                continue
            except (URLError, OSError) as error:  # TimeoutError is an OSError
                said = " ".join(str(getattr(error, "reason", error)).split()) or type(error).__name__
                continue
            try:
                return json.loads(data) if len(data) <= LARGEST_ANSWER else None
            except ValueError as error:
                raise InvalidRequest(f"the reward {self.name} answered no JSON: {data[:100]!r}") from error
        raise RuntimeUnavailable(
            f"the reward {self.name} did not answer, {self.retries + 1} times ({said}); start it, then --resume"
        )


def _encoded(images: Tensor) -> list[str]:
    """Pictures (B, C, H, W) in [-1, 1] as base64 PNG."""
    levels = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()
    encoded = []
    for picture in to_pil(levels):
        buffer = io.BytesIO()
        picture.save(buffer, format="PNG", compress_level=1)
        encoded.append(base64.b64encode(buffer.getvalue()).decode())
    return encoded
