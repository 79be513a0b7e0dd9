"""Guidance that a call chooses: diffusers' own images from one graph, and no second call where none is asked for."""

from __future__ import annotations

import io
import re
import shutil
from base64 import b64decode
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import onnx
import pipelines
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made_once import made
from numpy.typing import NDArray
from PIL import Image
from typer.testing import CliRunner

from redif_sdk import FastPipeline
from redif_sdk.artifact.folder import StudentFolder, write_manifest
from redif_sdk.artifact.records import TensorSpec
from redif_sdk.cli.main import app
from redif_sdk.distill import import_pipeline, load_student
from redif_sdk.errors import InvalidRequest
from redif_sdk.export import export
from redif_sdk.export.golden import read_golden
from redif_sdk.export.parity import check_denoiser
from redif_sdk.export.verify import Emulated
from redif_sdk.runtimes import RuntimeOptions
from redif_sdk.runtimes.guided import NULL, GuidedInputs
from redif_sdk.sampling.noise import noise as draw
from redif_sdk.serving.backend import ImageJob
from redif_sdk.serving.local import batch_key
from redif_sdk.serving.settings import ServeSettings
from tests.serving.conftest import running

PROMPTS = pipelines.PROMPTS


def small_sd() -> Any:
    """A pipeline of Stable Diffusion with one block."""
    return pipelines.stable_diffusion(**pipelines.ONE_BLOCK)


MAKERS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "sd": (small_sd, {"guidance_scale": 4.0}),
    "sdxl": (pipelines.stable_diffusion_xl, {}),
    "sd3": (pipelines.stable_diffusion_3, {}),
    "pixart": (pipelines.pixart, {}),
    "dit": (pipelines.dit, {"prompts": None}),
    "lcm": (pipelines.latent_consistency, {"guidance_scale": 3.0}),
    "flux": (pipelines.flux, {"height": 16, "width": 16}),
}


def make(name: str, folder: Path) -> None:
    maker, options = MAKERS[name]
    import_pipeline(maker(), folder, **{"steps": [3], "prompts": PROMPTS, **options})
    export(folder, batches=(1, 3))


def student_of(name: str) -> Path:
    """That pipeline as a student, with graphs that passed their gate. Read only."""
    return made(f"guided-{name}", lambda folder: make(name, folder))


def slow(*names: str) -> list[Any]:
    """Those names, each a test that takes minutes with the others."""
    return [pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.fixture(scope="module")
def student() -> Path:
    return student_of("sd")


@pytest.fixture(scope="module", params=["onnxruntime", "openvino"])
def pipe(request: pytest.FixtureRequest, student: Path) -> FastPipeline:
    return FastPipeline.from_pretrained(student, runtime=request.param, num_threads=2)


def latents_of(pipe: FastPipeline, count: int) -> NDArray[np.float32]:
    latents = pipe.manifest.latents
    return draw([(3, place) for place in range(count)], (latents.channels, latents.height, latents.width))[0]


def theirs(pipeline: Any, prompts: Any, noise: NDArray[np.float32], **asked: Any) -> NDArray[np.uint8]:
    """What diffusers makes of the same noise."""
    height, width = asked.pop("size", (16, 16))
    own = {} if type(pipeline).__name__ == "DiTPipeline" else {"height": height, "width": width}
    with torch.no_grad():
        images = pipeline(prompts, latents=torch.from_numpy(noise), output_type="np", **own, **asked).images
    return (np.asarray(images) * 255).round().astype(np.uint8)


def close(ours: NDArray[np.uint8], expected: NDArray[np.uint8]) -> bool:
    return int(np.abs(ours.astype(int) - expected.astype(int)).max()) <= 1


# ---------------------------------------------------------------- diffusers


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"guidance_scale": 1.0},
        {"guidance_scale": 9.0, "negative_prompt": ["blue", "old"]},
        {"guidance_scale": 2.0, "negative_prompt": ["blue", "blue"]},
    ],
    ids=["default", "none", "one a prompt", "another scale"],
)
def test_images_are_diffusers_own(pipe: FastPipeline, asked: dict[str, Any]) -> None:
    noise = latents_of(pipe, 2)
    ours = pipe(PROMPTS[:2], latents=noise, num_inference_steps=3, seed=0, output_type="uint8", **asked).images
    expected = theirs(small_sd(), PROMPTS[:2], noise, num_inference_steps=3, **{"guidance_scale": 4.0, **asked})
    assert close(ours, expected)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' Euler, numpy 2.4
@pytest.mark.parametrize("family", slow("sdxl", "sd3", "pixart"))
def test_families_are_guided_as_in_diffusers(family: str) -> None:
    pipe, pipeline = FastPipeline.from_pretrained(student_of(family)), MAKERS[family][0]()
    noise, size = latents_of(pipe, 2), pipe.manifest.image_shape[:2]
    more = {"use_resolution_binning": False, "clean_caption": False} if family == "pixart" else {}
    for asked in ({"guidance_scale": 1.0}, {"guidance_scale": 5.0}, {"guidance_scale": 3.0, "negative_prompt": "blue"}):
        given = asked | ({"negative_prompt": ["blue"] * 2} if "negative_prompt" in asked else {})
        ours = pipe(PROMPTS[:2], latents=noise, seed=0, output_type="uint8", **asked).images
        assert close(ours, theirs(pipeline, PROMPTS[:2], noise, num_inference_steps=3, size=size, **given, **more))


@pytest.mark.parametrize("family", slow("lcm", "flux"))
def test_a_network_that_takes_the_scale_is_given_that_of_the_call(family: str) -> None:
    pipe, pipeline = FastPipeline.from_pretrained(student_of(family)), MAKERS[family][0]()
    noise = latents_of(pipe, 2)
    ours = []
    for scale in (pipe.manifest.default_guidance, 7.0):
        ours.append(pipe(PROMPTS[:2], latents=noise, seed=0, output_type="latent", guidance_scale=scale).images)
        given = packed(noise) if family == "flux" else noise
        if family == "lcm":  # it draws noise of its own after each step: one step is compared
            continue
        image = pipe(PROMPTS[:2], latents=noise, seed=0, output_type="uint8", guidance_scale=scale).images
        assert close(image, theirs(pipeline, PROMPTS[:2], given, num_inference_steps=3, guidance_scale=scale))
    assert np.abs(ours[0] - ours[1]).max() > 0.01
    with pytest.raises(InvalidRequest, match="takes the guidance scale as an input, and no second prompt"):
        pipe(PROMPTS[0], negative_prompt="blue")


def packed(noise: NDArray[np.float32]) -> NDArray[np.float32]:
    """Flux's latents, as its pipeline takes them."""
    batch, channels, rows, columns = noise.shape
    blocks = noise.reshape(batch, channels, rows // 2, 2, columns // 2, 2).transpose(0, 2, 4, 1, 3, 5)
    return blocks.reshape(batch, rows * columns // 4, channels * 4)


@pytest.mark.slow
def test_classes_are_guided_as_in_diffusers() -> None:
    pipe, pipeline = FastPipeline.from_pretrained(student_of("dit")), pipelines.dit()
    noise = latents_of(pipe, 1)
    for scale in (1.0, 4.0, 2.5):
        ours = pipe(class_labels=[7], latents=noise, seed=0, output_type="latent", guidance_scale=scale).images
        labels = torch.tensor([7, 1000])
        x = torch.from_numpy(noise)
        pipeline.scheduler.set_timesteps(3)
        for t in pipeline.scheduler.timesteps:
            with torch.no_grad():
                f = pipeline.transformer(x.repeat(2, 1, 1, 1), timestep=t.expand(2), class_labels=labels).sample
            c, u = f[:, : x.shape[1]].split(1)
            x = pipeline.scheduler.step(u + scale * (c - u), t, x).prev_sample
        assert np.abs(ours - x.numpy()).max() < 1e-3
    with pytest.raises(InvalidRequest, match=r"negative_prompt is not supported by .*: it is class-conditional"):
        pipe(class_labels=[7], negative_prompt="blue")


# ---------------------------------------------------------------- one graph


@settings(deadline=None, max_examples=30)
@given(st.lists(st.sampled_from([0.0, 1.0, 1.5, 7.0]), min_size=1, max_size=6))
def test_rows_are_the_images_and_one_more_of_each_that_is_guided(scales: list[float]) -> None:
    specs = [
        TensorSpec(name="c", dtype="float32", shape=["rows", 2]),
        TensorSpec(name="guidance_rows", dtype="int64", shape=["rows"]),
        TensorSpec(name="null_rows", dtype="int64", shape=["batch"]),
        TensorSpec(name="guidance_scale", dtype="float32", shape=["batch"]),
    ]
    batch = len(scales)
    own = np.arange(batch * 2, dtype=np.float32).reshape(batch, 2)
    inputs = {"c": own, NULL + "c": -own - 1, "guidance_scale": np.array(scales, np.float32)}
    made_of = GuidedInputs(specs)(inputs)
    assert set(made_of) == {spec.name for spec in specs}
    assert len(made_of["c"]) == batch + sum(scale > 1 for scale in scales)
    f = made_of["c"] * 10 + made_of["guidance_rows"][:, None]  # a network that sees its image's number
    c, u = f[:batch], f[made_of["null_rows"]]
    mixed = u + made_of["guidance_scale"][:, None] * (c - u)
    number = np.arange(batch)[:, None]
    asked, null = own * 10 + number, (-own - 1) * 10 + number
    scale = np.array(scales)[:, None]
    np.testing.assert_allclose(mixed, np.where(scale > 1, null + scale * (asked - null), asked), rtol=1e-5)


def test_an_image_is_the_same_in_any_batch(pipe: FastPipeline) -> None:
    """Batches are cut into pieces, whose guided images have rows of their own."""
    prompts, negatives = [PROMPTS[place % 3] for place in range(5)], [f"bad {place}" for place in range(5)]
    seeds = [(4, place) for place in range(5)]
    whole = pipe(prompts, negative_prompt=negatives, seed=seeds, output_type="uint8").images
    for place in (0, 3, 4):
        alone = pipe(prompts[place], negative_prompt=negatives[place], seed=[seeds[place]], output_type="uint8").images
        assert close(alone, whole[place : place + 1])


def test_an_unguided_image_is_one_row(student: Path) -> None:
    """A scale of 1 makes one call: the network's own numbers, bit for bit, and half of the rows."""
    pipe = FastPipeline.from_pretrained(student, runtime="onnxruntime", num_threads=1)
    seen: list[int] = []
    session: Any = pipe._components["generator"]
    run = session._call

    def counted(one: Any, feed: Any) -> Any:
        seen.append(len(session._batches.inputs_of(feed)["guidance_rows"]))
        return run(one, feed)

    session._call = counted
    pipe(PROMPTS[:2], seed=0, guidance_scale=1)
    pipe(PROMPTS[:2], seed=0)
    assert seen == [2, 4]


def test_a_pipeline_that_is_not_guided_takes_guidance_nevertheless(student: Path, tmp_path: Path) -> None:
    imported = import_pipeline(small_sd(), tmp_path / "unguided", [3], prompts=PROMPTS, guidance_scale=1.0)
    assert load_student(tmp_path / "unguided").calls_per_step == 1
    folder = Path(shutil.copytree(student, tmp_path / "student"))  # the same network, with graphs
    manifest = StudentFolder(folder).manifest
    network = imported.network.model_copy(update={"guidance_inputs": True})
    write_manifest(folder, manifest.model_copy(update={"network": network}))
    plain, guided = FastPipeline.from_pretrained(folder), FastPipeline.from_pretrained(student)
    assert (plain.manifest.default_guidance, plain.manifest.network.calls_per_step) == (1.0, 1)
    asked = {"seed": 1, "output_type": "uint8"}
    assert np.array_equal(plain(PROMPTS[0], **asked).images, guided(PROMPTS[0], guidance_scale=1, **asked).images)
    assert np.array_equal(plain(PROMPTS[0], guidance_scale=4, **asked).images, guided(PROMPTS[0], **asked).images)


def test_the_graph_is_valid_and_the_gate_saw_guidance(student: Path) -> None:
    manifest = StudentFolder(student).manifest
    for component in ("denoiser", "generator"):
        graph = manifest.graph(component, "fp32")
        assert graph is not None
        onnx.checker.check_model(onnx.load(student / graph.file), full_check=True)
        assert [spec.name for spec in graph.inputs][-4:] == [spec.name for spec in manifest.graph_conditions]
    with np.load(student / manifest.golden[-1].file) as recorded:
        assert set(recorded["guidance_scale"]) == {1.0, 4.0}
        assert recorded["null.encoder_hidden_states"].shape == recorded["conditions.encoder_hidden_states"].shape


def test_an_emulated_graph_takes_guidance(student: Path) -> None:
    """As bf16 graphs are checked where no engine computes them."""
    folder = StudentFolder(student)
    graph = folder.manifest.graph("denoiser", "fp32")
    assert graph is not None
    row = check_denoiser(Emulated.load(folder, graph, RuntimeOptions()), read_golden(folder, folder.manifest.golden[1]))
    assert row["passed"]
    assert row["relative_rmse"] < 1e-4


def test_a_wrong_scale_does_not_pass_the_gate(student: Path, tmp_path: Path) -> None:
    """The gate compares guided images with torch's: a graph that ignores the scale is found."""
    folder = Path(shutil.copytree(student, tmp_path / "student"))
    graph = onnx.load(folder / "onnx/denoiser.fp32.onnx")
    for node in graph.graph.node:
        if node.op_type == "Mul" and "guidance_scales" in node.input:
            node.input[1] = "f_one"
    graph.graph.initializer.append(onnx.numpy_helper.from_array(np.ones((1, 1, 1, 1), np.float32), "f_one"))
    onnx.save(graph, folder / "onnx/denoiser.fp32.onnx")
    write_manifest(folder, StudentFolder(student).manifest)
    result = CliRunner().invoke(app, ["verify", str(folder), "--quiet"])
    assert result.exit_code == 1


# ---------------------------------------------------------------- requests


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"guidance_scale": -1}, "guidance_scale is -1; give a number from 0 on"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan"),
        ({"guidance_scale": "high"}, "guidance_scale is 'high'"),
        ({"guidance_scale": True}, "guidance_scale is True"),
        ({"guidance_scale": 1.0, "negative_prompt": "a"}, "has no effect at guidance_scale=1; give one above 1"),
        ({"negative_prompt": ["a", "b", "c"]}, "3 negative prompts for 2 prompts"),
        ({"negative_prompt": 3}, "negative_prompt is 3; give a string"),
        ({"negative_prompt": "a", "negative_prompt_embeds": np.zeros((1, 8, 32))}, "exclude each other"),
        ({"negative_pooled_prompt_embeds": np.zeros((1, 32))}, "negative_pooled_prompt_embeds is not supported by"),
        ({"negative_prompt_embeds": np.zeros((1, 3, 3))}, "encoder_hidden_states has shape"),
    ],
)
def test_what_is_no_guidance_is_refused(pipe: FastPipeline, asked: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        pipe(PROMPTS[:2], seed=0, **asked)


def test_encoded_negative_prompts_are_prompts(pipe: FastPipeline) -> None:
    asked = {"seed": 2, "num_images_per_prompt": 2, "output_type": "uint8"}
    expected = pipe(PROMPTS[:2], negative_prompt=["old", "blue"], **asked).images
    encoded = pipe.encode_prompt(["old", "blue"])["encoder_hidden_states"]
    assert np.array_equal(pipe(PROMPTS[:2], negative_prompt_embeds=encoded, **asked).images, expected)
    own = pipe.encode_prompt(PROMPTS[:2])["encoder_hidden_states"]
    assert np.array_equal(pipe(prompt_embeds=own, negative_prompt=["old", "blue"], **asked).images, expected)
    assert not np.array_equal(pipe(PROMPTS[:2], negative_prompt="old", **asked).images, expected)


def test_a_stream_is_guided_too(pipe: FastPipeline) -> None:
    asked = {"seed": 2, "negative_prompt": "blue", "guidance_scale": 6.0}
    *_, last = pipe.stream(PROMPTS[0], **asked)
    assert close(np.asarray(last)[None], pipe(PROMPTS[0], output_type="uint8", **asked).images)


def test_an_exported_student_of_before_keeps_its_fixed_guidance(student: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(student, tmp_path / "student"))
    manifest = StudentFolder(folder).manifest
    network = manifest.network.model_copy(update={"guidance_inputs": False})
    write_manifest(folder, manifest.model_copy(update={"network": network}))
    pipe = FastPipeline.from_pretrained(folder)
    with pytest.raises(InvalidRequest, match=r"use 4, or export it again to give one"):
        pipe(PROMPTS[0], guidance_scale=2.0)
    with pytest.raises(InvalidRequest, match="its negative prompt is fixed in its graphs; export it again"):
        pipe(PROMPTS[0], negative_prompt="blue")


def test_the_command_line_guides_and_its_mark_makes_the_image_again(student: Path, tmp_path: Path) -> None:
    run = CliRunner()
    out = tmp_path / "out.png"
    asked = ["generate", str(student), PROMPTS[0], "--seed", "3", "--guidance-scale", "2.5", "-o", str(out), "--quiet"]
    result = run.invoke(app, [*asked, "--negative-prompt", "blue"])
    assert result.exit_code == 0, result.output
    expected = FastPipeline.from_pretrained(student)(PROMPTS[0], seed=3, guidance_scale=2.5, negative_prompt="blue")
    assert np.array_equal(np.asarray(Image.open(out)), np.asarray(expected.images[0]))
    again = run.invoke(app, ["whence", str(out), "--student", str(student)])
    assert again.exit_code == 0, again.output
    assert "it is that image, bit for bit" in again.output
    assert "negative_prompt blue" in again.output


def test_a_server_guides_images_of_one_batch_differently(student: Path) -> None:
    pipe = FastPipeline.from_pretrained(student, runtime="onnxruntime", num_threads=1)
    with running({"sd": pipe}, ServeSettings(max_batch=4)) as address:
        asked = [
            {"prompt": PROMPTS[0], "guidance_scale": 2.5, "negative_prompt": "blue"},
            {"prompt": PROMPTS[1], "guidance_scale": 2.5, "negative_prompt": "old"},
            {"prompt": PROMPTS[2], "guidance_scale": 1},
            {"prompt": PROMPTS[0]},
        ]
        with ThreadPoolExecutor(4) as pool:
            post = f"{address}/v1/images/generations"
            answers = list(pool.map(lambda body: httpx.post(post, json={**body, "seed": 9}, timeout=60).json(), asked))
        for body, answer in zip(asked, answers, strict=True):
            prompt, more = body["prompt"], {name: value for name, value in body.items() if name != "prompt"}
            expected = pipe(prompt, seed=9, output_type="uint8", **more).images
            png = Image.open(io.BytesIO(b64decode(answer["data"][0]["b64_json"])))
            assert close(np.asarray(png)[None], expected)
        wrong = httpx.post(post, json={"prompt": "a", "guidance_scale": 1, "negative_prompt": "b"}, timeout=60)
        assert wrong.status_code == 400
        assert "negative_prompt has no effect at guidance_scale=1" in wrong.json()["error"]["message"]


def test_batch_keys_of_differently_guided_images_can_be_sorted() -> None:
    """As Ray's replicas sort them."""
    plain = ImageJob("sd", None, 0, 0, 3, 16, 16, "a")
    jobs = [replace(plain, guidance_scale=2.5), plain, replace(plain, nag_scale=3.0, negative_prompt="b")]
    assert len(sorted({batch_key(job) for job in jobs})) == 3


def test_the_page_s_example_runs(student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).parents[1] / "docs/guidance.md").read_text()
    block = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0]
    (tmp_path / "student").symlink_to(student)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(block, "guidance.md", "exec"), names)
    exec(compile(re.findall(r"```python\n(.*?)```", text, re.DOTALL)[1], "guidance.md", "exec"), names)
    assert not np.array_equal(np.asarray(names["heavier"].images[0]), np.asarray(names["usual"].images[0]))
    usual, strong, without = (np.asarray(names[name].images[0]) for name in ("usual", "strong", "without"))
    assert not np.array_equal(usual, strong)
    assert not np.array_equal(usual, without)
    assert len(names["away"].images) == 2
