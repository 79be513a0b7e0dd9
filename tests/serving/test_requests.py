"""Whatever a client or a proxy sends is answered in OpenAI's shape, and the message names what is wrong.

The application runs in this process, without a socket; its backend draws nothing.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import re
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import FastAPI
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from redif_sdk.artifact.folder import StudentFolder
from redif_sdk.artifact.manifest import Manifest
from redif_sdk.errors import InvalidRequest
from redif_sdk.serving.app import create_app
from redif_sdk.serving.backend import ImageJob
from redif_sdk.serving.settings import ServeSettings
from tests.prompted import build_prompted

PATH = "/v1/images/generations"
JSON = {"content-type": "application/json"}


class Blank:
    """A backend whose images are black."""

    def __init__(self, manifests: dict[str, Manifest]) -> None:
        self.manifests = manifests

    def ready(self) -> bool:
        return True

    async def start(self) -> None:
        return None

    async def stop(self) -> None:
        return None

    async def generate(self, job: ImageJob) -> NDArray[np.uint8]:
        return np.zeros((job.height, job.width, 1), np.uint8)

    async def stream(self, job: ImageJob) -> AsyncIterator[NDArray[np.uint8]]:
        for _ in range(job.num_inference_steps):
            yield await self.generate(job)


@pytest.fixture(scope="module")
def manifests(tiny_student: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Manifest]:
    prompted = build_prompted(tmp_path_factory.mktemp("prompted") / "prompted")
    return {"tiny": StudentFolder(tiny_student).manifest, "prompted": StudentFolder(prompted).manifest}


class Client:
    """Sends requests to an application, on one event loop."""

    def __init__(self, app: FastAPI) -> None:
        self.app = app
        self.loop = asyncio.new_event_loop()

    def __call__(self, method: str, path: str | httpx.URL, **options: Any) -> httpx.Response:
        async def ask() -> httpx.Response:
            transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                return await client.request(method, path, **options)

        return self.loop.run_until_complete(ask())

    def error(self, method: str, path: str, status: int, **options: Any) -> str:
        """The message of a request that is refused with `status`."""
        answer = self(method, path, **options)
        assert answer.status_code == status, answer.text
        return message_of(answer)


@pytest.fixture(scope="module")
def ask(manifests: dict[str, Manifest]) -> Iterator[Client]:
    client = Client(create_app(Blank(manifests), ServeSettings(max_body_bytes=1 << 12)))
    yield client
    client.loop.close()


def message_of(answer: httpx.Response) -> str:
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert error["type"].endswith("_error")
    assert error["message"].isprintable()
    return str(error["message"])


# ---------------------------------------------------------------- headers


def test_what_curl_sends_without_a_header_names_the_header(ask: Client) -> None:
    body = b'{"prompt": "a"}'
    form = {"content-type": "application/x-www-form-urlencoded"}
    said = ask.error("POST", PATH, 415, content=body, headers=form)
    assert "Content-Type is application/x-www-form-urlencoded" in said
    assert "-H 'Content-Type: application/json'" in said
    assert "the Content-Type header is missing" in ask.error("POST", PATH, 415, content=body)
    for other in ("text/plain", "multipart/form-data; boundary=x", "json", "application/xml", "", "é/é", ";;;"):
        assert "Content-Type" in ask.error("POST", PATH, 415, content=body, headers={"content-type": other.encode()})


@pytest.mark.parametrize("kind", ["application/json", "Application/JSON; charset=UTF-8", "application/vnd.api+json"])
def test_types_that_are_json_are_taken(ask: Client, kind: str) -> None:
    for mark in (b"", b"\xef\xbb\xbf"):
        body = mark + '{"prompt": "a", "user": "é"}'.encode()
        assert ask("POST", PATH, content=body, headers={"content-type": kind}).status_code == 200


def test_encodings_that_are_not_taken_are_named(ask: Client) -> None:
    packed = gzip.compress(b'{"prompt": "a"}')
    said = ask.error("POST", PATH, 415, content=packed, headers={**JSON, "content-encoding": "gzip"})
    assert "Content-Encoding: gzip is not supported" in said
    latin = {"content-type": "application/json; charset=latin-1"}
    assert "charset latin-1" in ask.error("POST", PATH, 415, content=b"{}", headers=latin)
    body = '{"prompt": "é"}'.encode("latin-1")
    assert "not UTF-8: byte 12 is 0xe9" in ask.error("POST", PATH, 400, content=body, headers=JSON)


def test_bodies_in_pieces_and_of_any_length(ask: Client) -> None:
    async def pieces(data: bytes) -> AsyncIterator[bytes]:
        for byte in range(len(data)):
            yield data[byte : byte + 1]

    expecting = {**JSON, "expect": "100-continue"}
    assert ask("POST", PATH, content=pieces(b'{"prompt": "a"}'), headers=expecting).status_code == 200
    assert "more than 4096 bytes" in ask.error("POST", PATH, 413, content=pieces(b" " * 5000), headers=JSON)
    assert "more than 4096 bytes" in ask.error("POST", PATH, 413, content=b" " * 5000, headers=JSON)


# ---------------------------------------------------------------- JSON


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("", "the body is empty"),
        ("  \n", "the body is empty"),
        ('{"prompt": "a"', "Expecting ',' delimiter in line 1, column 15, where it ends"),
        ('{"prompt": "a",\n "n" 1}', "Expecting ':' delimiter in line 2, column 6, at '1}'"),
        ("prompt=a", "Expecting value in line 1, column 1, at 'prompt=a'"),
        ("{'prompt': 'a'}", "Expecting property name enclosed in double quotes in line 1, column 2"),
        ('{"prompt": "a",}', "line 1, column 1"),
        ('{"prompt": "a"} x', "Extra data in line 1, column 17"),
        ('{"prompt": "a\nb"}', "Invalid control character"),
        ("[1]", "the body is a JSON array"),
        ('"a"', "the body is a JSON string"),
        ("3", "the body is a JSON number"),
        ("1e999", "the body is a JSON number"),
        ("null", "the body is a JSON null"),
        ("true", "the body is a JSON boolean"),
        ('{"prompt": "a", "prompt": "b"}', "prompt is given twice"),
        ('{"prompt": "a", "seed": NaN}', "the body holds NaN"),
        ('{"prompt": "a", "n": -Infinity}', "the body holds -Infinity"),
        ("[" * 4000, "the body is not"),
        ('{"prompt": {"a": ' * 200 + "1", "is not JSON"),
    ],
)
def test_a_body_that_is_no_request_says_where_it_breaks(ask: Client, body: str, words: str) -> None:
    assert words in ask.error("POST", PATH, 400, content=body.encode(), headers=JSON)


FIELDS = {
    "prompt": [3, [], {}, True, "x" * 10_001],
    "model": [3, [], "x" * 201],
    "n": ["2", 1.5, True, 0, -1, [], 10**30, 1e999],
    "size": [3, [], "x" * 30, "0x0", "28x", "-1x28", "28×28", "99999x99999"],
    "response_format": ["file", 1],
    "output_format": ["gif", 1],
    "output_compression": [-1, 101, "1", 1.5, 10**30],
    "stream": ["yes", 1, "true", []],
    "partial_images": [-1, 4, "1", 10**30],
    "background": ["transparent", 1],
    "quality": [1, "x" * 30],
    "style": [1, "x" * 30],
    "moderation": [1, "x" * 30],
    "user": [1, "x" * 1001],
    "seed": [-1, 1.5, "1", True, [[]], [1, 2], {}, [[1, 2, 3]], 2**64, 10**30, 1e999],
    "num_inference_steps": [0, "2", 2.5, True, 10**30],
    "class_label": [-1, 10, 1.5, True, [], "zebra", 10**30],
}


@pytest.mark.parametrize("field", FIELDS)
def test_a_wrong_value_names_its_field(manifests: dict[str, Manifest], field: str) -> None:
    ask = Client(create_app(Blank(manifests), ServeSettings()))
    for value in FIELDS[field]:
        text = json.dumps({"prompt": "a", field: value}).replace("Infinity", "1e999")
        answer = ask("POST", PATH, content=text, headers=JSON)
        assert answer.status_code in (400, 404), (value, answer.text)
        said = message_of(answer)
        named = {field, field.replace("num_inference_", ""), {"class_label": "class"}.get(field, field)}
        named |= {"size": {"height", "width"}, "prompt": {"'x"}}.get(field, set())
        assert any(name in said for name in named), (value, said)
        assert len(said) < 600
    ask.loop.close()


def test_an_unknown_field_is_named_with_the_known_ones(ask: Client) -> None:
    said = ask.error("POST", PATH, 400, json={"prompt": "a", "clip_skip": 2})
    assert said.startswith("clip_skip: there is no such field; use prompt, model, n,")


# ---------------------------------------------------------------- methods and paths


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/metrics", "/", "/docs", "/v1/models", "/v1/models/tiny"])
def test_head_is_answered_as_get(ask: Client, path: str) -> None:
    head, get = ask("HEAD", path), ask("GET", path)
    assert (head.status_code, get.status_code) == (200, 200)
    assert head.headers["content-type"] == get.headers["content-type"]


def test_other_methods_and_paths_are_named(ask: Client) -> None:
    said = ask.error("GET", PATH, 405)
    assert f"{PATH} does not support GET; use POST" in said
    assert ask("GET", PATH).headers["allow"] == "POST"
    for method in ("PUT", "DELETE", "PATCH", "OPTIONS", "PROPFIND"):
        assert method in ask.error(method, "/v1/models", 405)
    for path in (
        "/v1/chat/completions",
        f"{PATH}/",
        "/v1",
        "/v1/images/upscales",
        "/favicon.ico",
        "/%ff%00",
        "/v1/%2e",
    ):
        assert "this server has POST /v1/images/generations" in ask.error("GET", path, 404)
    assert "there is no model" in ask.error("GET", "/v1/models/", 404)
    assert "no longer kept" in ask.error("GET", "/v1/images/files/x.png", 404)


def test_a_host_that_is_none_breaks_nothing(ask: Client) -> None:
    """A server takes its own address then, or says that the header is wrong."""
    for host in ("[", "a b", "x:99999999", "é", ""):
        body = {"prompt": "a", "response_format": "url"}
        answer = ask("POST", PATH, json=body, headers={"host": host.encode("latin-1")})
        if answer.status_code != 200:
            assert "the Host header is" in message_of(answer)


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["a", "tiny", "28x28"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
REQUESTS = st.dictionaries(st.sampled_from(list(FIELDS)) | st.text(max_size=6), JSON_VALUES, max_size=4)
BODIES = (
    st.binary(max_size=60)
    | REQUESTS.map(json.dumps).map(str.encode)
    | st.tuples(REQUESTS.map(json.dumps), st.integers(0, 80)).map(lambda pair: pair[0][: pair[1]].encode())
)
TOKENS = st.text(st.characters(min_codepoint=32, max_codepoint=255, exclude_characters="\x7f"), max_size=20)
HEADERS = st.dictionaries(
    st.sampled_from(["content-type", "content-encoding", "authorization", "x-request-id", "host", "expect", "accept"]),
    st.sampled_from(["application/json", "gzip", "identity", "text/plain", "100-continue"]) | TOKENS,
    max_size=3,
)
METHODS = st.sampled_from(["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE"])
PATHS = st.sampled_from(
    [PATH, "/v1/models", "/v1/models/tiny", "/healthz", "/readyz", "/", "/metrics", "/docs"]
) | st.text("/v1imagesodel%.~?#", max_size=12).map(lambda text: f"/{text}")


@settings(max_examples=150)
@example("POST", PATH, b'{"\\ud800": 1}', JSON)
@example("POST", PATH, b'{"prompt": "\\ud800", "model": "prompted"}', JSON)
@example("POST", PATH, b'{"model": "\\ud800"}', JSON)
@example("POST", PATH, b'{"prompt": "a", "seed": ' + b"9" * 3000 + b"}", JSON)
@given(METHODS, PATHS, BODIES, st.just(JSON) | HEADERS)
def test_nothing_that_is_sent_breaks_the_server(
    ask: Client, method: str, path: str, body: bytes, headers: dict[str, str]
) -> None:
    try:
        url = httpx.URL("http://test").copy_with(raw_path=path.encode("utf-8"))
    except httpx.InvalidURL:
        return
    answer = ask(method, url, content=body, headers={k: v.encode("latin-1") for k, v in headers.items()})
    assert answer.status_code < 500, answer.text
    if answer.status_code >= 400 and method != "HEAD":
        message_of(answer)


# ---------------------------------------------------------------- below a prefix


@pytest.mark.parametrize("stripped", [True, False])
def test_below_a_prefix_everything_is_where_the_proxy_has_it(manifests: dict[str, Manifest], stripped: bool) -> None:
    """Some proxies remove the prefix and some do not; keys are asked for either way."""
    limits = ServeSettings(root_path="/my/images", api_keys=("a-secret-key",))
    ask = Client(create_app(Blank(manifests), limits))
    before = "" if stripped else "/my/images"
    key = {"authorization": "Bearer a-secret-key"}
    assert "no valid API key" in ask.error("POST", before + PATH, 401, json={"prompt": "a"})
    assert "no valid API key" in ask.error("GET", f"{before}/v1/models", 401)
    body = {"prompt": "a", "response_format": "url"}
    url = ask("POST", before + PATH, json=body, headers=key).json()["data"][0]["url"]
    assert re.fullmatch(r"http://test/my/images/v1/images/files/[\w-]+\.png", url)
    assert ask("GET", url.removeprefix("http://test/my/images" if stripped else "http://test")).status_code == 200
    page = ask("GET", f"{before}/").text
    assert 'href="/my/images/openapi.json"' in page
    assert f"HOST:PORT/my/images{PATH}" in page
    assert ask("GET", f"{before}/openapi.json").json()["servers"] == [{"url": "/my/images"}]
    assert ask("HEAD", f"{before}/healthz").status_code == 200
    ask.loop.close()


@pytest.mark.parametrize("path", ["images", "/images/", "/", "//x", "/a b", "/../x", "/x?y", "http://x/y", "/%2e"])
def test_a_prefix_that_is_none_is_refused(path: str) -> None:
    with pytest.raises(InvalidRequest, match="root_path is"):
        ServeSettings(root_path=path)
