"""Every pipeline's adapter against the pipeline itself: its prompts, its sampler, its steps, its folder.

The pipelines are diffusers' own classes with few random weights (`pipelines.py`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pipelines
import pytest
import torch
from torch import Tensor

from redif_sdk.artifact.manifest import Manifest
from redif_sdk.distill import DistillConfig, Teacher, distill, import_pipeline, load_student
from redif_sdk.distill.compute.costs import flops
from redif_sdk.distill.teachers import adapters
from redif_sdk.distill.teachers.own_scheduler import own_table
from redif_sdk.errors import InvalidRequest, UnsupportedModel
from redif_sdk.models.families import LAYOUTS
from redif_sdk.sampling.table import StepTable

# numpy's of torch, inside diffusers' schedulers
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
ROOT = Path(__file__).resolve().parent.parent
PROMPTS = pipelines.PROMPTS
#: name -> pipeline, and the size of a picture where the pipeline's own is another
TEXT: dict[str, tuple[Callable[[], Any], dict[str, int]]] = {
    "sd": (pipelines.stable_diffusion, {}),
    "sd-v-zero-snr": (
        lambda: pipelines.stable_diffusion(
            pipelines.ddim(rescale_betas_zero_snr=True, prediction_type="v_prediction", timestep_spacing="trailing")
        ),
        {},
    ),
    "lcm": (pipelines.latent_consistency, {}),
    "sdxl": (pipelines.stable_diffusion_xl, {}),
    "sd3": (pipelines.stable_diffusion_3, {}),
    "sd3-without-t5": (lambda: pipelines.stable_diffusion_3(with_t5=False), {}),
    "flux-dev": (pipelines.flux, {"height": 16, "width": 16}),
    "flux-schnell": (lambda: pipelines.flux(guidance_embeds=False, dynamic=False), {"height": 16, "width": 16}),
    "pixart": (pipelines.pixart, {}),
}

#: One of each kind of network; what sets the others apart, prompts, guidance and samplers, is in the tests before.
TRAINED = {"sd", "sd3-without-t5", "flux-dev", "pixart"}


@pytest.fixture(scope="module", params=list(TEXT))
def case(request: pytest.FixtureRequest) -> tuple[str, Any, Teacher]:
    make, size = TEXT[request.param]
    pipeline = make()
    return request.param, pipeline, Teacher.from_diffusers(pipeline, prompts=PROMPTS, **size)


def embeddings(pipeline: Any, prompts: list[str]) -> dict[str, Tensor]:
    """What the pipeline's own ``encode_prompt`` makes of prompts, by the names of our tensors."""
    name = type(pipeline).__name__
    layout, names = LAYOUTS[name]
    with torch.no_grad():
        if layout == "sd":
            found = (pipeline.encode_prompt(prompts, "cpu", 1, False)[0],)
        elif layout in ("sdxl", "sd3"):
            states, _, pooled, _ = pipeline.encode_prompt(
                prompts, *((None, None) if layout == "sd3" else ()), do_classifier_free_guidance=False
            )
            found = (states, pooled)
        elif layout == "flux":
            states, pooled, _ = pipeline.encode_prompt(prompts, None)
            found = (states, pooled)
        else:
            states, mask, _, _ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False)
            found = (states, mask.float())
    return dict(zip(names, found, strict=True))


def test_prompts_become_what_the_pipeline_makes_of_them(case: tuple[str, Any, Teacher]) -> None:
    _, pipeline, teacher = case
    assert teacher.prompts is not None
    ours = teacher.prompts(torch.tensor([2, 0]))
    theirs = embeddings(pipeline, [PROMPTS[2], PROMPTS[0]])
    assert list(ours) == list(theirs)
    for name in ours:
        assert ours[name].shape == theirs[name].shape
        assert torch.allclose(ours[name], theirs[name], atol=1e-5), name


def own_output(pipeline: Any, teacher: Teacher, noise: Tensor, prompts: list[str], steps: int) -> Tensor:
    """The pipeline's own latents for this noise, unpacked where Flux packs them."""
    name = type(pipeline).__name__
    height, width = (side * teacher.postprocess.scale for side in teacher.shape[1:])
    latents = noise
    more: dict[str, Any] = {"height": height, "width": width}
    if name == "FluxPipeline":
        latents = pipeline._pack_latents(noise, len(noise), noise.shape[1], *noise.shape[2:])
        more["guidance_scale"] = teacher.embedded_guidance or 1.0
    elif teacher.embedded_guidance is not None:
        more["guidance_scale"] = teacher.embedded_guidance
    else:
        more["guidance_scale"] = teacher.guidance.scale if teacher.guidance else 1.0
    if name.startswith("PixArt"):
        more |= {"use_resolution_binning": False, "clean_caption": False, "output_type": "latent"}
    found = pipeline(prompts, latents=latents.clone(), num_inference_steps=steps, output_type="latent", **more2(more))
    out: Tensor = found.images
    if name == "FluxPipeline":
        out = pipeline._unpack_latents(out, height, width, pipeline.vae_scale_factor)
    return out


def more2(more: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in more.items() if key != "output_type"}


def test_the_teachers_targets_are_the_pipelines_own_pictures(case: tuple[str, Any, Teacher]) -> None:
    """Guidance, pooled embeddings, time ids, packing, shifts, multistep solvers: all of it is in these latents."""
    name, pipeline, teacher = case
    if name == "lcm":
        pytest.skip("LCM's scheduler draws noise: its teacher is sampled by DDIM")
    noise = torch.randn(2, *teacher.shape, generator=torch.Generator().manual_seed(1))
    index = torch.tensor([0, 3])
    ours = teacher.sample(noise, index, 5)
    theirs = own_output(pipeline, teacher, noise, [PROMPTS[0], PROMPTS[3]], 5)
    assert torch.allclose(ours, theirs, atol=2e-4 * float(theirs.std())), (ours - theirs).abs().max()


@pytest.mark.parametrize("scheduler", ["PNDM", "DPMSolverMultistep", "UniPCMultistep", "EulerDiscrete", "Karras"])
def test_targets_of_several_step_and_karras_schedulers(scheduler: str) -> None:
    import diffusers

    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    if scheduler == "Karras":
        own = diffusers.EulerDiscreteScheduler(**betas, use_karras_sigmas=True, steps_offset=1)
    elif scheduler == "PNDM":
        own = diffusers.PNDMScheduler(**betas, skip_prk_steps=True, steps_offset=1)
    else:
        own = getattr(diffusers, f"{scheduler}Scheduler")(**betas, steps_offset=1)
    pipeline = pipelines.stable_diffusion(own)
    teacher = Teacher.from_diffusers(pipeline, prompts=PROMPTS)
    noise = torch.randn(2, *teacher.shape, generator=torch.Generator().manual_seed(1))
    ours = teacher.sample(noise, torch.tensor([1, 2]), 6)
    theirs = own_output(pipeline, teacher, noise, PROMPTS[1:3], 6)
    assert torch.allclose(ours, theirs, atol=2e-4 * float(theirs.std()))


def test_each_row_has_the_schedulers_own_clean_estimate(case: tuple[str, Any, Teacher]) -> None:
    """x0 of every row of the pipeline's own table, for the scheduler's own states."""
    import copy

    _, pipeline, teacher = case
    table = own_table(teacher, 4)
    assert table is not None
    scheduler = copy.deepcopy(pipeline.scheduler)
    flow = teacher.schedule.flow
    if type(pipeline).__name__ == "FluxPipeline":
        import math

        dynamic = scheduler.config.use_dynamic_shifting
        scheduler.set_timesteps(
            sigmas=np.linspace(1, 0.25, 4).tolist(), **({"mu": math.log(teacher.shift)} if dynamic else {})
        )
    else:
        scheduler.set_timesteps(4)
    index = torch.tensor([0, 4])
    x = torch.randn(2, *teacher.shape, generator=torch.Generator().manual_seed(2)) * getattr(
        scheduler, "init_noise_sigma", 1.0
    )
    for k, t in enumerate(scheduler.timesteps):
        given = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        assert float(t) == pytest.approx(float(table.timesteps[k]), abs=1e-3)
        f = teacher(given, torch.full((2,), float(t)), index)
        ours = table.clean(k, given, f)
        if flow:
            sigma = scheduler.sigmas[k]
            theirs = x - sigma * f
            x = scheduler.step(f, t, x).prev_sample
        else:
            out = scheduler.step(f, t, x, generator=torch.Generator().manual_seed(k))
            theirs = out.denoised if hasattr(out, "denoised") else out.pred_original_sample
            x = out.prev_sample
        assert torch.allclose(ours, theirs, atol=1e-4 * max(1.0, float(theirs.abs().max()))), k


@pytest.mark.parametrize(
    "case", [pytest.param(name, marks=[pytest.mark.slow] * (name not in TRAINED)) for name in TEXT], indirect=True
)
def test_a_student_learns_by_adapters_and_draws_the_same_in_plain_diffusers(
    case: tuple[str, Any, Teacher], tmp_path: Path
) -> None:
    """An update of each of redif's phases with LoRA; diffusers' own class loads the folder that it leaves."""
    import diffusers

    name, _, teacher = case
    config = DistillConfig(
        num_inference_steps=2,
        updates=3,
        segments=0.3,
        warm_start=0.6,
        schedule_updates=0,
        pool_size=8,
        batch_size=4,
        group_size=4,
        reward="pixel",
        reward_space="latents",
        lora_rank=2,
        device="cpu",
    )
    student = distill(teacher.guided(2.0) if teacher.guidance else teacher, config)
    manifest = student.save_pretrained(tmp_path / "student")
    assert manifest.task == "text-to-image"
    assert manifest.network.guidance is None, "a distilled student makes one call a step"
    again = load_student(tmp_path / "student")
    assert again.tables == student.tables
    noise = torch.randn(2, *teacher.shape, generator=torch.Generator().manual_seed(3))
    index = torch.tensor([1, 5])
    ours = student.policy().sample(noise, index)
    assert torch.allclose(again.policy().sample(noise, index), ours, atol=1e-5)

    left_out = {"text_encoder_3": None, "tokenizer_3": None} if name == "sd3-without-t5" else {}
    pipeline = getattr(diffusers, manifest.network.pipeline or "").from_pretrained(tmp_path / "student", **left_out)
    pipeline.set_progress_bar_config(disable=True)
    pictures = plain_pictures(pipeline, teacher, student.tables[0], noise, [PROMPTS[1], PROMPTS[5]])
    wanted = teacher.images(ours).clamp(-1, 1)
    assert torch.allclose(pictures, wanted, atol=2e-3), (name, (pictures - wanted).abs().max())


def test_rewards_of_pictures_are_charged_for_decoding_and_those_of_latents_are_not() -> None:
    teacher = Teacher.from_diffusers(pipelines.stable_diffusion(), prompts=PROMPTS)
    common = {"updates": 2, "warm_start": 0.0, "schedule_updates": 0, "pool_size": 8, "batch_size": 4, "group_size": 4}
    spent = {}
    for space in ("latents", "images"):
        config = DistillConfig(num_inference_steps=1, reward="pixel", reward_space=space, device="cpu", **common)
        made = distill(teacher, config).distillation
        assert made is not None
        spent[space] = made.budget.forward_equivalents
    decoded = 2 * (4 + 4 * 4)  # an update's targets, and a group of each
    call = flops(teacher.make_student(), torch.zeros(1, *teacher.shape), torch.zeros(1), torch.zeros(1).long())
    assert spent["images"] - spent["latents"] == pytest.approx(
        decoded * flops(teacher.images, torch.zeros(1, *teacher.shape)) / call, rel=0.01
    )


def plain_pictures(pipeline: Any, teacher: Teacher, table: StepTable, noise: Tensor, prompts: list[str]) -> Tensor:
    """The student in its own pipeline at its table's times, in [-1, 1]."""
    name = type(pipeline).__name__
    height, width = (side * teacher.postprocess.scale for side in teacher.shape[1:])
    more: dict[str, Any] = {"height": height, "width": width, "guidance_scale": teacher.embedded_guidance or 1.0}
    times = [float(t) for t in table.timesteps]
    if teacher.schedule.flow:
        more["sigmas"] = [t / 1000 for t in times]
    else:
        more["timesteps"] = [round(t) for t in times]
    if name == "FluxPipeline":
        noise = pipeline._pack_latents(noise, len(noise), noise.shape[1], *noise.shape[2:])
    if name.startswith("PixArt"):
        more |= {"use_resolution_binning": False, "clean_caption": False}
    pictures = pipeline(prompts, latents=noise, output_type="pt", **more).images
    out: Tensor = pictures * 2 - 1
    return out


def test_dit_is_class_conditional_on_latents(tmp_path: Path) -> None:
    pipeline = pipelines.dit()
    teacher = Teacher.from_diffusers(pipeline)
    assert (teacher.num_conditions, teacher.calls_per_step) == (1000, 2)
    noise = torch.randn(2, *teacher.shape, generator=torch.Generator().manual_seed(1))
    latents = teacher.sample(noise, torch.tensor([7, 300]), 4)
    import unittest.mock

    with unittest.mock.patch("diffusers.pipelines.dit.pipeline_dit.randn_tensor", return_value=noise):
        theirs = pipeline([7, 300], guidance_scale=4.0, num_inference_steps=4, output_type="pt").images
    assert torch.allclose((teacher.images(latents) / 2 + 0.5).clamp(0, 1), theirs, atol=1e-3)
    config = DistillConfig(
        num_inference_steps=2, updates=1, schedule_updates=0, pool_size=8, batch_size=4, lora_rank=2, reward="pixel"
    )
    student = distill(teacher, config)
    manifest = student.save_pretrained(tmp_path / "student")
    assert (manifest.task, manifest.network.folder) == ("class-conditional", "transformer")
    again = load_student(tmp_path / "student")
    index = torch.tensor([1, 2])
    assert torch.allclose(again.policy().sample(noise, index), student.policy().sample(noise, index), atol=1e-5)


def test_edm_networks_are_fed_noise_levels(tmp_path: Path) -> None:
    """A UNet2DModel with EDM's scheduler: its own table, its targets, one update, and its folder."""
    from diffusers import EDMEulerScheduler, UNet2DModel

    torch.manual_seed(0)
    network = UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        layers_per_block=1,
    )
    folder = tmp_path / "teacher"
    network.save_pretrained(folder / "unet")
    scheduler = EDMEulerScheduler()
    scheduler.save_pretrained(folder / "scheduler")
    teacher = Teacher.from_diffusers(folder, num_inference_steps=6)
    noise = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    scheduler.set_timesteps(6)
    x, table = noise * scheduler.init_noise_sigma, teacher.table(6)
    for k, t in enumerate(scheduler.timesteps):
        given = scheduler.scale_model_input(x, t)
        with torch.no_grad():
            f = network.eval()(given, t.expand(2)).sample
        out = scheduler.step(f, t, x)
        assert torch.allclose(table.clean(k, given, f), out.pred_original_sample, atol=1e-4)
        x = out.prev_sample
    assert torch.allclose(teacher.sample(noise, None), x, atol=1e-4)
    config = DistillConfig(
        num_inference_steps=2, updates=2, schedule_updates=0, pool_size=8, batch_size=4, lora_rank=2, reward="pixel"
    )
    student = distill(teacher, config)
    student.save_pretrained(tmp_path / "student")
    again = load_student(tmp_path / "student")
    assert torch.allclose(again.policy().sample(noise, None), student.policy().sample(noise, None), atol=1e-5)
    kept = json.loads((tmp_path / "student/scheduler/scheduler_config.json").read_text())
    assert kept["_class_name"] == "EDMEulerScheduler"
    with pytest.raises(UnsupportedModel, match="schedule_updates"):
        distill(teacher, config.replaced(schedule_updates=2))


@pytest.mark.parametrize(
    ("make", "steps", "expected"),
    [
        (pipelines.latent_consistency, [4, 1], "consistency"),
        (
            lambda: pipelines.stable_diffusion_xl(_scheduler("EulerAncestralDiscreteScheduler", "trailing")),
            [1, 4],
            "euler",
        ),  # Turbo's shape
        (lambda: pipelines.stable_diffusion_xl(_scheduler("EulerDiscreteScheduler", "trailing")), [4], "euler"),
        (lambda: pipelines.flux(guidance_embeds=False, dynamic=False), [4], "flow-euler"),
    ],
    ids=["lcm", "turbo", "lightning", "schnell"],
)
def test_few_step_pipelines_are_imported_with_their_own_tables(
    make: Callable[[], Any], steps: list[int], expected: str, tmp_path: Path
) -> None:
    pipeline = make()
    size = {"height": 16, "width": 16} if "Flux" in type(pipeline).__name__ else {}
    guidance = None if type(pipeline).__name__.startswith("Latent") else 1.0
    if "Flux" in type(pipeline).__name__:
        guidance = None
    manifest: Manifest = import_pipeline(
        pipeline, tmp_path / "student", steps, guidance_scale=guidance, prompts=PROMPTS, **size
    )
    assert manifest.supported_steps == steps
    assert {table.sampler for table in manifest.tables} == {expected}
    assert manifest.network.calls_per_step == 1
    kept = json.loads((tmp_path / "student/scheduler/scheduler_config.json").read_text())
    assert kept["_class_name"] == type(pipeline.scheduler).__name__
    for table in manifest.tables:
        assert table == StepTable.from_scheduler(pipeline.scheduler, num_inference_steps=table.num_inference_steps) or (
            expected == "flow-euler"
        )


def _scheduler(name: str, spacing: str) -> Any:
    import diffusers

    return getattr(diffusers, name)(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, timestep_spacing=spacing
    )


def test_a_guided_import_keeps_its_empty_prompt(tmp_path: Path) -> None:
    manifest = import_pipeline(pipelines.stable_diffusion(), tmp_path / "student", [4], prompts=PROMPTS)
    guidance = manifest.network.guidance
    assert guidance is not None
    assert (guidance.scale, guidance.null_prompt, guidance.null_class) == (7.5, "", 0)
    zeros = import_pipeline(pipelines.stable_diffusion_xl(), tmp_path / "xl", [4], prompts=PROMPTS)
    assert zeros.network.guidance is not None
    assert zeros.network.guidance.null_zeros


def test_without_prompts_there_is_nothing_to_distil_on() -> None:
    with pytest.raises(InvalidRequest, match="--prompts"):
        Teacher.from_diffusers(pipelines.stable_diffusion())
    with pytest.raises(InvalidRequest, match="no prompt"):
        Teacher.from_diffusers(pipelines.stable_diffusion(), prompts=["", "  "])


def test_an_unknown_pipeline_is_refused_with_what_there_is() -> None:
    class KandinskyPipeline:
        unet = None

    with pytest.raises(UnsupportedModel) as caught:
        Teacher.from_diffusers(KandinskyPipeline())
    for name in ("StableDiffusionXLPipeline", "FluxPipeline", "DiTPipeline", "docs/adapters.md"):
        assert name in str(caught.value)


def test_a_pipeline_that_is_told_more_than_a_prompt_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="inpainting"):
        Teacher.from_diffusers(pipelines.stable_diffusion(in_channels=9), prompts=PROMPTS)


def test_the_guides_adapter_works() -> None:
    """The whole example of docs/adapters.md, as it stands there, on a pipeline of its own."""
    found = re.search(r"```python\n(# my_adapter\.py.*?)```", (ROOT / "docs/adapters.md").read_text(), re.DOTALL)
    assert found is not None
    code = found[1]
    assert len(code.strip().splitlines()) < 40
    space: dict[str, Any] = {}
    exec(compile(code, "my_adapter.py", "exec"), space)
    pipeline = space["RampPipeline"](pipelines.unet(32))
    teacher = Teacher.from_diffusers(pipeline, prompts=["one", "two"])
    assert "RampPipeline" in adapters.supported()
    config = DistillConfig(
        num_inference_steps=1, updates=1, schedule_updates=0, pool_size=8, batch_size=4, reward="pixel"
    )
    student = distill(teacher, config)
    noise = torch.randn(2, *teacher.shape)
    assert student.policy().sample(noise, torch.tensor([0, 1])).shape == noise.shape
