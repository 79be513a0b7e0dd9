"""The step table itself: its equations for every prediction type, its edges, serialisation and the numpy loop."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from redif_sdk.errors import InvalidRequest, ManifestError, UnsupportedModel
from redif_sdk.sampling.loop import iterate_steps, run_steps, sample
from redif_sdk.sampling.table import COLUMNS, MAX_ROWS, PREDICTION_TYPES, NoiseSchedule, StepTable, karras_sigmas

quick = settings(deadline=None, max_examples=40)
float32s = st.floats(width=32, allow_nan=False, allow_infinity=False)
COSINE = NoiseSchedule.from_config({"beta_schedule": "squaredcos_cap_v2"})
LINEAR = NoiseSchedule.from_config({})


def tables() -> st.SearchStrategy[StepTable]:
    rows = st.integers(1, 6).flatmap(lambda k: arrays(np.float32, (k, 6), elements=float32s))
    samplers = st.text(max_size=12).filter(str.isprintable)
    return st.builds(StepTable, rows, st.sampled_from(PREDICTION_TYPES), samplers, float32s)


# ---------------------------------------------------------------- equations


@quick
@given(
    st.sampled_from(["epsilon", "v_prediction", "sample", "score", "flow"]),
    st.floats(0.05, 0.95),
    st.floats(0.05, 0.95),
    st.floats(0.0, 1.0),
)
def test_a_perfect_network_is_followed_exactly(kind: str, start: float, end: float, share: float) -> None:
    """From x = alpha x0 + sigma n with the true output, x' is alpha' x0 + (sigma'^2 - c^2)^.5 n + c z."""
    sigma, next_sigma = max(start, end), min(start, end)
    alpha, next_alpha = (1 - sigma, 1 - next_sigma) if kind == "flow" else np.sqrt(1 - np.square([sigma, next_sigma]))
    c = share * next_sigma
    table = StepTable.build(
        t=1.0,
        alphas=alpha,
        sigmas=sigma,
        next_alphas=next_alpha,
        next_sigmas=next_sigma,
        noise=c,
        prediction_type=kind,
    )
    x0, n, z = np.random.default_rng(0).standard_normal((3, 50))
    outputs = {
        "epsilon": n,
        "v_prediction": alpha * n - sigma * x0,
        "sample": x0,
        "score": -n / sigma,
        "flow": n - x0,
    }
    x = alpha * x0 + sigma * n
    clean = table.clean(0, x, outputs[kind])
    np.testing.assert_allclose(clean, x0, atol=2e-5)
    expected = next_alpha * x0 + math.sqrt(next_sigma**2 - c**2) * n + c * z
    np.testing.assert_allclose(table.advance(0, x, clean, z), expected, atol=2e-5)


@quick
@given(st.integers(2, 12), st.floats(0.3, 1.0), st.floats(0.002, 0.1), st.floats(20.0, 100.0), st.integers(0, 999))
def test_edm_is_edm(steps: int, sigma_data: float, sigma_min: float, sigma_max: float, seed: int) -> None:
    """Against EDM's Algorithm 1 without churn and second order, and EDMPrecond, in float64 and its own coordinates."""
    random = np.random.default_rng(seed)
    shape = (1, 2, 3, 4, 4)
    weights, start = random.standard_normal((steps, *shape[1:])), random.standard_normal(shape).astype(np.float32)

    def raw(x: np.ndarray, c_noise: float) -> np.ndarray:
        k = int(np.argmin(np.abs(np.log(sigmas[:-1]) / 4 - c_noise)))
        return np.tanh(x + weights[k]) * weights[k]

    i = np.arange(steps)
    rho = 7.0
    sigmas = (sigma_max ** (1 / rho) + i / (steps - 1) * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))) ** rho
    sigmas = np.append(sigmas, 0.0)
    x = start[0].astype(np.float64) * sigmas[0]
    for k in range(steps):
        sigma = sigmas[k]
        c_skip = sigma_data**2 / (sigma**2 + sigma_data**2)
        c_out = sigma * sigma_data / (sigma**2 + sigma_data**2) ** 0.5
        c_in = 1 / (sigma_data**2 + sigma**2) ** 0.5
        denoised = c_skip * x + c_out * raw(c_in * x, np.log(sigma) / 4)
        d = (x - denoised) / sigma
        x = x + (sigmas[k + 1] - sigma) * d

    np.testing.assert_allclose(karras_sigmas(steps, sigma_min, sigma_max), sigmas[:-1], rtol=1e-12)
    table = StepTable.edm(karras_sigmas(steps, sigma_min, sigma_max), sigma_data=sigma_data)
    ours = sample(lambda x, t, _: raw(x, float(t[0])).astype(np.float32), table, start)
    assert np.abs(ours - x).max() <= 1e-5 * max(1.0, np.abs(x).max())


def test_edm_and_euler_with_eta_are_ancestral() -> None:
    sigmas = karras_sigmas(5, 0.02, 60.0)
    levels = np.append(sigmas, 0.0)
    up = levels[1:] * np.sqrt(np.maximum(1 - (levels[1:] / levels[:-1]) ** 2, 0))  # k-diffusion's sigma_up at eta = 1
    for table, sigma_data in [
        (StepTable.edm(sigmas, sigma_data=0.7, eta=1.0), 0.7),
        (StepTable.euler(sigmas, timesteps=sigmas, prediction_type="epsilon", eta=1.0), 1.0),
    ]:
        c_in = 1 / np.sqrt(levels[1:] ** 2 + sigma_data**2)
        np.testing.assert_allclose(table.rows[:-1, 5], (c_in * up)[:-1], rtol=1e-6)
        assert table.rows[-1, 5] == 0.0


def test_the_last_row_gives_the_clean_image() -> None:
    sigmas = karras_sigmas(3, 0.02, 60.0)
    for table in [
        StepTable.ddim(COSINE, num_inference_steps=3, prediction_type="v_prediction", eta=1.0),
        StepTable.ddim(COSINE, timesteps=[999, 500, 7], prediction_type="epsilon", eta=0.5),
        StepTable.consistency(COSINE, [999, 500, 7], prediction_type="sample"),
        StepTable.flow_euler(num_inference_steps=3, shift=3.0, eta=1.0),
        StepTable.euler(sigmas, timesteps=sigmas, prediction_type="epsilon", eta=1.0),
        StepTable.edm(sigmas, eta=1.0),
    ]:
        assert table.rows[-1, 3:].tolist() == [1.0, 0.0, 0.0]


def test_ddim_at_learnt_times_steps_from_row_to_row() -> None:
    times = [999, 640, 12]
    table = StepTable.ddim(LINEAR, timesteps=times, prediction_type="epsilon")
    assert table.timesteps.tolist() == times
    next_levels = [(LINEAR.alphas[t], LINEAR.sigmas[t]) for t in times[1:]] + [(1.0, 0.0)]
    for k, (t, (next_alpha, next_sigma)) in enumerate(zip(times, next_levels, strict=True)):
        s = next_sigma / LINEAR.sigmas[t]
        np.testing.assert_allclose(table.rows[k, 3:5], [next_alpha - s * LINEAR.alphas[t], s], rtol=1e-6)
    stay = StepTable.ddim(LINEAR, timesteps=times, prediction_type="epsilon", set_alpha_to_one=False)
    assert stay.rows[-1, 4] == pytest.approx(LINEAR.sigmas[0] / LINEAR.sigmas[12])


def test_flow_grid_shift_scale_and_noise() -> None:
    table = StepTable.flow_euler(num_inference_steps=4, shift=3.0, time_scale=1.0, eta=0.5)
    np.testing.assert_allclose(table.timesteps, [1.0, 0.9, 0.75, 0.5], rtol=1e-6)
    np.testing.assert_allclose(table.rows[:, 5], math.sin(math.pi / 4) * np.array([0.9, 0.75, 0.5, 0.0]), rtol=1e-6)
    assert table.noise_slices == 5
    assert StepTable.flow_euler(sigmas=[1.0, 0.25]).timesteps.tolist() == [1000.0, 250.0]


def test_numpy_and_torch_compute_the_same() -> None:
    table = StepTable.ddim(COSINE, num_inference_steps=4, prediction_type="v_prediction", eta=1.0)
    x, f, z = np.random.default_rng(0).standard_normal((3, 2, 3)).astype(np.float32)
    for k in range(4):
        x0 = table.clean(k, x, f)
        there = table.clean(k, torch.from_numpy(x), torch.from_numpy(f))
        assert x0.dtype == np.float32
        assert there.dtype == torch.float32
        np.testing.assert_allclose(there.numpy(), x0, atol=1e-6)
        after = table.advance(k, torch.from_numpy(x), there, torch.from_numpy(z))
        np.testing.assert_allclose(after.numpy(), table.advance(k, x, x0, z), atol=1e-6)


# ---------------------------------------------------------------- the loop


def test_the_loop_runs_numpy_and_torch_alike() -> None:
    table = StepTable.ddim(COSINE, num_inference_steps=4, prediction_type="v_prediction", eta=1.0)
    noise = np.random.default_rng(0).standard_normal((5, 2, 3, 4, 4)).astype(np.float32)
    there = torch.from_numpy(noise)
    ours = run_steps(table, table.start(noise[0]), noise, lambda k, x: table.clean(k, x, 0.5 * x))
    torchs = run_steps(table, table.start(there[0]), there, lambda k, x: table.clean(k, x, 0.5 * x))
    assert ours.dtype == np.float32
    np.testing.assert_allclose(torchs.numpy(), ours, atol=1e-6)


def test_each_step_takes_its_own_slice_of_noise() -> None:
    table = StepTable.ddim(COSINE, num_inference_steps=3, prediction_type="v_prediction", eta=1.0)
    noise = np.random.default_rng(0).standard_normal((4, 1, 1, 2, 2)).astype(np.float32)
    x = table.start(noise[0])
    for k, after, x0 in iterate_steps(table, x, noise, lambda k, x: 0.5 * x):
        np.testing.assert_array_equal(x0, 0.5 * x)
        np.testing.assert_array_equal(after, table.advance(k, x, x0, noise[k + 1]))
        x = after
    with pytest.raises(InvalidRequest, match="adds noise"):
        run_steps(table, noise[0], None, lambda k, x: x)


def test_the_loop_goes_on_from_what_its_caller_wrote() -> None:
    table = StepTable.ddim(COSINE, num_inference_steps=3, prediction_type="v_prediction")
    seen = []

    def predict(k: int, x: np.ndarray) -> np.ndarray:
        seen.append(x.copy())
        return 0.5 * x

    for _, x, _ in iterate_steps(table, np.ones((1, 1, 2, 2), np.float32), None, predict):
        x[...] = 7.0
    assert [float(x.mean()) for x in seen] == [1.0, 7.0, 7.0]


def test_the_loop_may_be_run_in_parts() -> None:
    table = StepTable.ddim(COSINE, num_inference_steps=4, prediction_type="v_prediction")
    start = np.random.default_rng(0).standard_normal((2, 3, 4, 4)).astype(np.float32)
    half = run_steps(table, start, None, lambda k, x: 0.5 * x, steps=range(2))
    whole = run_steps(table, half, None, lambda k, x: 0.5 * x, steps=range(2, 4))
    np.testing.assert_array_equal(whole, run_steps(table, start, None, lambda k, x: 0.5 * x))


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("kind", ["epsilon", "score"])
def test_no_signal_and_a_noise_network_is_refused(kind: str) -> None:
    levels: dict[str, Any] = {"t": 999, "alphas": 0.0, "sigmas": 1.0, "next_alphas": 1.0, "next_sigmas": 0.0}
    with pytest.raises(UnsupportedModel, match=f"alpha = 0.*{kind}"):
        StepTable.build(**levels, prediction_type=kind)
    assert StepTable.build(**levels, prediction_type="v_prediction").rows.tolist() == [[999, 0, -1, 1, 0, 0]]


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("v_prediction", {"alphas": 0.7}, r"alpha\^2 \+ sigma\^2 = 1"),
        ("flow", {}, r"alpha \+ sigma = 1"),
        ("epsilon", {"alphas": -0.8}, "alpha < 0"),
        ("epsilon", {"alphas": math.nan}, "NaN"),
        ("epsilon", {"sigmas": 0.0}, "sigma = 0"),
        ("epsilon", {"noise": 0.5}, r"noise c is not in \[0, sigma'\]"),
        ("epsilon", {"noise": -0.1}, r"noise c is not in \[0, sigma'\]"),
        ("sample", {"t": math.inf}, "NaN or infinite"),
        ("sample", {"init_scale": 1e39}, "NaN or infinite"),
        ("epsilon", {"alphas": 1e-40}, "NaN or infinite"),
        ("velocity", {}, "'velocity' is unknown"),
        ("edm", {}, "c_skip, c_out and c_in"),
        ("sample", {"t": [1, 2], "sigmas": [0.1, 0.2, 0.3]}, "shapes"),
    ],
)
def test_levels_that_contradict_themselves_are_refused(kind: str, change: dict[str, Any], message: str) -> None:
    levels: dict[str, Any] = {"t": 500, "alphas": 0.8, "sigmas": 0.6, "next_alphas": 0.9, "next_sigmas": 0.4}
    with pytest.raises(InvalidRequest, match=message):
        StepTable.build(**(levels | change), prediction_type=kind)


@pytest.mark.parametrize("timesteps", [[], [1000], [-1], [500, 500], [1, 2], [10.5], [True], ["9"]])
def test_times_that_are_none_are_refused(timesteps: list[Any]) -> None:
    with pytest.raises(InvalidRequest, match="timestep"):
        StepTable.ddim(COSINE, timesteps=timesteps, prediction_type="sample")
    with pytest.raises(InvalidRequest, match="timestep"):
        StepTable.consistency(COSINE, timesteps, prediction_type="sample")


def test_other_wrong_requests_are_refused() -> None:
    for steps in (0, -1, 1001, 2.0, True):
        with pytest.raises(InvalidRequest, match="num_inference_steps is"):
            StepTable.ddim(COSINE, num_inference_steps=steps, prediction_type="sample")  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match="exactly one"):
        StepTable.ddim(COSINE, num_inference_steps=1, timesteps=[9], prediction_type="sample")
    with pytest.raises(InvalidRequest, match="steps_offset=2"):
        StepTable.ddim(COSINE, num_inference_steps=1000, prediction_type="sample", spacing="leading", steps_offset=2)
    with pytest.raises(InvalidRequest, match="exactly one"):
        StepTable.flow_euler()
    with pytest.raises(InvalidRequest, match="at most 1"):
        StepTable.flow_euler(sigmas=[1.5])
    with pytest.raises(InvalidRequest, match="shift > 0"):
        StepTable.flow_euler(num_inference_steps=2, shift=0.0)
    for sigmas in ([], [1.0, 1.0], [0.5, 1.0], [1.0, 0.0], [math.inf, 1.0], [math.nan]):
        with pytest.raises(InvalidRequest, match="sigmas"):
            StepTable.edm(sigmas)
    with pytest.raises(InvalidRequest, match="2 sigmas and 1 timesteps"):
        StepTable.euler([2.0, 1.0], timesteps=[5], prediction_type="sample")
    with pytest.raises(InvalidRequest, match="final_sigma"):
        StepTable.euler([2.0], timesteps=[5], prediction_type="sample", final_sigma=-1.0)
    with pytest.raises(InvalidRequest, match="sigma_data"):
        StepTable.edm([2.0], sigma_data=0.0)
    for bad in ((0, 0.1, 1.0), (2, 1.0, 0.1), (2, 0.0, 1.0), (2, 0.1, math.inf)):
        with pytest.raises(InvalidRequest):
            karras_sigmas(*bad)
    with pytest.raises(InvalidRequest, match="preserve the variance"):
        NoiseSchedule(np.array([0.5]), np.array([0.5]))
    with pytest.raises(InvalidRequest, match=r"outside \[0, 1\]"):
        NoiseSchedule.from_alphas_cumprod([0.9, -0.1])
    table = StepTable.consistency(COSINE, [999, 10], prediction_type="sample")
    with pytest.raises(InvalidRequest, match=r"step 0 .* give z"):
        table.advance(0, 1.0, 1.0)
    for k in (2, -1):
        with pytest.raises(InvalidRequest, match="steps 0 to 1"):
            table.clean(k, 1.0, 1.0)
    for rows in (np.zeros((0, 6)), np.zeros((2, 5)), np.zeros(6), np.zeros((MAX_ROWS + 1, 6))):
        with pytest.raises(InvalidRequest, match="shape"):
            StepTable(rows, "sample")


# ---------------------------------------------------------------- value semantics and serialisation


@quick
@given(tables())
def test_serialisation_is_exact(table: StepTable) -> None:
    text = json.dumps(table.to_dict(), allow_nan=False)
    back = StepTable.from_dict(json.loads(text))
    assert back == table
    assert hash(back) == hash(table)
    assert np.array_equal(back.rows.view(np.uint32), table.rows.view(np.uint32))
    assert json.dumps(back.to_dict()) == text


def test_tables_are_values() -> None:
    rows = np.array([[1, 2, 3, 4, 5, 0.0]], dtype=np.float32)
    table = StepTable(rows, "sample")
    rows[0, 0] = 9
    assert table.rows[0, 0] == 1
    with pytest.raises(ValueError, match="read-only"):
        table.rows[0, 0] = 9
    negative = StepTable(np.array([[1, 2, 3, 4, 5, -0.0]], dtype=np.float32), "sample")
    assert table == negative
    assert hash(table) == hash(negative)
    assert table != StepTable(table.rows, "sample", "ddim")
    assert table != StepTable(table.rows, "flow")
    assert table != StepTable(table.rows, "sample", init_scale=2.0)
    assert table != StepTable(np.concatenate([table.rows, table.rows]), "sample")


def test_a_table_s_numbers() -> None:
    plain = StepTable.ddim(COSINE, num_inference_steps=2, prediction_type="sample")
    assert (plain.num_inference_steps, plain.stochastic, plain.noise_slices) == (2, False, 1)
    assert plain.timesteps.dtype == np.float32
    noisy = StepTable.consistency(COSINE, [999, 10], prediction_type="sample")
    assert (noisy.num_inference_steps, noisy.stochastic, noisy.noise_slices) == (2, True, 3)
    assert StepTable(plain.rows, "sample", init_scale=0.1).init_scale == float(np.float32(0.1))


def spoilt(**changes: Any) -> Any:
    data = StepTable.ddim(COSINE, num_inference_steps=1, prediction_type="sample").to_dict()
    return {key: value for key, value in (data | changes).items() if value is not ...}


@pytest.mark.parametrize(
    "data",
    [
        None,
        [],
        "table",
        {},
        spoilt(extra=1),
        spoilt(rows=...),
        spoilt(columns=["t", "p", "q", "r", "c", "s"]),
        spoilt(columns=None),
        spoilt(rows=[]),
        spoilt(rows="rows"),
        spoilt(rows=[[0.0] * 6] * (MAX_ROWS + 1)),
        spoilt(rows=[[0.0] * 5]),
        spoilt(rows=[[0.0] * 6, [0.0] * 7]),
        spoilt(rows=[{"t": 0}]),
        spoilt(rows=[[0.0, 0.0, 0.0, 0.0, 0.0, math.nan]]),
        spoilt(rows=[[0.0, 0.0, 0.0, 0.0, 0.0, -math.inf]]),
        spoilt(rows=[[0.0, 0.0, 0.0, 0.0, 0.0, 1e39]]),
        spoilt(rows=[[0.0, 0.0, 0.0, 0.0, 0.0, 10**400]]),
        spoilt(rows=[[0.0, 0.0, 0.0, 0.0, 0.0, "0"]]),
        spoilt(rows=[[0.0, 0.0, 0.0, 0.0, 0.0, True]]),
        spoilt(rows=[[0.0, 0.0, 0.0, 0.0, 0.0, None]]),
        spoilt(init_scale=math.nan),
        spoilt(init_scale="1"),
        spoilt(init_scale=None),
        spoilt(prediction_type="velocity"),
        spoilt(prediction_type=["sample"]),
        spoilt(sampler=3),
    ],
)
def test_what_is_no_table_is_refused_when_read(data: Any) -> None:
    with pytest.raises(ManifestError, match="step table"):
        StepTable.from_dict(data)


# ---------------------------------------------------------------- the loop


def test_the_loop_reads_each_row_s_own_slice_of_noise() -> None:
    table = StepTable.consistency(COSINE, [999, 500, 100], prediction_type="sample")
    noise = np.random.default_rng(0).standard_normal((4, 2, 1, 2, 2)).astype(np.float32)
    seen: list[tuple[int, np.ndarray, np.ndarray]] = []
    fed: list[tuple[np.ndarray, np.ndarray]] = []

    def network(x: np.ndarray, t: np.ndarray, condition: Any) -> np.ndarray:
        assert condition == "boot"
        assert (x.dtype, t.dtype, t.shape) == (np.float32, np.float32, (2,))
        fed.append((x, t))
        # learned-variance networks give 2 C channels
        return np.concatenate([np.full_like(x, len(fed)), np.full_like(x, 99.0)], axis=1)

    before = noise.copy()
    final = sample(network, table, noise, "boot", lambda k, x, x0: seen.append((k, x, x0)))
    assert np.array_equal(noise, before)
    assert [t[0] for _, t in fed] == [999, 500, 100]
    assert np.array_equal(fed[0][0], noise[0])
    for k, following in enumerate([500, 100]):
        expected = COSINE.alphas[following] * (k + 1) + COSINE.sigmas[following] * noise[k + 1]
        np.testing.assert_allclose(fed[k + 1][0], expected, atol=1e-6)
    assert [k for k, _, _ in seen] == [0, 1, 2]
    assert all(np.all(x0 == k + 1) for k, _, x0 in seen)
    assert np.array_equal(seen[-1][1], final)
    assert final.dtype == np.float32
    assert np.all(final == 3)


def test_the_loop_starts_at_the_table_s_scale_and_is_pure() -> None:
    table = StepTable.edm(karras_sigmas(2, 0.1, 10.0))
    noise = np.random.default_rng(1).standard_normal((1, 3, 2, 2, 2))
    starts: list[np.ndarray] = []

    def network(x: np.ndarray, t: np.ndarray, condition: Any) -> np.ndarray:
        starts.append(x)
        return np.tanh(x)

    first = sample(network, table, noise)
    np.testing.assert_allclose(starts[0], noise[0] * 10.0 / math.sqrt(100.25), rtol=1e-6)
    assert np.array_equal(first, sample(network, table, noise))


def test_the_loop_refuses_noise_that_does_not_fit() -> None:
    def network(x: np.ndarray, t: np.ndarray, condition: Any) -> np.ndarray:
        return x

    noisy = StepTable.consistency(COSINE, [999, 10], prediction_type="sample")
    with pytest.raises(InvalidRequest, match="give 3"):
        sample(network, noisy, np.zeros((1, 1, 1, 2, 2), np.float32))
    for shape in [(1, 1, 2, 2), (1, 0, 1, 2, 2)]:
        with pytest.raises(InvalidRequest, match="noise has shape"):
            sample(network, noisy, np.zeros(shape, np.float32))


def test_columns_are_the_ones_that_graphs_and_browsers_read() -> None:
    assert COLUMNS == ("t", "p", "q", "r", "s", "c")
    assert PREDICTION_TYPES == ("epsilon", "v_prediction", "sample", "score", "flow", "edm")
