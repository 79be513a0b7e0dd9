"""Training on another device than the CPU, where there is none: a device that is simulated.

Its tensors say that they are on "meta", and hold their numbers on the CPU. Like a GPU's, they may not be mixed with the
CPU's tensors, which is what goes wrong first on a real one, and the result must be the CPU's own. Kernels, autocast and
memory of a GPU are not simulated.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_parallel import RUNS, make_teacher
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from redif_sdk.distill import DistillConfig, policy, pool
from redif_sdk.distill.compute import device as precision
from redif_sdk.distill.config import applicable
from redif_sdk.distill.evaluation import examine
from redif_sdk.distill.evaluation.arena import Arena, evaluate_folder
from redif_sdk.distill.evaluation.examine import examine_teacher
from redif_sdk.distill.rewards import critic, fake_score
from redif_sdk.distill.student import Student, decision
from redif_sdk.distill.teachers import denoising
from redif_sdk.distill.training import estimate as estimating
from redif_sdk.distill.training import loop as training
from redif_sdk.errors import InvalidRequest, RuntimeUnavailable
from redif_sdk.models import prompts, rows

META = torch.device("meta")
aten = torch.ops.aten


class Away(torch.Tensor):
    """A tensor on the simulated device; ``held`` has its numbers."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> Away:
        made: Away = torch.Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), dtype=held.dtype, device="meta", requires_grad=False
        )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


def here(value: Any) -> Any:
    return value.held if isinstance(value, Away) else value


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """One operation: refused where devices are mixed, else computed on the CPU and put where it belongs."""
    given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    away = any(isinstance(leaf, Away) for leaf in given)
    wanted = kwargs.get("device")
    if func in (aten._to_copy.default, aten.copy_.default):
        mixed = []
    elif func is aten.index.Tensor:  # indices on the CPU may choose from a GPU's tensor
        mixed = [] if isinstance(args[0], Away) else [leaf for leaf in given if isinstance(leaf, Away)]
    else:
        mixed = [leaf for leaf in given if leaf.dim() and not isinstance(leaf, Away)] if away else []
    if mixed:
        raise RuntimeError(f"{func}: a tensor of the CPU, {tuple(mixed[0].shape)}, among those of the device")
    args, kwargs = tree_map(here, (args, kwargs))
    if wanted is not None and torch.device(wanted) == META:
        kwargs, away = {**kwargs, "device": torch.device("cpu")}, True
    elif wanted is not None:
        away = False
    if func is aten.copy_.default:
        return func(*args, **kwargs)
    out = func(*args, **kwargs)
    return tree_map(lambda leaf: Away(leaf) if away and type(leaf) is torch.Tensor else leaf, out)


class Simulated(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


@contextmanager
def simulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(training, "chosen_device", lambda name: META)
    ordinary = torch.optim.AdamW
    monkeypatch.setattr(torch.optim, "AdamW", lambda *a, **k: ordinary(*a, **{**k, "fused": None, "foreach": False}))
    for module in (policy, critic, fake_score, denoising):
        monkeypatch.setattr(module, "autocast", lambda kind, precision="auto": nullcontext())
    with Simulated():
        yield


def student_of(teacher: Any) -> Student:
    return Student(teacher, teacher.make_student(), [teacher.table(2)], "student")


def test_it_refuses_what_a_gpu_refuses() -> None:
    with Simulated():
        there = torch.ones(3).to(META)
        assert ((there * 2).sum().item(), there.device, there.cpu().device.type) == (6.0, META, "cpu")
        with pytest.raises(RuntimeError, match="a tensor of the CPU"):
            there + torch.ones(3)


@pytest.mark.parametrize("name", RUNS)
def test_another_device_trains_what_the_cpu_does(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: False)
    teacher = make_teacher()
    asked = teacher.predict  # a black box on the CPU, as one behind an API would be
    teacher = replace(teacher, predict=lambda x, t, condition: asked(x.cpu(), t.cpu(), condition).to(x.device))
    pairs = pool.get(teacher, 32, "train")[0]
    settings = {"num_inference_steps": 2, "updates": 6, "warm_start": 0.2, "schedule_updates": 2, "group_size": 4}
    settings |= {"batch_size": 8, "calibration": 16, **RUNS[name]}
    config = DistillConfig.checked(**applicable(settings))
    ours = training.Trainer(teacher, config, pairs).run()
    with simulated(monkeypatch):
        theirs = training.Trainer(teacher, config, pairs).run()
        weights = [weight.cpu() for weight in theirs.network.state_dict().values()]
    for here_, there in zip(ours.network.state_dict().values(), weights, strict=True):
        torch.testing.assert_close(there, here_)
    assert theirs.table == ours.table
    assert theirs.meter.forward_equivalents == ours.meter.forward_equivalents


def test_examination_dry_run_and_evaluation_are_made_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `redif doctor --distill`, `--dry-run` and `redif eval` say is of the device that training would take."""
    asked = make_teacher().predict
    seen: set[str] = set()

    def predict(x: torch.Tensor, t: torch.Tensor, condition: torch.Tensor | None) -> torch.Tensor:
        seen.add(x.device.type)
        return asked(x.cpu(), t.cpu(), condition).to(x.device)

    teacher = replace(make_teacher(), predict=predict)
    config = DistillConfig.checked(method="redif", reward="pixel", batch_size=8, num_inference_steps=2, updates=4)
    ours = examine_teacher(teacher, config=config, device="cpu")
    assert seen == {"cpu"}
    seen.clear()
    for module in (examine, decision):
        monkeypatch.setattr(module, "chosen_device", lambda name: META)
    with simulated(monkeypatch):
        theirs = examine_teacher(teacher, config=config)
        row = estimating.estimate(teacher, config, 32, pool_is_there=False)
        student = student_of(teacher)
        arena = Arena.of(teacher, 16, device=META)
        judged = arena.student_row(student, 2)
    assert seen == {"meta"}
    assert [(r["subject"], r["status"]) for r in theirs] == [(r["subject"], r["status"]) for r in ours]
    assert row.forward_equivalents > 0
    assert next(iter(student.network.parameters())).device == META
    assert judged["mse"] == pytest.approx(Arena.of(teacher, 16).student_row(student_of(teacher), 2)["mse"], rel=1e-3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_refused(tmp_path: Any) -> None:
    with pytest.raises(RuntimeUnavailable, match="torch sees no CUDA GPU"):
        examine_teacher(make_teacher(), reward="pixel", device="cuda")
    with pytest.raises(RuntimeUnavailable, match="torch sees no CUDA GPU"):
        evaluate_folder(tmp_path, "fashion-mnist", 16, device="cuda")


@pytest.mark.parametrize("room", [1 << 20, 0])
def test_prompts_are_looked_up_on_the_device_where_they_find_room(room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "LARGEST_COPY", room)
    asked: list[str] = []

    def encode(texts: Sequence[str]) -> dict[str, torch.Tensor]:
        asked.extend(texts)
        return {"states": torch.tensor([[float(len(text)), 1.0] for text in texts])}

    known = prompts.Prompts(["red heart", "blue circle", "cat"], encode)
    with Simulated():
        some = known(torch.tensor([2, 0]).to(META))["states"]
        every = known(torch.tensor([3, 1, 0, 2]).to(META))["states"]
        assert (some.device, every.device) == (META, META)
        assert some.cpu()[:, 0].tolist() == [3.0, 9.0]
        assert every.cpu()[:, 0].tolist() == [0.0, 11.0, 9.0, 3.0]
    assert sorted(asked) == ["", "blue circle", "cat", "red heart"], "each is encoded once"


def test_a_gpu_that_is_not_there_is_not_replaced_by_the_cpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(RuntimeUnavailable, match="torch sees no CUDA GPU"):
        precision.chosen_device("cuda")
    assert precision.chosen_device("auto").type == "cpu"
    with pytest.raises(InvalidRequest, match="device"):
        DistillConfig.checked(device="tpu")
