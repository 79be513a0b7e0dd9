"""The ComfyUI nodes: by ComfyUI's protocol, and in ComfyUI itself where a checkout is named."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

from redif_sdk import FastPipeline
from redif_sdk.errors import InvalidRequest

FOLDER = Path(__file__).resolve().parent.parent / "integrations/comfyui"


@pytest.fixture(scope="module")
def nodes() -> ModuleType:
    """As ComfyUI loads a folder of custom_nodes."""
    spec = importlib.util.spec_from_file_location(
        "redif_nodes", FOLDER / "__init__.py", submodule_search_locations=[str(FOLDER)]
    )
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["redif_nodes"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pipe(full_student: Path) -> FastPipeline:
    return FastPipeline.from_pretrained(full_student, runtime="onnxruntime")


def defaults(kind: Any) -> dict[str, Any]:
    """The values of a node's widgets before anybody touches them, as the frontend has them."""
    found = {}
    for name, (type_, *options) in kind.INPUT_TYPES()["required"].items():
        if isinstance(type_, list):
            found[name] = type_[0]
        elif type_ in ("INT", "FLOAT", "STRING"):
            found[name] = options[0]["default"]
    return found


@pytest.fixture(scope="module")
def run(nodes: ModuleType, full_student: Path) -> Callable[..., Any]:
    """Load and sample, as ComfyUI's executor calls nodes: by keyword, with the inputs that INPUT_TYPES names."""
    load, sample = (nodes.NODE_CLASS_MAPPINGS[name] for name in ("RedifLoadStudent", "RedifSample"))
    asked = defaults(load) | {"student": str(full_student), "runtime": "onnxruntime"}
    (student,) = getattr(load(), load.FUNCTION)(**asked)

    def sampled(**inputs: Any) -> Any:
        (images,) = getattr(sample(), sample.FUNCTION)(student=student, **(defaults(sample) | inputs))
        return images

    return sampled


def test_images_are_the_pipelines_bit_for_bit(run: Callable[..., Any], pipe: FastPipeline) -> None:
    images = run(class_label="3", seed=7, batch_size=10, num_inference_steps=3)
    assert (images.dtype, tuple(images.shape)) == (torch.float32, (10, 28, 28, 3))
    ours = pipe(class_labels=3, seed=7, num_images_per_prompt=10, num_inference_steps=3, output_type="uint8").images
    saved = np.clip(255.0 * images.numpy(), 0, 255).astype(np.uint8)  # as the Save Image node does
    assert np.array_equal(saved, ours.repeat(3, 3))
    named = run(prompt="d", seed=7, width=28, height=36)
    assert tuple(named.shape) == (1, 36, 28, 3)


def test_images_and_masks(run: Callable[..., Any], pipe: FastPipeline) -> None:
    starts = run(class_label="1", seed=1, batch_size=2)
    mask = torch.zeros(1, 56, 56)
    mask[:, :28] = 1
    out = run(class_label="2", seed=7, batch_size=2, image=starts, mask=mask, strength=1.0)
    kept = starts.repeat_interleave(2, 0)
    assert torch.equal(out[:, 14:], kept[:, 14:])
    assert not torch.equal(out[:, :14], kept[:, :14])
    from_one = run(class_label="2", seed=7, batch_size=2, image=starts * 1.0000001, strength=0.5)
    grey = np.rint(starts.numpy()[..., 0] * 255).astype(np.uint8)
    for place, (first, second) in enumerate(((0, 0), (0, 1), (1, 2), (1, 3))):
        ours = pipe(class_labels=2, seed=[(7, second)], image=grey[first], strength=0.5, output_type="np").images
        assert np.array_equal(from_one[place].numpy(), ours[0].repeat(3, 2))


def test_what_is_wrong_is_one_line(nodes: ModuleType, run: Callable[..., Any], tmp_path: Path) -> None:
    load = nodes.NODE_CLASS_MAPPINGS["RedifLoadStudent"]
    assert "give a folder" in load.VALIDATE_INPUTS(student=" ")
    assert "has no redif.json" in load.VALIDATE_INPUTS(student=str(tmp_path))
    assert load.VALIDATE_INPUTS(student="org/name") is True
    with pytest.raises(ValueError, match="a mask is given without an image"):
        run(class_label="1", mask=torch.ones(1, 28, 28))
    with pytest.raises(ValueError, match="3 masks for 2 images"):
        run(class_label="1", image=torch.ones(2, 28, 28, 3), mask=torch.ones(3, 28, 28))
    with pytest.raises(InvalidRequest) as caught:
        run(class_label="77")
    assert "\n" not in str(caught.value)


def test_a_student_that_was_made_anew_is_loaded_again(
    nodes: ModuleType, full_student: Path, copy_of: Callable[[Path], Path]
) -> None:
    load = nodes.NODE_CLASS_MAPPINGS["RedifLoadStudent"]
    copied = copy_of(full_student)
    before = load.IS_CHANGED(student=str(copied), runtime="auto", precision="auto")
    assert load.IS_CHANGED(student=str(copied), runtime="auto", precision="auto") == before
    (copied / "redif.json").write_text((copied / "redif.json").read_text() + "\n")
    assert load.IS_CHANGED(student=str(copied), runtime="auto", precision="auto") != before


def test_progress_and_interruption(nodes: ModuleType, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """By the two functions of ComfyUI that the node uses; the real ones are used in the slow test."""
    seen: list[Any] = []

    class ProgressBar:
        def __init__(self, total: int) -> None:
            seen.append(total)

        def update(self, value: int) -> None:
            seen.append(value)

    def interrupt() -> None:
        if len(seen) > 2:
            raise KeyError("interrupted")

    utils, management = ModuleType("comfy.utils"), ModuleType("comfy.model_management")
    utils.ProgressBar, management.throw_exception_if_processing_interrupted = ProgressBar, interrupt  # type: ignore[attr-defined]
    for name, module in (
        ("comfy", ModuleType("comfy")),
        ("comfy.utils", utils),
        ("comfy.model_management", management),
    ):
        monkeypatch.setitem(sys.modules, name, module)
    with pytest.raises(KeyError, match="interrupted"):
        run(class_label="1", batch_size=20)
    assert seen == [20, 8, 8]


def test_the_workflow_fits_the_nodes(nodes: ModuleType) -> None:
    """Values of widgets stand in the order of INPUT_TYPES; a seed has a second widget behind it."""
    workflow = json.loads((FOLDER / "workflow.json").read_text())
    by_id = {node["id"]: node for node in workflow["nodes"]}
    for _, source, slot, target, place, kind in workflow["links"]:
        assert by_id[source]["outputs"][slot]["type"] == by_id[target]["inputs"][place]["type"] == kind
    for node in workflow["nodes"]:
        if node["type"] not in nodes.NODE_CLASS_MAPPINGS:
            continue
        values = api_inputs(node, nodes.NODE_CLASS_MAPPINGS[node["type"]])
        for name, value in values.items():
            type_, *options = nodes.NODE_CLASS_MAPPINGS[node["type"]].INPUT_TYPES()["required"][name]
            if isinstance(type_, list):
                assert value in type_
            else:
                assert isinstance(value, {"INT": int, "FLOAT": float, "STRING": str}[type_])
                assert options[0].get("min", 0) <= value <= options[0].get("max", 0) if type_ != "STRING" else True


def api_inputs(node: dict[str, Any], kind: Any) -> dict[str, Any]:
    """The widgets of a node of the workflow by name, as the frontend sends them."""
    names = []
    for name, (type_, *options) in kind.INPUT_TYPES()["required"].items():
        if isinstance(type_, list) or type_ in ("INT", "FLOAT", "STRING"):
            names += [name, None] if options and options[0].get("control_after_generate") else [name]
    assert len(names) == len(node["widgets_values"])
    return {name: value for name, value in zip(names, node["widgets_values"], strict=True) if name}


@pytest.mark.slow
def test_in_comfyui_itself(nodes: ModuleType, full_student: Path, pipe: FastPipeline, tmp_path: Path) -> None:
    """ComfyUI's server on the CPU validates the workflow, executes it, reports progress, and saves the images."""
    checkout = os.environ.get("REDIF_COMFYUI")
    if not checkout:
        pytest.skip("REDIF_COMFYUI does not name a checkout of ComfyUI")
    python = os.environ.get("REDIF_COMFYUI_PYTHON", sys.executable)
    shutil.copytree(FOLDER, tmp_path / "custom_nodes/redif")
    (tmp_path / "page").mkdir()
    shutil.copytree(full_student, tmp_path / "models/redif/student")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [python, "main.py", "--cpu", "--port", str(port), "--base-directory", str(tmp_path)]
    command += ["--disable-api-nodes", "--front-end-root", str(tmp_path / "page")]
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(command, cwd=checkout, stdout=log, stderr=subprocess.STDOUT)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            wait(lambda: responds(client), server, tmp_path / "log")
            assert {"RedifLoadStudent", "RedifSample"} <= client.get("/object_info").json().keys()
            outputs = executed(client, graph(nodes, student="student", runtime="onnxruntime"), server, tmp_path / "log")
            files = [tmp_path / "output" / image["filename"] for image in outputs["3"]["images"]]
            ours = pipe(class_labels=3, seed=7, num_images_per_prompt=4, output_type="uint8").images
            saved = np.stack([np.asarray(Image.open(file)) for file in files])
            assert np.array_equal(saved, ours.repeat(3, 3))
            refused = client.post("/prompt", json={"prompt": graph(nodes, student=str(tmp_path))})
            assert refused.status_code == 400
            assert "has no redif.json" in refused.text
            wrong = executed(client, graph(nodes, student="student", class_label="77"), server, tmp_path / "log")
            assert "class" in wrong["error"]
            assert "\n" not in wrong["error"].strip()
    finally:
        server.terminate()
        server.wait(60)


def graph(nodes: ModuleType, **values: Any) -> dict[str, Any]:
    """The workflow as the frontend sends it, with some values changed."""
    workflow = json.loads((FOLDER / "workflow.json").read_text())
    links = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    found = {}
    for node in workflow["nodes"]:
        kind = nodes.NODE_CLASS_MAPPINGS.get(node["type"])
        inputs = api_inputs(node, kind) if kind else {"filename_prefix": node["widgets_values"][0]}
        inputs |= {name: value for name, value in values.items() if name in inputs}
        inputs |= {one["name"]: links[one["link"]] for one in node["inputs"] if one["link"]}
        found[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return found


def responds(client: httpx.Client) -> bool:
    try:
        return client.get("/system_stats").status_code == 200
    except httpx.TransportError:
        return False


def wait(done: Callable[[], Any], server: subprocess.Popen[bytes], log: Path) -> Any:
    for _ in range(600):
        if found := done():
            return found
        assert server.poll() is None, log.read_text()[-3000:]
        time.sleep(0.5)
    raise AssertionError(log.read_text()[-3000:])


def executed(client: httpx.Client, prompt: dict[str, Any], server: Any, log: Path) -> dict[str, Any]:
    """The outputs of a prompt by node, or its error."""
    answer = client.post("/prompt", json={"prompt": prompt})
    assert answer.status_code == 200, answer.text
    name = answer.json()["prompt_id"]
    entry = wait(lambda: client.get(f"/history/{name}").json().get(name), server, log)
    if entry["status"]["status_str"] == "error":
        (message,) = [
            said["exception_message"] for kind, said in entry["status"]["messages"] if "exception_message" in said
        ]
        return {"error": message}
    outputs: dict[str, Any] = entry["outputs"]
    return outputs
