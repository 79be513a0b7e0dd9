"""Images that start from an image, over HTTP: OpenAI's client, forms by hand, and what is no form or no image."""

from __future__ import annotations

import io
from base64 import b64decode
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray
from openai.types import ImageEditCompletedEvent, ImageEditPartialImageEvent
from PIL import Image

from redif_sdk import FastPipeline
from redif_sdk.serving.settings import ServeSettings
from tests.serving.conftest import running
from tests.serving.test_http import pixels
from tests.serving.test_openai import client

EDITS = "/v1/images/edits"


def png(image: Any) -> bytes:
    data = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(data, "PNG")
    return data.getvalue()


@pytest.fixture(scope="module")
def photo(pipeline: FastPipeline) -> NDArray[np.uint8]:
    height, width, channels = pipeline.manifest.image_shape
    drawn = np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return drawn[..., 0] if channels == 1 else drawn


@pytest.fixture(scope="module")
def mask(photo: NDArray[np.uint8]) -> NDArray[np.uint8]:
    found = np.zeros(photo.shape[:2], np.uint8)
    found[4:12, 6:20] = 255
    return found


def wanted(pipeline: FastPipeline, photo: NDArray[np.uint8], **asked: Any) -> NDArray[np.uint8]:
    images: NDArray[np.uint8] = pipeline("d", image=photo, output_type="uint8", **{"seed": 4, **asked}).images
    return images[..., 0] if images.shape[3] == 1 else images  # as a decoded file has it


def test_openais_client_edits(
    address: str, pipeline: FastPipeline, photo: NDArray[np.uint8], mask: NDArray[np.uint8]
) -> None:
    image = ("photo.png", png(photo), "image/png")
    with client(address) as one:
        asked = {"num_inference_steps": 3, "strength": 0.7}
        answer = one.images.edit(
            image=image, prompt="d", n=2, response_format="b64_json", extra_body={"seed": 4, **asked}
        )
        got = [pixels(b64decode(entry.b64_json or "")) for entry in answer.data or []]
        assert np.array_equal(got, wanted(pipeline, photo, num_images_per_prompt=2, **asked))
        answer = one.images.edit(
            image=image, mask=("mask.png", png(mask)), prompt="d", response_format="b64_json", extra_body={"seed": 4}
        )
        (entry,) = answer.data or []
        found = pixels(b64decode(entry.b64_json or ""))
        assert np.array_equal(found, wanted(pipeline, photo, mask_image=mask)[0])
        assert np.array_equal(found[mask == 0], photo[mask == 0])
    data = {"seed": "4", "class_label": "d"}
    varied = httpx.post(f"{address}/v1/images/variations", files={"image": png(photo)}, data=data, timeout=60).json()
    assert np.array_equal(pixels(b64decode(varied["data"][0]["b64_json"])), wanted(pipeline, photo)[0])


@pytest.mark.parametrize(("asked", "shown"), [(3, 1), (1, 1), (0, 0)])
@pytest.mark.parametrize("painted", [False, True])
def test_openais_client_streams_edits(
    address: str,
    pipeline: FastPipeline,
    photo: NDArray[np.uint8],
    mask: NDArray[np.uint8],
    asked: int,
    shown: int,
    painted: bool,
) -> None:
    """Previews of the steps that are run, of strength .7 the last two of three; then the image of a plain edit."""
    more: dict[str, Any] = {"mask": ("mask.png", png(mask))} if painted else {}
    more["extra_body"] = {"seed": 4, "num_inference_steps": 3, "strength": 0.7}
    with client(address) as one:
        image = ("photo.png", png(photo), "image/png")
        events = list(one.images.edit(image=image, prompt="d", stream=True, partial_images=asked, **more))
    assert [event.type for event in events] == ["image_edit.partial_image"] * shown + ["image_edit.completed"]
    given: dict[str, Any] = {"num_inference_steps": 3, "strength": 0.7} | ({"mask_image": mask} if painted else {})
    assert np.array_equal(pixels(b64decode(events[-1].b64_json)), wanted(pipeline, photo, **given)[0])
    preview = next(iter(pipeline.stream("d", image=photo, seed=4, **given)))
    for place, event in enumerate(events[:-1]):
        assert isinstance(event, ImageEditPartialImageEvent)
        assert event.partial_image_index == place
        assert np.array_equal(pixels(b64decode(event.b64_json)), np.asarray(preview))
    assert isinstance(events[-1], ImageEditCompletedEvent)
    assert (events[-1].size, events[-1].output_format, events[-1].background) == ("28x28", "png", "opaque")


def test_edits_of_several_clients_share_batches(
    address: str, pipeline: FastPipeline, photo: NDArray[np.uint8], mask: NDArray[np.uint8]
) -> None:
    """Some with a mask, some with another strength, some from noise: each gets its own image."""

    def ask(number: int) -> NDArray[np.uint8]:
        files = {"image": png(photo)} | ({"mask": png(mask)} if number % 3 == 1 else {})
        data = {"prompt": "d", "seed": str(number), **({"strength": "1"} if number % 3 == 2 else {})}
        answer = httpx.post(address + EDITS, files=files, data=data, timeout=60).json()
        return pixels(b64decode(answer["data"][0]["b64_json"]))

    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(ask, range(12)))
    for number, image in enumerate(found):
        more: dict[str, Any] = {"mask_image": mask} if number % 3 == 1 else {}
        more |= {"strength": 1.0} if number % 3 == 2 else {}
        alone = wanted(pipeline, photo, seed=number, **more)[0]
        assert np.abs(image.astype(int) - alone.astype(int)).max() <= 1, number


@pytest.mark.parametrize(
    ("files", "data", "status", "said"),
    [
        ({}, {"prompt": "d"}, 415, "send a form with files"),
        ({"image": b"not an image"}, {"prompt": "d"}, 400, "image is none of PNG, JPEG"),
        ({"image": png(Image.new("1", (9000, 9000)))}, {"prompt": "d"}, 400, "image has 9000 x 9000 pixels"),
        ({"image": "here", "mask": b"nothing"}, {"prompt": "d"}, 400, "mask is none of PNG"),
        ({"mask": "here"}, {"prompt": "d"}, 400, "image: 0 files were sent; send one"),
        ({"image": "here", "other": b"x"}, {"prompt": "d"}, 400, "other is a file; only image, image[], mask may be"),
        ({"image": "here"}, {"prompt": "d", "mask": "white"}, 400, "mask is text; send a file"),
        ({"image": "here"}, {"prompt": "d", "strength": "0"}, 400, "strength: Input should be greater than 0"),
        ({"image": "here"}, {"prompt": "d", "strength": "0.01"}, 400, "leaves no step to run"),
        ({"image": "here"}, {"prompt": "d", "colour": "red"}, 400, "colour: there is no such field"),
        ({"image": "here"}, {"prompt": "d", "n": "two"}, 400, "n: Input should be a valid integer"),
        ({"image": "here"}, {"prompt": "d", "n": "99"}, 400, "allows at most"),
        ({"image": "here"}, {"prompt": "d", "stream": "true", "n": "2"}, 400, "a stream sends one image, not 2"),
        ({"image": "here"}, {"prompt": "zebra"}, 400, "is not a class of tiny"),
        ({"image": b"\0" * (17 << 20)}, {"prompt": "d"}, 413, "the body has more than 16777216 bytes"),
    ],
)
def test_what_is_wrong_with_an_edit_is_said(
    address: str, photo: NDArray[np.uint8], files: dict[str, Any], data: dict[str, str], status: int, said: str
) -> None:
    sent = {name: png(photo) if content == "here" else content for name, content in files.items()}
    answer = httpx.post(address + EDITS, files=sent, data=data, timeout=60)
    assert said in answer.json()["error"]["message"]
    assert answer.status_code == status


def test_a_body_that_is_no_form_is_refused(address: str) -> None:
    kind = {"content-type": "multipart/form-data; boundary=x"}
    for content, headers in ((b"--y\r\n", kind), (b"\xff" * 100, kind), (b"", {"content-type": "multipart/form-data"})):
        answer = httpx.post(address + EDITS, content=content, headers=headers)
        assert answer.status_code == 400, content
        assert answer.json()["error"]["message"]


def test_edits_need_a_key_where_generations_do(pipeline: FastPipeline, photo: NDArray[np.uint8]) -> None:
    with running({"tiny": pipeline}, ServeSettings(api_keys=("key-one-1",))) as locked:
        asked: dict[str, Any] = {"files": {"image": png(photo)}, "data": {"prompt": "d"}, "timeout": 60}
        assert httpx.post(locked + EDITS, **asked).status_code == 401
        assert httpx.post(locked + EDITS, headers={"authorization": "Bearer key-one-1"}, **asked).status_code == 200
