"""Two processes that train together take the path of one at the same global batch: real processes, gloo, one CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_other_methods import SCHEDULE, SHAPE, Small, exact

from redif_sdk.distill import DistillConfig, Teacher, draws, precision
from redif_sdk.distill import pairs as pool
from redif_sdk.distill.policy import StudentPolicy
from redif_sdk.distill.trainer import Trainer
from redif_sdk.errors import InvalidRequest

#: What is drawn, summed or learnt from in each differs: every arm that a process could take alone.
RUNS = {
    "regression": {"method": "regression"},
    "redif": {"reward": "feature+pixel", "exploration_rank": 4, "earlier_rows": 0.5},
    "redif, white": {"reward": "distribution+pixel", "exploration_rank": 0, "num_inference_steps": 1},
    "redif, pathwise": {"reward": {"discriminator": 1.0, "pixel": 0.5}, "estimator": "pathwise"},
    "redif, trajectory": {"reward": "mmd", "estimator": "trajectory", "kl": 0.1},
    "progressive": {"method": "progressive"},
    "consistency": {"method": "consistency"},
    "dmd2": {"method": "dmd2", "gan_weight": 0.1},
    "draft": {"method": "draft", "reward": "feature"},
    "grpo": {"method": "grpo", "reward": "pixel", "sde_window": 1},
}


def make_teacher() -> Teacher:
    torch.manual_seed(0)
    return Teacher.from_callable(
        exact,
        schedule=SCHEDULE,
        prediction_type="v_prediction",
        shape=SHAPE,
        student=Small(),
        num_inference_steps=8,
    )


def train(name: str, teacher: Teacher, pairs: pool.Pairs) -> tuple[torch.Tensor, dict[str, float]]:
    """The trained student's outputs on the pool, and its meter."""
    settings = {"num_inference_steps": 2, "updates": 8, "warm_start": 0.25, "schedule_updates": 2, "group_size": 4}
    settings |= {"batch_size": 16, "learning_rate": 1e-3, "weight_decay": 0.01, **RUNS[name]}
    policy = Trainer(teacher, DistillConfig.checked(**settings), pairs).run()
    with torch.no_grad():
        slices = policy.table.noise_slices
        output = policy.sample(pairs.slices(slices) if slices > 1 else pairs.noise, pairs.condition)
    meter = policy.meter
    return output, {"gradient_samples": meter.gradient_samples, "forward_equivalents": meter.forward_equivalents}


def main(folder: Path) -> None:
    """Every run, as one of the processes that torchrun started; the first writes what came out."""
    torch.set_num_threads(1)
    draws.join()
    teacher = make_teacher()
    pairs = pool.get(teacher, 64, "train", cache=folder)[0]
    found = {name: train(name, teacher, pairs) for name in RUNS}
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


def test_two_processes_train_what_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: False)
    done = launch(2, __file__, str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"found-{rank}-of-2.pt") for rank in (0, 1))
    teacher = make_teacher()
    pairs = pool.get(teacher, 64, "train", cache=tmp_path)[0]
    for name in RUNS:
        output, spent = train(name, teacher, pairs)
        assert torch.equal(first[name][0], second[name][0]), name  # no process strays
        assert (first[name][0] - output).abs().max() < 1e-5, name
        assert first[name][1]["gradient_samples"] * 2 == spent["gradient_samples"], name
        start = StudentPolicy(teacher.make_student(), teacher.table(2))
        with torch.no_grad():
            assert (output - start.sample(pairs.noise, pairs.condition)).abs().max() > 1e-3, name  # it did learn


def test_a_batch_that_cannot_be_shared_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draws, "world", lambda: 3)
    with pytest.raises(InvalidRequest, match="batch_size 64 cannot be shared by 3 processes; choose a multiple of 3"):
        draws.share(64)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
