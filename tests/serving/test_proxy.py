"""`redif serve` behind the proxies of docs/serving.md, by the examples as they stand there."""

from __future__ import annotations

import io
import re
import shutil
import socket
import subprocess
import time
from base64 import b64decode
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest
import yaml
from PIL import Image

from tests.serving.test_command import serving
from tests.serving.test_http import PATH

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "serving.md"
NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
SECONDS = 300  # on a busy machine


def example(language: str, containing: str) -> str:
    """The block of code in the documentation that holds a text."""
    blocks = re.findall(rf"```{language}\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    (found,) = [block for block in blocks if containing in block]
    return str(found)


@contextmanager
def nginx(folder: Path, location: str) -> Iterator[str]:
    """A server of its own around a `location` block."""
    assert NGINX is not None
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    places = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    temporary = "\n".join(f"{place}_temp_path {folder}/{place};" for place in places)
    (folder / "nginx.conf").write_text(
        f"daemon off; master_process off; pid {folder}/pid; error_log stderr;\n"
        f"events {{}}\nhttp {{ access_log off; {temporary}\nserver {{ listen 127.0.0.1:{port};\n{location} }} }}\n"
    )
    command = [NGINX, "-p", str(folder), "-c", str(folder / "nginx.conf"), "-e", "stderr"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            end = time.monotonic() + SECONDS
            while True:
                assert process.poll() is None, process.stderr and process.stderr.read()
                assert time.monotonic() < end, "nginx does not listen"
                try:
                    socket.create_connection(("127.0.0.1", port), 1).close()
                    break
                except OSError:
                    time.sleep(0.05)
            yield f"http://localhost:{port}"
        finally:
            process.terminate()


@pytest.mark.skipif(NGINX is None, reason="nginx is not here: apt-get install nginx-light")
def test_behind_nginx_as_documented(tiny_student: Path, tmp_path: Path) -> None:
    location = example("nginx", "proxy_pass")
    with serving(tiny_student, "--runtime", "onnxruntime", "--root-path", "/images") as (_, own):
        location = location.replace("127.0.0.1:8000", own.removeprefix("http://"))
        with nginx(tmp_path, location) as outside, httpx.Client(base_url=outside, timeout=SECONDS) as client:
            body = {"prompt": "c", "seed": 3, "response_format": "url"}
            url = client.post(f"/images{PATH}", json=body).json()["data"][0]["url"]
            assert url.startswith(f"{outside}/images/v1/images/files/")
            image = Image.open(io.BytesIO(client.get(url).content))
            assert image.size == (28, 28)
            https = client.post(f"/images{PATH}", json=body, headers={"x-forwarded-proto": "https"})
            assert https.json()["data"][0]["url"].startswith("http://")  # the proxy's word, not the client's
            assert 'href="/images/openapi.json"' in client.get("/images/").text
            assert client.head("/images/readyz").status_code == 200
            large = client.post(f"/images{PATH}", content=b" " * 100_000)
            assert (large.status_code, large.json()["error"]["type"]) == (413, "invalid_request_error")
            events = client.post(f"/images{PATH}", json={"prompt": "c", "seed": 3, "stream": True}).text
            (data,) = re.findall(r'"b64_json": "([^"]+)"', events)
            assert np.array_equal(np.asarray(Image.open(io.BytesIO(b64decode(data)))), np.asarray(image))


def test_forwarded_headers_are_believed_from_named_proxies_only(tiny_student: Path) -> None:
    body = {"prompt": "c", "response_format": "url"}
    headers = {"x-forwarded-proto": "https", "host": "images.example"}
    for trusted, scheme in (("127.0.0.1", "https"), ("10.1.2.3", "http")):
        given = ("--runtime", "fake", "--root-path", "/images/", "--forwarded-allow-ips", trusted)
        with serving(tiny_student, *given) as (_, own):
            answer = httpx.post(own + PATH, json=body, headers=headers, timeout=SECONDS).json()
            assert answer["data"][0]["url"].startswith(f"{scheme}://images.example/images/v1/images/files/")


def test_the_example_for_traefik_removes_the_prefix_of_the_command() -> None:
    """Read, not run: it has the parts that Traefik asks for, and they name one another."""
    found = yaml.safe_load(example("yaml", "stripPrefix"))["http"]
    (router,) = found["routers"].values()
    assert router["rule"] == "PathPrefix(`/images`)"
    assert [found["middlewares"][name]["stripPrefix"]["prefixes"] for name in router["middlewares"]] == [["/images"]]
    assert found["services"][router["service"]]["loadBalancer"]["servers"] == [{"url": "http://127.0.0.1:8000"}]
    assert "--root-path /images" in DOCUMENT.read_text(encoding="utf-8")
