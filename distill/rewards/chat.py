"""A vision-language model as a judge: a chat endpoint like OpenAI's is shown each image, and asked for a number."""

from __future__ import annotations

import os
import re
from typing import Any

import torch
from torch import Tensor

from redif_sdk.distill.rewards.batch import Batch
from redif_sdk.distill.rewards.http import Server, encoded, judged
from redif_sdk.errors import InvalidRequest

__all__ = ["ChatReward"]

QUESTION = (
    "How well does this image show the following, from 0 (not at all) to 10 (perfectly)? Answer with one number "
    "and nothing else.\n\n{prompt}"
)
KEY = "REDIF_CHAT_KEY"
LONGEST_ANSWER = 16  # tokens
_NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?")


class ChatReward:
    """The first number in a model's answer to a question about each image: (N,).

    An answer without a number counts as an image that could not be judged, as with `EndpointReward`.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        question: str = QUESTION,
        api_key: str | None = None,
        timeout: float = 60.0,
        retries: int = 4,
        concurrency: int = 8,
    ) -> None:
        """
        Args:
            url: of the API, such as http://127.0.0.1:8000/v1.
            model: the name that the server knows.
            question: ``{prompt}`` stands for an image's prompt, or the name of its class.
            api_key: None: what the environment's REDIF_CHAT_KEY says, if anything.
            timeout, retries, concurrency: as `Server` has them.

        Raises:
            InvalidRequest: it is no URL of a server, or no model is named.
        """
        if not model:
            raise InvalidRequest(f"no model is named; give chat:{url}#MODEL")
        key = api_key if api_key is not None else os.environ.get(KEY, "")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.server = Server(f"{url.rstrip('/')}/chat/completions", timeout, retries, concurrency, headers)
        self.name, self.model, self.question, self.unjudged = f"chat:{model}", model, question, 0

    @classmethod
    def named(cls, name: str) -> ChatReward:
        """Of ``chat:URL#MODEL``."""
        url, _, model = name.removeprefix("chat:").partition("#")
        return cls(url, model)

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Tensor:
        """The model's numbers for ``batch``: (N,) float32.

        Raises:
            InvalidRequest: there is neither a prompt nor a class name to ask about; the server refuses, or its answer
                is no chat completion.
            RuntimeUnavailable: all attempts failed.
            TrainingDiverged: no answer held a number.
        """
        subjects = batch.prompts or batch.class_names
        if subjects is None and "{prompt}" in self.question:
            raise InvalidRequest("the images have neither prompts nor class names; give a question without {prompt}")
        images = encoded(batch.images)
        bodies = [self._body(image, subjects[place] if subjects else "") for place, image in enumerate(images)]
        score, known = judged(self.name, self.server.ask_all(bodies, self._read))
        self.unjudged += int((~known).sum())
        return score

    def _body(self, image: str, subject: str) -> dict[str, Any]:
        content = [
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{image}"}},
            {"type": "text", "text": self.question.replace("{prompt}", subject)},
        ]
        messages = [{"role": "user", "content": content}]
        return {"model": self.model, "messages": messages, "max_tokens": LONGEST_ANSWER, "temperature": 0}

    def _read(self, answer: Any, place: int) -> float | None:
        try:
            text = answer["choices"][0]["message"]["content"]
        except (KeyError, IndexError, TypeError) as error:
            raise InvalidRequest(
                f"the reward {self.name} answered no chat completion: {str(answer)[:100]!r}"
            ) from error
        found = _NUMBER.search(text or "")
        return float(found[0]) if found else None
