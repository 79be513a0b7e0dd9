"""A reward that is a server: a real one, which answers, fails, is slow, and talks nonsense."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from redif_sdk.distill.rewards import Advantage, Batch, EndpointReward, make_rewards, reward_names
from redif_sdk.distill.rewards import http as module
from redif_sdk.errors import InvalidRequest, RuntimeUnavailable, TrainingDiverged

Answer = Callable[[int, dict[str, Any]], tuple[int, bytes]]


@contextmanager
def serving(answer: Answer, headers: Mapping[str, str] | None = None) -> Iterator[str]:
    """The address of a server that gives `answer(number of the request, its body)`."""
    count = iter(range(10_000))

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status, data = answer(next(count), body)
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/score"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def rewards(*values: object) -> bytes:
    return json.dumps({"rewards": values}).encode()


def pictures(count: int = 3) -> torch.Tensor:
    return torch.linspace(-1.2, 1.2, count * 16).reshape(count, 1, 4, 4)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_PAUSE", 0.01)


def test_it_is_shown_the_pictures_that_a_user_would_see() -> None:
    seen: list[dict[str, Any]] = []

    def brightness(number: int, body: dict[str, Any]) -> tuple[int, bytes]:
        seen.append(body)
        decoded = [np.asarray(Image.open(io.BytesIO(base64.b64decode(image)))) for image in body["images"]]
        return 200, rewards(*(float(image.mean()) for image in decoded))

    with serving(brightness) as url:
        values = EndpointReward(url)(Batch(pictures(), pictures(), torch.tensor([3, 1, 4])))
    wanted = ((pictures().clamp(-1, 1) + 1) * 127.5).round().mean((1, 2, 3))
    assert torch.allclose(values, wanted, atol=0.1)
    assert values.dtype == torch.float32
    assert seen[0]["class_labels"] == [3, 1, 4]
    assert seen[0]["targets"] == seen[0]["images"]


def test_what_passes_by_itself_is_tried_again() -> None:
    def late(number: int, body: dict[str, Any]) -> tuple[int, bytes]:
        if number == 0:
            assert answered.wait(30)  # longer than the client waits
        if number > 2:
            answered.set()
        return (200, rewards(1, 2, 3)) if number > 2 else (503, b"warming up")

    answered = threading.Event()
    with serving(late) as url:
        assert EndpointReward(url, timeout=0.2)(Batch(pictures(), pictures(), None)).tolist() == [1, 2, 3]
    with pytest.raises(RuntimeUnavailable, match=r"did not answer, 2 times \(.*refused.*\); start it, then --resume"):
        EndpointReward(url, timeout=1, retries=1)(Batch(pictures(), pictures(), None))  # which is gone now


def test_a_picture_that_was_not_judged_gets_the_lowest_reward() -> None:
    with serving(lambda number, body: (200, b'{"rewards": [2.5, null, NaN]}')) as url:
        reward = EndpointReward(url)
        assert reward(Batch(pictures(), pictures(), None)).tolist() == [2.5, 2.5, 2.5]
        assert reward.unjudged == 2
    with (
        serving(lambda number, body: (200, b'{"rewards": [null, null, NaN]}')) as url,
        pytest.raises(TrainingDiverged, match="judged none of 3 images"),
    ):
        EndpointReward(url)(Batch(pictures(), pictures(), None))


@pytest.mark.parametrize(
    ("status", "data", "said"),
    [
        (200, b"rewards: 3", "answered with no JSON"),
        (200, rewards(1, 2), "answered 2 numbers for 3 images"),
        (200, b'{"scores": {"a": [1, 2, 3], "b": [1]}}', "answered 1 numbers of b for 3 images"),
        (200, b"[1, 2, 3]", r"answered '\[1, 2, 3\]' .*; it must answer"),
        (200, b"{}", "give rewards, or scores, and not both"),
        (200, b'{"rewards": [1, 2, 3], "scores": {"a": [1, 2, 3]}}', "give rewards, or scores, and not both"),
        (200, rewards(1, "high", 2), r"\(rewards.1: Input should be a valid number\)"),
        (200, rewards(1, True, 2), r"\(rewards.1: Input should be a valid number\)"),
        (400, b"only RGB, please", r"refused the images \(status 400: only RGB, please\)"),
    ],
)
def test_nonsense_is_an_error_of_ours(status: int, data: bytes, said: str) -> None:
    with serving(lambda number, body: (status, data)) as url, pytest.raises(InvalidRequest, match=said):
        EndpointReward(url)(Batch(pictures(), pictures(), None))


def test_many_images_go_in_several_requests_and_come_back_in_order() -> None:
    together, busy = [], threading.Barrier(2, timeout=20)

    def brightness(number: int, body: dict[str, Any]) -> tuple[int, bytes]:
        together.append(len(body["images"]))
        busy.wait()  # two requests at once, or none is answered
        decoded = [np.asarray(Image.open(io.BytesIO(base64.b64decode(image)))) for image in body["images"]]
        return 200, rewards(*(float(image.mean()) for image in decoded))

    with serving(brightness) as url:
        reward = EndpointReward(url, batch_size=3, concurrency=2, retries=0)
        values = reward(Batch(pictures(12), pictures(12), torch.arange(12)))
    wanted = ((pictures(12).clamp(-1, 1) + 1) * 127.5).round().mean((1, 2, 3))
    assert torch.allclose(values, wanted, atol=0.1)
    assert together == [3, 3, 3, 3]


def test_several_scores_are_weighed_by_name() -> None:
    answer = b'{"scores": {"text": [1, 2, null], "looks": [6, 5, 4], "size": [0, 0, 0]}}'
    with serving(lambda number, body: (200, answer)) as url:
        reward = EndpointReward(f"{url}#text=2,size=0")
        scores = reward(Batch(pictures(), pictures()))
        assert {name: values.tolist() for name, values in scores.items()} == {
            "looks": [6, 5, 4],
            "size": [0, 0, 0],
            "text": [1, 2, 1],
        }
        assert reward.unjudged == 1
        group = torch.linspace(-1, 1, 3 * 16).reshape(3, 1, 1, 4, 4)
        advantage = Advantage([(reward, 1.0)], lambda x: x)(group, group[0], None)
    text, looks = torch.tensor([1.0, 2.0, 1.0]), torch.tensor([6.0, 5.0, 4.0])
    mixed = 2 * (text - text.mean()) / text.std() + (looks - looks.mean()) / looks.std()
    torch.testing.assert_close(advantage[:, 0], (mixed - mixed.mean()) / mixed.std())
    with pytest.raises(InvalidRequest, match=r"'text' after # .* is no weight; give NAME=NUMBER"):
        EndpointReward(f"{url}#text")


def test_a_busy_server_says_how_long_to_wait() -> None:
    began: list[float] = []

    def busy(number: int, body: dict[str, Any]) -> tuple[int, bytes]:
        began.append(time.monotonic())
        return (429, b"busy") if number == 0 else (200, rewards(1, 2, 3))

    with serving(busy, {"Retry-After": "0.5"}) as url:
        assert EndpointReward(url)(Batch(pictures(), pictures())).tolist() == [1, 2, 3]
    assert began[1] - began[0] >= 0.5


def test_it_is_named_without_its_secrets() -> None:
    with pytest.raises(InvalidRequest, match="is not the URL of a reward"):
        EndpointReward("http://")
    assert reward_names("texture+http://user:secret@127.0.0.1:9/score?key=secret") == [
        "texture",
        "http://127.0.0.1:9/score",
    ]
    made = make_rewards("http://127.0.0.1:9/score", None, None, 0)
    assert isinstance(made[0][0], EndpointReward)
