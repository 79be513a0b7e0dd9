"""OpenAI's own client against our server, and the example of the documentation."""

from __future__ import annotations

from base64 import b64decode
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from redif_sdk import FastPipeline
from redif_sdk.serving.settings import ServeSettings
from tests.serving.conftest import running
from tests.serving.test_http import expected, pixels

ROOT = Path(__file__).resolve().parents[2]


@contextmanager
def client(address: str, key: str = "none") -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0) as one:
        yield one


@pytest.fixture
def images(address: str) -> Iterator[Any]:
    with client(address) as one:
        yield one.images


def test_it_generates(images: Any, pipeline: FastPipeline) -> None:
    answer = images.generate(
        model="tiny", prompt="d", n=2, size="28x28", response_format="b64_json", extra_body={"seed": 4}
    )
    got = [pixels(b64decode(image.b64_json)) for image in answer.data]
    assert np.array_equal(got, expected(pipeline, "d", 4, 2))
    url = images.generate(prompt="d", response_format="url", extra_body={"seed": 4}).data[0].url
    assert np.array_equal(pixels(httpx.get(url).content), expected(pipeline, "d", 4)[0])


@pytest.mark.parametrize("wanted", [0, 1, 2, 3])
def test_it_streams_previews_and_then_the_same_picture(images: Any, pipeline: FastPipeline, wanted: int) -> None:
    events = list(
        images.generate(
            prompt="e", stream=True, partial_images=wanted, extra_body={"seed": 5, "num_inference_steps": 3}
        )
    )
    kinds = [event.type for event in events]
    assert kinds == ["image_generation.partial_image"] * min(wanted, 2) + ["image_generation.completed"]
    assert [event.partial_image_index for event in events[:-1]] == list(range(min(wanted, 2)))
    assert np.array_equal(pixels(b64decode(events[-1].b64_json)), expected(pipeline, "e", 5, steps=3)[0])
    previews = [np.asarray(image) for image in pipeline.stream("e", seed=5, num_inference_steps=3)][:-1]
    for event, preview in zip(events[:-1], previews[2 - min(wanted, 2) :], strict=True):
        assert np.array_equal(pixels(b64decode(event.b64_json)), preview)


def test_it_lists_the_models(address: str) -> None:
    with client(address) as one:
        assert [model.id for model in one.models.list()] == ["tiny", "plain"]
        assert one.models.retrieve("plain").owned_by == "redif-sdk"


def test_it_raises_its_own_errors(images: Any, pipeline: FastPipeline) -> None:
    with pytest.raises(openai.BadRequestError, match="is not a class of tiny"):
        images.generate(prompt="zebra")
    with pytest.raises(openai.NotFoundError):
        images.generate(prompt="a", model="dall-e-3")
    with running({"tiny": pipeline}, ServeSettings(api_keys=("key-one-1",))) as locked:
        with client(locked) as stranger, pytest.raises(openai.AuthenticationError):
            stranger.images.generate(prompt="a")
        with client(locked, "key-one-1") as known:
            assert known.images.generate(prompt="a").data


def test_the_documentation_s_example_runs(address: str) -> None:
    blocks = (ROOT / "docs/serving.md").read_text(encoding="utf-8").split("```python\n")
    (example,) = [block.partition("```")[0] for block in blocks if block.startswith("# openai\n")]
    assert "http://127.0.0.1:8000" in example
    names: dict[str, Any] = {}
    exec(example.replace("http://127.0.0.1:8000", address), names)
    names["client"].close()
    assert len(names["images"]) == 2
