"""FastPipeline: the same pictures whichever way they are asked for, clear refusals, and not a trace of torch."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import redif_sdk
from redif_sdk import FastPipeline
from redif_sdk.artifact.folder import StudentFolder
from redif_sdk.errors import HubError, IntegrityError, InvalidRequest, ManifestError, RuntimeUnavailable
from redif_sdk.sampling.noise import noise

Copy = Callable[[Path], Path]


@pytest.fixture(scope="module")
def pipe(tiny_student: Path) -> FastPipeline:
    return FastPipeline.from_pretrained(tiny_student, num_threads=1)


@pytest.fixture(scope="module")
def plain_pipe(plain_student: Path) -> FastPipeline:
    return FastPipeline.from_pretrained(plain_student, num_threads=1)


def levels(a: Any, b: Any) -> int:
    return int(np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int)).max())


BLOCKED = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "diffusers", "transformers", "onnx", "safetensors"):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Block())
"""


def run_blocked(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-c", BLOCKED + code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


def test_pictures_without_torch(tiny_student: Path) -> None:
    code = """
from redif_sdk import FastPipeline
from redif_sdk.export import verify
pipe = FastPipeline.from_pretrained(sys.argv[1], num_threads=1)
out = pipe("c", seed=0)
assert out.images[0].size == (28, 28)
assert len(list(pipe.stream("c", seed=0))) == 2
assert all(row["passed"] for row in verify(sys.argv[1]))
assert not {"torch", "diffusers", "transformers"} & set(sys.modules)
print("done")
"""
    result = run_blocked(code, str(tiny_student))
    assert (result.stdout, result.stderr) == ("done\n", "")


# ---------------------------------------------------------------- one request, one picture


def test_a_picture_depends_on_its_own_seed_only(pipe: FastPipeline) -> None:
    batch = pipe(class_labels=[3, 4, 5], seed=7, output_type="uint8")
    assert batch.seeds == [(7, 0), (7, 1), (7, 2)]
    alone = pipe(class_labels=4, seed=[(7, 1)], output_type="uint8")
    assert levels(batch.images[1], alone.images[0]) <= 1
    again = pipe(class_labels=[3, 4, 5], seed=batch.seeds, output_type="uint8")
    assert np.array_equal(batch.images, again.images)
    assert levels(batch.images[0], batch.images[1]) > 50
    assert pipe(class_labels=[1, 2], seed=[8, 9]).seeds == [(8, 0), (9, 0)]


def test_without_a_seed_every_call_differs_and_can_be_repeated(pipe: FastPipeline) -> None:
    first, second = (pipe(class_labels=1, output_type="uint8") for _ in range(2))
    assert first.seeds != second.seeds
    assert np.array_equal(pipe(class_labels=1, seed=first.seeds, output_type="uint8").images, first.images)


@pytest.mark.parametrize("steps", [2, 3])
def test_stream_callback_and_call_give_the_same_picture(pipe: FastPipeline, steps: int) -> None:
    picture = pipe("c", seed=5, num_inference_steps=steps).images[0]
    previews = list(pipe.stream("c", seed=5, num_inference_steps=steps))
    assert [(preview.mode, preview.size) for preview in previews] == [("L", (28, 28))] * steps
    assert levels(previews[-1], picture) <= 1
    assert levels(previews[0], picture) > 1

    seen = []

    def watch(given: FastPipeline, step: int, timestep: float, tensors: dict[str, Any]) -> dict[str, Any]:
        assert given is pipe
        seen.append((step, timestep, tensors["latents"].shape))
        return tensors

    out = pipe("c", seed=5, num_inference_steps=steps, callback_on_step_end=watch)
    assert levels(out.images[0], previews[-1]) == 0
    timesteps = pipe.manifest.step_table(steps).timesteps
    assert seen == [(k, float(timesteps[k]), (1, 4, 14, 14)) for k in range(steps)]
    assert out.runtime_info["component"] == "denoiser"


def test_a_callback_can_replace_the_latents(pipe: FastPipeline) -> None:
    def blank(_: FastPipeline, step: int, __: float, tensors: dict[str, Any]) -> dict[str, Any]:
        return {"latents": np.zeros_like(tensors["latents"])} if step == 1 else {}

    out = pipe("c", seed=5, num_inference_steps=2, callback_on_step_end=blank, output_type="uint8")
    assert np.unique(out.images).tolist() == [128]  # 127.5, half to even

    def wrong(_: FastPipeline, __: int, ___: float, ____: dict[str, Any]) -> dict[str, Any]:
        return {"latents": np.zeros((1, 4, 7, 7))}

    with pytest.raises(InvalidRequest, match=r"latents have shape \(1, 4, 7, 7\)"):
        pipe("c", callback_on_step_end=wrong)


@pytest.mark.parametrize("steps", [2, 3])
def test_latents_take_the_place_of_the_starting_noise(pipe: FastPipeline, steps: int) -> None:
    expected = pipe(class_labels=[1, 2], seed=4, num_inference_steps=steps, output_type="uint8").images
    latents = noise([(4, 0), (4, 1)], (4, 14, 14))[0]
    options: dict[str, Any] = {"num_inference_steps": steps, "output_type": "uint8", "seed": 4}
    assert np.array_equal(pipe(class_labels=[1, 2], latents=latents, **options).images, expected)
    assert np.array_equal(pipe(class_labels=[1, 2], latents=latents.astype(np.float64), **options).images, expected)


def test_the_array_interface_is_the_call(pipe: FastPipeline) -> None:
    for steps in (2, 3):
        slices = pipe.manifest.step_table(steps).noise_slices
        drawn = noise([(1, index) for index in range(3)], (4, 14, 14), slices=slices)
        images = pipe.generate_array(drawn, [7, 8, 9], steps)
        expected = pipe(class_labels=[7, 8, 9], seed=1, num_inference_steps=steps, output_type="uint8").images
        assert images.dtype == np.uint8
        assert np.array_equal(images, expected)
    with pytest.raises(InvalidRequest, match="give one for each image"):
        pipe.generate_array(drawn, [7, 8], 3)
    with pytest.raises(InvalidRequest, match=r"give \(4, B, 4, H, W\)"):
        pipe.generate_array(drawn[:1], [7, 8, 9], 3)


def test_output_types(pipe: FastPipeline, plain_pipe: FastPipeline) -> None:
    pil = pipe("a", seed=0)
    assert isinstance(pil.images[0], Image.Image)
    assert pil.images[0].mode == "L"
    array = pipe("a", seed=0, output_type="np").images
    assert array.dtype == np.float32
    assert array.shape == (1, 28, 28, 1)
    assert np.array_equal(np.rint(array[0, :, :, 0] * 255), np.asarray(pil.images[0]))
    assert set(pil.timings) == {"noise", "network", "output", "total"}
    assert plain_pipe(num_images_per_prompt=3, seed=0, output_type="uint8").images.shape == (3, 28, 28, 1)


def test_classes_by_number_by_name_and_several_of_each(pipe: FastPipeline) -> None:
    expected = pipe(class_labels=[2, 2, 0, 0], seed=0, output_type="uint8").images
    for asked in ({"prompt": ["c", "A "]}, {"class_labels": ["c", 0]}, {"class_labels": np.array([2, 0])}):
        out = pipe(**asked, num_images_per_prompt=2, seed=0, output_type="uint8")  # type: ignore[arg-type]
        assert np.array_equal(out.images, expected)


def test_threads_do_not_disturb_each_other(tiny_student: Path, pipe: FastPipeline) -> None:
    expected = [pipe(class_labels=seed % 10, seed=seed, output_type="uint8").images for seed in range(12)]
    fresh = FastPipeline.from_pretrained(tiny_student, num_threads=1)  # its denoiser is loaded by whoever is first

    def draw(seed: int) -> Any:
        if seed % 3 == 0:
            return np.asarray(list(fresh.stream(class_labels=seed % 10, seed=seed))[-1])[None, :, :, None]
        return fresh(class_labels=seed % 10, seed=seed, output_type="uint8").images

    with ThreadPoolExecutor(4) as pool:
        drawn = list(pool.map(draw, range(12)))
    assert all(levels(one, other) <= 1 for one, other in zip(expected, drawn, strict=True))
    assert all(np.array_equal(expected[seed], drawn[seed]) for seed in range(12) if seed % 3)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({}, "class_labels is required, one of 0 to 9"),
        ({"class_labels": 10}, "10 is not a class of tiny; use 0 to 9"),
        ({"class_labels": -1}, "-1 is not a class"),
        ({"class_labels": [1, 2.0]}, "2.0 is not a class"),
        ({"class_labels": True}, "True is not a class"),
        ({"class_labels": []}, "at least one"),
        ({"prompt": "shoe"}, "'shoe' is not a class"),
        ({"prompt": "a", "class_labels": 0}, "give one of them"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0"),
        ({"num_inference_steps": 7}, "choose from 2, 3"),
        ({"num_inference_steps": 2.0}, "give an integer"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt is 0"),
        ({"num_images_per_prompt": True}, "give an integer"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 1 << 64}, "seed is 18446744073709551616"),
        ({"seed": 0.5}, "seed is 0.5"),
        ({"seed": "1"}, "seed is '1'"),
        ({"seed": [1, 2]}, "2 seeds for 1 images"),
        ({"seed": [(1, 2, 3)]}, "give an integer or a pair"),
        ({"seed": [(1, -1)]}, "an image index is -1"),
        ({"latents": np.zeros((1, 4, 14))}, r"give \(1, 4, 14, 14\)"),
        ({"latents": np.zeros((2, 4, 14, 14))}, r"give \(1, 4, 14, 14\)"),
        ({"latents": np.full((1, 4, 14, 14), np.nan)}, "NaN"),
        ({"latents": np.full((1, 4, 14, 14), 1e60)}, "infinite"),
        ({"latents": np.zeros((1, 4, 14, 14), dtype=complex)}, "complex"),
        ({"output_type": "webp"}, "pil, np, uint8, pt, latent"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(pipe: FastPipeline, request_: dict[str, Any], message: str) -> None:
    complete = (
        request_ if not request_ or {"class_labels", "prompt"} & set(request_) else {"class_labels": 1, **request_}
    )
    with pytest.raises(InvalidRequest, match=message):
        pipe(**complete)
    if complete is not request_ and not {"num_images_per_prompt", "output_type"} & set(request_):
        with pytest.raises(InvalidRequest, match=message):
            pipe.stream(**complete)  # at once, not when the first picture is asked for


def test_an_unconditional_student_takes_no_class(plain_pipe: FastPipeline) -> None:
    assert len(plain_pipe(num_images_per_prompt=2, seed=0).images) == 2
    for asked in ({"class_labels": 1}, {"prompt": "a"}):
        with pytest.raises(InvalidRequest, match="unconditional"):
            plain_pipe(**asked)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match="unconditional"):
        plain_pipe.generate_array(np.zeros((1, 1, 4, 14, 14), np.float32), [0])


def test_stream_generates_one_image(pipe: FastPipeline) -> None:
    with pytest.raises(InvalidRequest, match="generates one image, not 2"):
        pipe.stream(class_labels=[1, 2])


def test_students_that_cannot_be_loaded(bare_student: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeUnavailable, match="redif export"):
        FastPipeline.from_pretrained(bare_student)
    with pytest.raises(ManifestError, match=r"no redif\.json"):
        FastPipeline.from_pretrained(tmp_path)
    with pytest.raises(ManifestError, match="neither a folder nor the id"):
        FastPipeline.from_pretrained(tmp_path / "nowhere")


# ---------------------------------------------------------------- to and from other places


def test_save_gives_the_same_student(pipe: FastPipeline, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path / "saved")
    StudentFolder(tmp_path / "saved").check_all()
    assert FastPipeline.from_pretrained(tmp_path / "saved").manifest == pipe.manifest
    with pytest.raises(InvalidRequest, match="not empty"):
        pipe.save_pretrained(tmp_path / "saved")
    pipe.save_pretrained(tmp_path / "saved", overwrite=True)
    with pytest.raises(InvalidRequest, match="inside"):
        FastPipeline.from_pretrained(tmp_path / "saved").save_pretrained(tmp_path / "saved" / "copy")


def hub_cache(student: Path, cache: Path, *, only: set[str] | None = None) -> Path:
    """Lay `student` out as huggingface_hub caches the repository me/tiny; its snapshot."""
    commit = hashlib.sha1(b"x").hexdigest()
    repository = cache / "models--me--tiny"
    snapshot = repository / "snapshots" / commit
    (repository / "refs").mkdir(parents=True, exist_ok=True)
    (repository / "blobs").mkdir(exist_ok=True)
    (repository / "refs" / "main").write_text(commit)
    for source in student.rglob("*"):
        relative = source.relative_to(student).as_posix()
        if source.is_file() and (only is None or relative in only):
            blob = repository / "blobs" / hashlib.sha256(source.read_bytes()).hexdigest()
            blob.write_bytes(source.read_bytes())
            place = snapshot / relative
            place.parent.mkdir(parents=True, exist_ok=True)
            place.unlink(missing_ok=True)
            place.symlink_to(os.path.relpath(blob, place.parent))
    return snapshot


def test_a_student_from_the_hub_needs_its_graphs_only(tiny_student: Path, pipe: FastPipeline, tmp_path: Path) -> None:
    needed = {"redif.json", "onnx/generator.fp32.onnx", "onnx/denoiser.fp32.onnx"}
    hub_cache(tiny_student, tmp_path / "hub", only=needed)
    remote = FastPipeline.from_pretrained("me/tiny", cache_dir=tmp_path / "hub", num_threads=1)
    expected = pipe("a", seed=1, output_type="uint8").images
    assert np.array_equal(remote("a", seed=1, output_type="uint8").images, expected)
    with pytest.raises(IntegrityError, match="is missing"):
        remote.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    hub_cache(tiny_student, tmp_path / "hub")
    remote.save_pretrained(tmp_path / "saved")
    StudentFolder(tmp_path / "saved").check_all()
    assert not any(path.is_symlink() for path in (tmp_path / "saved").rglob("*"))


def test_a_repository_that_cannot_be_had(tmp_path: Path) -> None:
    with pytest.raises(
        HubError, match=r"cannot get me/nothing: it is not in the cache, and downloads are switched off"
    ):
        FastPipeline.from_pretrained("me/nothing", cache_dir=tmp_path)


@pytest.mark.parametrize(
    "options", [{"revision": "main"}, {"token": "hf_x"}, {"cache_dir": "x"}, {"local_files_only": True}]
)
def test_options_of_the_hub_are_refused_for_a_local_folder(tiny_student: Path, options: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match=f"is a local folder, and {next(iter(options))} only apply"):
        FastPipeline.from_pretrained(tiny_student, **options)


# ---------------------------------------------------------------- the public face


def test_the_public_names() -> None:
    assert redif_sdk.__all__ == [
        "ExportError",
        "FastPipeline",
        "HubError",
        "IntegrityError",
        "InvalidRequest",
        "Manifest",
        "ManifestError",
        "ParityError",
        "PipelineOutput",
        "RedifError",
        "RuntimeUnavailable",
        "StepTable",
        "TrainingDiverged",
        "UnsupportedModel",
        "__version__",
    ]
    assert all(hasattr(redif_sdk, name) for name in redif_sdk.__all__)
    assert set(redif_sdk.__all__) <= set(dir(redif_sdk))
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    assert redif_sdk.__version__ == project["project"]["version"]
    with pytest.raises(AttributeError, match="nothing"):
        redif_sdk.nothing  # noqa: B018


def test_importing_the_package_imports_next_to_nothing() -> None:
    code = "import redif_sdk; assert not {'numpy', 'pydantic', 'PIL', 'onnxruntime'} & set(sys.modules); print('done')"
    assert run_blocked(code).stdout == "done\n"
