"""Spaces: what is sent, what is left alone, and that the application that is sent runs."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

import redif_sdk
from redif_sdk import FastPipeline
from redif_sdk.artifact.paths import list_files
from redif_sdk.errors import HubError, InvalidRequest, ParityError
from redif_sdk.hub import push_space
from redif_sdk.hub.space import SPACE_MARKER

from .standin import HubStandIn

SPACE, REPO = "alice/show", "alice/tiny"
REDIF = (sys.executable, "-c", "import sys; sys.argv[0] = 'redif'; from redif_sdk.cli.main import main; main()")


def head_of(readme: bytes) -> dict[str, object]:
    found: dict[str, object] = yaml.safe_load(readme.decode().split("---\n")[1])
    return found


def redif(hub: HubStandIn, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [*REDIF, *map(str, arguments)]
    return subprocess.run(command, env=os.environ | hub.environment, capture_output=True, text=True, timeout=120)


@contextmanager
def application(folder: Path, hub: HubStandIn) -> Iterator[str]:
    """``app.py`` as a Space runs it; its address."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = str(taken.getsockname()[1])
    environment = os.environ | hub.environment | {"GRADIO_SERVER_NAME": "127.0.0.1", "GRADIO_SERVER_PORT": port}
    process = subprocess.Popen(
        [sys.executable, "app.py"],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("tiny at http"), process.communicate()[1]
        yield line.split()[2]
    finally:
        process.kill()
        process.communicate()


def picture_of(address: str) -> np.ndarray:
    from gradio_client import Client

    client = Client(address, verbose=False)
    pictures = client.predict(prompt="c", num_inference_steps=3, seed="7", num_images=1, api_name="/generate")[0]
    client.close()
    return np.asarray(Image.open(pictures[0]["image"]).convert("L"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("place", [pytest.param("inside", marks=pytest.mark.slow), "on the Hub"])
def test_the_demo_that_is_sent_runs(hub: HubStandIn, tiny_student: Path, tmp_path: Path, place: str) -> None:
    arguments = [REPO] if place == "on the Hub" else []
    done = redif(hub, "push", tiny_student, *arguments, "--space", SPACE)
    assert done.returncode == 0, done.stderr
    files = hub.files(SPACE, kind="space")
    head = head_of(files["README.md"])
    assert head["sdk"] == "gradio"
    assert head["app_file"] == "app.py"
    assert head["license"] == "mit"
    assert files["requirements.txt"].decode() == f"redif-sdk[cpu,demo]=={redif_sdk.__version__}\n"
    own = {path.removeprefix("student/") for path in files if path.startswith("student/")}
    if place == "inside":
        assert own == set(list_files(tiny_student))
        assert ("model", REPO) not in hub.repos
    else:
        assert own == set()
        assert head["models"] == [REPO]
        assert f"run('{REPO}', revision='{hub.head(REPO)}')" in files["app.py"].decode()
    for path, data in files.items():
        (tmp_path / "space" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "space" / path).write_bytes(data)
    pipe = FastPipeline.from_pretrained(tiny_student, runtime="onnxruntime")
    wanted = pipe("c", num_inference_steps=3, seed=7, output_type="uint8").images[0, :, :, 0]
    with application(tmp_path / "space", hub) as address:
        assert np.array_equal(picture_of(address), wanted)


def test_a_second_push_replaces_what_changed(hub: HubStandIn, tiny_student: Path) -> None:
    first = push_space(tiny_student, SPACE, private=True)
    assert hub.repos["space", SPACE].private
    assert first.url == f"{hub.url}/spaces/{SPACE}"
    assert {row["action"] for row in push_space(tiny_student, SPACE).rows} == {"keep"}
    assert hub.head(SPACE, kind="space") == first.commit
    moved = push_space(tiny_student, SPACE, student_id=REPO, student_commit="a" * 40)
    assert {row["path"] for row in moved.rows if row["action"] == "replace"} == {"app.py", "README.md"}
    assert not [path for path in hub.files(SPACE, kind="space") if path.startswith("student/")]


def test_a_space_of_something_else_is_left_alone_before_the_student_is_sent(
    hub: HubStandIn, tiny_student: Path
) -> None:
    hub.put(SPACE, {"README.md": b"---\nsdk: gradio\n---\n", "app.py": b"print('mine')"}, kind="space")
    before = hub.head(SPACE, kind="space")
    done = redif(hub, "push", tiny_student, REPO, "--space", SPACE)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert "holds something else than a Space of redif-sdk (app.py" in done.stderr
    assert hub.head(SPACE, kind="space") == before
    assert ("model", REPO) not in hub.repos


def test_what_the_hub_itself_put_there_is_replaced(hub: HubStandIn, tiny_student: Path) -> None:
    hub.put(SPACE, {"README.md": b"---\nsdk: gradio\n---\nCheck out the configuration reference"}, kind="space")
    push_space(tiny_student, SPACE)
    assert SPACE_MARKER in hub.files(SPACE, kind="space")["README.md"].decode()


def test_a_dry_run_changes_nothing(hub: HubStandIn, tiny_student: Path) -> None:
    done = redif(hub, "push", tiny_student, REPO, "--space", SPACE, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert f"{REPO}: " in done.stdout
    assert f"{SPACE}: " in done.stdout
    assert not hub.repos
    assert not hub.asked("POST|PUT|DELETE")


def test_a_page_is_a_static_space(hub: HubStandIn, tiny_student: Path, tmp_path: Path) -> None:
    if shutil.which("npm") is None:
        pytest.skip("no npm here: install Node.js")
    from redif_sdk.export.web import build_page

    page = build_page(tiny_student, tmp_path / "web", engines=("wasm",))
    push_space(page, SPACE)
    files = hub.files(SPACE, kind="space")
    assert {path: data for path, data in files.items() if path != ".gitattributes"} == {
        path: (page / path).read_bytes() for path in list_files(page)
    }
    head = head_of(files["README.md"])
    assert head["sdk"] == "static"
    assert head["custom_headers"]["cross-origin-embedder-policy"] == "require-corp"
    assert {row["action"] for row in push_space(page, SPACE).rows} == {"keep"}
    with pytest.raises(InvalidRequest, match="is a page with the student in it"):
        push_space(page, SPACE, student_id=REPO)
    (page / "app.js").write_text("alert(1)")
    with pytest.raises(InvalidRequest, match=r"app.js of the page in .* is not what was exported"):
        push_space(page, SPACE)


def test_what_is_refused(hub: HubStandIn, tiny_student: Path, bare_student: Path, tmp_path: Path) -> None:
    for arguments, said in (
        ((), "no destination is given"),
        (("--space", SPACE, "--git-tag", "v1"), "--git-tag needs a repository for the student"),
        ((REPO, "--space", SPACE, "--pr"), "--pr opens a pull request"),
        (("--space", "show"), "give it as org/name"),
    ):
        done = redif(hub, "push", tiny_student, *arguments)
        assert done.returncode == 2
        assert said in done.stderr
    with pytest.raises(ParityError, match="is not pushed: it has no compiled graphs"):
        push_space(bare_student, SPACE)
    with pytest.raises(HubError, match="may not do that") as refused:
        push_space(tiny_student, "bob/show")
    assert refused.value.kind == "forbidden"
    assert not hub.repos
