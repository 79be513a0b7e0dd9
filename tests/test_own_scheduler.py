"""A pipeline's own scheduler: kept by import, the sampler of targets, or refused before any work."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import diffusers
import pipelines
import pytest
import torch
from typer.testing import CliRunner

from redif_sdk.cli.main import app
from redif_sdk.distill import DistillConfig, Teacher, distill, import_pipeline, load_student, pool
from redif_sdk.distill.teachers.known_schedulers import full_config
from redif_sdk.distill.teachers.own_scheduler import run_table
from redif_sdk.errors import InvalidRequest, RedifError, UnsupportedModel

# diffusers' solvers make numpy arrays of torch tensors in the old way
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

NOISE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def network() -> Any:
    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        block_out_channels=(8,),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        attention_head_dim=8,
        add_attention=False,
    ).eval()


def folder_of(folder: Path, scheduler: Any) -> Path:
    """A UNet2DModel and a scheduler, or a scheduler's configuration."""
    network().save_pretrained(folder / "unet")
    config = scheduler if isinstance(scheduler, dict) else {"_class_name": type(scheduler).__name__, **scheduler.config}
    (folder / "scheduler").mkdir()
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps(config))
    return folder


@torch.no_grad()
def theirs(scheduler: Any, steps: int, seed: int | None = None) -> torch.Tensor:
    """diffusers' own loop, with torch's noise from ``seed`` on."""
    unet = network()
    scheduler.set_timesteps(steps)
    x = NOISE * float(scheduler.init_noise_sigma)
    for k, t in enumerate(scheduler.timesteps):
        f = unet(scheduler.scale_model_input(x, t), t).sample
        if seed is not None:
            torch.manual_seed(seed + k)
        x = scheduler.step(f, t, x).prev_sample
    return x


def assert_same_images(ours: torch.Tensor, wanted: torch.Tensor) -> None:
    assert float((ours.clamp(-1, 1) - wanted.clamp(-1, 1)).abs().max()) <= 2 / 255


@pytest.mark.parametrize("name", ["ScoreSdeVeScheduler", "KarrasVeScheduler", "IPNDMScheduler", "MyScheduler", ""])
def test_an_unknown_scheduler_is_refused_by_name(name: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "teacher", {"_class_name": name, "num_train_timesteps": 1000})
    for use in (Teacher.load, lambda source: import_pipeline(source, tmp_path / "student", [4])):
        with pytest.raises(UnsupportedModel, match=f"{name}.* is not supported.*DDIMScheduler, .*EDMEulerScheduler"):
            use(folder)
    done = CliRunner().invoke(app, ["distill", str(folder), "-o", str(tmp_path / "student"), "--dry-run"])
    assert done.exit_code != 0
    assert not (tmp_path / "student").exists()


def test_a_key_that_nobody_knows_is_refused(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "teacher", {"_class_name": "DDIMScheduler", "predict_epsilon": False})
    with pytest.raises(UnsupportedModel, match="predict_epsilon"):
        Teacher.load(folder)


def test_a_key_of_another_class_changes_nothing(tmp_path: Path) -> None:
    """diffusers' PNDMScheduler does not know rescale_betas_zero_snr, and its files may have it all the same."""
    config = {"_class_name": "PNDMScheduler", "rescale_betas_zero_snr": True}
    teacher = Teacher.load(folder_of(tmp_path / "teacher", config))
    assert teacher.schedule.alphas[-1] > 0
    kept = diffusers.PNDMScheduler.from_config(config)
    assert "rescale_betas_zero_snr" not in full_config(kept)


def test_import_keeps_the_spacing_of_a_folder(tmp_path: Path) -> None:
    scheduler = diffusers.DDIMScheduler(timestep_spacing="leading", clip_sample=False)
    folder = folder_of(tmp_path / "teacher", scheduler)
    manifest = import_pipeline(folder, tmp_path / "student", [4])
    assert manifest.tables[0].timesteps.tolist() == [750, 500, 250, 0]
    kept = json.loads((tmp_path / "student/scheduler/scheduler_config.json").read_text())
    assert (kept["_class_name"], kept["timestep_spacing"]) == ("DDIMScheduler", "leading")
    assert_same_images(load_student(tmp_path / "student").policy().sample(NOISE, None), theirs(scheduler, 4))


def test_targets_are_those_of_the_folders_scheduler_with_its_clipping(tmp_path: Path) -> None:
    scheduler = diffusers.DDIMScheduler(timestep_spacing="leading", clip_sample=True, clip_sample_range=0.5)
    teacher = Teacher.load(folder_of(tmp_path / "teacher", scheduler))
    assert_same_images(teacher.sample(NOISE, None, 8), theirs(scheduler, 8))


@pytest.mark.parametrize("option", ["clip_sample", "thresholding"])
def test_import_says_what_clipping_changes(option: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    scheduler = diffusers.DDIMScheduler(**{"clip_sample": False, option: True})
    folder = folder_of(tmp_path / "teacher", scheduler)
    with caplog.at_level(logging.WARNING):
        import_pipeline(folder, tmp_path / "student", [4, 2])
    (said,) = [record.getMessage() for record in caplog.records if "step table" in record.getMessage()]
    assert f"DDIMScheduler has {option}=True" in said
    assert "at 4 step(s)" in said
    assert "at 2 step(s)" in said


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_ddpm_is_imported_with_its_noise(variance: str, tmp_path: Path) -> None:
    scheduler = diffusers.DDPMScheduler(variance_type=variance, clip_sample=False)
    teacher = Teacher.load(folder_of(tmp_path / "teacher", scheduler))
    assert teacher.own is not None
    table = teacher.own.table(4)
    assert table.stochastic
    ours = run_table(table, lambda x, t: teacher(x, t, None), NOISE, seed=3)
    assert_same_images(ours, theirs(scheduler, 4, seed=3))
    assert "DDIMScheduler with the same settings" in teacher.own.remark()


def test_a_solver_of_several_outputs_is_imported_with_another_scheduler_only(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "teacher", diffusers.UniPCMultistepScheduler())
    with pytest.raises(UnsupportedModel, match="--scheduler DDIMScheduler") as caught:
        import_pipeline(folder, tmp_path / "student", [4])
    assert "\n" not in str(caught.value)
    arguments = ["import", str(folder), "-o", str(tmp_path / "student"), "--steps", "4", "--scheduler", "DDIMScheduler"]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    with pytest.raises(UnsupportedModel, match="WishScheduler is not supported"):
        import_pipeline(folder, tmp_path / "other", [4], scheduler="WishScheduler")


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
def test_flow_sigmas_of_multistep_solvers(name: str, tmp_path: Path) -> None:
    """SD3 with DPM-Solver++ or UniPC: its targets are the pipeline's, and its student is a flow's."""
    pipeline = pipelines.stable_diffusion_3(with_t5=False)
    own = getattr(diffusers, name)(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    pipeline.scheduler = own
    teacher = Teacher.from_diffusers(pipeline, prompts=pipelines.PROMPTS)
    assert (teacher.prediction_type, teacher.shift) == ("flow", 3.0)
    noise = torch.randn(1, *teacher.shape, generator=torch.Generator().manual_seed(1))
    wanted = pipeline(
        pipelines.PROMPTS[:1],
        latents=noise.clone(),
        num_inference_steps=4,
        height=16,
        width=16,
        guidance_scale=7.0,
        output_type="latent",
    ).images
    ours = teacher.sample(noise, torch.tensor([0]), 4)
    assert torch.allclose(ours, wanted, atol=2e-4 * float(wanted.std()))
    assert pipeline.scheduler is own
    with pytest.raises(UnsupportedModel, match="--scheduler FlowMatchEulerDiscreteScheduler"):
        import_pipeline(pipeline, tmp_path / "student", [4], prompts=pipelines.PROMPTS)
    manifest = import_pipeline(
        pipeline,
        tmp_path / "student",
        [4],
        prompts=pipelines.PROMPTS,
        scheduler="FlowMatchEulerDiscreteScheduler",
    )
    assert manifest.tables[0].sampler == "flow-euler"
    assert pipeline.scheduler is own


def test_zero_terminal_snr_epsilon_is_taken_where_the_last_time_is_not_visited(tmp_path: Path) -> None:
    leading = diffusers.DDIMScheduler(rescale_betas_zero_snr=True, timestep_spacing="leading", clip_sample=False)
    teacher = Teacher.load(folder_of(tmp_path / "leading", leading))
    assert_same_images(teacher.sample(NOISE, None, 50), theirs(leading, 50))
    student = distill(
        dataclasses.replace(teacher, fingerprint=""),
        DistillConfig(num_inference_steps=2, updates=1, schedule_updates=0, pool_size=8, batch_size=4, reward="pixel"),
    )
    assert student.tables[0].timesteps[0] == 980
    assert torch.isfinite(student.policy().sample(NOISE, None)).all()
    trailing = diffusers.DDIMScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    with pytest.raises(UnsupportedModel, match=r"rescale_betas_zero_snr.*timestep_spacing leading"):
        Teacher.load(folder_of(tmp_path / "trailing", trailing))


def test_the_teachers_steps_follow_its_schedule(tmp_path: Path) -> None:
    scheduler = diffusers.DDIMScheduler(num_train_timesteps=20, clip_sample=False)
    folder = folder_of(tmp_path / "teacher", scheduler)
    teacher = Teacher.load(folder)
    assert teacher.num_inference_steps == 20
    assert_same_images(teacher.sample(NOISE, None), theirs(scheduler, 20))
    with pytest.raises(InvalidRequest, match="--teacher-steps 20"):
        teacher.at_steps(50)


def test_teacher_steps_is_a_setting(tmp_path: Path, teacher_folder: Path) -> None:
    common: dict[str, Any] = {"updates": 1, "schedule_updates": 0, "pool_size": 8, "batch_size": 4, "reward": "pixel"}
    student = distill(teacher_folder, DistillConfig(num_inference_steps=1, teacher_steps=3, **common))
    assert student.teacher.num_inference_steps == 3
    assert student.distillation is not None
    assert student.distillation.budget.teacher_calls == 8 * 3
    command = ["distill", str(teacher_folder), "-o", str(tmp_path / "s"), "--dry-run", "--updates", "1"]
    done = CliRunner().invoke(app, [*command, "--teacher-steps", "5000"])
    assert done.exit_code != 0
    asked = CliRunner().invoke(app, ["distill", "--list-settings"])
    assert "teacher_steps" in asked.stdout


def test_a_shipped_bank_is_of_its_own_steps(tmp_path: Path) -> None:
    teacher = Teacher.load("fashion-mnist")
    assert pool.is_there(teacher, 8, "train")
    assert not pool.is_there(teacher.at_steps(7), 8, "train", cache=tmp_path)


def test_a_wrong_value_is_an_error_of_ours(tmp_path: Path) -> None:
    wrong: list[dict[str, Any]] = [
        {"beta_schedule": "no"},
        {"timestep_spacing": 7},
        {"num_train_timesteps": "many"},
        {"trained_betas": "x"},
        {"prediction_type": "flow_prediction"},
    ]
    for place, config in enumerate(wrong):
        folder = folder_of(tmp_path / str(place), {"_class_name": "DDIMScheduler", **config})
        with pytest.raises(RedifError) as caught:
            Teacher.load(folder)
        assert "\n" not in str(caught.value)


def test_the_callers_scheduler_is_not_changed() -> None:
    scheduler = diffusers.UniPCMultistepScheduler(steps_offset=1)
    before = (scheduler.num_inference_steps, scheduler.step_index, scheduler.timesteps.tolist())
    pipeline = pipelines.stable_diffusion(scheduler)
    made = Teacher.from_diffusers(pipeline, prompts=pipelines.PROMPTS)
    made.sample(torch.zeros(1, *made.shape), torch.tensor([0]), 3)
    assert (scheduler.num_inference_steps, scheduler.step_index, scheduler.timesteps.tolist()) == before
