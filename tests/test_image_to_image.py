"""Starting from an image: the table's levels, equality with diffusers, masks, and what is no image."""

from __future__ import annotations

import io
import math
import re
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pipelines
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from test_export_text import SIZES
from typer.testing import CliRunner

from redif_sdk import FastPipeline
from redif_sdk.cli.main import app
from redif_sdk.distill import import_pipeline
from redif_sdk.errors import InvalidRequest
from redif_sdk.export import export
from redif_sdk.images import from_uint8, to_uint8
from redif_sdk.inputs.images import LARGEST_IMAGE, open_image
from redif_sdk.sampling.entry import from_row, levels, steps_of
from redif_sdk.sampling.noise import noise as draw
from redif_sdk.sampling.noise_schedule import NoiseSchedule
from redif_sdk.sampling.table import StepTable, karras_sigmas

quick = settings(deadline=None, max_examples=40)
PROMPT = "a red heart"


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """A smooth picture in colours."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


# ---------------------------------------------------------------- levels


@quick
@given(
    st.sampled_from(["epsilon", "v_prediction", "sample", "score", "flow"]),
    st.lists(st.floats(0.05, 0.98), min_size=2, max_size=6, unique=True),
    st.floats(0, 0.9),
)
def test_a_tables_levels_are_those_that_it_was_built_from(kind: str, drawn: list[float], share: float) -> None:
    sigmas = np.array(sorted(drawn, reverse=True))
    if np.diff(sigmas).max() > -0.01:
        return  # in float32 two levels so close say little of each other
    alphas = 1 - sigmas if kind == "flow" else np.sqrt(1 - sigmas**2)
    ends = np.append(sigmas[1:], 0.0)
    noise = share * ends * (0 if kind == "sample" else 1)
    table = StepTable.build(
        t=np.arange(len(sigmas))[::-1],
        alphas=alphas,
        sigmas=sigmas,
        next_alphas=np.append(alphas[1:], 1.0),
        next_sigmas=ends,
        noise=noise,
        prediction_type=kind,
    )
    np.testing.assert_allclose(levels(table), np.stack([alphas, sigmas], 1), atol=2e-4)


@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
def test_the_levels_of_edm_are_its_own(sigma_data: float) -> None:
    sigmas = karras_sigmas(5, 0.01, 40.0)
    table = StepTable.edm(sigmas, sigma_data=sigma_data)
    scale = 1 / np.hypot(sigmas, sigma_data)
    np.testing.assert_allclose(levels(table), np.stack([scale, scale * sigmas], 1), rtol=2e-4)


def test_the_levels_of_euler_are_scaled_as_its_network_is() -> None:
    sigmas = np.array([14.6, 3.0, 0.5])
    table = StepTable.euler(sigmas, prediction_type="epsilon", timesteps=[999, 500, 100])
    scale = 1 / np.hypot(sigmas, 1)
    np.testing.assert_allclose(levels(table), np.stack([scale, scale * sigmas], 1), rtol=1e-4)


def test_strengths_are_steps() -> None:
    table = StepTable.ddim(NoiseSchedule.from_config({}), num_inference_steps=4, prediction_type="epsilon")
    assert [steps_of(table, s, 0.8) for s in (0.25, 0.49, 0.5, 0.75, 0.99, 1, None)] == [1, 1, 2, 3, 3, 4, 3]
    assert steps_of(from_row(table, 3), None, 0.8) == 1
    with pytest.raises(InvalidRequest, match=r"strength 0.2 of 4 steps leaves no step to run; .* 0.25, 0.5, 0.75, 1: "):
        steps_of(table, 0.2, 0.8)
    for wrong in (0, -1, 1.01, math.nan, True, "half"):
        with pytest.raises(InvalidRequest, match="give a number above 0, up to 1"):
            steps_of(table, wrong, 0.8)


# ---------------------------------------------------------------- diffusers


def diffusers_images(
    kind: str,
    pipeline: Any,
    image: Image.Image,
    noise: NDArray[np.float32],
    monkeypatch: pytest.MonkeyPatch,
    **more: Any,
) -> NDArray[np.uint8]:
    """What diffusers' own pipeline makes of ``image``, with our noise and the mean of the encoder's distribution."""
    unused = {"safety_checker", "feature_extractor", "image_encoder"} & set(pipeline.components)
    own = getattr(diffusers, kind)(**pipeline.components | dict.fromkeys(unused))
    own.set_progress_bar_config(disable=True)
    module = __import__(type(own).__module__, fromlist=["x"])
    monkeypatch.setattr(module, "randn_tensor", lambda shape, **_: torch.from_numpy(noise).reshape(shape))
    mode = lambda output, generator=None, sample_mode="sample": output.latent_dist.mode()  # noqa: E731
    monkeypatch.setattr(module, "retrieve_latents", mode)
    with torch.no_grad():
        found = own(PROMPT, image=image, output_type="np", **more).images
    return np.rint(found * 255).astype(np.uint8)


FAMILIES: dict[str, tuple[Callable[[], Any], str]] = {
    "sd": (lambda: pipelines.stable_diffusion(pipelines.ddim()), "StableDiffusionImg2ImgPipeline"),
    "sdxl": (lambda: pipelines.stable_diffusion_xl(pipelines.ddim()), "StableDiffusionXLImg2ImgPipeline"),
    "sd3": (lambda: pipelines.stable_diffusion_3(with_t5=False), "StableDiffusion3Img2ImgPipeline"),
    "flux": (pipelines.flux, "FluxImg2ImgPipeline"),
}


@pytest.fixture(scope="module")
def students(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, FastPipeline]]:
    """A pipeline of a family, and it as a student of four steps."""
    made: dict[str, tuple[Any, FastPipeline]] = {}
    folder = tmp_path_factory.mktemp("students")

    def student(family: str) -> tuple[Any, FastPipeline]:
        if family not in made:
            pipeline = FAMILIES[family][0]()
            guidance = {} if family == "flux" else {"guidance_scale": 1.0}
            import_pipeline(pipeline, folder / family, [4], prompts=[PROMPT], **guidance)
            sizes = SIZES if family == "sd" else []  # its traces are those of test_export_text.py
            manifest = export(folder / family, runtimes=["onnxruntime"], batches=(2,), sizes=sizes)
            assert {graph.component for graph in manifest.graphs} >= {"encoder", "decoder"}
            assert any(row["component"] == "encoder" and row["passed"] for row in manifest.verification)
            made[family] = pipeline, FastPipeline.from_pretrained(folder / family, num_threads=1)
        return made[family]

    return student


@pytest.mark.parametrize(
    "family", ["sd", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sdxl", "sd3", "flux"))]
)
@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_image_to_image_is_that_of_diffusers(
    students: Callable[[str], tuple[Any, FastPipeline]], family: str, strength: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline, pipe = students(family)
    latents, scale = pipe.manifest.latents, pipe.manifest.postprocess.scale
    side = latents.width * scale
    noise = draw([(7, 0)], (latents.channels, latents.height, latents.width))[0]
    asked: dict[str, Any] = {"num_inference_steps": 4, "strength": strength}
    ours, other = (
        pipe(PROMPT, image=photo(side, side, n), seed=7, output_type="uint8", **asked).images for n in (0, 1)
    )
    asked |= {"guidance_scale": 1.0 if family != "flux" else pipe.manifest.network.embedded_guidance}
    asked |= {"height": side, "width": side} if family == "flux" else {}
    theirs = diffusers_images(FAMILIES[family][1], pipeline, photo(side, side), noise, monkeypatch, **asked)
    assert np.abs(ours.astype(int) - theirs.astype(int)).max() <= 1
    assert strength == 1 or np.abs(ours.astype(int) - other.astype(int)).max() > 8


# ---------------------------------------------------------------- pixels, masks, sizes


@pytest.fixture(scope="module")
def pixels(full_student: Path) -> FastPipeline:
    """A class-conditional student of pixels, in shuffled blocks, of several steps."""
    return FastPipeline.from_pretrained(full_student, runtime="onnxruntime", num_threads=1)


def own_size(pipe: FastPipeline) -> tuple[int, int, int]:
    """(height, width, channels) of what it makes."""
    latents, post = pipe.manifest.latents, pipe.manifest.postprocess
    return latents.height * post.scale, latents.width * post.scale, post.channels(latents.channels)


def array(pipe: FastPipeline, count: int = 1, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (count, *own_size(pipe)), dtype=np.uint8)


@pytest.mark.parametrize("shuffle", [1, 2])
def test_pixels_are_their_own_latents(pixels: FastPipeline, shuffle: int) -> None:
    post = pixels.manifest.postprocess.model_copy(update={"pixel_shuffle": shuffle, "value_range": (-0.4, 1.7)})
    images = np.random.default_rng(0).integers(0, 256, (3, 12, 8, 3), dtype=np.uint8)
    found = from_uint8(images, post)
    assert found.shape == (3, 3 * shuffle**2, 12 // shuffle, 8 // shuffle)
    assert np.array_equal(to_uint8(found, post), images)


def test_what_a_mask_leaves_out_stays_to_the_bit(pixels: FastPipeline) -> None:
    steps = max(pixels.manifest.supported_steps)
    image, (height, width, channels) = array(pixels, 2), own_size(pixels)
    mask = np.zeros((height, width), dtype=bool)
    mask[3:9, 5:12] = True
    asked: dict[str, Any] = {"class_labels": [1, 2], "seed": 3, "num_inference_steps": steps, "output_type": "uint8"}
    found = pixels(image=image, mask_image=mask, **asked).images
    assert np.array_equal(found[:, ~mask], image[:, ~mask])
    assert (found[:, mask] != image[:, mask]).mean() > 0.5
    white, black = (pixels(image=image, mask_image=np.full_like(mask, b), **asked).images for b in (True, False))
    assert np.array_equal(black, image)
    assert np.array_equal(white, pixels(image=image, strength=1.0, **asked).images)
    seen: list[int] = []
    kept = pixels(image=image, mask_image=mask, callback_on_step_end=lambda _, k, *__: seen.append(k), **asked).images
    assert seen == list(range(steps))
    assert np.array_equal(kept, found)
    clear = np.concatenate(
        [np.zeros((height, width, 3), np.uint8), np.where(mask, 0, 255).astype(np.uint8)[..., None]], 2
    )
    alpha = pixels(image=image, mask_image=clear, **asked).images  # as in OpenAI's API: what is clear is painted anew
    assert np.array_equal(alpha, found)
    assert channels == image.shape[3]


def test_few_steps_stay_near_the_image(pixels: FastPipeline) -> None:
    """The fused graph on a part of its table is what single steps give; the fewer rows, the nearer to the image."""
    steps = max(pixels.manifest.supported_steps)
    image, asked = array(pixels), {"class_labels": 1, "seed": 3, "output_type": "uint8", "num_inference_steps": steps}
    table, latents = pixels.manifest.step_table(steps), pixels.manifest.latents
    channels, height, width = latents.channels, latents.height, latents.width
    for rows in range(1, steps + 1):
        found = pixels(image=image[0], strength=rows / steps, **asked).images
        stepped = pixels(image=image[0], strength=rows / steps, callback_on_step_end=lambda *_: None, **asked).images
        assert np.abs(found.astype(int) - stepped.astype(int)).max() <= 1
        noise = draw([(3, 0)], (channels, height, width), slices=table.noise_slices)
        alpha, sigma = levels(table)[0].astype(np.float32)
        noise[0] = (alpha * from_uint8(image, pixels.manifest.postprocess) + sigma * noise[0]) / table.init_scale
        plain = pixels.generate_array(noise, 1, steps)  # all rows, from what the image is at the first one's level
        assert rows < steps or np.abs(found.astype(int) - plain.astype(int)).max() <= 1


def test_a_stream_from_an_image_ends_with_what_a_call_gives(pixels: FastPipeline) -> None:
    steps, image = max(pixels.manifest.supported_steps), array(pixels)[0]
    mask = np.zeros(image.shape[:2], dtype=bool)
    mask[3:9, 5:12] = True
    asked: dict[str, Any] = {"class_labels": 1, "seed": 3, "num_inference_steps": steps}
    for more, rows in (({"strength": (steps - 1) / steps}, steps - 1), ({"mask_image": mask}, steps)):
        formed = [np.asarray(one) for one in pixels.stream(image=image, **asked, **more)]
        assert len(formed) == rows
        whole = np.asarray(pixels(image=image, **asked, **more).images[0])
        assert np.abs(formed[-1].astype(int) - whole.astype(int)).max() <= 1
        assert not np.array_equal(formed[0], formed[-1])


def test_images_are_scaled_cut_and_turned(pixels: FastPipeline) -> None:
    height, width, channels = own_size(pixels)
    asked: dict[str, Any] = {"class_labels": 1, "seed": 3, "output_type": "uint8"}
    mask = np.zeros((height, width), dtype=np.uint8)
    mode = "L" if channels == 1 else "RGB"
    plain = photo(width, height).convert(mode)
    keep: Callable[[Image.Image], NDArray[np.uint8]] = lambda image: pixels(  # noqa: E731
        image=image, mask_image=Image.fromarray(mask).resize(image.size), **asked
    ).images[0]
    wanted = np.asarray(plain).reshape(height, width, channels)
    assert np.array_equal(keep(plain), wanted)
    wide = Image.new(mode, (3 * width, height), 0)
    wide.paste(plain, (width, 0))
    assert np.array_equal(keep(wide), wanted)  # the middle
    turned = plain.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    data = io.BytesIO()
    turned.save(data, "PNG", exif=exif)
    assert np.array_equal(keep(open_image(data.getvalue())), wanted)
    for other in (plain.convert("RGBA"), plain.convert("CMYK").convert(mode), np.asarray(plain) / 255):
        found = pixels(image=other, mask_image=mask, **asked).images[0]
        assert np.abs(found.astype(int) - wanted.astype(int)).max() <= 1
    deep = Image.fromarray(np.asarray(plain.convert("L")).astype(np.uint16) * 257)
    assert np.array_equal(keep(deep), np.asarray(plain.convert("L").convert(mode)).reshape(wanted.shape))
    clear = Image.new("RGBA", (width, height), (0, 0, 0, 0))
    assert (keep(clear) == 255).all()  # on white


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"strength": 0.5}, "strength is given without image"),
        ({"mask_image": np.zeros((4, 4), bool)}, "mask_image is given without image"),
        ({"image": "photo.png"}, "image is a str; open it first, with PIL.Image.open"),
        ({"image": []}, "image is an empty list"),
        ({"image": 3}, "image 0 is a int; give a PIL image or an array"),
        ({"image": np.zeros((4, 4, 2), np.uint8)}, r"image 0 has shape \(4, 4, 2\); give"),
        ({"image": np.zeros((0, 4, 3), np.uint8)}, r"image 0 has shape \(0, 4, 3\); give"),
        ({"image": np.full((4, 4, 3), 2.0)}, "holds numbers outside 0 to 1"),
        ({"image": np.full((4, 4, 3), np.nan)}, "holds numbers outside 0 to 1"),
        ({"image": np.zeros((4, 4, 3), np.int64)}, "has dtype int64; give uint8, or floats"),
        ({"image": [np.zeros((4, 4, 3), np.uint8)] * 3}, "3 images to start from, and 1 to make"),
        ({"image": np.zeros((4, 4, 3), np.uint8), "strength": 0.01}, "leaves no step to run"),
        (
            {"image": np.zeros((4, 4, 3), np.uint8), "mask_image": np.zeros((5, 4), bool)},
            "a mask has 4 x 5 pixels, its",
        ),
        ({"image": Image.new("F", (4, 4))}, "no range that is known"),
    ],
)
def test_what_cannot_be_started_from_is_one_clear_line(
    pixels: FastPipeline, arguments: dict[str, Any], said: str
) -> None:
    with pytest.raises(InvalidRequest, match=said):
        pixels(class_labels=1, **arguments)


# ---------------------------------------------------------------- files that are no images


def png(width: int, height: int, data: bytes = b"") -> bytes:
    """A PNG's header of that size, and what there is of its pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def saved(kind: str, image: Image.Image | None = None, **more: Any) -> bytes:
    data = io.BytesIO()
    (image or photo(64, 48)).save(data, kind, **more)
    return data.getvalue()


def hostile() -> dict[str, bytes]:
    frames = [photo(16, 16, seed) for seed in range(3)]
    return {
        "nothing": b"",
        "text": b"this is a photograph",
        "html": b"<html><img src=x></html>",
        "svg": b'<svg xmlns="http://www.w3.org/2000/svg"><rect width="9" height="9"/></svg>',
        "pdf": b"%PDF-1.4\n%%EOF",
        "zip": b"PK\x03\x04" + bytes(64),
        "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        "header alone": b"\x89PNG\r\n\x1a\n",
        "no pixels": png(64, 64),
        "few pixels": png(64, 64, bytes(100)),
        "no width": png(0, 64),
        "bomb": png(60_000, 60_000, bytes(1000)),
        "tall": png(1, 1 << 27),
        "a bomb that is whole": saved("PNG", Image.new("1", (9000, 9000)), optimize=False),
        "cut png": saved("PNG")[:-200],
        "cut jpeg": saved("JPEG")[:400],
        "cut webp": saved("WEBP")[:60],
        "cut gif": saved("GIF")[:60],
        "animated gif": saved("GIF", frames[0], save_all=True, append_images=frames[1:]),
        "animated webp": saved("WEBP", frames[0], save_all=True, append_images=frames[1:]),
        "animated png": saved("PNG", frames[0], save_all=True, append_images=frames[1:]),
        "pages": saved("TIFF", frames[0], save_all=True, append_images=frames[1:]),
        "broken zlib": saved("PNG")[:60] + bytes(200) + saved("PNG")[260:],
    }


@pytest.mark.parametrize("name", list(hostile()))
def test_a_file_that_is_no_image_is_refused_at_once(name: str, tmp_path: Path) -> None:
    data = hostile()[name]
    (tmp_path / "given.png").write_bytes(data)
    for source in (data, tmp_path / "given.png"):
        began = time.process_time()
        with pytest.raises(InvalidRequest, match=r"^(image|the image) ") as caught:
            open_image(source, "image")
        assert time.process_time() - began < 1
        assert "\n" not in str(caught.value)
    assert LARGEST_IMAGE < 9000 * 9000


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="cannot be read: No such file"):
        open_image(tmp_path / "none.png")


# ---------------------------------------------------------------- the documentation, and the command line


def test_the_documentations_example_runs(
    full_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pixels: FastPipeline
) -> None:
    """As it stands in docs/image-to-image.md, in a folder that has the student and the photograph."""
    page = (Path(__file__).resolve().parent.parent / "docs/image-to-image.md").read_text()
    example = re.search(r"```python\n(.*?)```", page, re.DOTALL)
    assert example is not None
    steps = max(pixels.manifest.supported_steps)
    code = example[1].replace("num_inference_steps=4", f"num_inference_steps={steps}")
    (tmp_path / "student").symlink_to(full_student)
    height, width, _ = own_size(pixels)
    photo(width, height).save(tmp_path / "photo.png")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "docs/image-to-image.md", "exec"), {})
    half, given = (np.asarray(Image.open(tmp_path / name).convert("RGB")) for name in ("half.png", "photo.png"))
    channels = pixels.manifest.postprocess.channels(pixels.manifest.latents.channels)
    given = given if channels == 3 else np.asarray(Image.open("photo.png").convert("L").convert("RGB"))
    assert np.array_equal(half[height // 2 :], given[height // 2 :])


def test_the_command_line_starts_from_a_file(full_student: Path, tmp_path: Path, pixels: FastPipeline) -> None:
    height, width, _ = own_size(pixels)
    photo(width, height).save(tmp_path / "photo.png")
    mask = Image.new("L", (width, height))
    mask.paste(255, (2, 2, 9, 9))
    mask.save(tmp_path / "mask.png")
    command = [
        "generate",
        str(full_student),
        "--class-label",
        "1",
        "--seed",
        "3",
        "--runtime",
        "onnxruntime",
        "--precision",
        "fp32",
        "--quiet",
        "-o",
        str(tmp_path / "o.png"),
    ]
    files = ["--image", str(tmp_path / "photo.png"), "--mask", str(tmp_path / "mask.png")]
    done = CliRunner().invoke(app, [*command, *files])
    assert done.exit_code == 0, done.output
    wanted = pixels(class_labels=1, seed=3, image=photo(width, height), mask_image=mask).images[0]
    assert np.array_equal(np.asarray(Image.open(tmp_path / "o.png")), np.asarray(wanted))
    (tmp_path / "photo.png").write_text("no image")
    done = CliRunner().invoke(app, [*command, *files])
    assert isinstance(done.exception, InvalidRequest)
    assert "photo.png is none of PNG, JPEG" in str(done.exception)
