"""A real server over a real socket: images, refusals, limits, keys, and clients that leave."""

from __future__ import annotations

import asyncio
import io
import json
import random
import re
import socket
import threading
import time
from base64 import b64decode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from numpy.typing import NDArray
from PIL import Image

from redif_sdk import FastPipeline
from redif_sdk.errors import InvalidRequest
from redif_sdk.serving.encode import KeptFiles
from redif_sdk.serving.settings import ServeSettings
from tests.nonfinite import BAD_CLASS, poisoned
from tests.serving.conftest import running

PATH = "/v1/images/generations"


def pixels(data: bytes) -> NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(data)))


def from_json(answer: Any) -> list[NDArray[np.uint8]]:
    return [pixels(b64decode(entry["b64_json"])) for entry in answer["data"]]


def expected(pipeline: FastPipeline, label: Any, seed: Any, n: int = 1, steps: int = 2) -> NDArray[np.uint8]:
    labels = {} if label is None else {"class_labels": label}
    out = pipeline(**labels, seed=seed, num_images_per_prompt=n, num_inference_steps=steps, output_type="uint8")
    return out.images[..., 0]


def counter(address: str, name: str) -> float:
    lines = httpx.get(f"{address}/metrics").text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))


@pytest.mark.parametrize("steps", [2, 3])
def test_a_seed_is_the_same_picture_over_http_as_in_python(address: str, pipeline: FastPipeline, steps: int) -> None:
    body = {"prompt": "C", "n": 3, "seed": 7, "num_inference_steps": steps}
    answer = httpx.post(address + PATH, json=body).json()
    assert np.array_equal(from_json(answer), expected(pipeline, "c", 7, 3, steps))
    assert answer["seeds"] == [[7, 0], [7, 1], [7, 2]]
    again = httpx.post(address + PATH, json={**body, "n": 1, "seed": [answer["seeds"][2]]}).json()
    assert np.array_equal(from_json(again)[0], from_json(answer)[2])


def test_batched_with_strangers_it_is_the_same_picture(address: str, pipeline: FastPipeline) -> None:
    """Sixty requests at once, of two students and two numbers of steps, share batches; none sees another."""
    drawn = random.Random(0)
    wanted = [(drawn.randrange(10), drawn.randrange(2**64), drawn.choice([2, 3])) for _ in range(60)]
    batches = counter(address, "redif_batch_images_count")

    async def ask() -> list[Any]:
        async with httpx.AsyncClient(base_url=address, timeout=3000) as client:
            bodies = [{"class_label": c, "seed": seed, "num_inference_steps": k} for c, seed, k in wanted]
            return [answer.json() for answer in await asyncio.gather(*(client.post(PATH, json=b) for b in bodies))]

    answers = asyncio.run(ask())
    for (label, seed, steps), answer in zip(wanted, answers, strict=True):
        assert np.array_equal(from_json(answer)[0], expected(pipeline, label, seed, steps=steps)[0])
    assert counter(address, "redif_batch_images_count") - batches < len(wanted)  # some were batched


def test_an_unconditional_student_needs_no_prompt(address: str, plain_student: Path) -> None:
    plain = FastPipeline.from_pretrained(plain_student, runtime="onnxruntime")
    answer = httpx.post(address + PATH, json={"model": "plain", "prompt": "", "n": 2, "seed": 3}).json()
    assert np.array_equal(from_json(answer), expected(plain, None, 3, 2))


@pytest.mark.parametrize("output", ["png", "webp"])
def test_a_url_leads_to_the_picture(address: str, pipeline: FastPipeline, output: str) -> None:
    body = {"prompt": "a", "seed": 1, "response_format": "url", "output_format": output}
    url = httpx.post(address + PATH, json=body).json()["data"][0]["url"]
    answer = httpx.get(url)
    assert answer.headers["content-type"] == f"image/{output}"
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(answer.content)).convert("L")), expected(pipeline, 0, 1)[0])
    assert httpx.get(url[:-8] + "xxxx." + output).status_code == 404


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"prompt": "zebra"}, 400, "'zebra' is not a class of tiny; use 0 to 9"),
        ({"prompt": "a", "n": 17}, 400, "at most 16"),
        ({"prompt": "a", "n": 0}, 400, "n:"),
        ({"prompt": "a", "n": "2"}, 400, "n:"),
        ({"prompt": "a", "size": "big"}, 400, "WIDTHxHEIGHT"),
        ({"prompt": "a", "size": "512x512"}, 400, "height=512 is not supported"),
        ({"prompt": "a", "num_inference_steps": 5}, 400, "choose from 2, 3"),
        ({"prompt": "a", "seed": -1}, 400, "seed is -1"),
        ({"prompt": "a", "seed": [1, 2]}, 400, "2 seeds for 1 images"),
        ({"prompt": "a", "class_label": "b"}, 400, "both name the class"),
        ({"prompt": "a", "model": "dall-e-3"}, 404, "this server has tiny, plain"),
        ({"prompt": "a", "mask": "x"}, 400, "mask:"),
        ({"prompt": "a", "background": "transparent"}, 400, "background:"),
        ({"prompt": "a", "stream": True, "n": 2}, 400, "a stream sends one image"),
        ({"model": "plain", "prompt": "cat"}, 400, "unconditional"),
        ({}, 400, "class_labels is required"),
    ],
)
def test_what_cannot_be_done_is_refused_in_openai_s_shape(
    address: str, body: dict[str, Any], status: int, words: str
) -> None:
    answer = httpx.post(address + PATH, json=body)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert words in error["message"]
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"\xff\xfe", b'{"prompt": 3}', b"[" * 60000, b'{"seed": 1e999}'])
def test_a_body_that_is_no_request_is_refused(address: str, data: bytes) -> None:
    answer = httpx.post(address + PATH, content=data, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_large_bodies_are_refused_whether_they_say_so_or_not(address: str) -> None:
    large = b"x" * (1 << 17)
    assert httpx.post(address + PATH, content=large).status_code == 413
    assert httpx.post(address + PATH, content=iter([large[:1000]] * 131)).status_code == 413


def test_every_answer_has_its_request_s_id(address: str) -> None:
    assert httpx.get(f"{address}/healthz", headers={"x-request-id": "abc-1"}).headers["x-request-id"] == "abc-1"
    forged = httpx.get(f"{address}/healthz", headers={"x-request-id": "a" * 65}).headers["x-request-id"]
    assert len(forged) == 16


def test_health_models_and_metrics(address: str) -> None:
    assert httpx.get(f"{address}/healthz").json() == {"status": "ok"}
    assert httpx.get(f"{address}/readyz").status_code == 200
    models = httpx.get(f"{address}/v1/models").json()["data"]
    assert [model["id"] for model in models] == ["tiny", "plain"]
    assert models[0]["class_names"] == list("abcdefghij")
    assert httpx.get(f"{address}/v1/models/plain").json()["num_inference_steps"] == [2, 3]
    assert httpx.get(f"{address}/v1/models/other").status_code == 404
    before = counter(address, 'redif_images_total{model="tiny"}')
    httpx.post(address + PATH, json={"prompt": "a", "n": 3})
    assert counter(address, 'redif_images_total{model="tiny"}') == before + 3
    assert counter(address, "redif_pending_images") == 0


def test_the_page_loads_nothing_from_elsewhere(address: str) -> None:
    text = httpx.get(f"{address}/docs").text
    assert PATH in text
    assert "src=" not in text
    assert "//" not in text.replace("http://HOST:PORT", "")
    assert httpx.get(f"{address}/openapi.json").json()["paths"][PATH]["post"]


def test_with_keys_only_they_open_the_api(pipeline: FastPipeline) -> None:
    with running({"tiny": pipeline}, ServeSettings(api_keys=("key-one-1", "key-two-2"))) as address:
        for headers in ({}, {"authorization": "Bearer wrong-key"}, {"authorization": "Basic key-one-1"}):
            answer = httpx.post(address + PATH, json={"prompt": "a"}, headers=headers)
            assert answer.status_code == 401
            assert answer.json()["error"]["type"] == "authentication_error"
        for key in ("key-one-1", "key-two-2"):
            body = {"prompt": "a", "response_format": "url"}
            answer = httpx.post(address + PATH, json=body, headers={"authorization": f"Bearer {key}"})
            assert answer.status_code == 200
            assert httpx.get(answer.json()["data"][0]["url"]).status_code == 200  # its name is secret
        assert httpx.get(f"{address}/v1/models").status_code == 401
        assert httpx.get(f"{address}/readyz").status_code == 200


def test_cors_is_off_unless_an_origin_is_named(address: str, pipeline: FastPipeline) -> None:
    origin = {"origin": "https://page.example"}
    assert "access-control-allow-origin" not in httpx.get(f"{address}/healthz", headers=origin).headers
    settings = ServeSettings(cors_origins=("https://page.example",), api_keys=("key-one-1",))
    with running({"tiny": pipeline}, settings) as other:
        preflight = httpx.options(other + PATH, headers=origin | {"access-control-request-method": "POST"})
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == "https://page.example"
        stranger = httpx.get(f"{other}/healthz", headers={"origin": "https://evil.example"})
        assert "access-control-allow-origin" not in stranger.headers


class Slow(FastPipeline):
    """A real pipeline that waits until it is let go."""

    go: threading.Event
    calls: list[int]

    def __call__(self, *args: Any, **options: Any) -> Any:
        self.calls.append(len(options["seed"]))
        assert self.go.wait(300)
        return super().__call__(*args, **options)


@pytest.fixture
def slow(tiny_student: Path) -> Slow:
    pipeline = Slow.from_pretrained(tiny_student, runtime="onnxruntime")
    assert isinstance(pipeline, Slow)
    pipeline.go, pipeline.calls = threading.Event(), []
    pipeline.go.set()
    return pipeline


def until(condition: Any) -> None:
    end = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_full_queue_says_so_and_when_to_come_again(slow: Slow) -> None:
    with running({"tiny": slow}, ServeSettings(max_queue=3, max_images=3)) as address:
        slow.go.clear()
        answers: list[httpx.Response] = []
        body = {"prompt": "a", "n": 3}
        asking = threading.Thread(target=lambda: answers.append(httpx.post(address + PATH, json=body, timeout=3000)))
        asking.start()
        until(lambda: counter(address, "redif_pending_images") == 3)
        refused = httpx.post(address + PATH, json={"prompt": "a"})
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        with (
            openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client,
            pytest.raises(openai.RateLimitError, match=r"the queue is full \(3 images are waiting\); try again in"),
        ):
            client.images.generate(model="tiny", prompt="a")
        slow.go.set()
        asking.join()
        assert answers[0].status_code == 200
        assert httpx.post(address + PATH, json={"prompt": "a"}).status_code == 200


def test_a_client_that_leaves_is_not_computed_for(slow: Slow) -> None:
    with running({"tiny": slow}, ServeSettings(max_batch=1)) as address:
        slow.calls.clear()
        slow.go.clear()
        host, port = address.removeprefix("http://").split(":")
        data = json.dumps({"prompt": "a", "n": 4}).encode()
        head = (
            f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        )
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(head.encode() + data)
            until(lambda: counter(address, "redif_pending_images") == 4)
        until(lambda: counter(address, "redif_pending_images") == 0)
        slow.go.set()
        assert httpx.post(address + PATH, json={"prompt": "b"}, timeout=300).status_code == 200
        assert len(slow.calls) == 2  # the one that had begun, and the last request's
        assert counter(address, "redif_cancelled_total") == 1


def test_a_request_that_takes_too_long_is_given_up(slow: Slow) -> None:
    with running({"tiny": slow}, ServeSettings(timeout_s=0.2)) as address:
        slow.go.clear()
        answer = httpx.post(address + PATH, json={"prompt": "a"}, timeout=300)
        slow.go.set()
        assert answer.status_code == 504
        assert answer.json()["error"]["type"] == "timeout_error"
        assert counter(address, "redif_pending_images") == 0


def test_what_breaks_inside_is_not_told(slow: Slow, caplog: pytest.LogCaptureFixture) -> None:
    with running({"tiny": slow}, ServeSettings()) as address:
        slow.calls = None  # type: ignore[assignment]  # every call fails from now on
        answer = httpx.post(address + PATH, json={"prompt": "a"}, timeout=300)
        counted = httpx.get(address + "/metrics").text
        shown = httpx.post(address + PATH, json={"prompt": "a", "stream": True, "partial_images": 1}, timeout=300)
    assert answer.status_code == 500
    assert answer.json()["error"]["message"] == "the server failed; see its log"
    assert answer.headers["x-request-id"]
    assert 'redif_request_seconds_count{route="/v1/images/generations",status="500"} 1.0' in counted
    assert "NoneType" in caplog.text
    assert "event: error" in shown.text  # a stream, whose status was sent before, says it too
    assert "NoneType" not in shown.text


@pytest.fixture(scope="module")
def poisoned_address(tiny_student: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server whose student gives NaN for one class."""
    folder = poisoned(tiny_student, tmp_path_factory.mktemp("poisoned") / "tiny")
    pipeline = FastPipeline.from_pretrained(folder, runtime="onnxruntime")
    with running({"tiny": pipeline}, ServeSettings(max_wait_ms=200.0)) as url:
        yield url


def test_nan_is_an_error_of_its_own_request_alone(poisoned_address: str, pipeline: FastPipeline) -> None:
    """Requests in the same batch get their images, those whose images hold NaN get 500 and are counted."""
    classes = [0, BAD_CLASS, 1, BAD_CLASS, 2, 4, 5, 6]

    async def ask() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=poisoned_address, timeout=3000) as client:
            return await asyncio.gather(*(client.post(PATH, json={"class_label": c, "seed": c}) for c in classes))

    answers = asyncio.run(ask())
    for label, answer in zip(classes, answers, strict=True):
        if label == BAD_CLASS:
            assert answer.status_code == 500
            assert answer.json()["error"]["code"] == "non_finite_output"
            assert answer.json()["error"]["type"] == "server_error"
        else:
            assert np.array_equal(from_json(answer.json())[0], expected(pipeline, label, label)[0])
    assert counter(poisoned_address, 'redif_nonfinite_total{model="tiny"}') == 2
    assert counter(poisoned_address, "redif_batch_images_sum") == 1 + len(classes)  # the warm-up, and one batch
    assert counter(poisoned_address, "redif_pending_images") == 0


@pytest.mark.parametrize("partial_images", [0, 2])
def test_nan_in_a_stream_is_an_error_event(poisoned_address: str, partial_images: int) -> None:
    before = counter(poisoned_address, "redif_nonfinite_total")
    body = {"class_label": BAD_CLASS, "seed": 0, "stream": True, "partial_images": partial_images}
    text = httpx.post(poisoned_address + PATH, json=body, timeout=3000).text
    (event,) = re.findall(r"^event: error\ndata: (.*)\n\n", text, re.MULTILINE)
    assert json.loads(event)["error"]["code"] == "non_finite_output"
    assert "completed" not in text
    assert counter(poisoned_address, "redif_nonfinite_total") == before + 1
    assert counter(poisoned_address, "redif_pending_images") == 0


def test_a_stream_whose_client_leaves_is_ended(slow: Slow) -> None:
    with running({"tiny": slow}, ServeSettings()) as address:
        slow.go.clear()
        body = {"prompt": "a", "stream": True}
        with httpx.stream("POST", address + PATH, json=body, timeout=3000) as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            assert counter(address, "redif_pending_images") == 1
        until(lambda: counter(address, "redif_pending_images") == 0)
        slow.go.set()
        assert counter(address, "redif_cancelled_total") == 1


def test_kept_files_are_bounded_in_bytes_and_in_time() -> None:
    files = KeptFiles(limit=10, seconds=1000)
    names = [files.keep(bytes(4), "png") for _ in range(3)]
    assert [files.get(name) is not None for name in names] == [False, True, True]
    with pytest.raises(InvalidRequest, match="the image has 11 bytes, and at most 10 are kept for URLs"):
        files.keep(bytes(11), "png")
    assert KeptFiles(limit=10, seconds=0).get(KeptFiles(limit=10, seconds=0).keep(b"x", "png")) is None


@pytest.mark.parametrize(
    "settings",
    [{"max_batch": 0}, {"max_wait_ms": -1}, {"timeout_s": 0}, {"max_images": 300}, {"api_keys": ("short",)}],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest):
        ServeSettings(**settings)
