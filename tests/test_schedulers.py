"""Tables against diffusers: whole trajectories of random networks, schedules and steps, state by state."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from redif_sdk.errors import InvalidRequest, UnsupportedModel
from redif_sdk.sampling.table import NoiseSchedule, StepTable

# diffusers' DPM solver and Euler make numpy arrays of torch tensors in the old way
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

SHAPE = (2, 3, 4, 4)
quick = settings(deadline=None, max_examples=40)
seeds = st.integers(0, 2**32 - 1)
spacings = st.sampled_from(["leading", "trailing", "linspace"])
predictions = st.sampled_from(["epsilon", "v_prediction", "sample"])
etas = st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0.0, 1.0, allow_subnormal=False))


@st.composite
def schedules(draw: st.DrawFn, *, smallest: int = 30) -> dict[str, Any]:
    """The part of a scheduler's configuration that says its betas, with keys left to their defaults now and then."""
    steps = draw(st.sampled_from([smallest, 100, 257, 1000]))
    kind = draw(st.sampled_from(["default", "linear", "scaled_linear", "squaredcos_cap_v2", "trained"]))
    if kind == "default":
        return {}
    if kind == "trained":
        generator = np.random.default_rng(draw(seeds))
        return {"num_train_timesteps": steps, "trained_betas": generator.uniform(1e-4, 20 / steps, steps).tolist()}
    start = draw(st.floats(1e-5, 1e-3))
    end = draw(st.floats(0.005, 0.03)) * 1000 / steps
    return {"num_train_timesteps": steps, "beta_schedule": kind, "beta_start": start, "beta_end": min(end, 0.9)}


def total_steps(config: dict[str, Any]) -> int:
    return config.get("num_train_timesteps", 1000)


class RandomNetwork:
    """A smooth function of the state, another one at each step, with outputs of order 1."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.weights: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def normal(self) -> np.ndarray:
        return self.random.standard_normal(SHAPE).astype(np.float32)

    def __call__(self, k: int, x: np.ndarray) -> np.ndarray:
        if k not in self.weights:
            self.weights[k] = (self.normal(), self.normal())
        gain, offset = self.weights[k]
        return np.tanh(x) * gain + offset


def assert_same_trajectory(
    table: StepTable,
    network: RandomNetwork,
    step: Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    *,
    start: float = 1.0,
    scale_input: Callable[[int, torch.Tensor], torch.Tensor] = lambda k, x: x,
) -> None:
    """Both samplers from the same noise, each on its own state: every state agrees to 1e-5 of its scale.

    A reference that starts at ``start`` times noise, large, keeps that start's float32 rounding to its end.
    """
    noise = network.normal()
    slack = (start - 1.0) * np.abs(noise).max() * 2.0**-22
    x, theirs = table.init_scale * noise, start * torch.from_numpy(noise)
    for k in range(table.num_inference_steps):
        seen = scale_input(k, theirs)
        assert_close(x, seen, slack)
        z = network.normal()
        x0 = table.clean(k, x, network(k, x))
        x = table.advance(k, x, x0, z)
        theirs = step(k, torch.from_numpy(network(k, seen.numpy())), theirs, torch.from_numpy(z))
    assert_close(x, theirs, slack)


def assert_close(ours: np.ndarray, theirs: torch.Tensor, slack: float) -> None:
    expected = theirs.numpy()
    assert np.isfinite(ours).all()
    assert np.abs(ours - expected).max() <= 1e-5 * max(1.0, np.abs(expected).max()) + slack


def assert_times(table: StepTable, scheduler: Any) -> None:
    assert table.timesteps.tolist() == scheduler.timesteps.to(torch.float32).tolist()


def in_double(scheduler: Any, *names: str) -> Any:
    """The same noise levels, so that the reference's c = sqrt(small differences) is not float32 noise itself."""
    for name in ("alphas_cumprod", *names):
        setattr(scheduler, name, getattr(scheduler, name).double())
    return scheduler


@quick
@given(schedules(), predictions, spacings, etas, st.booleans(), st.integers(0, 1), st.integers(1, 12), seeds)
def test_ddim(
    config: dict[str, Any], prediction: str, spacing: str, eta: float, one: bool, offset: int, steps: int, seed: int
) -> None:
    scheduler = DDIMScheduler(
        **config,
        prediction_type=prediction,
        timestep_spacing=spacing,
        set_alpha_to_one=one,
        steps_offset=offset,
        clip_sample=False,
    )
    scheduler.set_timesteps(steps)
    assume(len(scheduler.timesteps) == steps)  # diffusers' trailing grid has a stray time -1 at some (T, K)
    assume(scheduler.timesteps.max() < total_steps(config))
    table = StepTable.from_scheduler(scheduler, num_inference_steps=steps, eta=eta)
    assert table == StepTable.ddim(
        NoiseSchedule.from_alphas_cumprod(scheduler.alphas_cumprod.numpy()),
        num_inference_steps=steps,
        prediction_type=prediction,
        eta=eta,
        spacing=spacing,
        steps_offset=offset,
        set_alpha_to_one=one,
    )
    assert_times(table, scheduler)
    if eta > 0:
        in_double(scheduler, "final_alpha_cumprod")

    def step(k: int, f: torch.Tensor, x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        noise = z if eta > 0 else None
        return scheduler.step(f, int(scheduler.timesteps[k]), x, eta=eta, variance_noise=noise).prev_sample

    assert_same_trajectory(table, RandomNetwork(seed), step)


@quick
@given(schedules(), predictions, st.sets(st.integers(0, 29), min_size=1), st.integers(0, 1), seeds)
def test_dpm_solver_at_learnt_times(
    config: dict[str, Any], prediction: str, picked: set[int], zero: int, seed: int
) -> None:
    times = sorted((t * total_steps(config) // 30 for t in picked), reverse=True)
    final = "zero" if zero else "sigma_min"
    assume(zero or times[-1] > 0)  # at time 0 their last step to sigma_min is 0 / 0
    scheduler = DPMSolverMultistepScheduler(
        **config, prediction_type=prediction, solver_order=1, final_sigmas_type=final
    )
    scheduler.set_timesteps(timesteps=times)
    table = StepTable.from_scheduler(scheduler, timesteps=times)
    if zero:
        schedule = NoiseSchedule.from_config(scheduler.config)
        assert table == StepTable.ddim(schedule, timesteps=times, prediction_type=prediction)
    assert_times(table, scheduler)
    assert_same_trajectory(
        table, RandomNetwork(seed), lambda k, f, x, z: scheduler.step(f, scheduler.timesteps[k], x).prev_sample
    )


@quick
@given(
    schedules(), predictions, spacings, st.sampled_from(["dpmsolver++", "sde-dpmsolver++"]), st.integers(1, 12), seeds
)
def test_dpm_solver_on_its_own_grid(
    config: dict[str, Any], prediction: str, spacing: str, algorithm: str, steps: int, seed: int
) -> None:
    scheduler = DPMSolverMultistepScheduler(
        **config,
        prediction_type=prediction,
        solver_order=1,
        timestep_spacing=spacing,
        algorithm_type=algorithm,
        lambda_min_clipped=-5.1,
    )
    scheduler.set_timesteps(steps)
    assume(len(scheduler.timesteps) <= steps and scheduler.timesteps.min() >= 0)  # as with DDIM's
    table = StepTable.from_scheduler(scheduler, num_inference_steps=steps)
    assert table.stochastic == (algorithm == "sde-dpmsolver++" and table.num_inference_steps > 1)
    assert_times(table, scheduler)
    assert_same_trajectory(
        table,
        RandomNetwork(seed),
        lambda k, f, x, z: scheduler.step(f, scheduler.timesteps[k], x, variance_noise=z).prev_sample,
    )


@quick
@given(schedules(), predictions, spacings, st.integers(1, 12), seeds)
def test_ddpm_is_ddim_with_eta_one(
    config: dict[str, Any], prediction: str, spacing: str, steps: int, seed: int
) -> None:
    scheduler = DDPMScheduler(**config, prediction_type=prediction, timestep_spacing=spacing, clip_sample=False)
    scheduler.set_timesteps(steps)
    assume(len(scheduler.timesteps) == steps)
    table = StepTable.from_scheduler(scheduler, num_inference_steps=steps, eta=1.0)
    assert_times(table, scheduler)
    in_double(scheduler, "one")

    def step(k: int, f: torch.Tensor, x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        time = int(scheduler.timesteps[k])
        # they draw their noise themselves: take it out, put ours in
        drawn = torch.randn(SHAPE, generator=torch.Generator().manual_seed(k))
        after = scheduler.step(f, time, x, generator=torch.Generator().manual_seed(k)).prev_sample
        std = math.sqrt(scheduler._get_variance(time)) if time > 0 else 0.0
        return after + std * (z - drawn)

    assert_same_trajectory(table, RandomNetwork(seed), step)


@quick
@given(schedules(), st.sampled_from(["epsilon", "v_prediction"]), spacings, st.booleans(), st.integers(1, 12), seeds)
def test_pndm_in_its_ddim_reading(
    config: dict[str, Any], prediction: str, spacing: str, one: bool, steps: int, seed: int
) -> None:
    chosen = {"set_alpha_to_one": True} if one else {}
    scheduler = PNDMScheduler(
        **config, **chosen, prediction_type=prediction, timestep_spacing=spacing, skip_prk_steps=True
    )
    scheduler.set_timesteps(max(steps, 2))
    times = [int(t) for t in scheduler._timesteps[::-1]]
    assume(len(times) == max(steps, 2))
    table = StepTable.from_scheduler(scheduler, num_inference_steps=len(times))
    assert table.timesteps.tolist() == times
    stride = total_steps(config) // len(times)
    in_double(scheduler, "final_alpha_cumprod")  # their form of the update subtracts large terms
    assert_same_trajectory(
        table,
        RandomNetwork(seed),
        lambda k, f, x, z: scheduler._get_prev_sample(x.double(), times[k], times[k] - stride, f.double()).float(),
    )


@quick
@given(schedules(smallest=100), predictions, st.integers(1, 8), st.booleans(), seeds)
def test_lcm(config: dict[str, Any], prediction: str, steps: int, custom: bool, seed: int) -> None:
    # a small scaling makes the boundary condition's skip visible
    scheduler = LCMScheduler(**config, prediction_type=prediction, timestep_scaling=0.02)
    if custom:
        times = sorted({int(t) for t in np.linspace(1, total_steps(config) - 1, steps)}, reverse=True)
        scheduler.set_timesteps(timesteps=times)
        table = StepTable.from_scheduler(scheduler, timesteps=times)
    else:
        scheduler.set_timesteps(steps)
        table = StepTable.from_scheduler(scheduler, num_inference_steps=steps)
    assert_times(table, scheduler)
    assert table.noise_slices == (1 if table.num_inference_steps == 1 else table.num_inference_steps + 1)

    def step(k: int, f: torch.Tensor, x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        time = scheduler.timesteps[k]
        drawn = torch.randn(SHAPE, generator=torch.Generator().manual_seed(k))
        after = scheduler.step(f, time, x, generator=torch.Generator().manual_seed(k)).prev_sample
        if k + 1 == len(scheduler.timesteps):
            return after
        return after + (1 - scheduler.alphas_cumprod[scheduler.timesteps[k + 1]]).sqrt() * (z - drawn)

    assert_same_trajectory(table, RandomNetwork(seed), step)


def test_consistency_is_lcm_away_from_its_boundary() -> None:
    scheduler = LCMScheduler(prediction_type="v_prediction", timestep_scaling=1e6)
    times = [999, 759, 499, 259]
    ours = StepTable.consistency(NoiseSchedule.from_config(scheduler.config), times, prediction_type="v_prediction")
    theirs = StepTable.from_scheduler(scheduler, timesteps=times)
    np.testing.assert_allclose(ours.rows, theirs.rows, atol=1e-6)


@quick
@given(
    schedules(), predictions, spacings, st.booleans(), st.sampled_from(["zero", "sigma_min"]), st.integers(1, 12), seeds
)
def test_euler(
    config: dict[str, Any], prediction: str, spacing: str, karras: bool, final: str, steps: int, seed: int
) -> None:
    scheduler = EulerDiscreteScheduler(
        **config,
        prediction_type=prediction,
        timestep_spacing=spacing,
        use_karras_sigmas=karras,
        final_sigmas_type=final,
    )
    scheduler.set_timesteps(steps)
    assume(len(scheduler.timesteps) == steps)
    assume(scheduler.init_noise_sigma < 200)  # at squaredcos' 20,000 their float32 state is off by 1e-3
    table = StepTable.from_scheduler(scheduler, num_inference_steps=steps)
    if karras:  # times between the schedule's, found by their logarithms
        np.testing.assert_allclose(table.timesteps, scheduler.timesteps.numpy(), atol=1e-3)
    else:
        assert_times(table, scheduler)
    assert table.init_scale == pytest.approx(
        float(scheduler.init_noise_sigma / (scheduler.sigmas[0] ** 2 + 1) ** 0.5), rel=1e-6
    )
    assert_same_trajectory(
        table,
        RandomNetwork(seed),
        lambda k, f, x, z: scheduler.step(f, scheduler.timesteps[k], x).prev_sample,
        start=float(scheduler.init_noise_sigma),
        scale_input=lambda k, x: scheduler.scale_model_input(x, scheduler.timesteps[k]),
    )


def test_euler_takes_custom_times_and_feeds_continuous_ones() -> None:
    scheduler = EulerDiscreteScheduler(prediction_type="v_prediction")
    times = [998.5, 400.25, 3.0]
    scheduler.set_timesteps(timesteps=times)
    table = StepTable.from_scheduler(scheduler, timesteps=times)
    assert_times(table, scheduler)
    np.testing.assert_allclose(-table.rows[:, 2] / table.rows[:, 1], scheduler.sigmas[:-1].numpy(), rtol=1e-6)

    continuous = EulerDiscreteScheduler(
        prediction_type="v_prediction", timestep_type="continuous", use_karras_sigmas=True, sigma_min=0.01, sigma_max=90
    )
    continuous.set_timesteps(5)
    table = StepTable.from_scheduler(continuous, num_inference_steps=5)
    np.testing.assert_allclose(table.timesteps, continuous.timesteps.numpy(), rtol=1e-6)


@quick
@given(st.floats(0.3, 12.0), st.sampled_from([100, 1000]), st.booleans(), st.integers(1, 12), seeds)
def test_flow(shift: float, total: int, stochastic: bool, steps: int, seed: int) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=total, shift=shift, stochastic_sampling=stochastic)
    scheduler.set_timesteps(steps)
    table = StepTable.from_scheduler(scheduler, num_inference_steps=steps)
    assert_flow_trajectory(table, scheduler, seed)
    # custom times are those that the network sees
    again = StepTable.from_scheduler(scheduler, timesteps=scheduler.timesteps.tolist())
    np.testing.assert_allclose(again.rows, table.rows, rtol=2e-5, atol=1e-6)


@quick
@given(st.floats(0.3, 12.0), st.integers(1, 12), seeds)
def test_flow_on_a_pipeline_s_grid(shift: float, steps: int, seed: int) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1.0 / steps, steps).tolist())
    assert_flow_trajectory(StepTable.flow_euler(num_inference_steps=steps, shift=shift), scheduler, seed)


def assert_flow_trajectory(table: StepTable, scheduler: Any, seed: int) -> None:
    np.testing.assert_allclose(table.timesteps, scheduler.timesteps.numpy(), rtol=1e-6)

    def step(k: int, f: torch.Tensor, x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        drawn = torch.randn(SHAPE, generator=torch.Generator().manual_seed(k))
        after = scheduler.step(f, scheduler.timesteps[k], x, generator=torch.Generator().manual_seed(k)).prev_sample
        return after + scheduler.sigmas[k + 1] * (z - drawn) if scheduler.config.stochastic_sampling else after

    assert_same_trajectory(table, RandomNetwork(seed), step)


def test_dynamic_flow_shift_is_a_shift() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    sigmas = np.linspace(1.0, 0.25, 4).tolist()
    scheduler.set_timesteps(sigmas=sigmas, mu=0.8)
    table = StepTable.flow_euler(sigmas=sigmas, shift=math.exp(0.8), time_scale=1.0)
    np.testing.assert_allclose(table.timesteps, scheduler.sigmas[:-1].numpy(), rtol=1e-6)
    with pytest.raises(UnsupportedModel, match="shift=exp"):
        StepTable.from_scheduler(scheduler, num_inference_steps=4)


@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
def test_zero_terminal_snr(prediction: str) -> None:
    scheduler = DDIMScheduler(
        rescale_betas_zero_snr=True, prediction_type=prediction, timestep_spacing="trailing", clip_sample=False
    )
    scheduler.set_timesteps(4)
    table = StepTable.from_scheduler(scheduler, num_inference_steps=4)
    assert_same_trajectory(
        table, RandomNetwork(0), lambda k, f, x, z: scheduler.step(f, int(scheduler.timesteps[k]), x).prev_sample
    )


def test_zero_terminal_snr_of_an_epsilon_network_is_refused_unless_its_sampler_avoids_it() -> None:
    config = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    with pytest.raises(UnsupportedModel, match="alpha = 0"):
        StepTable.from_scheduler({"_class_name": "DDIMScheduler", **config}, num_inference_steps=2)
    scheduler = EulerDiscreteScheduler(**config)
    scheduler.set_timesteps(2)
    table = StepTable.from_scheduler(scheduler, num_inference_steps=2)
    assert table.rows[0, 1] == pytest.approx(float(scheduler.sigmas[0]), rel=1e-5) == pytest.approx(4096, rel=1e-3)


@pytest.mark.parametrize("kind", ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"])
@pytest.mark.parametrize("rescale", [False, True])
def test_schedules_have_the_last_bits_of_diffusers(kind: str, rescale: bool) -> None:
    scheduler = DDPMScheduler(beta_schedule=kind, rescale_betas_zero_snr=rescale)
    schedule = NoiseSchedule.from_config(scheduler.config)
    expected = scheduler.alphas_cumprod.double().numpy()
    # torch's square root and exponential are not correctly rounded, nor the same on every processor
    tolerance = 1e-6 if rescale or kind == "sigmoid" else 1e-15
    np.testing.assert_allclose(schedule.alphas**2, expected, rtol=0, atol=tolerance)
    np.testing.assert_allclose(schedule.sigmas**2, 1 - expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    "scheduler",
    [
        DDIMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", timestep_spacing="trailing"),
        DDPMScheduler(trained_betas=np.linspace(0.001, 0.2, 50).tolist(), num_train_timesteps=50),
        PNDMScheduler(skip_prk_steps=True, steps_offset=1),
        LCMScheduler(),
        DPMSolverMultistepScheduler(solver_order=1),
        EulerDiscreteScheduler(use_karras_sigmas=True),
        FlowMatchEulerDiscreteScheduler(shift=3.0),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_a_saved_configuration_gives_the_object_s_table(scheduler: Any, tmp_path: Any) -> None:
    scheduler.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert StepTable.from_scheduler(config, num_inference_steps=4) == StepTable.from_scheduler(
        scheduler, num_inference_steps=4
    )


@pytest.mark.parametrize(
    "kind",
    [DDIMScheduler, DDPMScheduler, PNDMScheduler, LCMScheduler, EulerDiscreteScheduler],
    ids=lambda k: k.__name__,
)
def test_a_configuration_that_names_only_its_class_has_that_class_s_defaults(kind: Any) -> None:
    bare = StepTable.from_scheduler({"_class_name": kind.__name__}, num_inference_steps=4)
    assert bare == StepTable.from_scheduler(kind(), num_inference_steps=4)


def test_a_learnt_time_student_runs_in_plain_diffusers() -> None:
    saved = DDIMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", clip_sample=False)
    table = StepTable.ddim(
        NoiseSchedule.from_config(saved.config), timesteps=[999, 640, 301], prediction_type="v_prediction"
    )
    scheduler = DPMSolverMultistepScheduler.from_config(saved.config, solver_order=1, final_sigmas_type="zero")
    scheduler.set_timesteps(timesteps=table.timesteps.astype(int).tolist())
    assert_same_trajectory(
        table, RandomNetwork(3), lambda k, f, x, z: scheduler.step(f, scheduler.timesteps[k], x).prev_sample
    )


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"_class_name": "UniPCMultistepScheduler"}, UnsupportedModel, "UniPC.* cannot be read"),
        ({}, UnsupportedModel, "None cannot be read"),
        ({"_class_name": "DPMSolverMultistepScheduler"}, UnsupportedModel, "solver_order=2"),
        (
            {"_class_name": "DPMSolverMultistepScheduler", "solver_order": 1, "use_lu_lambdas": True},
            UnsupportedModel,
            "use_lu_lambdas",
        ),
        (
            {"_class_name": "DPMSolverMultistepScheduler", "solver_order": 1, "algorithm_type": "sde-dpmsolver"},
            UnsupportedModel,
            "algorithm_type",
        ),
        ({"_class_name": "EulerDiscreteScheduler", "use_beta_sigmas": True}, UnsupportedModel, "use_beta_sigmas"),
        (
            {"_class_name": "EulerDiscreteScheduler", "interpolation_type": "log_linear"},
            UnsupportedModel,
            "interpolation_type",
        ),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "invert_sigmas": True}, UnsupportedModel, "invert_sigmas"),
        ({"_class_name": "DDIMScheduler", "prediction_type": "score"}, UnsupportedModel, "prediction_type 'score'"),
        ({"_class_name": "DDIMScheduler", "beta_schedule": "laplace"}, UnsupportedModel, "beta_schedule 'laplace'"),
        ({"_class_name": "DDIMScheduler", "timestep_spacing": "odd"}, InvalidRequest, "spacing 'odd'"),
        ({"_class_name": "DDIMScheduler", "num_train_timesteps": 3}, InvalidRequest, "only 3 steps"),
        ({"_class_name": "DDIMScheduler", "beta_end": 2.0}, InvalidRequest, r"betas are not all in \[0, 1\]"),
        ({"_class_name": "LCMScheduler", "original_inference_steps": 2}, InvalidRequest, "distilled at 2 of 1000"),
    ],
)
def test_what_is_no_table_is_refused(config: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        StepTable.from_scheduler(config, num_inference_steps=4)


def test_requests_that_make_no_sense_are_refused() -> None:
    ddim = {"_class_name": "DDIMScheduler"}
    with pytest.raises(InvalidRequest, match="exactly one"):
        StepTable.from_scheduler(ddim)
    with pytest.raises(InvalidRequest, match="exactly one"):
        StepTable.from_scheduler(ddim, num_inference_steps=1, timesteps=[999])
    with pytest.raises(InvalidRequest, match="at least 1"):
        StepTable.from_scheduler(ddim, num_inference_steps=0)
    with pytest.raises(InvalidRequest, match=r"eta is 1\.5"):
        StepTable.from_scheduler(ddim, num_inference_steps=2, eta=1.5)
    with pytest.raises(InvalidRequest, match="prescribes its own noise"):
        StepTable.from_scheduler({"_class_name": "LCMScheduler"}, num_inference_steps=2, eta=0.5)
    with pytest.raises(InvalidRequest, match="takes no timesteps"):
        StepTable.from_scheduler(
            {"_class_name": "EulerDiscreteScheduler", "use_karras_sigmas": True}, timesteps=[999, 1]
        )
    with pytest.raises(InvalidRequest, match="not a scheduler"):
        StepTable.from_scheduler("scheduler_config.json", num_inference_steps=1)
    with pytest.raises(UnsupportedModel, match="HeunDiscreteScheduler"):
        StepTable.from_scheduler(HeunDiscreteScheduler(), num_inference_steps=2)


@pytest.mark.parametrize("wrong", [{"beta_end": None}, {"beta_start": "x"}, {"trained_betas": {}}, {"beta_end": [1]}])
def test_betas_that_are_no_numbers_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(InvalidRequest, match="betas"):
        NoiseSchedule.from_config({"beta_schedule": "squaredcos_cap_v2", **wrong})
