"""The server under load: every accepted request is answered once, with the right images, in constant memory.

    python benchmarks/serving_load.py build/quickstart/student-2 --json docs/results/serving.json

Measures also what batching brings, compared with the engine alone. Starts `redif serve` as a process on the loopback;
the clients run in this process, and both share the machine's cores. The mix has a fixed seed: single images and
requests of up to four, cancelled requests, invalid ones. Exits 1 if a bound is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from base64 import b64decode
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import numpy as np
import psutil
from PIL import Image

from redif_sdk import FastPipeline
from redif_sdk.artifact.manifest import Manifest
from redif_sdk.results import document, write_json

PATH = "/v1/images/generations"
CANCELLED, BAD = 0.08, 0.08
BATCH = 8
ROUNDS = 5
BAD_BODIES = [
    b"{",
    b'{"prompt": "no such class"}',
    b'{"class_label": 0, "n": 0}',
    b'{"model": "other"}',
    b"x" * (1 << 17),
]


@contextmanager
def server(student: str, max_batch: int, core: int | None = None) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run a server of `student` on a free port, optionally on one core; it must stop without an error."""
    script = "from redif_sdk.cli.main import main; main()"
    options = ["--port", "0", "--runtime", "onnxruntime", "--max-batch", str(max_batch), "--log-level", "error"]
    if core is not None:
        options += ["--threads", "1"]
        script = f"import os; os.sched_setaffinity(0, [{core}]); {script}"
    command = [sys.executable, "-c", script, "serve", student, *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        found = re.search(r"http://\S+", process.stdout.readline())
        if found is None:
            raise SystemExit("the server did not start")
        yield process, found[0]
        process.send_signal(signal.SIGTERM)
        if process.wait(60) != 0:
            raise SystemExit(f"the server ended with {process.returncode}")


def choices(manifest: Manifest) -> list[dict[str, Any]]:
    """The valid values of a request's condition: each class, each example prompt, or none."""
    if manifest.text is not None:
        return [{"prompt": prompt} for prompt in manifest.text.examples]
    return (
        [{}] if manifest.classes is None else [{"class_label": label} for label in range(manifest.classes.num_classes)]
    )


def in_python(body: dict[str, Any]) -> dict[str, Any]:
    """The same request as arguments of a pipeline."""
    names = {"prompt": "prompt", "class_label": "class_labels"}
    return {names[name]: value for name, value in body.items() if name in names}


def plan(requests: int, asks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The requests: {"kind": good, cancelled or bad, "body", "after": seconds until a cancelled client disconnects}."""
    drawn = random.Random(0)
    asked = []
    for _ in range(requests):
        body: dict[str, Any] = {"seed": drawn.randrange(2**64), "n": drawn.choices([1, 2, 4], [8, 1, 1])[0]}
        body |= drawn.choice(asks)
        kind = drawn.choices(["good", "cancelled", "bad"], [1 - CANCELLED - BAD, CANCELLED, BAD])[0]
        data = drawn.choice(BAD_BODIES) if kind == "bad" else json.dumps(body).encode()
        asked.append({"kind": kind, "body": body, "data": data, "after": drawn.uniform(0.0, 0.2)})
    return asked


async def load(address: str, asked: list[dict[str, Any]], concurrency: int, process: int) -> dict[str, Any]:
    """Ask for all of it. Each entry gets "status", "answer" and "seconds"; the rest is of the whole."""
    waiting = iter(asked)
    memory: list[int] = []
    retries = 0

    async def one(client: httpx.AsyncClient, entry: dict[str, Any]) -> None:
        nonlocal retries
        while True:
            begun = time.perf_counter()
            request = client.post(PATH, content=entry["data"], headers={"content-type": "application/json"})
            try:
                limit = entry["after"] if entry["kind"] == "cancelled" else 120
                answer = await asyncio.wait_for(request, limit)
            except TimeoutError:
                entry["status"] = "cancelled" if entry["kind"] == "cancelled" else "lost"
                return
            if answer.status_code == 429:
                retries += 1
                await asyncio.sleep(float(answer.headers["retry-after"]))
                continue
            entry |= {"status": answer.status_code, "answer": answer.content, "seconds": time.perf_counter() - begun}
            return

    async def client_loop() -> None:
        # One client each: a shared pool scans all its connections for every request.
        async with httpx.AsyncClient(base_url=address, timeout=120, verify=False) as client:
            for entry in waiting:
                await one(client, entry)

    async def watch() -> None:
        while True:
            memory.append(psutil.Process(process).memory_info().rss)
            await asyncio.sleep(0.1)

    watching = asyncio.create_task(watch())
    begun = time.perf_counter()
    await asyncio.gather(*(client_loop() for _ in range(concurrency)))
    seconds = time.perf_counter() - begun
    watching.cancel()
    async with httpx.AsyncClient(base_url=address) as client:
        metrics = (await client.get("/metrics")).text
    return {"seconds": seconds, "memory": memory, "retries": retries, "metrics": metrics}


def wrong(pipeline: FastPipeline, asked: list[dict[str, Any]]) -> Counter[str]:
    """Count the answers by kind and status; "wrong" if an image is not that of its seed."""
    found: Counter[str] = Counter()
    for entry in asked:
        found[f"{entry['kind']}: {entry['status']}"] += 1
        if entry["kind"] == "bad" or entry["status"] != 200:
            continue
        body = entry["body"]
        expected = pipeline(
            **in_python(body), num_images_per_prompt=body["n"], seed=body["seed"], output_type="uint8"
        ).images
        data = json.loads(entry["answer"])["data"]
        got = [np.asarray(Image.open(io.BytesIO(b64decode(image["b64_json"])))) for image in data]
        grey = expected.shape[3] == 1
        if len(got) != len(expected) or not np.array_equal(got, expected[..., 0] if grey else expected):
            found["wrong"] += 1
    return found


def metric(text: str, name: str) -> float:
    return sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(name))


def engine_rate(pipeline: FastPipeline, asks: list[dict[str, Any]], batch: int) -> float:
    """Images a second of the engine alone, in batches of `batch`."""
    begun = time.perf_counter()
    for seed in range(128 // batch):
        pipeline(**in_python(asks[0]), num_images_per_prompt=batch, seed=seed, output_type="uint8")
    return 128 / (time.perf_counter() - begun)


def gains(student: str, asks: list[dict[str, Any]], concurrency: int, apart: bool) -> dict[str, list[float]]:
    """Images a second of two servers, one without batches, and of the engine, in interleaved rounds.

    `apart`: the server, or the engine by itself, has one core and the clients another; otherwise they share all cores.
    """
    every = sorted(os.sched_getaffinity(0))
    own, other = (every[0], [every[-1]]) if apart else (None, every)
    pipeline = FastPipeline.from_pretrained(student, runtime="onnxruntime", num_threads=1 if apart else None)
    names = "served 1", f"served {BATCH}", "engine 1", f"engine {BATCH}"
    rates: dict[str, list[float]] = {name: [] for name in names}
    with server(student, 1, own) as (_, plain), server(student, BATCH, own) as (_, batched):
        for turn in range(ROUNDS + 1):
            os.sched_setaffinity(0, other)
            found = [served_rate(address, asks, concurrency) for address in (plain, batched)]
            os.sched_setaffinity(0, every if own is None else [own])
            found += [engine_rate(pipeline, asks, batch) for batch in (1, BATCH)]
            if turn:  # the first one warms all of them up
                for name, rate in zip(names, found, strict=True):
                    rates[name].append(rate)
    os.sched_setaffinity(0, every)
    return rates


def gain_row(rates: dict[str, list[float]]) -> dict[str, Any]:
    """Medians of the rates, and of the rounds' gains by batching: for clients, for the engine, and the share kept."""
    pairs = {
        kind: [many / one for one, many in zip(rates[f"{kind} 1"], rates[f"{kind} {BATCH}"], strict=True)]
        for kind in ("served", "engine")
    }
    kept = [served / engine for served, engine in zip(pairs["served"], pairs["engine"], strict=True)]
    return {
        "images_per_second": {name: statistics.median(found) for name, found in rates.items()},
        "served_gain": statistics.median(pairs["served"]),
        "engine_gain": statistics.median(pairs["engine"]),
        "kept": statistics.median(kept),
        "round_rates": rates,
    }


def served_rate(address: str, asks: list[dict[str, Any]], concurrency: int) -> float:
    """Images a second that clients receive."""
    asked = [entry for entry in plan(360, asks) if entry["kind"] == "good"]
    for entry in asked:
        entry["body"]["n"] = 1
        entry["data"] = json.dumps(entry["body"]).encode()
    out = asyncio.run(load(address, asked, concurrency, os.getpid()))
    if any(entry["status"] != 200 for entry in asked):
        raise SystemExit("a request of the gain's measurement was not answered with 200")
    return len(asked) / out["seconds"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student")
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--json", default=None, metavar="FILE")
    options = parser.parse_args()
    pipeline = FastPipeline.from_pretrained(options.student, runtime="onnxruntime")
    asks = choices(pipeline.manifest)
    asked = plan(options.requests, asks)
    with server(options.student, BATCH) as (process, address):
        out = asyncio.run(load(address, asked, options.concurrency, process.pid))
    counts = wrong(pipeline, asked)
    seconds = sorted(entry["seconds"] for entry in asked if entry["kind"] == "good" and entry["status"] == 200)
    half = out["memory"][len(out["memory"]) // 2 :]
    apart, shared = (gain_row(gains(options.student, asks, options.concurrency, one)) for one in (True, False))
    good = sum(entry["kind"] == "good" for entry in asked)
    row = {
        "contender": "redif serve",
        "requests": len(asked),
        "concurrency": options.concurrency,
        "answers": dict(counts),
        "retries_429": out["retries"],
        "lost": counts["good: lost"],
        "wrong": counts["wrong"],
        "seconds": out["seconds"],
        "requests_per_second": len(asked) / out["seconds"],
        "p50_ms": 1000 * seconds[len(seconds) // 2],
        "p95_ms": 1000 * seconds[int(0.95 * len(seconds))],
        "p99_ms": 1000 * seconds[int(0.99 * len(seconds))],
        "memory_mb": out["memory"][-1] / 1e6,
        "memory_growth_second_half": max(half) / half[0] - 1,
        "mean_batch": metric(out["metrics"], "redif_batch_images_sum")
        / metric(out["metrics"], "redif_batch_images_count"),
        "clients_apart": apart,
        "clients_on_the_same_cores": shared,
        "load_average": os.getloadavg()[0],
    }
    print(json.dumps(row, indent=1))
    if options.json:
        write_json(options.json, document("serving_load", [row]))
    bounds = {
        "every good request answered with 200": counts["good: 200"] == good,
        "every image that of its seed": counts["wrong"] == 0,
        "every bad request refused": all(key[5] == "4" for key in counts if key.startswith("bad: ")),
        "memory grows by less than 5 % over the second half": row["memory_growth_second_half"] < 0.05,
        "batching keeps 90 % of the engine's gain, clients on a core of their own": apart["kept"] >= 0.9,
        "batching keeps 90 % of the engine's gain, clients on the same cores": shared["kept"] >= 0.9,
    }
    for bound, kept in bounds.items():
        print("kept  " if kept else "MISSED", bound)
    sys.exit(0 if all(bounds.values()) else 1)


if __name__ == "__main__":
    main()
