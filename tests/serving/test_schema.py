"""Requests that schemathesis makes of ``/openapi.json``: no status 5xx, and answers as they are documented.

Most requests that keep to the schema ask for a class that no student has. So others choose from a narrower one, whose
images are made.
"""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from schemathesis import GenerationMode, checks, openapi

GENERATIONS, EDITS, VARIATIONS = (f"/v1/images/{name}" for name in ("generations", "edits", "variations"))
READ = ["/v1/models", "/v1/models/{name}", "/v1/images/files/{name}", "/healthz", "/readyz", "/metrics"]
UNSURE = "positive_data_acceptance"  # a request that keeps to the schema may ask for what a student does not make
checks.load_all_checks()
#: The test of what breaks the schema has its own: 413 is a refusal too.
CHECKS = [
    checks.CHECKS.get_one(name)
    for name in checks.CHECKS.get_all_names()
    if name not in (UNSURE, "negative_data_rejection")
]
NARROW: dict[str, Any] = {
    "prompt": {"enum": ["a"]},
    "model": {"enum": ["tiny"]},
    "n": {"enum": [1, 1, 2]},
    "size": {"enum": ["auto", "28x28"]},
    "num_inference_steps": {"enum": [2, 3]},
    "class_label": {"enum": ["a"]},
    "seed": {"type": "integer", "minimum": 0, "maximum": 2**64 - 2},
    "strength": {"enum": [0.5, 0.9, 1]},
}


def files(*modes: str) -> list[bytes]:
    """Files of images."""
    made = []
    for kind, mode in zip(("PNG", "JPEG", "WEBP"), modes, strict=True):
        data = io.BytesIO()
        Image.fromarray(np.zeros((28, 28, 4), np.uint8)).convert(mode).save(data, kind)
        made.append(data.getvalue())
    return made


@pytest.fixture(scope="module")
def documents(address: str) -> dict[str, Any]:
    """The document of the server, and the narrower one."""
    images = files("L", "RGB", "RGBA")
    openapi.format("binary", st.sampled_from([*images, *images, images[0][:50], b"GIF89a", b""]))
    own, narrow = (httpx.get(f"{address}/openapi.json").json() for _ in range(2))
    schemas = [narrow["components"]["schemas"]["ImageRequest"]]
    for path in (EDITS, VARIATIONS):
        schemas.append(narrow["paths"][path]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"])
    for schema in schemas:
        schema["required"] = [*schema.get("required", []), "prompt"]
        schema["properties"] |= {name: field for name, field in NARROW.items() if name in schema["properties"]}
    found = {"own": openapi.from_dict(own), "narrow": openapi.from_dict(narrow)}
    for document in found.values():
        document.config.update(base_url=address)
    return found


def statuses(schema: Any, method: str, path: str, mode: GenerationMode, examples: int) -> set[int]:
    """The statuses of the answers to so many requests, all of which are checked."""
    found = set()

    @given(case=schema[path][method].as_strategy(generation_mode=mode))
    @settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    def ask(case: Any) -> None:
        response = case.call(timeout=300)
        found.add(response.status_code)
        case.validate_response(response, checks=CHECKS)

    try:
        ask()
    except ValueError as error:  # not every mutation of schemathesis can be made of a file's bytes
        if "Unsupported type: 'Binary'" not in str(error):
            raise
    return found


@pytest.mark.parametrize("path", [GENERATIONS, EDITS, VARIATIONS])
def test_what_makes_images_answers_as_documented(documents: dict[str, Any], path: str) -> None:
    keeps, breaks = GenerationMode.POSITIVE, GenerationMode.NEGATIVE
    assert 200 in statuses(documents["narrow"], "POST", path, keeps, 15)
    assert max(statuses(documents["own"], "POST", path, keeps, 15)) < 500
    assert statuses(documents["own"], "POST", path, breaks, 15) <= {400, 404, 413}


def test_what_is_read_answers_as_documented(documents: dict[str, Any]) -> None:
    for path in READ:
        found = statuses(documents["own"], "GET", path, GenerationMode.POSITIVE, 10)
        assert found <= ({200, 404} if "{" in path else {200})


@pytest.mark.slow
def test_schemathesis_own_run_finds_nothing(address: str, tmp_path: Path) -> None:
    """Its every phase: examples, the bounds of each field, random requests, and requests that follow from answers."""
    config = "[checks]\nnegative_data_rejection.expected-statuses = [400, 401, 404, 405, 413, 415]\n"
    (tmp_path / "schemathesis.toml").write_text(config)
    asked = ["--checks", "all", "--exclude-checks", UNSURE, "--max-examples", "100", "--suppress-health-check", "all"]
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{address}/openapi.json", *asked, "--no-color"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-4000:]
