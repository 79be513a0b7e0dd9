"""`redif serve` as a process: told to stop, it finishes what it accepted; what it cannot do is one line."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from redif_sdk import FastPipeline
from tests.serving.test_http import PATH, expected, from_json


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-c", "from redif_sdk.cli.main import main; main()", "serve", *map(str, arguments)]


@contextmanager
def serving(*arguments: str | Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command(*arguments, "--port", "0"), **pipes) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            address = re.search(r"http://\S+", line)
            assert address, line
            yield process, address[0]
        finally:
            process.kill()


def test_told_to_stop_it_answers_what_it_accepted_and_ends_well(tiny_student: Path, pipeline: FastPipeline) -> None:
    with serving(tiny_student, "--runtime", "onnxruntime") as (process, address):

        async def ask() -> list[Any]:
            async with httpx.AsyncClient(base_url=address, timeout=60) as client:
                assert (await client.get("/readyz")).status_code == 200
                bodies = [{"class_label": seed % 10, "seed": seed, "n": 4} for seed in range(30)]
                asked = [asyncio.create_task(client.post(PATH, json=body)) for body in bodies]
                await asked[0]
                process.send_signal(signal.SIGTERM)
                return await asyncio.gather(*asked, return_exceptions=True)

        answers = asyncio.run(ask())
        assert process.wait(60) == 0
        assert process.stderr is not None
        log = [json.loads(line) for line in process.stderr]
    done = [line for line in log if line["event"] == "request" and line["path"] == PATH]
    assert {line["status"] for line in done} == {200}
    assert {line["images"] for line in done} == {4}
    accepted = [(seed, answer) for seed, answer in enumerate(answers) if isinstance(answer, httpx.Response)]
    assert len(accepted) == len(done) >= 1  # the others found no open door: none was accepted and then lost
    for seed, answer in accepted:
        assert np.array_equal(from_json(answer.json()), expected(pipeline, seed % 10, seed, 4))


def test_keys_come_from_a_file(tiny_student: Path, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("first-key-1\n\nsecond-key-2\n")
    with serving(tiny_student, "--api-keys-file", tmp_path / "keys") as (_, address):
        assert httpx.post(address + PATH, json={"prompt": "a"}).status_code == 401
        headers = {"authorization": "Bearer second-key-2"}
        assert httpx.post(address + PATH, json={"prompt": "a"}, headers=headers).status_code == 200


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], "neither a folder nor the id"),
        (["STUDENT", "STUDENT"], "two students are named tiny"),
        (["STUDENT", "--max-batch", "0"], "max_batch is 0"),
        (["STUDENT", "--log-level", "loud"], "--log-level is 'loud'"),
        (["STUDENT", "--host", "192.0.2.1"], "cannot listen on 192.0.2.1"),
        (["STUDENT", "--api-keys-file", "/dev/null"], "redif: /dev/null is a device, not a file"),
    ],
)
def test_what_cannot_be_served_is_one_line(tiny_student: Path, arguments: list[str], words: str) -> None:
    given = [str(tiny_student) if argument == "STUDENT" else argument for argument in arguments]
    environment = {**os.environ, "REDIF_API_KEYS": ""}
    done = subprocess.run(command(*given), capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("redif: ")
    assert words in last
    assert "Traceback" not in done.stderr
