"""examples/: each file is short, runs as a process of its own, and makes what it says."""

from __future__ import annotations

import ast
import contextlib
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import urlencode
from urllib.request import urlopen

import numpy as np
import pipelines
import pytest
from PIL import Image

from redif_sdk import FastPipeline
from redif_sdk.artifact.folder import StudentFolder

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "examples"
EXAMPLES = sorted(path.name for path in FOLDER.glob("*.py") if path.name != "shipped.py")
NO_TORCH = "raise ImportError('this example runs where torch is not installed')\n"


def environment(tmp_path: Path, torch: bool) -> dict[str, str]:
    """This process's, with the checkout first; without ``torch``, importing it fails."""
    places = [str(ROOT)]
    if not torch:
        (tmp_path / "without").mkdir(exist_ok=True)
        (tmp_path / "without" / "torch.py").write_text(NO_TORCH)
        places.insert(0, str(tmp_path / "without"))
    return os.environ | {"PYTHONPATH": os.pathsep.join(places), "GRADIO_ANALYTICS_ENABLED": "False"}


def run(name: str, *arguments: object, cwd: Path, torch: bool = False, fails: bool = False) -> str:
    """Standard output of an example (of a failing one standard error)."""
    command = [sys.executable, str(FOLDER / name), *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, env=environment(cwd, torch), capture_output=True, text=True, timeout=1500)
    assert bool(done.returncode) == fails, f"{name}\n{done.stdout}\n{done.stderr}"
    return done.stderr if fails else done.stdout


@contextlib.contextmanager
def served(name: str, *arguments: object, port: int, cwd: Path) -> Iterator[str]:
    """The address of an example that serves, once it answers; it is stopped by SIGTERM."""
    command = [sys.executable, str(FOLDER / name), *map(str, arguments)]
    with (cwd / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=cwd, env=environment(cwd, False), stdout=log, stderr=log)
    try:
        for _ in range(600):
            if _answers(port):
                break
            assert process.poll() is None, (cwd / "log").read_text()
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(60)


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def levels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image).copy()


def test_there_are_ten_and_each_is_short_and_in_the_index() -> None:
    assert len(EXAMPLES) == 10
    index = (FOLDER / "README.md").read_text(encoding="utf-8")
    for name in EXAMPLES:
        text = (FOLDER / name).read_text(encoding="utf-8")
        assert len(text.splitlines()) < 60, name
        assert f"python examples/{name}" in (ast.get_docstring(ast.parse(text)) or ""), name
        assert f"[{name}]({name})" in index
    listed = set(re.findall(r"\]\(([^):#]+)\)", index))
    assert all((FOLDER / path).exists() for path in listed), listed


def test_the_gradio_page_is_twenty_lines() -> None:
    text = (FOLDER / "gradio_demo.py").read_text(encoding="utf-8")
    assert len([line for line in text.splitlines() if line.strip()]) <= 20


def test_from_an_image(tiny_student: Path, tmp_path: Path) -> None:
    run("image_to_image.py", tiny_student, "--first", "a", "--prompt", "b", "-o", "out/row.png", cwd=tmp_path)
    row = levels(tmp_path / "out/row.png")
    assert row.shape == (28, 28 * 4)  # the image, two strengths, and the part that was painted anew
    first, weak, full, painted = np.split(row.astype(int), 4, axis=1)
    assert np.array_equal(painted[:, :14], first[:, :14])
    assert not np.array_equal(painted[:, 14:], first[:, 14:])
    assert np.abs(weak - first).mean() < np.abs(full - first).mean()


def test_a_batch_goes_on_where_it_stopped(tiny_student: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a\nc\n\nb\n")
    asked = (tiny_student, "--prompts", "prompts.txt", "-n", 2, "-o", "images")
    run("batch_to_folder.py", *asked, "--batch", 4, cwd=tmp_path)
    images = tmp_path / "images"
    rows = [json.loads(line) for line in (images / "metadata.jsonl").read_text().splitlines()]
    assert [row["text"] for row in rows] == ["a", "a", "c", "c", "b", "b"]
    assert sorted(path.name for path in images.iterdir()) == [*(row["file_name"] for row in rows), "metadata.jsonl"]
    pipe = FastPipeline.from_pretrained(tiny_student)
    wanted = pipe([row["text"] for row in rows], seed=[tuple(row["seed"]) for row in rows], output_type="uint8").images
    assert np.array_equal(np.stack([levels(images / row["file_name"]) for row in rows]), wanted[..., 0])

    lost = images / rows[3]["file_name"]
    before = {path: path.stat().st_mtime_ns for path in images.iterdir() if path != lost}
    lost.unlink()
    with (tmp_path / "prompts.txt").open("a") as file:
        file.write("e\n")
    assert "5 of 8 images are there already" in run("batch_to_folder.py", *asked, "--batch", 1, cwd=tmp_path)
    assert np.array_equal(levels(lost), wanted[3, ..., 0])  # whatever shares its batch
    assert all(path.stat().st_mtime_ns == when for path, when in before.items() if path.suffix == ".png")
    assert len(list(images.glob("*.png"))) == 8

    said = run("batch_to_folder.py", *asked, "--seed", 1, cwd=tmp_path, fails=True)
    assert said == "images holds images of other prompts, numbers or seeds; choose another folder with -o\n"


def test_the_route_of_an_application_gives_the_image_of_the_seed(tiny_student: Path, tmp_path: Path) -> None:
    port = free_port()
    with served("fastapi_app.py", tiny_student, "--port", port, port=port, cwd=tmp_path) as address:
        with urlopen(f"{address}/image?{urlencode({'prompt': 'c', 'seed': 7})}", timeout=60) as answer:
            assert answer.headers["content-type"] == "image/png"
            assert answer.headers["x-seed"] == "7"
            found = Image.open(io.BytesIO(answer.read()))
        wanted = FastPipeline.from_pretrained(tiny_student)("c", seed=7).images[0]
        assert np.array_equal(np.asarray(found), np.asarray(wanted))
        with pytest.raises(HTTPError) as error:
            urlopen(f"{address}/image?prompt=nothing", timeout=60)
        assert error.value.code == 422
        assert "nothing" in json.load(error.value)["detail"]


@pytest.mark.slow
def test_the_page_draws_what_is_asked_for(tiny_student: Path, tmp_path: Path) -> None:
    client = pytest.importorskip("gradio_client")
    port = free_port()
    with served("gradio_demo.py", tiny_student, port, port=port, cwd=tmp_path) as address:
        files = client.Client(address, verbose=False).predict("c", 2, 7, api_name="/paint")
        wanted = FastPipeline.from_pretrained(tiny_student)("c", num_images_per_prompt=2, seed=7, output_type="uint8")
        found = [np.asarray(Image.open(file["image"]).convert("L")) for file in files]
        assert np.array_equal(np.stack(found), wanted.images[..., 0])


@pytest.mark.slow
def test_any_pipeline_as_it_is(tmp_path: Path) -> None:
    pipelines.tiny_sd(tmp_path / "sd")
    said = run("import_pipeline.py", "sd", "--steps", 2, 4, "-o", "out/imported", cwd=tmp_path, torch=True)
    assert "4 images in" in said
    assert StudentFolder(tmp_path / "out/imported").manifest.supported_steps == [2, 4]
    assert levels(tmp_path / "out/imported.png").shape == (32, 32, 3)


@pytest.mark.slow
def test_a_class_model_is_distilled(tmp_path: Path) -> None:
    asked = ("--updates", 2, "-o", "out/student")
    run("distil_class_model.py", *asked, cwd=tmp_path, torch=True)
    manifest = StudentFolder(tmp_path / "out/student").manifest
    assert manifest.supported_steps == [2]
    assert manifest.distillation is not None
    assert manifest.distillation.budget.updates == 2
    assert levels(tmp_path / "out/student.png").shape == (4 * 28, 4 * 28)
    assert not (tmp_path / "out/student.training/checkpoint.pt").exists()


@pytest.mark.slow
def test_text_by_adapters(tmp_path: Path) -> None:
    pipelines.tiny_sd(tmp_path / "sd")
    (tmp_path / "prompts.txt").write_text("\n".join(pipelines.PROMPTS))
    asked = ("sd", "--prompts", "prompts.txt", "--updates", 2, "--pool", 32, "--rank", 2, "--steps", 2)
    run("distil_text_lora.py", *asked, "-o", "student", "--draw", "red heart", cwd=tmp_path, torch=True)
    manifest = StudentFolder(tmp_path / "student").manifest
    assert manifest.distillation is not None
    assert manifest.distillation.configuration["lora_rank"] == 2
    assert manifest.text is not None
    assert manifest.text.examples == pipelines.PROMPTS
    assert levels(tmp_path / "student.png").shape == (16, 32, 3)


@pytest.mark.slow
def test_a_reward_over_http(tmp_path: Path) -> None:
    said = run("reward_over_http.py", "--updates", 2, "-o", "student", cwd=tmp_path, torch=True)
    assert re.search(r"rewarded by http://127\.0\.0\.1:\d+/score", said)
    distillation = StudentFolder(tmp_path / "student").manifest.distillation
    assert distillation is not None
    assert len(distillation.rewards) == 2
    port = int(re.findall(r":(\d+)/score", said)[0])
    assert not _answers(port), "the server is still there"


@pytest.mark.slow
def test_a_function_as_a_teacher(tmp_path: Path) -> None:
    run("callable_teacher.py", "--updates", 3, "-o", "student", cwd=tmp_path, torch=True)
    assert StudentFolder(tmp_path / "student").manifest.network.call == "x, t, condition"
    assert levels(tmp_path / "student.png").shape == (112, 112)


@pytest.mark.slow
def test_precisions_side_by_side(tiny_student: Path, tmp_path: Path) -> None:
    asked = (tiny_student, "--precision", "fp32", "int8", "--prompt", "c", "--rounds", 2, "-o", "both")
    said = run("export_and_quantise.py", *asked, cwd=tmp_path, torch=True)
    table = {line.split()[0]: line.split()[1:] for line in said.splitlines()[1:3]}
    assert table["fp32"][-1] == "equal"
    assert float(table["int8"][-1]) > 20
    assert float(table["int8"][0]) < float(table["fp32"][0]) / 2
    assert levels(tmp_path / "both.png").shape == (56, 112)


@pytest.mark.slow
def test_without_a_student_the_shipped_one_is_exported_once(tmp_path: Path) -> None:
    """From a copy of what the example and the teacher need, as in a clone without build/."""
    (tmp_path / "clone").mkdir()
    shutil.copytree(FOLDER, tmp_path / "clone/examples")
    asked = ["--prompt", "a blue heart", "-o", str(tmp_path / "row.png")]
    command = [sys.executable, "clone/examples/image_to_image.py", *asked]
    said = []
    for _ in range(2):
        done = subprocess.run(
            command, cwd=tmp_path, env=environment(tmp_path, True), capture_output=True, text=True, check=True
        )
        said.append(done.stdout)
    assert "exporting the shipped student" in said[0]
    assert "exporting" not in said[1]
    first, *_, full, painted = np.split(levels(tmp_path / "row.png").astype(int), 6, axis=1)
    colour = [part[24:40, 40:56].mean((0, 1)) for part in (first, full, painted)]
    assert colour[0][0] > 150 > colour[0][2]  # a red heart
    assert colour[1][2] > 150 > colour[1][0]  # became blue
    assert colour[2][2] > colour[2][0]  # and so did its right half
