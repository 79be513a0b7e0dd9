"""Nothing here talks to a network unless it is asked for a name on the Hub: not at import, and not in use."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

#: Runs before anything else: every way out of Python's own sockets ends the process.
GUARD = """
import os, sys
def refuse(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "socket.sendmsg"):
        sys.stderr.write(f"{event} {arguments}\\n")
        os._exit(77)
sys.addaudithook(refuse)
"""

IMPORTS = """
import redif_sdk, redif_sdk.pipeline, redif_sdk.cli.main, redif_sdk.hub, redif_sdk.export
import redif_sdk.runtimes.onnxruntime
import redif_sdk.runtimes.openvino, redif_sdk.distill, redif_sdk.export.build, redif_sdk.demo, huggingface_hub.constants
assert huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY
"""

USE = """
from redif_sdk import FastPipeline
from redif_sdk.export import verify
FastPipeline.from_pretrained({student!r})(class_labels=3, seed=0)
assert all(row["passed"] for row in verify({student!r}, ["onnxruntime"]))
"""


def run(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {key: value for key, value in os.environ.items() if "TELEMETRY" not in key and key != "HF_HUB_OFFLINE"}
    return subprocess.run(
        [sys.executable, "-c", GUARD + script], env=inherited | environment, capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize("what", ["import", "use"])
def test_no_socket_is_opened(what: str, tiny_student: Path) -> None:
    done = run(IMPORTS if what == "import" else USE.format(student=str(tiny_student)))
    assert done.returncode == 0, done.stderr


def test_onnx_runtime_leaves_no_number_of_this_machine(tiny_student: Path, tmp_path: Path) -> None:
    """Its telemetry is native code, which no guard in Python sees; but it begins with a file that has a number."""
    places = {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    script = USE.format(student=str(tiny_student))
    assert run(script, **places).returncode == 0
    assert not list(tmp_path.rglob("*"))


def can_trace() -> bool:
    """Whether strace is here, and allowed to look."""
    return shutil.which("strace") is not None and subprocess.run(["strace", "-o", os.devnull, "true"]).returncode == 0


@pytest.mark.slow  # that telemetry is off is seen above, by the file that it would begin with
@pytest.mark.skipif(not can_trace(), reason="strace is not here, or may not trace (Debian: apt-get install strace)")
def test_no_native_code_opens_a_socket(tiny_student: Path, tmp_path: Path) -> None:
    """Of the whole process and its threads; ONNX Runtime would ask for its makers' address within ten seconds."""
    trace = tmp_path / "trace"
    script = USE.format(student=str(tiny_student)) + "import time; time.sleep(12)"
    strace = ["strace", "-f", "-qq", "-e", "trace=connect,sendto,sendmsg", "-o", str(trace)]
    inherited = {key: value for key, value in os.environ.items() if "TELEMETRY" not in key}
    subprocess.run([*strace, sys.executable, "-c", script], env=inherited, check=True, timeout=300)
    assert "AF_INET" not in trace.read_text()


def test_the_guard_sees_a_connection() -> None:
    assert run("import urllib.request; urllib.request.urlopen('http://127.0.0.1:9')").returncode == 77


def test_whoever_wants_the_telemetry_of_the_hubs_client_can_have_it() -> None:
    script = (
        "import redif_sdk, huggingface_hub.constants; assert not huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY"
    )
    assert run(script, HF_HUB_DISABLE_TELEMETRY="0").returncode == 0
