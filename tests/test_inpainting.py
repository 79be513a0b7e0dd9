"""Inpainting networks of nine channels: diffusers' own images, and what calls without an image are told."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import httpx
import numpy as np
import onnx
import pipelines
import pytest
import torch
from made_once import made
from numpy.typing import NDArray
from PIL import Image
from test_image_to_image import photo
from typer.testing import CliRunner

from redif_sdk import FastPipeline
from redif_sdk.artifact.manifest import MASK_LATENTS, MASKED_LATENTS, Manifest
from redif_sdk.bench.rounds import Workload
from redif_sdk.cli.main import app
from redif_sdk.distill import DistillConfig, Teacher, distill, import_pipeline, load_student
from redif_sdk.errors import InvalidRequest, UnsupportedModel
from redif_sdk.export import export
from redif_sdk.sampling.noise import noise as draw
from redif_sdk.serving.settings import ServeSettings
from tests.serving.conftest import running

PROMPTS = pipelines.PROMPTS
SIDE = 16  # pixels
SIZES = [(16, 16), (24, 16)]


def small_sd(**more: Any) -> Any:
    """Stable Diffusion's inpainting with one block."""
    return pipelines.inpainting(pipelines.stable_diffusion(pipelines.ddim(), **pipelines.ONE_BLOCK, **more))


def small_xl() -> Any:
    return pipelines.inpainting(pipelines.stable_diffusion_xl(pipelines.ddim()))


MAKERS: dict[str, tuple[Callable[[], Any], float]] = {"sd": (small_sd, 4.0), "sdxl": (small_xl, 5.0)}
FAMILIES = ["sd", pytest.param("sdxl", marks=pytest.mark.slow)]


def make(family: str, folder: Path) -> None:
    maker, scale = MAKERS[family]
    import_pipeline(maker(), folder, [4], prompts=PROMPTS, guidance_scale=scale)
    export(folder, batches=(1, 3), sizes=SIZES if family == "sd" else ())


def student_of(family: str) -> Path:
    """That pipeline as a student, with graphs that passed their gate. Read only."""
    return made(f"inpainting-{family}", lambda folder: make(family, folder))


@pytest.fixture(scope="module")
def student() -> Path:
    return student_of("sd")


@pytest.fixture(scope="module")
def pipe(student: Path) -> FastPipeline:
    return FastPipeline.from_pretrained(student, runtime="onnxruntime", num_threads=1)


def half(width: int = SIDE, height: int = SIDE) -> Image.Image:
    """A mask of the right half and a corner, which does not fall on latents."""
    mask = np.zeros((height, width), np.uint8)
    mask[:, width // 2 :] = 255
    mask[: height // 3, : width // 3] = 128
    return Image.fromarray(mask)


def theirs(
    pipeline: Any,
    prompts: list[str],
    noise: NDArray[np.float32],
    image: Any,
    mask: Any,
    monkeypatch: pytest.MonkeyPatch,
    **asked: Any,
) -> NDArray[np.uint8]:
    """diffusers' images of the same noise, with the mean of the encoder's distribution."""
    module = __import__(type(pipeline).__module__, fromlist=["x"])
    monkeypatch.setattr(module, "randn_tensor", lambda shape, **_: torch.from_numpy(noise).reshape(shape))
    mode = lambda output, generator=None, sample_mode="sample": output.latent_dist.mode()  # noqa: E731
    monkeypatch.setattr(module, "retrieve_latents", mode)
    with torch.no_grad():
        found = pipeline(prompts, image=image, mask_image=mask, output_type="np", **asked).images
    return np.rint(np.asarray(found) * 255).astype(np.uint8)


def close(ours: NDArray[np.uint8], expected: NDArray[np.uint8]) -> bool:
    return int(np.abs(ours.astype(int) - expected.astype(int)).max()) <= 1


# ---------------------------------------------------------------- diffusers


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "asked",
    [{}, {"guidance_scale": 1.0}, {"guidance_scale": 7.0, "negative_prompt": ["blue", "old"]}, {"strength": 0.5}],
    ids=["default", "unguided", "negatives", "strength"],
)
def test_images_are_diffusers_own(
    family: str, runtime: str, asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    maker, scale = MAKERS[family]
    pipe = FastPipeline.from_pretrained(student_of(family), runtime=runtime, num_threads=2)
    latents = pipe.manifest.latents
    noise = draw([(7, 0), (7, 1)], (latents.channels, latents.height, latents.width))[0]
    images, masks = [photo(SIDE, SIDE, n) for n in (0, 1)], [half(), half().transpose(Image.Transpose.ROTATE_90)]
    given = {"num_inference_steps": 4, "strength": 1.0, **asked}
    ours = pipe(PROMPTS[:2], image=images, mask_image=masks, seed=7, output_type="uint8", **given)
    assert ours.runtime_info["component"] == "generator"
    size = {"height": SIDE, "width": SIDE, "guidance_scale": scale}
    expected = theirs(maker(), PROMPTS[:2], noise, images, masks, monkeypatch, **{**size, **given})
    assert close(ours.images, expected)


def test_the_networks_inputs_change_the_image(pipe: FastPipeline) -> None:
    asked: dict[str, Any] = {"seed": 3, "output_type": "uint8"}
    plain = pipe(PROMPTS[0], image=photo(SIDE, SIDE), mask_image=half(), **asked).images
    assert not close(plain, pipe(PROMPTS[0], image=photo(SIDE, SIDE, 1), mask_image=half(), **asked).images)
    left = half().transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    assert not close(plain, pipe(PROMPTS[0], image=photo(SIDE, SIDE), mask_image=left, **asked).images)
    hidden = np.array(photo(SIDE, SIDE))
    hidden[np.asarray(half()) >= 128] = 7  # what is under the mask is not seen
    assert np.array_equal(plain, pipe(PROMPTS[0], image=hidden, mask_image=half(), **asked).images)


def test_steps_streams_and_batches_give_the_fused_graphs_images(pipe: FastPipeline) -> None:
    asked: dict[str, Any] = {"image": photo(SIDE, SIDE), "mask_image": half()}
    fused = pipe(PROMPTS[:3], seed=[5, 6, 7], output_type="uint8", **asked)
    stepped = pipe(PROMPTS[:3], seed=[5, 6, 7], output_type="uint8", callback_on_step_end=lambda *_: None, **asked)
    assert (fused.runtime_info["component"], stepped.runtime_info["component"]) == ("generator", "denoiser")
    assert close(fused.images, stepped.images)
    alone = pipe(PROMPTS[1], seed=6, output_type="uint8", **asked).images
    assert close(alone, fused.images[1:2])
    formed = [np.asarray(image) for image in pipe.stream(PROMPTS[1], seed=6, **asked)]
    assert len(formed) == 4
    assert close(formed[-1][None], alone)
    later = [np.asarray(image) for image in pipe.stream(PROMPTS[1], seed=6, strength=0.5, **asked)]
    assert len(later) == 2
    assert close(later[-1][None], pipe(PROMPTS[1], seed=6, strength=0.5, output_type="uint8", **asked).images)


def test_free_sizes_and_given_arrays(pipe: FastPipeline) -> None:
    tall: dict[str, Any] = {"image": photo(16, 24), "mask_image": half(16, 24), "seed": 1, "output_type": "uint8"}
    images = pipe(PROMPTS[0], **tall).images
    assert images.shape == (1, 24, 16, 3)
    latents = pipe.manifest.latents
    noise = draw([(1, 0)], (latents.channels, 12, 8))
    given = pipe.encode_prompt(PROMPTS[0])
    masks = (np.asarray(half(16, 24))[::2, ::2] >= 128).astype(np.float32)[None, None]
    hidden = np.asarray(half(16, 24))[None] >= 128
    painted = {
        MASK_LATENTS: masks,
        MASKED_LATENTS: pipe._components.latents(np.asarray(photo(16, 24))[None], hidden),
    }
    assert close(pipe.generate_array(noise, given | painted), images)
    with pytest.raises(InvalidRequest, match="mask_latents, masked_image_latents, not encoder_hidden_states"):
        pipe.generate_array(noise, given)


@pytest.mark.slow
def test_precisions_and_negative_prompts_at_one_call_pass_the_gate(tmp_path: Path) -> None:
    import_pipeline(small_sd(), tmp_path / "sd", [2], prompts=PROMPTS, guidance_scale=3.0)
    precisions = ("fp32", "fp16", "bf16", "int8wo")
    manifest = export(tmp_path / "sd", precisions=precisions, batches=(2,), runtimes=["onnxruntime"])
    assert {row["precision"] for row in manifest.verification if row["component"] == "denoiser"} == set(precisions)
    import_pipeline(small_sd(time_cond_proj_dim=16), tmp_path / "lcm", [2], prompts=PROMPTS)
    export(tmp_path / "lcm", batches=(3,), runtimes=["onnxruntime"], nag=True)
    pipe = FastPipeline.from_pretrained(tmp_path / "lcm")
    asked: dict[str, Any] = {"image": photo(SIDE, SIDE), "mask_image": half(), "seed": 1, "output_type": "uint8"}
    plain, away = pipe(PROMPTS[0], **asked), pipe(PROMPTS[0], negative_prompt="blue", **asked)
    assert away.runtime_info["component"] == "nag"
    assert not np.array_equal(plain.images, away.images)


def test_a_plain_unet_in_an_inpainting_pipeline_is_a_plain_student(tmp_path: Path) -> None:
    plain = pipelines.stable_diffusion(**pipelines.ONE_BLOCK)
    own = diffusers.StableDiffusionInpaintPipeline(**plain.components, requires_safety_checker=False)
    assert not import_pipeline(own, tmp_path / "plain", [2], prompts=PROMPTS).network.inpainting


# ---------------------------------------------------------------- what is refused


def test_a_call_without_image_or_mask_says_what_is_missing(pipe: FastPipeline) -> None:
    for given, missing in (
        ({}, "give image and mask_image too"),
        ({"image": photo(SIDE, SIDE)}, "give mask_image too"),
        ({"mask_image": half()}, "give image too"),
    ):
        with pytest.raises(InvalidRequest, match=f"is an inpainting model: {missing}"):
            pipe(PROMPTS[0], **given)
        with pytest.raises(InvalidRequest, match="is an inpainting model"):
            pipe.stream(PROMPTS[0], **given)


def test_it_is_not_distilled_trained_or_timed(student: Path, tmp_path: Path) -> None:
    teacher = Teacher.from_diffusers(small_sd(), prompts=PROMPTS)
    with pytest.raises(UnsupportedModel, match="is an inpainting model, which is not distilled"):
        distill(teacher, DistillConfig(updates=1, pool_size=8, batch_size=2), progress=False)
    with pytest.raises(UnsupportedModel, match="is exported and run, and neither trained nor evaluated"):
        load_student(student)
    with pytest.raises(InvalidRequest, match="redif bench gives no images to paint"):
        Workload.of(student, batch=1)


def test_networks_of_other_channels_are_refused() -> None:
    for channels, message in ((8, "takes more than noise and a prompt"), (9, "makes 9 channels")):
        plain = pipelines.stable_diffusion(**pipelines.ONE_BLOCK)
        more = {"in_channels": channels, "out_channels": 4 if channels == 8 else 9}
        known = {name: value for name, value in plain.unet.config.items() if not name.startswith("_")}
        network = type(plain.unet).from_config({**known, **more})
        own = diffusers.StableDiffusionInpaintPipeline(
            **plain.components | {"unet": network}, requires_safety_checker=False
        )
        with pytest.raises(UnsupportedModel, match=message):
            Teacher.from_diffusers(own, prompts=PROMPTS)
    scored = pipelines.inpainting(pipelines.stable_diffusion_xl(), requires_aesthetics_score=True)
    with pytest.raises(UnsupportedModel, match="requires_aesthetics_score"):
        Teacher.from_diffusers(scored, prompts=PROMPTS)


# ---------------------------------------------------------------- the ways to it


def test_the_command_line_paints(student: Path, pipe: FastPipeline, tmp_path: Path) -> None:
    photo(SIDE, SIDE).save(tmp_path / "photo.png")
    half().save(tmp_path / "mask.png")
    line = ["generate", str(student), PROMPTS[0], "--seed", "3", "--precision", "fp32", "--runtime", "onnxruntime"]
    files = ["--image", str(tmp_path / "photo.png"), "--mask", str(tmp_path / "mask.png")]
    result = CliRunner().invoke(app, [*line, *files, "-o", str(tmp_path / "out.png")])
    assert result.exit_code == 0, result.output
    expected = pipe(PROMPTS[0], image=photo(SIDE, SIDE), mask_image=half(), seed=3, output_type="uint8").images
    assert close(np.asarray(Image.open(tmp_path / "out.png").convert("RGB"))[None], expected)
    refused = CliRunner().invoke(app, [*line, "-o", str(tmp_path / "no.png")])
    assert refused.exit_code != 0
    assert "give image and mask_image too" in " ".join(f"{refused.exception} {refused.output}".split())


def png(image: Image.Image) -> bytes:
    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()


def test_the_server_paints_and_refuses_a_prompt_alone(pipe: FastPipeline) -> None:
    files = {"image": ("photo.png", png(photo(SIDE, SIDE))), "mask": ("mask.png", png(half()))}
    with running({"painter": pipe}, ServeSettings()) as address, httpx.Client(base_url=address, timeout=60) as client:
        answer = client.post("/v1/images/edits", data={"prompt": PROMPTS[0], "seed": "3"}, files=files)
        assert answer.status_code == 200, answer.text
        image = Image.open(io.BytesIO(base64.b64decode(answer.json()["data"][0]["b64_json"])))
        expected = pipe(PROMPTS[0], image=photo(SIDE, SIDE), mask_image=half(), seed=3, output_type="uint8").images
        assert close(np.asarray(image)[None], expected)
        alone = client.post("/v1/images/generations", json={"prompt": PROMPTS[0]})
        assert alone.status_code == 400
        assert "send image and mask to POST /v1/images/edits" in alone.json()["error"]["message"]
        unmasked = client.post("/v1/images/edits", data={"prompt": PROMPTS[0]}, files={"image": files["image"]})
        assert unmasked.status_code == 400
        assert "give mask_image too" in unmasked.json()["error"]["message"]
        assert client.get("/v1/models/painter").json()["inpainting"] is True


def test_the_card_and_the_manifest_say_it(student: Path, pipe: FastPipeline) -> None:
    card = (student / "README.md").read_text()
    assert "image=photo, mask_image=mask" in card
    assert "--image photo.png --mask mask.png" in card
    assert (student / "samples" / "steps-4.png").is_file()
    assert Manifest.from_bytes(pipe.manifest.to_bytes()).network.inpainting
    graph = onnx.load(student / "onnx/denoiser.fp32.onnx")
    assert {MASK_LATENTS, MASKED_LATENTS} <= {value.name for value in graph.graph.input}


def test_the_demo_warms_up_and_paints(pipe: FastPipeline) -> None:
    from redif_sdk.demo.studio import Studio

    studio = Studio({"painter": pipe})
    studio.warm_up()
    order = studio.order("painter", PROMPTS[0], 4, "3", 1, image=photo(SIDE, SIDE), mask=half())
    *_, shown = studio.make(order)
    expected = pipe(PROMPTS[0], image=photo(SIDE, SIDE), mask_image=half(), seed=3, output_type="uint8").images
    assert close(np.asarray(shown.images[0][0])[None], expected)
