"""Prompts from end to end, without torch: Python, the command line, HTTP and benchmarks draw the same pictures."""

from __future__ import annotations

import asyncio
import html
import io
import json
import logging
import sys
from base64 import b64decode
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from redif_sdk import FastPipeline
from redif_sdk.artifact.folder import StudentFolder, write_manifest
from redif_sdk.artifact.manifest import Manifest
from redif_sdk.artifact.records import Guidance
from redif_sdk.card.render import render
from redif_sdk.cli import main as cli
from redif_sdk.errors import InvalidRequest, RuntimeUnavailable
from redif_sdk.export.samples import sample_grid, write_samples
from redif_sdk.sampling.noise import noise
from redif_sdk.sampling.table import StepTable
from redif_sdk.serving.logs import keep_prompts_out
from redif_sdk.serving.settings import ServeSettings
from tests.prompted import EXAMPLES, LENGTH, build_prompted
from tests.serving.conftest import running
from tests.test_pipeline import hub_cache, run_blocked

PATH = "/v1/images/generations"


@pytest.fixture(scope="module")
def prompted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_prompted(tmp_path_factory.mktemp("prompted") / "prompted")


@pytest.fixture(scope="module")
def pipe(prompted: Path) -> FastPipeline:
    return FastPipeline.from_pretrained(prompted, runtime="onnxruntime", num_threads=1)


def draw(pipe: FastPipeline, prompt: Any, seed: Any = 0, **more: Any) -> NDArray[np.uint8]:
    images: NDArray[np.uint8] = pipe(prompt, seed=seed, output_type="uint8", **more).images
    return images


def levels(a: Any, b: Any) -> int:
    return int(np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int)).max())


# ---------------------------------------------------------------- one prompt, one picture


def test_a_prompt_decides_the_picture(pipe: FastPipeline) -> None:
    out = pipe("red heart", seed=0)
    assert (out.images[0].mode, out.images[0].size) == ("RGB", (16, 16))
    assert list(out.timings) == ["noise", "text", "network", "output", "total"]
    assert sum(out.timings.values()) == pytest.approx(2 * out.timings["total"])
    assert out.runtime_info["component"] == "generator"
    pictures = [draw(pipe, prompt) for prompt in ("red heart", "blue star", "")]
    assert np.array_equal(pictures[0][0], np.asarray(out.images[0]))
    assert min(levels(pictures[0], pictures[1]), levels(pictures[0], pictures[2])) > 5
    assert np.array_equal(draw(pipe, "RED  heart"), pictures[0])  # the same tokens


@pytest.mark.parametrize("steps", [2, 3])
def test_several_prompts_in_their_order(pipe: FastPipeline, steps: int) -> None:
    prompts = ["red heart", "blue star", "red heart"]
    out = pipe(prompts, num_images_per_prompt=2, seed=7, num_inference_steps=steps, output_type="uint8")
    assert out.seeds == [(7, index) for index in range(6)]
    for index, picture in enumerate(out.images):
        alone = draw(pipe, prompts[index // 2], [(7, index)], num_inference_steps=steps)
        assert levels(picture, alone[0]) <= 1
    again = pipe(tuple(prompts), num_images_per_prompt=2, seed=out.seeds, num_inference_steps=steps)
    assert all(np.array_equal(a, b) for a, b in zip(again.images, out.images, strict=True))


class Counting:
    """A runtime that notes how many rows it was given."""

    def __init__(self, engine: Any) -> None:
        self.info, self._engine = engine.info, engine
        self.rows: list[int] = []

    def run(self, inputs: Any) -> Any:
        self.rows.append(len(inputs["input_ids"]))
        return self._engine.run(inputs)


@pytest.mark.parametrize("runtime", ["fake", "onnxruntime"])
def test_equal_prompts_are_encoded_once(prompted: Path, runtime: str) -> None:
    pipe = FastPipeline.from_pretrained(prompted, runtime=runtime)
    counting = Counting(pipe._components["text_encoder"])
    pipe._components = pipe._components.replaced("text_encoder", counting)  # type: ignore[arg-type]
    images = draw(pipe, ["a", "b", "a", "a"], num_images_per_prompt=3, seed=[1] * 12)
    assert counting.rows == [2]
    assert np.array_equal(images[0], images[6])
    assert not np.array_equal(images[0], images[3])


def test_graphs_are_loaded_when_they_are_needed(prompted: Path) -> None:
    pipe = FastPipeline.from_pretrained(prompted, runtime="onnxruntime", num_threads=1)
    loaded = pipe._components._loaded
    assert set(loaded) == {"generator"}
    draw(pipe, "red heart")
    assert set(loaded) == {"generator", "text_encoder"}
    next(pipe.stream("red heart", seed=0))
    assert set(loaded) == {"generator", "text_encoder", "denoiser", "decoder"}


@pytest.mark.parametrize("steps", [2, 3])
def test_stream_callback_and_call_give_the_same_picture(pipe: FastPipeline, steps: int) -> None:
    asked: dict[str, Any] = {"seed": 5, "num_inference_steps": steps}
    picture = pipe("blue star", **asked).images[0]
    previews = list(pipe.stream("blue star", **asked))
    assert [(preview.mode, preview.size) for preview in previews] == [("RGB", (16, 16))] * steps
    assert levels(previews[-1], picture) <= 1
    assert levels(previews[0], picture) > 1
    out = pipe("blue star", callback_on_step_end=lambda *_: None, **asked)
    assert levels(out.images[0], previews[-1]) == 0
    assert out.runtime_info["component"] == "denoiser"

    def blank(_: FastPipeline, step: int, __: float, tensors: dict[str, Any]) -> dict[str, Any]:
        assert tensors["latents"].shape == (1, 4, 8, 8)
        return {"latents": np.zeros_like(tensors["latents"])}

    flat = pipe("blue star", callback_on_step_end=blank, output_type="uint8", **asked).images
    assert levels(flat[:, ::2, ::2], flat[:, :1, :1]) == 0  # one colour a place of the decoder's blocks


def test_a_student_without_a_fused_graph_is_stepped(prompted: Path, pipe: FastPipeline, tmp_path: Path) -> None:
    stepped = FastPipeline.from_pretrained(
        build_prompted(tmp_path / "stepped", without=("generator",)), runtime="onnxruntime", num_threads=1
    )
    assert stepped.runtime_info["component"] == "denoiser"
    assert levels(draw(stepped, EXAMPLES, 3), draw(pipe, EXAMPLES, 3)) <= 1


def test_sizes_in_pixels(pipe: FastPipeline) -> None:
    images = draw(pipe, "red heart", height=24, width=32)
    assert images.shape == (1, 24, 32, 3)
    latents = noise([(0, 0)], (4, 12, 16))[0]
    assert np.array_equal(draw(pipe, "red heart", latents=latents), images)
    assert next(pipe.stream("red heart", height=24, width=32)).size == (32, 24)
    with pytest.raises(InvalidRequest, match="height=10 is not supported; give a multiple of 4"):
        pipe("red heart", height=10)


def test_the_array_interface_is_the_call(pipe: FastPipeline) -> None:
    conditions = pipe.encode_prompt(EXAMPLES)
    assert {name: (value.dtype.name, value.shape) for name, value in conditions.items()} == {
        "encoder_hidden_states": ("float32", (3, LENGTH, 4)),
        "pooled_projections": ("float32", (3, 4)),
        "encoder_attention_mask": ("float32", (3, LENGTH)),
    }
    for steps in (2, 3):
        slices = pipe.manifest.step_table(steps).noise_slices
        drawn = noise([(1, index) for index in range(3)], (4, 8, 8), slices=slices)
        expected = draw(pipe, EXAMPLES, 1, num_inference_steps=steps)
        assert np.array_equal(pipe.generate_array(drawn, conditions, steps), expected)
    for wrong, message in (
        (None, "takes encoder_hidden_states, pooled_projections, encoder_attention_mask by name"),
        (np.zeros(3, np.int64), "by name"),
        ({}, "not nothing"),
        ({name: value[:2] for name, value in conditions.items()}, r"have batch sizes \[2\]; give 3"),
    ):
        with pytest.raises(InvalidRequest, match=message):
            pipe.generate_array(drawn, wrong, 3)


def test_threads_do_not_disturb_each_other(prompted: Path, pipe: FastPipeline) -> None:
    fresh = FastPipeline.from_pretrained(prompted, runtime="onnxruntime", num_threads=1)
    prompts = [f"{colour} {thing}" for colour in ("red", "blue", "green") for thing in ("heart", "star", "tree")]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda prompt: draw(fresh, prompt), prompts))
    assert all(np.array_equal(one, draw(pipe, prompt)) for one, prompt in zip(found, prompts, strict=True))


# ---------------------------------------------------------------- embeddings in place of prompts


def embeds(pipe: FastPipeline, prompt: Any) -> dict[str, Any]:
    """Under diffusers' names."""
    made = pipe.encode_prompt(prompt)
    return {
        "prompt_embeds": made["encoder_hidden_states"],
        "pooled_prompt_embeds": made["pooled_projections"],
        "prompt_attention_mask": made["encoder_attention_mask"],
    }


def test_embeddings_are_their_prompts(pipe: FastPipeline) -> None:
    made = embeds(pipe, ["red heart", "blue star"])
    expected = draw(pipe, ["red heart", "blue star"], 2, num_images_per_prompt=2)
    assert np.array_equal(draw(pipe, None, 2, num_images_per_prompt=2, **made), expected)
    wider = {name: value.astype(np.float64) for name, value in made.items()}
    wider["prompt_attention_mask"] = wider["prompt_attention_mask"].astype(bool)
    assert np.array_equal(draw(pipe, None, 2, num_images_per_prompt=2, **wider), expected)
    one = {name: value[:1] for name, value in made.items()}
    assert levels(list(pipe.stream(seed=2, **one))[-1], expected[0]) <= 1
    with pytest.raises(InvalidRequest, match="one image, not 2"):
        pipe.stream(**made)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": "red heart"}, "prompt and prompt_embeds, .* exclude each other"),
        ({"prompt_attention_mask": None}, "without prompt_attention_mask; give all of them"),
        ({"prompt_embeds": np.zeros((1, 9, 4))}, rf"has shape \(1, 9, 4\); give \(batch, {LENGTH}, 4\)"),
        ({"pooled_prompt_embeds": np.zeros((2, 4))}, r"have batch sizes \[1, 2\]; give the same for all"),
        ({"pooled_prompt_embeds": np.full((1, 4), np.nan)}, "pooled_projections holds NaN"),
        ({"pooled_prompt_embeds": np.full((1, 4), 1e60)}, "infinite"),
        ({"pooled_prompt_embeds": np.zeros((1, 4), complex)}, "complex"),
        ({"pooled_prompt_embeds": "red heart"}, "give an array of numbers"),
    ],
)
def test_embeddings_that_do_not_fit(pipe: FastPipeline, changes: dict[str, Any], message: str) -> None:
    asked = embeds(pipe, "red heart") | changes
    with pytest.raises(InvalidRequest, match=message):
        pipe(**asked)
    with pytest.raises(InvalidRequest, match=message):
        pipe.stream(**asked)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({}, "prompted is a text-to-image model: prompt is required, for example 'red heart'"),
        ({"prompt": 3}, "prompt is 3; give a string or a list of strings"),
        ({"prompt": ["a", 3]}, "give a string or a list of strings"),
        ({"prompt": b"a"}, "give a string"),
        ({"prompt": []}, "0 prompts were given; give 1 to"),
        ({"prompt": "x" * 10_001}, "a prompt has 10001 characters; give at most 10000"),
        ({"prompt": "\ud83d"}, "cannot be encoded as UTF-8"),
        ({"class_labels": 1}, "is a text-to-image model; class_labels is not supported"),
        ({"prompt": "a", "class_labels": 1}, "class_labels is not supported"),
        ({"prompt": ["a", "b"], "seed": [1, 2, 3]}, "3 seeds for 2 images"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(pipe: FastPipeline, asked: dict[str, Any], message: str) -> None:
    for ask in (pipe, pipe.stream):
        with pytest.raises(InvalidRequest, match=message):
            ask(**asked)


def test_guidance_is_in_the_graphs_or_there_is_none(prompted: Path, pipe: FastPipeline, tmp_path: Path) -> None:
    expected = draw(pipe, "red heart")
    for harmless in (None, 0, 0.0, 1, 1.0):
        assert np.array_equal(draw(pipe, "red heart", guidance_scale=harmless), expected)
    with pytest.raises(
        InvalidRequest,
        match=r"guidance_scale=7\.5 is not supported by prompted: it runs without guidance",
    ):
        pipe("red heart", guidance_scale=7.5)
    for negative in ("ugly", "", ["ugly"]):
        with pytest.raises(
            InvalidRequest, match="negative_prompt is not supported by prompted: it runs without guidance, at 1 network"
        ):
            pipe("red heart", negative_prompt=negative)
    network = pipe.manifest.network
    for name, changes, own in (
        ("guided", {"guidance": Guidance(scale=7.5, null_prompt="")}, 7.5),
        ("embedded", {"embedded_guidance": 3.5}, 3.5),
    ):
        folder = build_prompted(tmp_path / name, network=network.model_copy(update=changes))
        other = FastPipeline.from_pretrained(folder, runtime="onnxruntime", num_threads=1)
        assert np.array_equal(draw(other, "red heart", guidance_scale=own), draw(other, "red heart"))
        with pytest.raises(InvalidRequest, match=rf"guidance_scale=1\.0 is not supported by prompted: use {own}"):
            other("red heart", guidance_scale=1.0)
        with pytest.raises(InvalidRequest, match="negative_prompt is not supported"):
            other("red heart", negative_prompt="ugly")


def test_class_students_take_no_embeddings(tmp_path: Path, pipe: FastPipeline) -> None:
    folder = build_prompted(tmp_path / "plain", condition=None, task="unconditional")
    plain = FastPipeline.from_pretrained(folder, runtime="fake")
    assert draw(plain, None, num_images_per_prompt=2).shape == (2, 16, 16, 3)
    with pytest.raises(InvalidRequest, match="is not a text-to-image model; prompt_embeds is not supported"):
        plain(prompt_embeds=np.zeros((1, 4)))
    with pytest.raises(InvalidRequest, match="there is no prompt to encode"):
        plain.encode_prompt("red heart")
    with pytest.raises(InvalidRequest, match="unconditional"):
        plain("red heart")


@pytest.mark.parametrize("runtime", ["onnxruntime", "fake"])
def test_a_graph_that_is_missing_is_said_when_it_is_needed(tmp_path: Path, runtime: str) -> None:
    for without, message in (
        (("text_encoder",), "no graph of its text_encoder in fp32, which prompts need; run redif export"),
        (("generator", "decoder"), "no graph of its decoder in fp32, which decoding latents needs"),
    ):
        folder = build_prompted(tmp_path / "-".join(without), without=without)
        with pytest.raises(RuntimeUnavailable, match=message):
            FastPipeline.from_pretrained(folder, runtime=runtime)
    pipe = FastPipeline.from_pretrained(build_prompted(tmp_path / "fused", without=("decoder",)), runtime=runtime)
    assert draw(pipe, "red heart").shape == (1, 16, 16, 3)
    with pytest.raises(RuntimeUnavailable, match="no graph of its decoder in fp32"):
        pipe.stream("red heart")


def test_no_other_precision_stands_in(prompted: Path, tmp_path: Path) -> None:
    folder = build_prompted(tmp_path / "half")
    manifest = StudentFolder(folder).manifest
    half = [
        graph.model_copy(update={"precision": "fp16"}) for graph in manifest.graphs if graph.component == "generator"
    ]
    write_manifest(folder, manifest.model_copy(update={"graphs": [*manifest.graphs, *half]}))
    with pytest.raises(RuntimeUnavailable, match=r"no graph of its text_encoder in fp16, .* --precision fp16"):
        FastPipeline.from_pretrained(folder, runtime="onnxruntime", precision="fp16")


def test_what_is_cut_off_is_said_but_not_by_a_server(pipe: FastPipeline, caplog: pytest.LogCaptureFixture) -> None:
    words = "one two three four five six seven eight nine ten eleven twelve thirteen"
    with caplog.at_level(logging.WARNING, "redif_sdk"):
        pipe(words)
    (record,) = caplog.records
    assert "thirteen'" in record.getMessage()
    caplog.clear()
    logger = logging.getLogger("redif_sdk.tokenizer")
    before = logger.level
    try:
        keep_prompts_out()
        pipe(words)
        assert caplog.records == []
    finally:
        logger.setLevel(before)


# ---------------------------------------------------------------- engines, the Hub, and no torch


def test_pictures_without_torch(prompted: Path) -> None:
    code = """
from redif_sdk import FastPipeline
pipe = FastPipeline.from_pretrained(sys.argv[1], runtime="onnxruntime", num_threads=1)
assert pipe(["red heart", "blue star"], seed=0).images[1].size == (16, 16)
assert len(list(pipe.stream("red heart", seed=0))) == 2
assert not {"torch", "diffusers", "transformers", "onnx"} & set(sys.modules)
print("done")
"""
    result = run_blocked(code, str(prompted))
    assert (result.stdout, result.stderr) == ("done\n", "")


def test_openvino_draws_the_same(prompted: Path, pipe: FastPipeline) -> None:
    pytest.importorskip("openvino")
    other = FastPipeline.from_pretrained(prompted, runtime="openvino", precision="fp32")
    assert levels(draw(other, EXAMPLES, 4), draw(pipe, EXAMPLES, 4)) <= 1
    assert levels(draw(other, "red heart", height=24, width=16), draw(pipe, "red heart", height=24, width=16)) <= 1
    assert levels(list(other.stream("red heart", seed=4))[-1], draw(pipe, "red heart", 4)[0]) <= 1


def test_the_fake_stands_in_for_any_engine(prompted: Path) -> None:
    fake = FastPipeline.from_pretrained(prompted, runtime="fake")
    images = draw(fake, ["red heart", "blue star"])
    assert images.shape == (2, 16, 16, 3)
    assert np.array_equal(images, draw(fake, ["red heart", "blue star"], callback_on_step_end=lambda *_: None))
    assert not np.array_equal(images[0], draw(fake, "blue star")[0])


def test_a_student_from_the_hub_needs_graphs_and_tokenizers(prompted: Path, pipe: FastPipeline, tmp_path: Path) -> None:
    graphs = {f"onnx/{name}.fp32.onnx" for name in ("generator", "denoiser", "text_encoder", "decoder")}
    hub_cache(prompted, tmp_path / "hub", only={"redif.json", "tokenizer/tokenizer.json", *graphs})
    remote = FastPipeline.from_pretrained("me/tiny", cache_dir=tmp_path / "hub", runtime="onnxruntime", num_threads=1)
    assert np.array_equal(draw(remote, EXAMPLES), draw(pipe, EXAMPLES))
    assert levels(list(remote.stream("red heart", seed=0))[-1], draw(pipe, "red heart")[0]) <= 1


def test_it_is_saved_whole(pipe: FastPipeline, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path / "saved")
    StudentFolder(tmp_path / "saved").check_all()
    again = FastPipeline.from_pretrained(tmp_path / "saved", runtime="onnxruntime", num_threads=1)
    assert np.array_equal(draw(again, "red heart"), draw(pipe, "red heart"))


# ---------------------------------------------------------------- the command line, cards, benchmarks


def redif(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    monkeypatch.setattr(sys, "argv", ["redif", *map(str, arguments)])
    with pytest.raises(SystemExit) as raised:
        cli.main()
    return int(raised.value.code or 0)


def test_the_command_line(
    prompted: Path,
    pipe: FastPipeline,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    common = ["--seed", "3", "--runtime", "onnxruntime", "--threads", "1"]
    assert redif(monkeypatch, "generate", prompted, "red heart", "-n", "4", *common, "-o", tmp_path / "out.png") == 0
    expected = draw(pipe, "red heart", 3, num_images_per_prompt=4)
    with Image.open(tmp_path / "out.png") as sheet:
        assert sheet.size == (32, 32)
        assert np.array_equal(np.asarray(sheet)[16:, :16], expected[2])
    folder = f"{tmp_path}/all/"
    assert redif(monkeypatch, "generate", prompted, "red heart", "blue star", *common, "-o", folder, "--quiet") == 0
    for index, picture in enumerate(draw(pipe, ["red heart", "blue star"], 3)):
        assert np.array_equal(np.asarray(Image.open(f"{folder}{index}.png")), picture)
    capsys.readouterr()
    assert redif(monkeypatch, "generate", prompted, "--class-label", "1") == 2
    assert "class_labels is not supported" in capsys.readouterr().err
    assert redif(monkeypatch, "generate", prompted) == 2
    assert "prompt is required, for example 'red heart'" in capsys.readouterr().err


def test_the_card_asks_by_a_prompt(tmp_path: Path, pipe: FastPipeline) -> None:
    folder = build_prompted(tmp_path / "prompted")
    assert write_samples(folder) == ["samples/steps-2.png", "samples/steps-3.png"]
    manifest = write_manifest(folder, StudentFolder(folder).manifest)
    sheet = np.asarray(Image.open(folder / "samples/steps-2.png"))
    assert sheet.shape == (4 * 64, 3 * 64, 3)
    assert np.array_equal(sheet, np.asarray(sample_grid(pipe, 2)))
    picture = draw(pipe, EXAMPLES[1], [(0, 4)])[0]
    assert levels(sheet[64:128:4, 64:128:4], picture) <= 1  # the second row's second column
    text = render(manifest)
    assert 'image = pipe("red heart", seed=0).images[0]' in text
    assert "redif generate prompted 'red heart' --seed 0 -o out.png" in text
    assert "one column per prompt (`red heart`, `blue star`, `a small green tree`), not selected" in text
    assert f"A prompt can have {LENGTH} tokens" in text
    assert "multiples of 4" in text
    assert "pipeline_tag: text-to-image" in text


def test_large_pictures_are_shown_in_one_row(tmp_path: Path) -> None:
    class Pipeline:
        manifest: Manifest

        def __call__(self, **asked: Any) -> Any:
            self.asked = asked
            count = len(asked["prompt"])
            return type("Output", (), {"images": [Image.new("RGB", (512, 512))] * count})

    pipeline: Any = Pipeline()
    manifest = StudentFolder(build_prompted(tmp_path / "prompted")).manifest
    text = manifest.text
    assert text is not None
    many = text.model_copy(update={"examples": [f"a {number}" for number in range(30)]})
    latents = manifest.latents.model_copy(update={"height": 256, "width": 256})
    pipeline.manifest = manifest.model_copy(update={"latents": latents, "condition": many})
    assert sample_grid(pipeline).size == (4 * 512, 512)
    assert pipeline.asked["prompt"] == ["a 0", "a 1", "a 2", "a 3"]


def test_the_card_s_lines_for_plain_diffusers(prompted: Path) -> None:
    """Only where a stock pipeline takes the table's times; their values are those of the table."""
    manifest = StudentFolder(prompted).manifest
    assert "plain diffusers" not in render(manifest)  # a flow table, and a pipeline that takes times
    network = manifest.network.model_copy(update={"pipeline": "StableDiffusion3Pipeline"})
    flow = render(manifest.model_copy(update={"network": network}))
    assert "from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline" in flow
    assert "    sigmas=[1.0, 0.5],\n    guidance_scale=1.0,\n    height=16,\n    width=16,\n" in flow
    table = StepTable.ddim(schedule(), num_inference_steps=2, prediction_type="epsilon")
    guided = manifest.network.model_copy(update={"guidance": Guidance(scale=5.0, null_prompt="bad")})
    update = {"step_tables": [table.to_dict()], "network": guided}
    text = render(manifest.model_copy(update=update))
    assert "from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline" in text
    assert '    timesteps=[999, 499],\n    guidance_scale=5.0,\n    negative_prompt="bad",\n' in text
    gained = manifest.model_copy(update={"step_tables": [table.with_gain(1.1).to_dict()]})
    assert "plain diffusers" not in render(gained)  # a pipeline has no place for a gain


def schedule() -> Any:
    from redif_sdk.sampling.noise_schedule import NoiseSchedule

    return NoiseSchedule.from_alphas_cumprod(np.linspace(0.999, 0.01, 1000))


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_benchmarks_measure_it(prompted: Path, runtime: str) -> None:
    from redif_sdk.bench.engines import contenders, overhead
    from redif_sdk.bench.rounds import Workload, compare

    pytest.importorskip(runtime)
    work = Workload.of(prompted, batch=4)
    assert work.labels is None
    assert set(work.inputs(work.noise)) == {
        *("noise", "table", "init_scale"),
        *("encoder_hidden_states", "pooled_projections", "encoder_attention_mask"),
    }
    assert work.asked == {"prompt": ["red heart", "blue star", "a small green tree", "red heart"]}
    rows = compare(contenders([runtime], ["fp32"]), work, rounds=1)
    assert [row["contender"] for row in rows if row["skipped"] is not None] == []
    assert all(row["agrees"] for row in rows)
    assert overhead(work, runtime, "fp32")["overhead_seconds"] < 1


# ---------------------------------------------------------------- HTTP


@pytest.fixture(scope="module")
def address(prompted: Path, pipe: FastPipeline) -> Iterator[str]:
    with running({"prompted": pipe}, ServeSettings(max_wait_ms=50)) as url:
        yield url


def pictures(answer: httpx.Response) -> list[NDArray[np.uint8]]:
    assert answer.status_code == 200, answer.text
    return [np.asarray(Image.open(io.BytesIO(b64decode(entry["b64_json"])))) for entry in answer.json()["data"]]


def test_a_prompt_over_http_is_the_same_picture(address: str, pipe: FastPipeline) -> None:
    body = {"prompt": "red heart", "n": 3, "seed": 7}
    assert np.array_equal(pictures(httpx.post(address + PATH, json=body)), draw(pipe, ["red heart"] * 3, 7))
    body = {"prompt": "", "seed": 7, "size": "32x24"}
    assert np.array_equal(pictures(httpx.post(address + PATH, json=body)), draw(pipe, "", 7, height=24, width=32))


def test_batched_with_strangers_it_is_the_same_picture(address: str, pipe: FastPipeline) -> None:
    words: Sequence[str] = ["red heart", "blue star", "a tree", "", "日本 😀", "yellow " * 30]
    asked = [(words[place % 6], place, 2 + place % 2) for place in range(36)]
    batches = count(address)

    async def ask() -> list[Any]:
        async with httpx.AsyncClient(base_url=address, timeout=60) as client:
            bodies = [{"prompt": text, "seed": seed, "num_inference_steps": steps} for text, seed, steps in asked]
            return await asyncio.gather(*(client.post(PATH, json=body) for body in bodies))

    for (text, seed, steps), answer in zip(asked, asyncio.run(ask()), strict=True):
        assert levels(pictures(answer)[0], draw(pipe, text, seed, num_inference_steps=steps)[0]) <= 1
    assert count(address) - batches < len(asked)  # some were batched


def count(address: str) -> float:
    lines = httpx.get(f"{address}/metrics").text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith("redif_batch_images_count"))


def test_a_stream_shows_how_it_forms(address: str, pipe: FastPipeline) -> None:
    body = {"prompt": "blue star", "seed": 2, "stream": True, "partial_images": 1, "num_inference_steps": 3}
    with httpx.stream("POST", address + PATH, json=body, timeout=60) as answer:
        lines = [line for line in answer.iter_lines() if line.startswith("data: ")]
    events = [json.loads(line.removeprefix("data: ")) for line in lines]
    assert [event["type"].rpartition(".")[2] for event in events] == ["partial_image", "completed"]
    shown = [np.asarray(Image.open(io.BytesIO(b64decode(event["b64_json"])))) for event in events]
    previews = list(pipe.stream("blue star", seed=2, num_inference_steps=3))
    assert np.array_equal(shown[0], np.asarray(previews[1]))
    assert np.array_equal(shown[1], draw(pipe, "blue star", 2, num_inference_steps=3)[0])


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, "prompt is required, for example 'red heart'"),
        ({"prompt": "a", "class_label": 1}, "is a text-to-image model; class_label is not supported"),
        ({"prompt": "x" * 10_001}, "prompt: String should have at most 10000 characters"),
        ({"prompt": "a", "size": "10x16"}, "width=10 is not supported; give a multiple of 4"),
    ],
)
def test_what_cannot_be_done_over_http(address: str, body: dict[str, Any], words: str) -> None:
    answer = httpx.post(address + PATH, json=body)
    assert answer.status_code == 400
    assert words in answer.json()["error"]["message"]


def test_the_server_says_what_can_be_asked(address: str) -> None:
    (model,) = httpx.get(f"{address}/v1/models").json()["data"]
    assert (model["task"], model["size"], model["num_classes"]) == ("text-to-image", "16x16", None)
    assert model["example_prompts"] == EXAMPLES
    assert '"prompt": "red heart"' in html.unescape(httpx.get(f"{address}/docs").text)
