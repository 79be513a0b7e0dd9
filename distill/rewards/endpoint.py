"""A black-box reward: an HTTP server that is sent images and answers with numbers.

It can be a classifier in another language, people who vote, the size of a file. It needs no gradient; the
policy-gradient estimators work with it. ``redif_sdk/reward_server/protocol.py`` has request and answer, ``redif
serve-reward`` makes such a server of a function.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

import torch
from pydantic import ValidationError
from torch import Tensor

from redif_sdk.distill.rewards.batch import Batch
from redif_sdk.distill.rewards.http import Server, encoded, judged
from redif_sdk.errors import InvalidRequest
from redif_sdk.reward_server.protocol import RewardAnswer, RewardRequest

__all__ = ["EndpointReward"]

SMALL = 1024  # numbers of a condition for an image that are sent as they are

_log = logging.getLogger(__name__)


class EndpointReward:
    """POSTs `RewardRequest`, and takes a `RewardAnswer`: one number an image, or several scores by name.

    An image that could not be judged (null or NaN) gets the lowest value of its batch, and is counted in `unjudged`.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout: float = 30.0,
        retries: int = 4,
        batch_size: int = 64,
        concurrency: int = 4,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        """
        Args:
            url: http://HOST:PORT/PATH. A fragment, ``#text=2,looks=0.5``, gives ``weights``.
            timeout, retries, concurrency: as `Server` has them.
            batch_size: images in one request, at most.
            weights: of the scores, by name; a name that is missing has 1, a score of weight 0 is left out.

        Raises:
            InvalidRequest: it is no URL of a server, or a number is out of range.
        """
        address, _, fragment = url.partition("#")
        self.server = Server(address, timeout, retries, concurrency)
        self.name = self.server.name
        if batch_size < 1:
            raise InvalidRequest(f"batch_size is {batch_size}; give at least 1")
        self.batch_size, self.unjudged = batch_size, 0
        self._left_out: set[str] = set()
        self.weights = dict(weights) if weights is not None else _weights(fragment, address)

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Tensor | dict[str, Tensor]:
        """The server's numbers for ``batch``: (N,) float32, or one such for each score.

        Raises:
            InvalidRequest: the server refuses the images, or its answer is malformed.
            RuntimeUnavailable: all attempts failed.
            TrainingDiverged: no image was judged.
        """
        images, targets = encoded(batch.images), encoded(batch.targets)
        request = RewardRequest(
            images=images,
            targets=targets,
            prompts=batch.prompts,
            class_labels=batch.class_labels,
            class_names=batch.class_names,
            conditions=self._conditions(batch) or None,
        ).model_dump()
        parts = [slice(low, low + self.batch_size) for low in range(0, len(images), self.batch_size)]
        bodies = [{name: _part(value, part) for name, value in request.items()} for part in parts]
        answers = self.server.ask_all(bodies, lambda answer, place: self._read(answer, len(bodies[place]["images"])))
        names = sorted(answers[0])
        if other := next((answer for answer in answers if sorted(answer) != names), None):
            raise InvalidRequest(
                f"the reward {self.name} does not give the same scores each time: {names} and {sorted(other)}"
            )
        scores, known = {}, torch.ones(len(images), dtype=torch.bool)
        for name in names:
            scores[name], judged_here = judged(self.name, [value for answer in answers for value in answer[name]])
            known &= judged_here
        self.unjudged += int((~known).sum())
        return scores[""] if names == [""] else scores

    def _conditions(self, batch: Batch) -> dict[str, list[Any]]:
        """The arrays that a user's own teacher is conditioned on: images in [-1, 1] as PNG, small ones as numbers."""
        if batch.teacher is None or batch.teacher.data is None:
            return {}
        found: dict[str, list[Any]] = {}
        for name, value in batch.conditions.items():
            shape = value.shape[1:]
            is_image = value.is_floating_point() and len(shape) == 3 and shape[0] in (1, 3)
            if is_image and float(value.abs().max()) <= 1:
                found[name] = encoded(value)
            elif shape.numel() <= SMALL:
                found[name] = value.tolist()
            elif name not in self._left_out:
                self._left_out.add(name)
                _log.warning(
                    "%s is not sent to %s: it is no image in [-1, 1], and has %d numbers",
                    name,
                    self.name,
                    shape.numel(),
                )
        return found

    def _read(self, answer: Any, count: int) -> dict[str, list[float | None]]:
        """The scores in an answer for ``count`` images."""
        try:
            found = RewardAnswer.model_validate(answer).by_name()
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"][:2])
            raise InvalidRequest(
                f"the reward {self.name} answered {str(answer)[:100]!r} ({where}: {first['msg']}); it must answer "
                '{"rewards": [a number an image]} or {"scores": {name: [...]}}'
            ) from error
        for name, values in found.items():
            if len(values) != count:
                of = f" of {name}" if name else ""
                raise InvalidRequest(f"the reward {self.name} answered {len(values)} numbers{of} for {count} images")
        return found


def _part(value: Any, part: slice) -> Any:
    """Of a list the part of one request; of lists by name that of each; None stays None."""
    return {name: each[part] for name, each in value.items()} if isinstance(value, dict) else value and value[part]


def _weights(fragment: str, address: str) -> dict[str, float]:
    """The weights in a URL's fragment, ``name=number,...``.

    Raises:
        InvalidRequest: a part is not so.
    """
    found = {}
    for part in filter(None, fragment.split(",")):
        name, equals, value = part.partition("=")
        try:
            found[name.strip()] = float(value)
        except ValueError:
            equals = ""
        if not equals:
            raise InvalidRequest(
                f"{part!r:.60} after # in {urlsplit(address).hostname}'s address is no weight; give NAME=NUMBER,..."
            )
    return found
