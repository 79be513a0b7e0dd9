"""The page for browsers and the demo: equality of images with Python, speed, and the demo's start-up time.

    python benchmarks/pages.py build/quickstart/student-1 build/quickstart/student-2 build/quickstart/student-4 \\
        --json docs/results/pages.json

A headless Chromium runs each student's page (WASM, one thread) in turns with FastPipeline on ONNX Runtime with one
thread; the figures are the medians of the rounds and their ratio. The demo is started in fresh processes.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np

from redif_sdk import FastPipeline
from redif_sdk.export.web import build_page
from redif_sdk.results import document, write_json

ROUNDS, NUMBER, SEED = 5, 32, 11

PIXELS = """() => [...document.querySelectorAll('#gallery canvas')].map(
    (canvas) => Array.from(canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data))"""

COLD = """
import sys, time, urllib.request
import redif_sdk.demo.app as app
from redif_sdk import FastPipeline
from redif_sdk.demo.studio import Studio
from redif_sdk.artifact.folder import StudentFolder
start = time.perf_counter()
pipe = FastPipeline.from_pretrained(sys.argv[1])
studio = Studio({"student": pipe})
studio.warm_up()
demo = app.build_demo(studio, {"student": app.card_text(pipe.manifest, StudentFolder(sys.argv[1]))})
address = app.launch(demo, port=None)
urllib.request.urlopen(address, timeout=30).read()
print(time.perf_counter() - start)
demo.close(verbose=False)
"""


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Log nothing."""


@contextmanager
def served(folder: Path) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()


def wait_for(page: Any, wanted: str) -> str:
    for _ in range(6000):
        text = page.inner_text("#status")
        if re.search(wanted, text):
            return str(text)
        if page.is_visible("#error"):
            raise SystemExit(page.inner_text("#error"))
        page.wait_for_timeout(10)
    raise SystemExit(f"the page says: {text}")


def seconds_of(text: str) -> float:
    found = re.search(r"in ([\d.e+]+) (ms|s)", text)
    assert found is not None, text
    return float(found[1]) / (1000 if found[2] == "ms" else 1)


def measure_page(student: Path, browser: Any) -> dict[str, Any]:
    pipe = FastPipeline.from_pretrained(student, runtime="onnxruntime", precision="fp32", num_threads=1)
    manifest = pipe.manifest
    labels = {} if manifest.classes is None else {"class_labels": 0}
    with tempfile.TemporaryDirectory() as folder:
        target = build_page(student, Path(folder) / "web", engines=("wasm",))
        size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
        with served(target) as url:
            page = browser.new_page()
            start = time.perf_counter()
            page.goto(url)
            wait_for(page, "^Ready")
            ready = time.perf_counter() - start
            if page.is_visible("#previews"):
                page.uncheck("#previews")
            page.fill("#count", str(NUMBER))
            page.fill("#seed", str(SEED))
            rounds = []
            for turn in range(ROUNDS + 1):
                page.click("#clear") if page.is_visible("#clear") else None
                page.click("#generate")
                browser_seconds = seconds_of(wait_for(page, " in [0-9]")) / NUMBER
                start = time.perf_counter()
                for index in range(NUMBER):
                    pipe(**labels, seed=[(SEED, index)], output_type="uint8")
                python_seconds = (time.perf_counter() - start) / NUMBER
                if turn:  # the first one warms both up
                    rounds.append((browser_seconds, python_seconds))
            height, width, channels = manifest.image_shape
            shown = np.array(page.evaluate(PIXELS), dtype=np.uint8).reshape(-1, height, width, 4)[..., :channels]
            page.close()
    wanted = np.concatenate(
        [pipe(**labels, seed=[(SEED, index)], output_type="uint8").images for index in range(NUMBER)]
    )
    return {
        "student": manifest.name,
        "num_inference_steps": manifest.supported_steps[0],
        "pictures": len(shown),
        "largest_difference": int(np.abs(shown.astype(int) - wanted.astype(int)).max()),
        "values_that_differ": int((shown != wanted).sum()),
        "seconds_until_ready": ready,
        "megabytes": size / 1e6,
        "browser_seconds": statistics.median(one for one, _ in rounds),
        "python_seconds": statistics.median(one for _, one in rounds),
        "ratio": statistics.median(one / other for one, other in rounds),
        "round_seconds": rounds,
    }


def measure_demo(student: Path) -> dict[str, Any]:
    command = [sys.executable, "-c", COLD, str(student)]
    seconds = []
    for _ in range(ROUNDS):
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
        seconds.append(float(done.stdout.split()[-1]))
    return {"demo": student.name, "cold_start_seconds": statistics.median(seconds), "round_seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("students", nargs="+", type=Path)
    parser.add_argument("--json", metavar="FILE")
    arguments = parser.parse_args()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        executable = os.environ.get("CHROMIUM") or shutil.which("chromium")
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        version = browser.version
        rows = [measure_page(student, browser) | {"chromium": version} for student in arguments.students]
        browser.close()
    rows.append(measure_demo(arguments.students[-1]))
    for row in rows:
        print(json.dumps({key: value for key, value in row.items() if key != "round_seconds"}))
    if arguments.json:
        write_json(arguments.json, document("pages", rows))


if __name__ == "__main__":
    main()
