"""A short load with cancellations and bad requests; the long one, which measures, is benchmarks/serving_load.py."""

from __future__ import annotations

import asyncio
import base64
import io
import random

import httpx
import numpy as np
from PIL import Image

from redif_sdk import FastPipeline

PATH = "/v1/images/generations"
BAD = [
    ({"prompt": "zebra"}, 400),
    ({"prompt": "a", "n": 99}, 400),
    ({"prompt": "a", "num_inference_steps": 7}, 400),
    ({"prompt": "a", "model": "nobody"}, 404),
    ({"prompt": "a" * 100_000}, 413),
]


def test_every_accepted_request_is_answered_once_with_its_own_picture(address: str, pipeline: FastPipeline) -> None:
    """240 requests, 32 at a time: every tenth is left by its client, every tenth is bad."""
    number = 240
    chance = random.Random(0)
    kinds = [chance.choices(["good", "left", "bad"], [8, 1, 1])[0] for _ in range(number)]
    labels = [chance.randrange(10) for _ in range(number)]
    answers: dict[int, list[np.ndarray]] = {}
    refused: list[int] = []

    async def ask(client: httpx.AsyncClient, gate: asyncio.Semaphore, place: int) -> None:
        body = {"prompt": "", "class_label": labels[place], "seed": place, "num_inference_steps": 2 + place % 2}
        async with gate:
            if kinds[place] == "bad":
                wrong, status = BAD[place % len(BAD)]
                assert (await client.post(PATH, json=wrong)).status_code == status
                refused.append(place)
                return
            try:
                timeout = chance.uniform(0, 0.02) if kinds[place] == "left" else 60.0
                answer = await asyncio.wait_for(client.post(PATH, json=body), timeout)
            except TimeoutError:
                assert kinds[place] == "left"
                return
        assert answer.status_code == 200, answer.text
        entry = base64.b64decode(answer.json()["data"][0]["b64_json"])
        answers.setdefault(place, []).append(np.asarray(Image.open(io.BytesIO(entry))))

    async def load() -> None:
        gate = asyncio.Semaphore(32)
        async with httpx.AsyncClient(base_url=address, timeout=60, limits=httpx.Limits(max_connections=64)) as client:
            await asyncio.gather(*(ask(client, gate, place) for place in range(number)))

    asyncio.run(load())
    good = [place for place in range(number) if kinds[place] == "good"]
    assert set(good) <= set(answers)
    assert len(refused) == kinds.count("bad")
    assert all(len(pictures) == 1 for pictures in answers.values())
    for steps in (2, 3):
        mine = [place for place in sorted(answers) if 2 + place % 2 == steps]
        wanted = pipeline(
            class_labels=[labels[place] for place in mine],
            num_inference_steps=steps,
            seed=[(place, 0) for place in mine],
            output_type="uint8",
        ).images[..., 0]
        assert np.array_equal(np.stack([answers[place][0] for place in mine]), wanted)
    text = httpx.get(f"{address}/metrics").text
    assert "redif_pending_images 0.0" in text  # nobody who left is still counted
