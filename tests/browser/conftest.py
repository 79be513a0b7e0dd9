"""A headless Chromium of the system, and a page that fails its test if it asks anybody else, or breaks.

Skipped by name where there is no Chromium: install Debian's package ``chromium``, or set CHROMIUM to a browser's path.
REDIF_SCREENSHOTS names a folder that is given a picture of every page that a test looks at.
"""

from __future__ import annotations

import functools
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture(scope="package")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no Chromium here: apt-get install chromium, or set CHROMIUM to a browser's path")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


Opener = Callable[..., Any]


@pytest.fixture
def open_page(browser: Any) -> Iterator[Opener]:
    """Opens an address in a context of its own. At the end: nothing was asked of anybody else, nothing was thrown."""
    contexts, asked, broken = [], [], []

    def open_at(url: str, **context: Any) -> Any:
        own = browser.new_context(accept_downloads=True, **context)
        contexts.append(own)
        page = own.new_page()
        page.set_default_timeout(30_000)
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: broken.append(str(error)))
        page.goto(url)
        hosts.add(urlsplit(url).netloc)
        return page

    hosts: set[str] = set()
    yield open_at
    for context in contexts:
        context.close()
    foreign = [url for url in asked if urlsplit(url).scheme in ("http", "https", "ws") and _host(url) not in hosts]
    assert not foreign, foreign
    assert not broken, broken


def _host(url: str) -> str:
    return urlsplit(url).netloc


@pytest.fixture
def until() -> Callable[[Any, Callable[[], Any]], Any]:
    """Waits until something is true of a page, and returns it."""

    def wait(page: Any, condition: Callable[[], Any], seconds: float = 60) -> Any:
        end = time.monotonic() + seconds
        while not (found := condition()):
            assert time.monotonic() < end, f"it did not come about; the page says: {page.inner_text('body')[:2000]}"
            page.wait_for_timeout(20)
        return found

    return wait


@pytest.fixture
def look(request: pytest.FixtureRequest) -> Callable[[Any, str], None]:
    """Takes a picture of the page for REDIF_SCREENSHOTS, where a person looks at it."""

    def take(page: Any, name: str) -> None:
        if folder := os.environ.get("REDIF_SCREENSHOTS"):
            Path(folder).mkdir(parents=True, exist_ok=True)
            page.screenshot(path=Path(folder) / f"{request.node.name}-{name}.png")

    return take


@contextmanager
def static_server(folder: Path) -> Iterator[str]:
    """The address of a plain server of the files in `folder`."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
