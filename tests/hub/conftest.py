"""Fixtures that put the stand-in in the Hub's place, for this process and for others."""

from __future__ import annotations

import ssl
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from .standin import HubStandIn

TOKEN = "hf_alice"
NO_CERTIFICATES = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # to load the machine's takes longer than most tests


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The client itself sends LFS files in a way that httpx2 deprecates."""
    for item in items:
        if "hub" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"))


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that the client would have waited before it tried again. It waits for none of them."""
    from huggingface_hub import file_download
    from huggingface_hub.utils import _http

    waited: list[float] = []
    clock = SimpleNamespace(**{**vars(time), "sleep": waited.append})
    monkeypatch.setattr(_http, "time", clock)
    monkeypatch.setattr(file_download, "time", clock)
    return waited


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waits: list[float]) -> Iterator[HubStandIn]:
    """A stand-in that this process's huggingface_hub talks to, logged in as alice, with a cache and home of its own.

    `hub.environment` makes other processes talk to it too; those do wait before they try again.
    """
    from huggingface_hub import _tree_cache, close_session, constants, hf_api
    from huggingface_hub.utils import _detect_agent

    home = tmp_path / "hf-home"
    with HubStandIn() as standin:
        standin.environment |= {
            "HF_HOME": str(home),
            "HF_TOKEN": TOKEN,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        settings = {
            "ENDPOINT": standin.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": standin.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_DISABLE_TELEMETRY": True,
            "HF_HUB_DISABLE_IMPLICIT_TOKEN": False,
            "HF_HOME": str(home),
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_ASSETS_CACHE": str(home / "assets"),
            "HF_XET_CACHE": str(home / "xet"),
            "HF_TOKEN_PATH": str(home / "token"),
            "HF_STORED_TOKENS_PATH": str(home / "stored_tokens"),
        }
        for name, value in settings.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr("httpx2._transports.default.create_ssl_context", lambda **_: NO_CERTIFICATES)
        monkeypatch.setattr(hf_api.api, "endpoint", standin.url)
        monkeypatch.setattr(hf_api.api, "_whoami_cache", {})
        monkeypatch.setattr(_tree_cache, "_IN_MEMORY_TREE_CACHE", {})
        monkeypatch.setattr(_detect_agent, "_registry", _detect_agent._EMPTY_REGISTRY)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        for name in ("HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"):
            monkeypatch.delenv(name, raising=False)
        close_session()
        try:
            yield standin
        finally:
            close_session()
    assert not standin.errors, standin.errors[0]
