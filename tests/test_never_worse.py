"""No run ends worse than it began without saying so: every method, destructive settings, resuming, every door."""

from __future__ import annotations

import copy
import json
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from redif_sdk.artifact.folder import StudentFolder
from redif_sdk.cli.main import app
from redif_sdk.distill import DistillConfig, Teacher, distill, pool
from redif_sdk.distill.config import applicable
from redif_sdk.distill.methods import METHODS
from redif_sdk.distill.policy import StudentPolicy
from redif_sdk.distill.student import training_folder
from redif_sdk.distill.training import checkpoint
from redif_sdk.distill.training.log import LOG
from redif_sdk.distill.training.loop import Trainer
from redif_sdk.distill.training.standing import Keeper, Standing, energy_errors
from redif_sdk.errors import TrainingDiverged, WorseThanStart
from redif_sdk.models.denoiser import Denoiser
from redif_sdk.sampling.noise_schedule import NoiseSchedule
from tests.gaussian import make_teacher as gaussian_teacher
from tests.mixture import denoiser, make_teacher

DESTRUCTIVE = 30.0  # a learning rate
RUNS: dict[str, dict[str, object]] = {
    **{name: {"method": name} for name in METHODS},
    "redif, pathwise": {"estimator": "pathwise"},
    "redif, trajectory": {"estimator": "trajectory"},
    "redif, critic": {"estimator": "critic"},
    "redif, discriminator": {"reward": "discriminator"},
    "redif, distribution": {"reward": "distribution"},
    "redif, calibrated": {"calibration": 32},
    "dmd, gan": {"method": "dmd", "gan_weight": 0.1},
    "regression, segments": {"method": "regression", "segments": 0.5},
    "one step": {"num_inference_steps": 1},
}


SCHEDULE = NoiseSchedule.from_config({"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 1000})


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    """Its student begins with a network that computes, roughly, what the teacher does."""
    network = denoiser(150)
    return replace(
        make_teacher(),
        make_student=lambda: Denoiser(copy.deepcopy(network).requires_grad_(True), diffusers_call=False),
    )


@pytest.fixture(scope="module")
def pairs(teacher: Teacher) -> pool.Pairs:
    return pool.compute(teacher, 64, "train")


@pytest.fixture(scope="module")
def judged(teacher: Teacher) -> pool.Pairs:
    """Noises that neither training nor its checks see."""
    return pool.compute(teacher, 128, "train", seed=5)


def config(**settings: object) -> DistillConfig:
    common: dict[str, object] = {"num_inference_steps": 2, "updates": 9, "batch_size": 16, "pool_size": 64}
    common |= {"reward": "pixel", "warm_start": 0.5, "schedule_updates": 0, "group_size": 4, "learning_rate": 3e-3}
    return DistillConfig.checked(**applicable({**common, "check_every": 3, "log_every": 3, **settings}))


def error_of(policy: StudentPolicy, pairs: pool.Pairs) -> float:
    slices = policy.table.noise_slices
    with torch.no_grad():
        output = policy.sample(pairs.slices(slices) if slices > 1 else pairs.noise, pairs.condition)
    return float((output - pairs.target).square().mean())


def untrained(teacher: Teacher, steps: int = 2) -> StudentPolicy:
    return StudentPolicy(teacher.make_student(), teacher.table(steps), teacher.schedule)


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    theirs = b.state_dict()
    return all(torch.equal(value, theirs[name]) for name, value in a.state_dict().items())


@pytest.mark.parametrize("name", sorted(RUNS))
def test_a_destructive_run_is_never_returned_in_silence(
    name: str, teacher: Teacher, pairs: pool.Pairs, judged: pool.Pairs
) -> None:
    run = Trainer(teacher, config(learning_rate=DESTRUCTIVE, **RUNS[name]), pairs)
    try:
        policy = run.run()
    except TrainingDiverged:
        return
    assert run.verdict is not None
    assert run.verdict.checks.worse
    assert "worse than its untrained start" in run.verdict.worse
    steps = policy.num_inference_steps
    assert error_of(policy, judged) <= 1.02 * error_of(untrained(teacher, steps), judged)
    if run.verdict.checks.kept == 0:
        assert same_weights(policy.network, teacher.make_student())
        assert policy.table == teacher.table(steps)


def test_keep_last_returns_the_last_weights_and_says_so(teacher: Teacher, pairs: pool.Pairs) -> None:
    settings = config(method="regression", learning_rate=DESTRUCTIVE, keep="last")
    run = Trainer(teacher, settings, pairs)
    policy = run.run()
    assert run.verdict is not None
    assert run.verdict.checks.kept == 9
    assert "the last weights are kept" in run.verdict.worse
    assert same_weights(policy.network, run.ema)


@pytest.mark.parametrize("method", ["redif", "regression"])
def test_a_good_run_ends_with_its_last_weights(method: str, tmp_path: Path) -> None:
    teacher = gaussian_teacher()
    pairs, judged = (pool.compute(teacher, 64, "train", seed=seed) for seed in (0, 5))
    run = Trainer(teacher, config(method=method, updates=60, ema_decay=0.5, check_every=30), pairs, tmp_path)
    policy = run.run()
    assert run.verdict is not None
    assert (run.verdict.worse, run.verdict.note, run.verdict.checks.kept) == ("", "", 60)
    assert same_weights(policy.network, run.ema)
    assert error_of(policy, judged) < error_of(untrained(teacher), judged)
    rows = [json.loads(line) for line in (tmp_path / LOG).read_text().splitlines()]
    assert rows[0]["update"] == 0
    assert rows[0]["error"] == run.verdict.checks.start.error
    assert rows[-1]["checks"]["end"]["error"] == run.verdict.checks.end.error < run.verdict.checks.start.error
    assert run.verdict.checks.held_out
    assert run.meter.check_calls == run.verdict.checks.forward_equivalents > 0


def test_checks_cost_some_two_percent_of_a_run(teacher: Teacher) -> None:
    """Of a pool that is large enough to keep pairs from training: those of a small one are sampled besides."""
    large = pool.compute(replace(teacher, num_inference_steps=2), 1536, "train")
    run = Trainer(teacher, config(method="regression", updates=200, check_every=100), large)
    run.run()
    assert 0 < run.meter.check_calls < 0.025 * run.meter.forward_equivalents


def test_a_resumed_run_knows_its_start_and_its_best(teacher: Teacher, pairs: pool.Pairs, tmp_path: Path) -> None:
    """A run that is good at first and destroyed later, cut between: the same weights as without the cut."""

    def made(folder: Path) -> Trainer:
        run = Trainer(
            teacher, config(method="regression", updates=12, ema_decay=0.0, checkpoint_seconds=0), pairs, folder
        )
        step = run.step

        def destroyed(progress: float) -> dict[str, float]:
            figures = step(progress)
            if run.update > 7:
                with torch.no_grad():
                    for weight in run.ema.parameters():
                        weight.mul_(-3.0)
            return figures

        run.step = destroyed  # type: ignore[method-assign]
        return run

    whole = made(tmp_path / "whole")
    wanted = whole.run()
    cut = made(tmp_path / "cut")
    cut.on_progress = lambda share, figures: (_ for _ in ()).throw(KeyboardInterrupt) if cut.update == 8 else None
    with pytest.raises(KeyboardInterrupt):
        cut.run()
    again = made(tmp_path / "cut")
    found = again.run(resume=True)
    assert whole.verdict is not None
    assert again.verdict is not None
    assert 0 < whole.verdict.checks.kept <= 7
    assert whole.verdict.checks.worse
    assert f"the weights of update {whole.verdict.checks.kept} are kept" in whole.verdict.worse
    assert again.verdict.checks.model_dump(exclude={"forward_equivalents"}) == whole.verdict.checks.model_dump(
        exclude={"forward_equivalents"}
    )
    assert same_weights(found.network, wanted.network)
    assert found.table == wanted.table


def test_a_checkpoint_of_an_earlier_release_is_resumed(teacher: Teacher, pairs: pool.Pairs, tmp_path: Path) -> None:
    first = Trainer(teacher, config(method="regression"), pairs, tmp_path)
    for _ in range(3):
        first.step(first.progress)
    first.save()
    state = torch.load(tmp_path / checkpoint.CHECKPOINT, weights_only=True)
    del state["keeper"]
    checkpoint.write(tmp_path, state)
    run = Trainer(teacher, config(method="regression"), pairs, tmp_path)
    run.run(resume=True)
    assert run.verdict is not None
    assert run.verdict.checks.start.update == 0


def standing(update: int, error: float, reward: float | None = None) -> Standing:
    spread = torch.linspace(0.9, 1.1, 32, dtype=torch.float64)
    return Standing(update, error * spread, None if reward is None else reward * spread)


@pytest.mark.parametrize(
    ("end", "worse", "kept"),
    [
        ((0.05, 0.9), False, 9),  # better in both
        ((0.4, 0.9), False, 9),  # the reward's price: it is paid on purpose, and said
        ((0.05, 0.1), False, 9),  # further from the reward than the start, nearer to the teacher
        ((0.4, 0.1), True, 3),  # worse in both
        ((9.0, 0.9), True, 3),  # nothing to do with the teacher's images: whatever the reward says of that
        ((0.15, 0.5), False, 3),  # better than the start, worse in both than the best
    ],
)
def test_error_and_reward_decide_together(end: tuple[float, float], worse: bool, kept: int) -> None:
    keeper = Keeper(aimed=False, apart=1.0)
    keeper.begin(standing(0, 0.3, 0.3))
    keeper.look(standing(3, 0.1, 0.7), dict, {})
    keeper.look(standing(9, *end), dict, {})
    assert keeper.worse_than_start(standing(9, *end)) == worse
    assert keeper.reverts() == (kept == 3)
    verdict = keeper.verdict(kept, "squared", 32, True, 1.0)
    assert bool(verdict.worse) == worse
    assert bool(verdict.note) == (not worse and (kept == 3 or end[0] > 0.3))


def test_without_a_steady_reward_an_earlier_check_is_no_reason_to_go_back() -> None:
    """Distribution matching raises the paired error on purpose; regression does not."""
    for aimed in (False, True):
        keeper = Keeper(aimed=aimed, apart=1.0)
        keeper.begin(standing(0, 0.3))
        keeper.look(standing(3, 0.1), dict, {})
        keeper.look(standing(9, 0.2), dict, {})
        assert keeper.reverts() == aimed


def test_chance_is_not_worse_and_infinity_is() -> None:
    draw = torch.Generator().manual_seed(0)
    noisy = Standing(9, 0.3 + 0.2 * torch.rand(32, generator=draw, dtype=torch.float64), None)
    other = Standing(0, 0.3 + 0.2 * torch.rand(32, generator=draw, dtype=torch.float64), None)
    assert noisy.further_off(other, 1.0) is False
    assert standing(9, 1e30).further_off(other, 1.0)


def test_samples_that_belong_to_no_target_are_compared_as_a_set() -> None:
    draw = torch.Generator().manual_seed(0)
    target, other = (torch.randn(64, 1, 4, 4, generator=draw) for _ in range(2))
    fresh = energy_errors(other, target)
    assert abs(float(fresh.mean())) < 0.05
    assert float(energy_errors(torch.zeros_like(target), target).mean()) > float(fresh.mean()) + 0.1
    assert torch.isfinite(energy_errors(other * float("inf"), target)).all()


# -- the doors --------------------------------------------------------------------------------------------------------


def test_from_python_a_warning_and_the_students_own_word(teacher: Teacher, pairs: pool.Pairs, tmp_path: Path) -> None:
    with pytest.warns(WorseThanStart, match="ended worse than its untrained start"):
        student = distill(teacher, config(method="regression", learning_rate=DESTRUCTIVE), pairs=pairs)
    assert "worse" in student.worse
    assert student.distillation is not None
    assert student.distillation.checks is not None
    assert student.distillation.checks.worse
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        good = distill(teacher, config(method="regression", updates=60), pairs=pairs)
    assert good.worse == ""


def test_the_command_exits_1_and_its_last_line_says_why(teacher_folder: Path, tmp_path: Path) -> None:
    def run(output: Path, *more: str) -> tuple[int, list[str]]:
        options = "--method regression --steps 2 --updates 6 --pool-size 16 --batch-size 8 --check-every 2"
        done = CliRunner().invoke(app, ["distill", str(teacher_folder), "-o", str(output), *options.split(), *more])
        return (done.exit_code if isinstance(done.exit_code, int) else 1), done.output.strip().splitlines()

    for keep in ("best", "last"):
        code, lines = run(tmp_path / keep, "--learning-rate", str(DESTRUCTIVE), "--keep", keep)
        assert code == 1
        assert "the run ended worse than its untrained start" in lines[-1]
        checks = StudentFolder(tmp_path / keep).manifest.distillation.checks  # type: ignore[union-attr]
        assert checks is not None
        assert checks.worse
        card = (tmp_path / keep / "README.md").read_text()
        assert "**The run that made it ended worse than its untrained start**" in card
        assert ("these weights are untrained" in card) == (checks.kept == 0)
    last = json.loads((training_folder(tmp_path / "last") / LOG).read_text().splitlines()[-1])
    assert set(last["checks"]) == {"start", "best", "end"}


# -- log fluxes: a range that is not [-1, 1] --------------------------------------------------------------------------

LOW, HIGH, MEAN, STD = -0.5, 9.4, 4.45, 1.5


def levels(t: Tensor) -> tuple[Tensor, Tensor]:
    found = (torch.from_numpy(values.copy()).float()[t.long()] for values in (SCHEDULE.alphas, SCHEDULE.sigmas))
    alpha, sigma = (values.view(-1, 1, 1, 1) for values in found)
    return alpha, sigma


def score(x: Tensor, t: Tensor, condition: Tensor | None) -> Tensor:
    """Of log fluxes that are N(MEAN, STD^2) at every place: they reach from LOW to HIGH."""
    alpha, sigma = levels(t)
    return -(x - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2)


class Corrected(nn.Module):
    """The score with what is learnt of the clean image beside it, nothing at first: it begins as its teacher."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(17, 64), nn.SiLU(), nn.Linear(64, 16))
        nn.init.zeros_(self.body[2].weight)
        nn.init.zeros_(self.body[2].bias)

    def forward(self, x: Tensor, t: Tensor, condition: Tensor | None) -> Tensor:
        alpha, sigma = levels(t)
        learnt: Tensor = self.body(torch.cat([x.flatten(1) / 3, t[:, None] / 1000], 1)).view_as(x)
        return score(x, t, condition) + alpha / sigma**2 * learnt


@pytest.mark.parametrize("given", [None, (LOW, HIGH)])
def test_log_fluxes_end_better_than_untrained_ddim(given: tuple[float, float] | None) -> None:
    torch.manual_seed(0)
    teacher = Teacher.from_callable(
        score,
        schedule=SCHEDULE,
        prediction_type="score",
        shape=(1, 4, 4),
        student=Corrected(),
        num_inference_steps=20,
        value_range=given,
    )
    pairs = pool.compute(teacher, 256, "train")
    settings = config(updates=150, check_every=75, ema_decay=0.9, learning_rate=1e-2)
    student = distill(teacher, settings, pairs=pairs)
    low, high = student.teacher.postprocess.value_range
    assert (low, high) == pytest.approx((LOW, HIGH), abs=2)
    held = pool.compute(teacher, 64, "train", seed=5)
    with torch.no_grad():
        ddim = teacher.few_steps(held.noise, None, 2)
    assert student.worse == ""
    assert error_of(student.policy(), held) < 0.8 * float((ddim - held.target).square().mean())
