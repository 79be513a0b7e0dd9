"""The Ray Serve application on a real local cluster: two replicas, one of which is killed under load."""

from __future__ import annotations

import asyncio
import base64
import io
import os
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import httpx
import numpy as np
import pytest
from PIL import Image

from redif_sdk import FastPipeline
from redif_sdk.errors import InvalidRequest, NonFiniteOutput
from tests.nonfinite import BAD_CLASS, poisoned

ray = pytest.importorskip("ray", reason='Ray is not here: pip install "redif-sdk[ray]"')
pytestmark = pytest.mark.filterwarnings("ignore")

PATH = "/v1/images/generations"
ROOT = Path(__file__).resolve().parents[2]
SECONDS = 600  # a busy machine is slow
#: Ray gives up on its own processes after seconds, and kills a proxy that has not started in five.
PATIENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": str(SECONDS),
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": str(SECONDS),
    "RAY_worker_register_timeout_seconds": str(SECONDS),
    "RAY_gcs_server_request_timeout_seconds": str(SECONDS),
}


@pytest.fixture(scope="module")
def address(tiny_student: Path) -> Iterator[str]:
    """Two replicas and an ingress, on a cluster of their own that ends with the tests."""
    import psutil
    from ray import serve

    from redif_sdk.serving.ray_app import RayArguments, app

    folder = tempfile.mkdtemp(prefix="r", dir="/tmp")  # a Unix socket's path has to be short
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    before = dict(os.environ)
    os.environ.update(PATIENT)
    patience = pytest.MonkeyPatch()
    patience.setattr("ray.serve._private.api.HTTP_PROXY_TIMEOUT", SECONDS, raising=False)
    patience.setattr("ray.serve._private.client.HTTP_PROXY_TIMEOUT", SECONDS, raising=False)
    ray.init(
        num_cpus=4,
        include_dashboard=False,
        _temp_dir=folder,
        object_store_memory=100 << 20,
        logging_level="ERROR",
        log_to_driver=False,
    )
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        arguments = RayArguments(
            student=str(tiny_student), runtime="onnxruntime", min_replicas=2, max_replicas=2, timeout=SECONDS
        )
        serve.run(app(arguments), name="redif")
        url = f"http://127.0.0.1:{port}"
        until_ready(url)
        yield url
    finally:
        serve.shutdown()
        ray.shutdown()
        patience.undo()
        for name in PATIENT:
            os.environ.pop(name) if name not in before else os.environ.update({name: before[name]})
        gone = [process for process in psutil.process_iter() if folder in " ".join(_command(process))]
        for process in gone:
            process.kill()
        shutil.rmtree(folder, ignore_errors=True)


def until_ready(url: str) -> None:
    """Wait until the application generates images."""
    end = time.monotonic() + SECONDS
    while True:
        try:
            if httpx.get(f"{url}/readyz", timeout=SECONDS).status_code == 200:
                return
        except httpx.TransportError:  # nobody listens yet
            pass
        assert time.monotonic() < end, "the application did not become ready"
        time.sleep(0.1)


def _command(process: Any) -> list[str]:
    import psutil

    try:
        return list(process.cmdline())
    except psutil.Error:
        return []


@pytest.fixture(scope="module")
def pipe(tiny_student: Path) -> FastPipeline:
    return FastPipeline.from_pretrained(tiny_student, runtime="onnxruntime", num_threads=1)


def decoded(entry: dict[str, str]) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(entry["b64_json"]))))


def replicas() -> set[int]:
    """The processes of the generator's replicas."""
    import psutil

    found = set()
    for process in psutil.process_iter():
        try:
            if "ServeReplica:redif:generator-0" in " ".join(process.cmdline()):
                found.add(process.pid)
        except psutil.Error:
            continue
    return found


@pytest.mark.slow
def test_it_is_the_same_server(address: str, pipe: FastPipeline) -> None:
    models = httpx.get(f"{address}/v1/models").json()["data"]
    assert [model["id"] for model in models] == ["tiny"]
    answer = httpx.post(address + PATH, json={"prompt": "c", "n": 3, "seed": 7}, timeout=SECONDS)
    assert answer.status_code == 200, answer.text
    wanted = pipe(["c"] * 3, seed=7, output_type="uint8").images[..., 0]
    assert np.array_equal(np.stack([decoded(entry) for entry in answer.json()["data"]]), wanted)
    refused = httpx.post(address + PATH, json={"prompt": "zebra"}, timeout=SECONDS)
    assert refused.status_code == 400
    assert "is not a class of tiny" in refused.json()["error"]["message"]


@pytest.mark.slow
def test_it_streams(address: str, pipe: FastPipeline) -> None:
    body = {"prompt": "c", "seed": 3, "num_inference_steps": 3, "stream": True, "partial_images": 2}
    with httpx.stream("POST", address + PATH, json=body, timeout=SECONDS) as answer:
        events = [line.removeprefix("event: ") for line in answer.iter_lines() if line.startswith("event: ")]
    assert events == ["image_generation.partial_image"] * 2 + ["image_generation.completed"]


@pytest.mark.slow
def test_the_kill_of_a_replica_under_load_loses_nothing(address: str, pipe: FastPipeline) -> None:
    """Every request is answered once, with the picture of its seed, though half of the engines die meanwhile."""
    seeds = list(range(120))
    wanted = pipe(["d"] * len(seeds), seed=[(seed, 0) for seed in seeds], output_type="uint8").images[..., 0]
    answered = threading.Semaphore(0)

    def ask(seed: int) -> np.ndarray:
        with httpx.Client(timeout=SECONDS) as client:
            answer = client.post(address + PATH, json={"prompt": "d", "seed": seed})
        assert answer.status_code == 200, answer.text
        answered.release()
        return decoded(answer.json()["data"][0])

    before = replicas()
    assert len(before) == 2
    with ThreadPoolExecutor(16) as pool:
        asked = [pool.submit(ask, seed) for seed in seeds]
        for _ in range(40):
            assert answered.acquire(timeout=SECONDS)
        victim = min(before)
        os.kill(victim, signal.SIGKILL)
        pictures = [one.result() for one in asked]
    assert np.array_equal(np.stack(pictures), wanted)
    end = time.monotonic() + SECONDS
    while len(now := replicas()) < 2 or victim in now:  # and Ray starts another one in its place
        assert time.monotonic() < end, now
        time.sleep(0.2)


def test_jobs_of_several_kinds_that_come_together(tiny_student: Path, tmp_path: Path) -> None:
    """A batch of Ray's may mix sizes and steps, and hold an image of NaN: everyone gets what is theirs."""
    from redif_sdk.serving.backend import ImageJob
    from redif_sdk.serving.ray_app import Generator

    class Observed:
        sizes: ClassVar[list[int]] = []

        def observe(self, size: int, tags: object) -> None:
            self.sizes.append(size)

    pipe = FastPipeline.from_pretrained(poisoned(tiny_student, tmp_path / "tiny"), runtime="onnxruntime", num_threads=1)
    replica: Any = object.__new__(Generator)
    replica._pipeline, replica._observed = pipe, Observed()
    wanted = [(0, 2), (BAD_CLASS, 3), (1, 3), (2, 2), (4, 3)]
    jobs = [ImageJob("tiny", label, seed, 0, steps, 28, 28) for seed, (label, steps) in enumerate(wanted)]
    batch: Any = Generator._batch
    results = asyncio.run(batch.__wrapped__(replica, jobs))
    assert sorted(Observed.sizes) == [2, 3]
    for job, result in zip(jobs, results, strict=True):
        if job.label == BAD_CLASS:
            assert isinstance(result, NonFiniteOutput)
            continue
        alone = pipe(class_labels=job.label, num_inference_steps=job.num_inference_steps, seed=job.seed)
        assert np.array_equal(result[..., 0], np.asarray(alone.images[0]))


def test_what_it_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    from redif_sdk.serving.ray_app import RayArguments, app

    with pytest.raises(InvalidRequest, match="min_replicas is 5, more than max_replicas, 4"):
        app(RayArguments(student="student", min_replicas=5))
    with pytest.raises(InvalidRequest, match="student is empty"):
        app(RayArguments(student=" , "))
    with pytest.raises(InvalidRequest, match="max_batch is 0"):
        app(RayArguments(student="student", max_batch=0))
    with pytest.raises(InvalidRequest, match=r"steps: Extra inputs are not permitted; this application takes student"):
        app({"student": "student", "steps": "4"})  # as the command line gives it
    with pytest.raises(InvalidRequest, match="student: Field required"):
        app({})


def test_the_config_file_of_the_documentation_is_taken() -> None:
    """docs/deploy/ray.yaml by Ray's own schema, and its arguments by ours."""
    import yaml
    from ray.serve.schema import ServeDeploySchema

    from redif_sdk.serving.ray_app import RayArguments

    config = yaml.safe_load((ROOT / "docs/deploy/ray.yaml").read_text())
    schema = ServeDeploySchema.model_validate(config) if hasattr(ServeDeploySchema, "model_validate") else None
    assert schema is None or schema.applications[0].import_path == "redif_sdk.serving.ray_app:app"
    RayArguments(**config["applications"][0]["args"])
