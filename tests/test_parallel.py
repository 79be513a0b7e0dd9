"""Two processes that train together take the path of one at the same global batch: real processes, gloo, one CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gaussian import make_teacher

from redif_sdk.distill import DistillConfig, Teacher, pool
from redif_sdk.distill.compute import device as precision
from redif_sdk.distill.compute import parallel as sharding
from redif_sdk.distill.compute import random as draws
from redif_sdk.distill.config import applicable
from redif_sdk.distill.methods.redif import ReDiF
from redif_sdk.distill.policy import StudentPolicy
from redif_sdk.distill.training.loop import Trainer
from redif_sdk.errors import InvalidRequest

#: What is drawn, summed or learnt from in each differs: every arm that a process could take alone.
RUNS = {
    "regression": {"method": "regression"},
    "redif": {"reward": "feature+pixel", "exploration_rank": 4, "intermediate_step_fraction": 0.5},
    "redif, white": {"reward": "distribution+pixel", "exploration_rank": 0, "num_inference_steps": 1},
    "redif, pathwise": {"reward": {"discriminator": 1.0, "pixel": 0.5}, "estimator": "pathwise"},
    "redif, trajectory": {"reward": "mmd", "estimator": "trajectory", "kl": 0.1},
    "redif, critic": {"reward": "pixel", "estimator": "critic", "dmd_weight": 0.5, "critic_memory": 32},
    "progressive": {"method": "progressive"},
    "consistency": {"method": "consistency"},
    "dmd": {"method": "dmd", "gan_weight": 0.1},
    "dmd2": {"method": "dmd2"},
    "cdm": {"method": "cdm"},
    "sgmd": {"method": "sgmd"},
    "draft": {"method": "draft", "reward": "feature"},
    "grpo": {"method": "grpo", "reward": "pixel", "sde_window": 1},
}

#: Those that can be sharded.
SHARDED = ("regression", "redif", "redif, pathwise", "dmd", "draft")
#: Each way to draw, sum or learn once: groups, what is learnt, trajectories, a network of its own.
QUICK = ("redif", "redif, trajectory", "dmd2")


def settings_of(name: str, **more: object) -> DistillConfig:
    settings = {"num_inference_steps": 2, "updates": 4, "warm_start": 0.25, "schedule_updates": 2, "group_size": 4}
    settings |= {"batch_size": 16, "learning_rate": 1e-3, "weight_decay": 0.01, **RUNS[name]}
    return DistillConfig.checked(**applicable(settings), **more)


def train(
    name: str, teacher: Teacher, pairs: pool.Pairs, cut: Path | None = None, **more: object
) -> tuple[torch.Tensor, dict[str, float]]:
    """The trained student's outputs on the pool, and its meter. ``cut``: a folder in which it is cut and resumed."""
    config = settings_of(name, **more)
    if cut is not None:
        config = config.replaced(checkpoint_seconds=0, check_every=2, log_every=1)

        def stop(share: float, figures: dict[str, float]) -> None:
            if share > 0.6:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            Trainer(teacher, config, pairs, cut, on_progress=stop).run()
    policy = Trainer(teacher, config, pairs, cut).run(resume=cut is not None)
    with torch.no_grad():
        slices = policy.table.noise_slices
        output = policy.sample(pairs.slices(slices) if slices > 1 else pairs.noise, pairs.condition)
    meter = policy.meter
    return output, {"gradient_samples": meter.gradient_samples, "forward_equivalents": meter.forward_equivalents}


def learnt_once(teacher: Teacher, pairs: pool.Pairs) -> dict[str, object]:
    """What a run learns once, where every process would find something else: its reward and weights differ by rank."""

    def of_two_minds(images: torch.Tensor, targets: torch.Tensor, condition: torch.Tensor | None) -> torch.Tensor:
        return (1 - 2 * draws.rank()) * -(images - targets).pow(2).mean((1, 2, 3))

    settings = {"reward": of_two_minds, "num_inference_steps": 3, "schedule_updates": 6, "exploration_rank": 4}
    run = Trainer(teacher, DistillConfig.checked(method="redif", batch_size=16, **settings), pairs)
    assert isinstance(run.method, ReDiF)
    run.method.prepare(run.context)
    calls = run.meter.student_calls
    with torch.no_grad():
        for weight in run.context.policy.network.parameters():
            weight.add_(0.1 * draws.rank())
    run.method._begin(run.context)
    assert run.method.exploration is not None
    times = torch.from_numpy(run.context.policy.table.timesteps.copy())
    return {"times": times, "basis": run.method.exploration.basis, "calls": calls}


def main(folder: Path, names: list[str]) -> None:
    """The runs, as one of the processes that torchrun started; each writes what came out."""
    torch.set_num_threads(1)
    draws.init_distributed()
    teacher = make_teacher(num_inference_steps=8)
    pairs = pool.get(teacher, 64, "train", cache=folder)[0]
    found = {name: train(name, teacher, pairs) for name in names}
    found |= {f"{name}, sharded": train(name, teacher, pairs, shard=True) for name in SHARDED if name in names}
    found["redif, sharded, cut"] = train("redif", teacher, pairs, folder / "cut", shard=True)
    made = Trainer(teacher, settings_of("redif", shard=True), pairs)
    kept, whole = (sum(map(torch.numel, sharding.local(n.parameters()))) for n in (made.ema, teacher.make_student()))
    found["share"] = kept / whole
    found["once"] = learnt_once(teacher, pairs)
    torch.save(found, folder / f"found-{draws.rank()}-of-{draws.world()}.pt")


def launch(processes: int, *command: str) -> subprocess.CompletedProcess[str]:
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return subprocess.run(
        [sys.executable, *start, *command],
        env={**os.environ, "OMP_NUM_THREADS": "1", "REDIF_CPU_BF16": "0", "PYTHONPATH": str(Path(__file__).parent)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize("names", [QUICK, pytest.param(tuple(RUNS), marks=pytest.mark.slow)], ids=["some", "all"])
def test_two_processes_train_what_one_does(
    names: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: False)
    done = launch(2, __file__, str(tmp_path), *names)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"found-{rank}-of-2.pt") for rank in (0, 1))
    teacher = make_teacher(num_inference_steps=8)
    pairs = pool.get(teacher, 64, "train", cache=tmp_path)[0]
    alone = {name: train(name, teacher, pairs) for name in names}
    once = learnt_once(teacher, pairs)
    for name in ("times", "basis"):  # the first process's, which are those of one process
        assert torch.equal(first["once"][name], second["once"][name]), name
        torch.testing.assert_close(first["once"][name], once[name])
    assert first["once"]["calls"] == second["once"]["calls"] == once["calls"] / 2  # spent once, and shared
    arms = [(name, name) for name in names] + [(f"{name}, sharded", name) for name in SHARDED if name in names]
    assert 0.4 < first["share"] < 0.6  # of the weights that a process keeps
    for name, as_alone in [*arms, ("redif, sharded, cut", "redif")]:
        output, spent = alone[as_alone]
        assert torch.equal(first[name][0], second[name][0]), name  # no process strays
        assert (first[name][0] - output).abs().max() < 1e-5, name
        assert first[name][1]["gradient_samples"] * 2 == spent["gradient_samples"], name
        start = StudentPolicy(teacher.make_student(), teacher.table(2))
        with torch.no_grad():
            assert (output - start.sample(pairs.noise, pairs.condition)).abs().max() > 1e-3, name  # it did learn


def test_what_cannot_be_sharded_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="the method consistency keeps a copy of the network"):
        sharding.refuse("consistency", 0.0)
    with pytest.raises(InvalidRequest, match=r"kl 0\.1 keeps a copy"):
        sharding.refuse("redif", 0.1)


def test_processes_part_at_the_end(tmp_path: Path) -> None:
    """A process group that lives on may abort the interpreter when everything is done already."""
    script = tmp_path / "joined.py"
    script.write_text(
        "import atexit\nimport torch.distributed as dist\n"
        "from redif_sdk.distill.compute.random import init_distributed\n"
        "atexit.register(lambda: print('parted' if not dist.is_initialized() else 'together', flush=True))\n"
        "init_distributed()\nassert dist.get_world_size() == 2\n"
    )
    done = launch(2, str(script))
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.replace("\n", "") == 2 * "parted"  # two processes may share a line


def test_a_batch_that_cannot_be_shared_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draws, "world", lambda: 3)
    with pytest.raises(InvalidRequest, match="batch_size 64 cannot be shared by 3 processes; choose a multiple of 3"):
        draws.share(64)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
