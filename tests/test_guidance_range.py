"""Students of a range of guidance scales: from the teacher's pairs to the graph's input, equal everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pipelines
import pytest
import torch
from diffusers import StableDiffusionPipeline
from made_once import made
from torch import Tensor
from typer.testing import CliRunner

from redif_sdk import FastPipeline
from redif_sdk.artifact.folder import StudentFolder
from redif_sdk.artifact.manifest import Manifest
from redif_sdk.cli.main import app
from redif_sdk.distill import DistillConfig, Student, Teacher, distill, load_student, pool
from redif_sdk.distill.config import RANGED
from redif_sdk.distill.evaluation.arena import evaluate_folder
from redif_sdk.distill.methods import method_names
from redif_sdk.distill.rewards import Batch
from redif_sdk.distill.teachers.adapters import drawing
from redif_sdk.distill.teachers.ranges import guided_over
from redif_sdk.errors import InvalidRequest, ManifestError, UnsupportedModel
from redif_sdk.export import export
from redif_sdk.models.scales import places_of, scales_at, scales_of, with_scales
from redif_sdk.serving.settings import ServeSettings
from tests.serving.conftest import running

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers, numpy 2.4

PROMPTS = pipelines.PROMPTS
LOW, HIGH = 1.0, 8.0


def responsive() -> Any:
    """Stable Diffusion with one block, whose images depend on the prompt, by a sampler that a step table is."""
    scheduler = pipelines.ddim(timestep_spacing="trailing", set_alpha_to_one=True)
    pipeline = pipelines.stable_diffusion(scheduler, **pipelines.ONE_BLOCK)
    with torch.no_grad():
        for name, part in pipeline.unet.named_modules():
            if name.endswith("attn2"):
                part.to_v.weight.mul_(4)
                part.to_out[0].weight.mul_(4)
    return pipeline


def teacher_of(pipeline: Any, steps: int = 2, **options: Any) -> Teacher:
    return Teacher.load(pipeline, prompts=PROMPTS, **options).at_steps(steps)


def config(**more: Any) -> DistillConfig:
    settings: dict[str, Any] = {"method": "regression", "num_inference_steps": 2, "guidance_range": (LOW, HIGH)}
    settings |= {"updates": 2, "pool_size": 16, "batch_size": 8, "check_every": 1000, "keep": "last"}
    return DistillConfig(**settings | more)


def make(folder: Path) -> None:
    trained = config(updates=120, pool_size=128, batch_size=32, learning_rate=3e-3, seed=1)
    distill(teacher_of(responsive()), trained, progress=False).save_pretrained(folder)
    export(folder, batches=(1, 3))


@pytest.fixture(scope="module")
def student() -> Path:
    """A student of the range that is trained and exported. Read only."""
    return made("guidance-range", make)


def asked(count: int, scale: float) -> Tensor:
    """Prompts in turn, at one scale."""
    return with_scales(torch.arange(count) % len(PROMPTS), torch.full((count,), scale))


# ---------------------------------------------------------------- scales


def test_a_condition_keeps_its_scale_bit_for_bit() -> None:
    places, scales = torch.tensor([0, 5, 2**31]), torch.tensor([1.0, 7.3, 1e-3])
    packed = with_scales(places, scales)
    assert torch.equal(places_of(packed), places)
    assert torch.equal(scales_of(packed, 4.0), scales)
    assert scales_of(places, 4.0).tolist() == [4.0] * 3


def test_scales_are_uniform_and_a_function_of_the_entry_alone() -> None:
    scales = scales_at(np.arange(4096), 2.0, 6.0)
    assert torch.equal(scales_at(np.array([4000, 7]), 2.0, 6.0), scales[[4000, 7]])
    assert 2 <= scales.min() < 2.01
    assert 5.99 < scales.max() < 6
    for cycle in (2, 7, 89):  # of prompts in turn
        for place in range(min(cycle, 5)):
            assert scales[place::cycle].mean() == pytest.approx(4, abs=0.5)


def test_the_pool_is_the_teacher_at_the_scale_of_each_entry() -> None:
    plain = teacher_of(responsive())
    pairs = pool.compute(guided_over(plain, LOW, HIGH), 6, "train")
    again = pool.compute(guided_over(plain, LOW, HIGH), 2, "train", low=4)
    assert pairs.condition is not None
    assert again.condition is not None
    assert torch.equal(again.condition, pairs.condition[4:])
    torch.testing.assert_close(again.target, pairs.target[4:])
    for entry, scale in enumerate(scales_of(pairs.condition, 0)):
        part = pairs[entry : entry + 1]
        expected = plain.guided(float(scale)).sample(part.noise, part.places)
        torch.testing.assert_close(part.target, expected, rtol=1e-4, atol=1e-4)


def test_a_pool_of_another_range_is_another(tmp_path: Path) -> None:
    plain = teacher_of(responsive())
    names = {guided_over(plain, *bounds).identity for bounds in ((1, 8), (1, 7), (2, 8))} | {plain.identity}
    assert len(names) == 4


# ---------------------------------------------------------------- networks


FAMILIES = {
    "sd": (pipelines.stable_diffusion, {}),
    "sdxl": (pipelines.stable_diffusion_xl, {}),
    "lcm": (pipelines.latent_consistency, {}),
    "flux": (pipelines.flux, {"height": 16, "width": 16}),
}


@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_family_is_guided_by_each_images_scale(family: str) -> None:
    maker, options = FAMILIES[family]
    plain = Teacher.load(maker(), prompts=PROMPTS, **options)
    ranged = guided_over(plain, LOW, HIGH)
    labels = ranged.labels(np.arange(3))
    assert labels is not None
    x, t = torch.randn(3, *plain.shape), torch.full((3,), 400.0)
    for place, scale in enumerate(scales_of(labels, 0)):
        one = slice(place, place + 1)
        alone = plain.guided(float(scale))(x[one], t[one], places_of(labels)[one])
        torch.testing.assert_close(ranged(x, t, labels)[one], alone, rtol=1e-4, atol=1e-4)
    begun = ranged.make_student()
    with torch.no_grad():
        first = begun(x, t, labels)
    if plain.embedded_guidance is None:  # the new input is zero: the teacher's own unguided network, at any scale
        torch.testing.assert_close(first, plain.guided(1)(x, t, places_of(labels)))
        assert begun.network.config.time_cond_proj_dim == 256
        assert plain.make_student().network.config.time_cond_proj_dim is None
    else:
        torch.testing.assert_close(first, ranged(x, t, labels))


@pytest.mark.parametrize(
    ("maker", "prompts", "kind"),
    [
        (pipelines.stable_diffusion_3, PROMPTS, "SD3Transformer2DModel"),
        (pipelines.pixart, PROMPTS, "PixArtTransformer2DModel"),
        (pipelines.dit, None, "DiTTransformer2DModel"),
    ],
)
def test_a_network_without_room_for_the_scale_is_refused_by_name(maker: Any, prompts: Any, kind: str) -> None:
    with pytest.raises(UnsupportedModel, match=f"a {kind} cannot learn a range of guidance scales"):
        distill(Teacher.load(maker(), prompts=prompts), config(), progress=False)


def test_the_shipped_unet2d_is_refused_by_name(tmp_path: Path) -> None:
    command = ["distill", "fashion-mnist", "-o", str(tmp_path / "never"), "--guidance-range", "1", "4"]
    error = CliRunner().invoke(app, command).exception
    assert isinstance(error, UnsupportedModel)
    assert "a UNet2DModel cannot learn a range of guidance scales" in str(error)
    assert not (tmp_path / "never").exists()


def test_a_teacher_without_guidance_is_refused() -> None:
    network = pipelines.unet(32, **pipelines.ONE_BLOCK)
    plain = teacher_of(responsive())
    with pytest.raises(UnsupportedModel, match="is no copy of a network of diffusers"):
        distill(plain, config(), student=torch.nn.Conv2d(4, 4, 1), progress=False)
    smaller = distill(plain, config(), student=network, progress=False)
    assert smaller.inner.config.time_cond_proj_dim == 256
    assert network.config.time_cond_proj_dim is None  # the caller's own stays as it is


# ---------------------------------------------------------------- methods and settings


@pytest.mark.parametrize("method", sorted(set(RANGED) - {"regression"}))
def test_a_method_trains_over_the_range(method: str) -> None:
    more: dict[str, Any] = {"reward": "pixel"} if method in ("redif", "draft", "grpo") else {}
    if method in ("redif", "draft"):
        more |= {"warm_start": 0.0}
    made = distill(teacher_of(responsive()), config(method=method, **more), progress=False)
    assert made.manifest("made").network.guidance_range == (LOW, HIGH)
    weight = made.inner.time_embedding.cond_proj.weight
    assert weight.abs().max() > 0, "the scale's input was not trained"
    assert torch.isfinite(weight).all()


@pytest.mark.parametrize("method", sorted(set(method_names()) - set(RANGED)))
def test_any_other_method_is_refused_by_name(method: str) -> None:
    with pytest.raises(InvalidRequest, match=f"the method {method} cannot learn a range of guidance scales"):
        DistillConfig.checked(method=method, guidance_range=(1, 4))
    ranged = guided_over(teacher_of(responsive()), LOW, HIGH)
    with pytest.raises(InvalidRequest, match=f"the method {method} cannot learn a range"):
        distill(ranged, config(method=method, guidance_range=None), progress=False)


@pytest.mark.parametrize("bounds", [(4, 4), (5, 2), (0.5, 3), (1, float("inf")), (float("nan"), 2)])
def test_what_is_no_range_is_refused(bounds: tuple[float, float]) -> None:
    with pytest.raises(InvalidRequest, match=r"guidance_range is .*; give two guidance scales, the lower first"):
        DistillConfig.checked(guidance_range=bounds)


@pytest.mark.parametrize(("bounds", "default"), [((1, 8), 7.5), ((2, 4), 3.0), ((8, 10), 9.0)])
def test_the_default_is_the_teachers_own_scale_where_it_lies_in_the_range(
    bounds: tuple[float, float], default: float
) -> None:
    assert guided_over(teacher_of(responsive()), *bounds).guidance_scale == default


def test_a_reward_sees_the_scale_and_the_prompt_of_each_image() -> None:
    seen: list[Batch] = []

    def reward(batch: Batch) -> Tensor:
        seen.append(batch)
        return -(batch.images - batch.targets).pow(2).mean((1, 2, 3))

    distill(teacher_of(responsive()), config(method="redif", reward=reward, warm_start=0.0), progress=False)
    for batch in seen:
        assert batch.guidance_scales is not None
        assert batch.condition is not None
        assert batch.guidance_scales.shape == batch.condition.shape == (len(batch),)
        assert LOW <= batch.guidance_scales.min() < batch.guidance_scales.max() <= HIGH
        assert set(batch.prompts or ()) <= set(PROMPTS)


@pytest.mark.parametrize(
    "reward", ["feature", *(pytest.param(name, marks=pytest.mark.slow) for name in ("discriminator", "distribution"))]
)
def test_rewards_that_learn_take_the_prompts_alone(reward: str) -> None:
    distill(teacher_of(responsive()), config(method="redif", reward=reward, warm_start=0.0), progress=False)


def test_a_run_that_is_resumed_is_the_one_that_was_not(tmp_path: Path) -> None:
    teacher = teacher_of(responsive())
    whole = distill(teacher, config(updates=6), progress=False)

    def stop(done: float, figures: dict[str, float]) -> None:
        if done >= 0.5:
            raise KeyboardInterrupt

    settings = config(updates=6, checkpoint_seconds=0)
    with pytest.raises(KeyboardInterrupt):
        distill(teacher, settings, folder=tmp_path, on_progress=stop)
    with pytest.raises(InvalidRequest, match="of a run with other settings"):
        distill(teacher, settings.replaced(guidance_range=(1, 7)), folder=tmp_path, resume=True, progress=False)
    again = distill(teacher, settings, folder=tmp_path, resume=True, progress=False)
    pairs = zip(whole.inner.state_dict().values(), again.inner.state_dict().values(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_adapters_learn_the_scale_too() -> None:
    made = distill(teacher_of(responsive()), config(lora_rank=4, learning_rate=1e-2), progress=False)
    assert made.inner.time_embedding.cond_proj.weight.abs().max() > 0


# ---------------------------------------------------------------- the trained student


def test_a_student_follows_the_scale(student: Path) -> None:
    """At each of two scales it is nearer to the teacher at that scale than to the teacher at the other."""
    plain, policy = teacher_of(responsive()), load_student(student).policy()
    noise = pool.pool_noise(plain.shape, 24, "held_out")
    places = torch.arange(24) % len(PROMPTS)
    wanted = {scale: plain.guided(scale).sample(noise, places) for scale in (1.5, 7.5)}
    with torch.no_grad():
        found = {scale: policy.sample(noise, asked(24, scale)) for scale in wanted}
    for scale, other in ((1.5, 7.5), (7.5, 1.5)):
        assert (found[scale] - wanted[scale]).pow(2).mean() < (found[scale] - wanted[other]).pow(2).mean()


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_graphs_are_torch_at_every_scale(student: Path, runtime: str) -> None:
    pipe, policy = FastPipeline.from_pretrained(student, runtime=runtime), load_student(student).policy()
    found = []
    for scale in (None, LOW, 3.3, HIGH):
        given = {} if scale is None else {"guidance_scale": scale}
        latents = np.asarray(pipe(PROMPTS[:3], seed=4, output_type="latent", **given).images)
        noise = torch.from_numpy(pipe_noise(pipe, 4, 3))
        with torch.no_grad():
            expected = policy.sample(noise, asked(3, 7.5 if scale is None else scale))
        np.testing.assert_allclose(latents, expected.numpy(), rtol=1e-3, atol=1e-3)
        found.append(latents)
    assert np.abs(found[1] - found[3]).max() > 0.1


def pipe_noise(pipe: FastPipeline, seed: int, count: int) -> Any:
    from redif_sdk.sampling.noise import noise

    latents = pipe.manifest.latents
    return noise([(seed, place) for place in range(count)], (latents.channels, latents.height, latents.width))[0]


def test_plain_diffusers_gives_the_same_images(student: Path) -> None:
    pipe, manifest = FastPipeline.from_pretrained(student), StudentFolder(student).manifest
    theirs = StableDiffusionPipeline.from_pretrained(student)
    theirs.set_progress_bar_config(disable=True)
    times = [int(time) for time in manifest.tables[0].timesteps]
    for scale in (2.0, 7.0):
        noise = pipe_noise(pipe, 0, 1)
        given = {"latents": torch.from_numpy(noise), "timesteps": times, "height": 16, "width": 16}
        image = theirs(PROMPTS[0], guidance_scale=scale, output_type="np", **given).images
        ours = pipe(PROMPTS[0], seed=0, guidance_scale=scale, output_type="uint8").images
        assert np.abs(ours.astype(int) - (image * 255).round().astype(int)).max() <= 1
    assert "guidance_scale=7.5," in (student / "README.md").read_text()


def test_the_manifest_the_card_and_the_gate_have_the_range(student: Path) -> None:
    manifest = StudentFolder(student).manifest
    assert (manifest.network.guidance_range, manifest.default_guidance) == ((LOW, HIGH), 7.5)
    assert manifest.network.calls_per_step == 1
    assert "| Guidance scale | any from 1 to 8 (`guidance_scale`); default 7.5 |" in (student / "README.md").read_text()
    with np.load(student / manifest.golden[-1].file) as recorded:
        assert set(recorded["guidance_scale"]) == {LOW, 7.5, HIGH}


def test_a_default_outside_the_range_is_no_manifest(student: Path) -> None:
    manifest = StudentFolder(student).manifest
    for wrong in ({"embedded_guidance": 9.0}, {"embedded_guidance": None}, {"guidance_range": (8.0, 1.0)}):
        network = manifest.network.model_copy(update=wrong)
        with pytest.raises(ManifestError, match=r"is not in guidance_range|guidance_inputs without"):
            Manifest.from_bytes(manifest.model_copy(update={"network": network}).digested().to_bytes())


def test_a_student_loads_and_is_saved_again_with_its_range(student: Path, tmp_path: Path) -> None:
    again: Student = load_student(student)
    saved = again.save_pretrained(tmp_path / "again").network
    assert (saved.guidance_range, saved.embedded_guidance) == ((LOW, HIGH), 7.5)
    further = distill(teacher_of(responsive()), config(updates=1), start=student, progress=False)
    assert further.inner.time_embedding.cond_proj.weight.abs().max() > 0


# ---------------------------------------------------------------- requests


def test_a_scale_outside_is_refused_with_the_range(student: Path, tmp_path: Path) -> None:
    pipe = FastPipeline.from_pretrained(student)
    message = "guidance_scale=9 is not supported by .*, which learnt 1 to 8; give one in that range"
    with pytest.raises(InvalidRequest, match=message):
        pipe(PROMPTS[0], guidance_scale=9)
    with pytest.raises(InvalidRequest, match=r"guidance_scale=0\.5 is not supported"):
        pipe(PROMPTS[0], guidance_scale=0.5)
    with pytest.raises(InvalidRequest, match="takes the guidance scale as an input, and no second prompt"):
        pipe(PROMPTS[0], negative_prompt="blue")
    command = ["generate", str(student), PROMPTS[0], "-o", str(tmp_path / "a.png"), "--guidance-scale"]
    assert CliRunner().invoke(app, [*command, "3"]).exit_code == 0
    assert "guidance_scale" in CliRunner().invoke(app, ["whence", str(tmp_path / "a.png")]).output
    (tmp_path / "a.png").unlink()
    assert isinstance(CliRunner().invoke(app, [*command, "9"]).exception, InvalidRequest)
    assert not (tmp_path / "a.png").exists()


def test_the_server_takes_the_scale(student: Path) -> None:
    pipe = FastPipeline.from_pretrained(student)
    with running({"ranged": pipe}, ServeSettings()) as address:
        (card,) = httpx.get(f"{address}/v1/models").json()["data"]
        assert (card["guidance_scale"], card["guidance_range"]) == (7.5, [LOW, HIGH])
        body: dict[str, Any] = {"model": "ranged", "prompt": PROMPTS[0], "seed": 1, "response_format": "b64_json"}
        answers = [
            httpx.post(f"{address}/v1/images/generations", json=body | {"guidance_scale": scale})
            for scale in (2.0, 7.0, 9.0)
        ]
    assert [answer.status_code for answer in answers] == [200, 200, 400]
    assert answers[0].json()["data"] != answers[1].json()["data"]
    assert "which learnt 1 to 8" in answers[2].json()["error"]["message"]


# ---------------------------------------------------------------- evaluation


def test_evaluation_asks_at_the_teachers_scales(student: Path) -> None:
    """A teacher of one scale is met at that scale, one of a range at the scale of each image."""
    plain = teacher_of(responsive())
    errors = {}
    for scale in (2.0, 7.5):
        rows = evaluate_folder(student, plain.guided(scale), 16, unpaired=False, baselines=False, device="cpu")
        errors[scale] = rows[-1]["mse"]
    ranged = evaluate_folder(student, guided_over(plain, LOW, HIGH), 16, unpaired=False, baselines=False, device="cpu")
    assert errors[2.0] < ranged[-1]["mse"] < errors[7.5]  # what is guided more is harder to reach
    with pytest.raises(InvalidRequest, match=r"learnt guidance scales from 1 to 8, and .* is guided at 12"):
        evaluate_folder(student, plain.guided(12), 16, unpaired=False, baselines=False, device="cpu")


def test_a_teacher_on_other_prompts_keeps_its_range() -> None:
    ranged = guided_over(teacher_of(responsive()), 2, 9)
    other = drawing(ranged, ["a green tree"])
    assert other.guidance_range == (2, 9)
    assert other.guidance_scale == ranged.guidance_scale
