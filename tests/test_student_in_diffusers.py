"""A student's folder in plain diffusers: it gives the student's own images, or an error that says what to do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pipelines
import pytest
import torch
from diffusers import DDIMPipeline, DiffusionPipeline, StableDiffusionPipeline, UNet2DModel

from redif_sdk.artifact.folder import StudentFolder
from redif_sdk.distill import DistillConfig, Teacher, distill, import_pipeline
from redif_sdk.distill.student import load_student
from redif_sdk.errors import UnsupportedModel
from redif_sdk.images import to_uint8

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers, numpy 2.4


@pytest.fixture(scope="module", params=["classes", "plain", "text"])
def student(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Students of two steps: class-conditional, unconditional and text-to-image, each at times of its own."""
    folder = tmp_path_factory.mktemp("in-diffusers") / f"{request.param}-2"
    source: Any = request.getfixturevalue("teacher_folder")
    if request.param == "text":
        source = Teacher.from_diffusers(pipelines.stable_diffusion(), prompts=pipelines.PROMPTS)
    elif request.param == "plain":
        source = Path(shutil.copytree(source, folder.with_name("plain-teacher")))
        (source / "redif_teacher.json").unlink()
        config = UNet2DModel.load_config(source / "unet") | {"num_class_embeds": None}
        UNet2DModel.from_config(config).save_pretrained(source / "unet")
    common = {"schedule_updates": 0, "pool_size": 8, "batch_size": 4, "group_size": 4}
    config = DistillConfig(num_inference_steps=2, updates=1, reward="pixel", reward_space="latents", **common)
    distill(source, config).save_pretrained(folder)
    return folder


def test_diffusion_pipeline_gives_the_student_s_images_or_says_what_to_do(student: Path) -> None:
    """It used to sample at 50 other times without a word, or to fail for want of class labels."""
    manifest = StudentFolder(student).manifest
    noise = torch.randn(2, manifest.latents.channels, manifest.latents.height, manifest.latents.width)
    asked: dict[str, Any] = {"prompt": pipelines.PROMPTS[:2]} if manifest.text else {"batch_size": 2}
    condition = torch.tensor([0, 1]) if manifest.condition else None
    with torch.no_grad():
        loaded = load_student(student)
        images = loaded.teacher.images(loaded.policy().sample(noise, condition))
        wanted = to_uint8(images.numpy(), manifest.postprocess.model_copy(update={"pixel_shuffle": 1}))
    try:
        pipeline = DiffusionPipeline.from_pretrained(student)
        drawn = pipeline(**asked, latents=noise, output_type="np").images
    except (AttributeError, ValueError) as error:
        reason = str(error)
        assert student.name in reason
        assert "FastPipeline.from_pretrained" in reason
        assert "README.md" in reason
        return
    assert np.abs((drawn * 255).round() - wanted).max() <= 1


def test_an_explicit_class_does_not_sample_at_other_times_either(student: Path) -> None:
    manifest = StudentFolder(student).manifest
    times = [int(time) for time in manifest.tables[0].timesteps]
    if manifest.text is None:
        with pytest.raises(ValueError, match="expected"):
            DDIMPipeline.from_pretrained(student)
        return
    pipeline = StableDiffusionPipeline.from_pretrained(student)
    pipeline.set_progress_bar_config(disable=True)
    asked: dict[str, Any] = {"prompt": "red heart", "guidance_scale": 1.0, "height": 16, "width": 16}
    with pytest.raises(ValueError, match=rf"timesteps=\[{times[0]}, {times[1]}\]"):
        pipeline(**asked)
    assert pipeline(**asked, timesteps=times).images


def test_parts_of_the_folder_still_load(student: Path) -> None:
    manifest = StudentFolder(student).manifest
    if manifest.text is None:
        assert UNet2DModel.from_pretrained(student, subfolder="unet").config["in_channels"] == manifest.latents.channels
    assert load_student(student).tables == manifest.tables


def test_an_imported_pipeline_with_its_own_scheduler_stays_one(tmp_path: Path) -> None:
    """Its scheduler visits the table's times by itself, so diffusers gives the same images."""
    import_pipeline(pipelines.latent_consistency(), tmp_path / "lcm", [4], prompts=pipelines.PROMPTS)
    index = json.loads((tmp_path / "lcm/model_index.json").read_text())
    assert index["_class_name"] == "LatentConsistencyModelPipeline"


def test_a_text_student_is_no_teacher(student: Path) -> None:
    if StudentFolder(student).manifest.text is not None:
        with pytest.raises(UnsupportedModel, match="few-step student"):
            Teacher.load(student)
