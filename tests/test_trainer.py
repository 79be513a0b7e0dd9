"""A run that is killed and resumed is the run that was not: bit for bit, with real processes and SIGKILL."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from torch import Tensor

from redif_sdk import FastPipeline
from redif_sdk.artifact.folder import StudentFolder
from redif_sdk.distill import DistillConfig, Student, Teacher, distill, import_pipeline, load_student, pool
from redif_sdk.distill.compute import device as precision
from redif_sdk.distill.config import applicable
from redif_sdk.distill.methods.times import table_at
from redif_sdk.distill.rewards.batch import Batch
from redif_sdk.distill.student import pool_size, recorded, training_folder
from redif_sdk.distill.teachers.large import sized
from redif_sdk.distill.training import checkpoint
from redif_sdk.distill.training.check import Watch
from redif_sdk.errors import InvalidRequest
from redif_sdk.export import export

#: Networks of features, and times that are learnt by them, are most of a short run: its quickstart has both.
SMALL = {"pool_size": 32, "batch_size": 8, "group_size": 4, "reward": "pixel", "schedule_updates": 1}


def start(teacher: Path, output: Path, *extra: str) -> ForkServerProcess:
    """``redif distill`` in a process of its own."""
    options = "--steps 2 --updates 14 --pool-size 32 --batch-size 8 --warm-start 0.5 --checkpoint-seconds 0 --quiet"
    options += " --reward pixel --set schedule_updates=1"
    arguments = ["distill", str(teacher), "-o", str(output), *options.split(), *extra]
    return forked.start(arguments, {"REDIF_CACHE": str(output.parent / "cache")}, output.with_suffix(".said"))


def end(process: ForkServerProcess, output: Path) -> None:
    process.join(300)
    assert process.exitcode == 0, output.with_suffix(".said").read_text()


def weights(folder: Path) -> bytes:
    return (folder / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_sigkill_and_resume_give_the_same_bits(teacher_folder: Path, tmp_path: Path, seed: int) -> None:
    end(start(teacher_folder, tmp_path / "whole"), tmp_path / "whole")
    output, draw, kills = tmp_path / "killed", random.Random(seed), 0
    for attempt in range(4):
        process = start(teacher_folder, output, *(("--resume",) if attempt else ()))
        if attempt < 2:
            checkpoint = training_folder(output) / "checkpoint.pt"
            deadline = time.monotonic() + 120
            while not checkpoint.is_file() and process.is_alive() and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(draw.uniform(0.0, 0.5))
            process.kill()
            process.join(60)
            kills += process.exitcode == -signal.SIGKILL
        else:
            end(process, output)
        if output.is_dir():  # it had finished already
            break
    assert kills >= 1
    assert weights(output) == weights(tmp_path / "whole")
    tables = [StudentFolder(folder).manifest.step_tables for folder in (output, tmp_path / "whole")]
    assert tables[0] == tables[1]
    updates = [json.loads(line)["update"] for line in (training_folder(output) / "log.jsonl").read_text().splitlines()]
    assert updates == sorted(set(updates))


HOLDER = """
import sys
from pathlib import Path
from redif_sdk.distill import DistillConfig, distill

def wait(share, figures):
    print("holds", flush=True)
    sys.stdin.read()

config = DistillConfig(num_inference_steps=2, updates=3, **{SMALL})
distill(sys.argv[1], config, folder=Path(sys.argv[2]), on_progress=wait)
"""


def test_a_second_run_into_a_folder_is_refused_until_the_first_is_gone(teacher_folder: Path, tmp_path: Path) -> None:
    """Two runs in one folder would replace each other's checkpoint; a killed one must not leave the folder locked."""
    again = config()
    command = [sys.executable, "-c", HOLDER.format(SMALL=SMALL), str(teacher_folder), str(tmp_path / "run")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "holds\n"
        kept = (tmp_path / "run" / "checkpoint.pt").read_bytes()
        with pytest.raises(InvalidRequest, match=r"another run is writing to .*run; wait until it ends"):
            distill(teacher_folder, again, folder=tmp_path / "run", resume=True)
        assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == kept
        first.send_signal(signal.SIGKILL)
        first.wait(60)
    student = distill(teacher_folder, again, folder=tmp_path / "run", resume=True)
    assert student.distillation is not None
    assert student.distillation.budget.updates == 3


def config(**settings: object) -> DistillConfig:
    return DistillConfig.checked(**applicable({"num_inference_steps": 2, "updates": 3, **SMALL, **settings}))


def test_resume_with_other_settings_is_refused(teacher_folder: Path, tmp_path: Path) -> None:
    distill(teacher_folder, config(), folder=tmp_path / "run")
    with pytest.raises(InvalidRequest, match="other settings"):
        distill(teacher_folder, config(learning_rate=0.5), folder=tmp_path / "run", resume=True)


def test_a_reward_is_known_again_by_its_name_in_another_process(teacher_folder: Path) -> None:
    """Functions have other addresses there, and a server may be at another host or port."""
    teacher = Teacher.load(teacher_folder)

    def identity_of(reward: object) -> str:
        return checkpoint.identity(config(reward=reward), teacher)

    def mine(batch: Batch) -> Tensor:
        return batch.images.mean((1, 2, 3))

    def again() -> object:
        def mine(batch: Batch) -> Tensor:
            return batch.images.mean((1, 2, 3))

        return mine

    class Judge:
        def of(self, batch: Batch) -> Tensor:
            return batch.images.mean((1, 2, 3))

    def other(batch: Batch) -> Tensor:
        return -batch.images.mean((1, 2, 3))

    assert identity_of(mine) == identity_of(again()) != identity_of(other)
    assert identity_of(Judge().of) == identity_of(Judge().of)
    assert identity_of({mine: 2.0, "pixel": 1.0}) == identity_of({again(): 2.0, "pixel": 1.0})
    assert identity_of({mine: 2.0, "pixel": 1.0}) != identity_of({mine: 1.0, "pixel": 1.0})
    assert identity_of([mine, "pixel"]) == identity_of([again(), "pixel"])
    at = "http://127.0.0.1:{}/score#likeness={}"
    assert identity_of(at.format(8000, 2)) == identity_of(at.format(8001, 2)) != identity_of(at.format(8000, 1))


def test_the_log_names_reward_recall_and_budget(teacher_folder: Path, tmp_path: Path) -> None:
    """Of the reward that is the default; the others here have one that costs nothing."""
    reward = DistillConfig().reward
    distill(teacher_folder, config(updates=12, warm_start=0.0, reward=reward), folder=tmp_path / "run")
    last = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])
    assert {"update", "loss", "grad_norm", "reward", "recall", "dropped_groups", "budget"} <= set(last)
    assert last["budget"]["gradient_samples"] == 12 * 8 * 2


def test_a_student_is_saved_and_loaded_whole(teacher_folder: Path, tmp_path: Path) -> None:
    student = distill(teacher_folder, config())
    manifest = student.save_pretrained(tmp_path / "student")
    StudentFolder(tmp_path / "student").check_all()
    assert manifest.distillation is not None
    assert manifest.distillation.budget.updates == 3
    assert manifest.distillation.estimator == config().get("estimator") == "same-state"
    recorded = manifest.distillation.configuration
    wanted = sized(config(), student.teacher)[0].settings()
    assert {name: recorded[name] for name in wanted if name != "reward"} == {
        k: wanted[k] for k in wanted if k != "reward"
    }
    assert recorded["reward"] == manifest.distillation.rewards
    assert "All settings of the run" in (tmp_path / "student/README.md").read_text()
    again = load_student(tmp_path / "student")
    noise, labels = pool.pool_noise((4, 8, 8), 5, "held_out"), torch.tensor([0, 1, 2, 0, 1])
    with torch.no_grad():
        assert torch.equal(again.policy().sample(noise, labels), student.policy().sample(noise, labels))
    with pytest.raises(InvalidRequest, match="exists and is not empty"):
        student.save_pretrained(tmp_path / "student")


def test_settings_are_recorded_as_json_without_secrets() -> None:
    """A callable is its name, an endpoint's address has no password, and infinity is a word."""

    def brighter(images: torch.Tensor, **_: object) -> torch.Tensor:
        return images.mean((1, 2, 3))

    given = config(reward={brighter: 2.0, "https://me:secret@judge.example/score": 1.0}, seconds=float("inf"))
    text = json.dumps(recorded(given), allow_nan=False)
    assert json.loads(text)["reward"] == {"brighter": 2.0, "https://judge.example/score": 1.0}
    assert json.loads(text)["seconds"] == "inf"
    assert "secret" not in text


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers with numpy 2.4
def test_plain_diffusers_gives_the_same_pictures(teacher_folder: Path, tmp_path: Path) -> None:
    """The card's own code: stock classes, learnt times, the same latents."""
    from diffusers import DPMSolverMultistepScheduler

    student = distill(teacher_folder, config(num_inference_steps=3, schedule_updates=4))
    student.save_pretrained(tmp_path / "student")
    unet = UNet2DModel.from_pretrained(tmp_path / "student" / "unet")
    scheduler = DPMSolverMultistepScheduler.from_pretrained(tmp_path / "student" / "scheduler")
    scheduler.set_timesteps(timesteps=[round(float(t)) for t in student.tables[0].timesteps])
    noise, labels = pool.pool_noise((4, 8, 8), 4, "held_out"), torch.tensor([0, 1, 2, 0])
    x = noise.clone()
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(unet(x, t, class_labels=labels).sample, t, x).prev_sample
        ours = student.policy().sample(noise, labels)
    torch.testing.assert_close(x, ours, rtol=1e-4, atol=1e-4)


def test_a_score_student_is_saved_and_runs(teacher_folder: Path, tmp_path: Path) -> None:
    """No stock scheduler takes a score; the student folder and its table do."""
    base = Teacher.load(teacher_folder)

    def score(x: torch.Tensor, t: torch.Tensor, condition: torch.Tensor | None) -> torch.Tensor:
        return -x

    network = UNet2DModel.from_pretrained(teacher_folder / "unet")
    teacher = Teacher.from_callable(
        score, schedule=base.schedule, prediction_type="score", shape=base.shape, student=network, num_classes=3
    )
    student = distill(teacher, config(num_inference_steps=1, updates=1))
    student.save_pretrained(tmp_path / "student")
    again = load_student(tmp_path / "student")
    noise, labels = pool.pool_noise(base.shape, 2, "held_out"), torch.tensor([0, 1])
    with torch.no_grad():
        torch.testing.assert_close(again.policy().sample(noise, labels), student.policy().sample(noise, labels))


def test_a_student_begins_where_another_ended(teacher_folder: Path, tmp_path: Path) -> None:
    first = distill(teacher_folder, config(num_inference_steps=1, updates=5))
    second = distill(teacher_folder, config(method="regression", updates=1, learning_rate=1e-12), start=first)
    for a, b in zip(first.network.parameters(), second.network.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_import_takes_a_pipeline_as_it_is(teacher_folder: Path, tmp_path: Path) -> None:
    manifest = import_pipeline(str(teacher_folder), tmp_path / "student", [2, 6, 2])
    assert manifest.supported_steps == [2, 6]
    assert manifest.distillation is None
    student, teacher = load_student(tmp_path / "student"), Teacher.load(teacher_folder)
    noise, labels = pool.pool_noise((4, 8, 8), 3, "held_out"), torch.tensor([0, 1, 2])
    with torch.no_grad():
        torch.testing.assert_close(student.policy(6).sample(noise, labels), teacher.sample(noise, labels))


def test_a_guided_teacher_makes_two_calls_and_its_student_one(teacher_folder: Path) -> None:
    plain = Teacher.load(teacher_folder)
    teacher = plain.guided(2.0)
    x, t, labels = torch.randn(3, *teacher.shape), torch.full((3,), 400.0), torch.tensor([0, 1, 2])
    asked, unasked = plain(x, t, labels), plain(x, t, torch.full_like(labels, 3))
    assert torch.allclose(teacher(x, t, labels), 2 * asked - unasked, atol=1e-5)
    assert plain.identity != teacher.identity != plain.guided(3.0).identity  # their pairs must not be mixed up
    pairs, calls = pool.get(teacher, 16, "train")
    assert calls == 16 * 6 * 2
    config = DistillConfig(num_inference_steps=1, updates=2, pool_size=16, batch_size=8, reward="pixel")
    student = distill(teacher, config, pairs=pairs)
    assert student.distillation is not None
    assert student.distillation.budget.teacher_calls == 16 * 6 * 2
    origin = student.manifest("s").teacher
    assert origin is not None
    assert origin.guidance_scale == 2.0
    assert student.calls_per_step == 1


@pytest.mark.parametrize("scale", [-1.0, float("nan")])
def test_a_guidance_that_cannot_be_is_refused(teacher_folder: Path, scale: float) -> None:
    with pytest.raises(InvalidRequest, match="guidance_scale"):
        Teacher.load(teacher_folder).guided(scale)


def test_guidance_needs_a_no_class_entry(teacher_folder: Path) -> None:
    teacher = dataclasses.replace(Teacher.load(teacher_folder), extra={})
    with pytest.raises(InvalidRequest, match="null_class"):
        teacher.guided(2.0)
    assert teacher.guided(2.0, null_class=3).calls_per_step == 2


def test_a_guided_pipeline_is_imported_with_its_guidance(teacher_folder: Path, tmp_path: Path) -> None:
    """Torch, the exported graphs and the teacher agree, and the folder says what a step costs."""
    teacher = Teacher.load(teacher_folder).guided(3.0)
    folder = tmp_path / "guided"
    import_pipeline(teacher, folder, [2])
    manifest = export(folder)
    assert manifest.network.calls_per_step == 2
    noise, labels = pool.pool_noise(teacher.shape, 5, "held_out"), torch.arange(5) % 3
    wanted = teacher.images(teacher.sample(noise, labels, 2)).clamp(-1, 1)
    levels = ((wanted + 1) * 127.5).round().permute(0, 2, 3, 1).numpy()
    served = FastPipeline.from_pretrained(folder).generate_array(noise[None].numpy(), labels.numpy())
    assert np.abs(levels - served).max() <= 1
    again = load_student(folder)
    assert again.calls_per_step == 2
    with torch.no_grad():
        assert torch.allclose(again.policy().sample(noise, labels), teacher.sample(noise, labels, 2), atol=1e-5)


def test_a_pipeline_object_is_a_teacher(teacher_folder: Path) -> None:
    from diffusers import DDIMPipeline

    pipeline = DDIMPipeline.from_pretrained(teacher_folder)
    teacher = Teacher.load(pipeline)
    assert (teacher.shape, teacher.prediction_type) == ((4, 8, 8), "v_prediction")
    assert teacher.condition is not None
    assert teacher.condition.num_classes == 4  # nothing tells which entry means 'no class'
    assert isinstance(distill(teacher, config(updates=1)), Student)


def test_pairs_are_sampled_once(teacher_folder: Path, tmp_path: Path) -> None:
    teacher = Teacher.load(teacher_folder)
    seen: list[int] = []
    first, calls = pool.get(teacher, 16, "train", cache=tmp_path, on_batch=seen.append)
    again, _ = pool.get(teacher, 16, "train", cache=tmp_path, on_batch=seen.append)
    assert torch.equal(first.target, again.target)
    assert (sum(seen), calls) == (16, 96)
    pool.get(teacher, 16, "train", cache=tmp_path, on_batch=seen.append, rebuild=True)
    assert sum(seen) == 32
    assert [p.suffix for p in tmp_path.iterdir()] == [".npy"]


def test_teacher_calls_limit_the_pool(teacher_folder: Path) -> None:
    teacher = Teacher.load(teacher_folder)
    assert pool_size(teacher, config(teacher_calls=60, pool_size=4096)) == 10
    with pytest.raises(InvalidRequest, match="fewer than one batch"):
        pool_size(teacher, config(teacher_calls=10))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"updates": 0}, "updates"),
        ({"group_size": 5}, "group_size must be even"),
        ({"speed": 3}, "speed"),
        ({"estimator": "magic"}, "estimator"),
    ],
)
def test_a_wrong_setting_is_named_in_one_line(settings: dict[str, object], words: str) -> None:
    with pytest.raises(InvalidRequest, match=words) as caught:
        DistillConfig.checked(**settings)
    assert "\n" not in str(caught.value)


def test_what_is_no_teacher_is_named(tmp_path: Path, teacher_folder: Path) -> None:
    with pytest.raises(InvalidRequest, match="no folder and no shipped teacher"):
        Teacher.load(tmp_path / "nowhere")
    with pytest.raises(InvalidRequest, match=r"unet/config\.json is missing"):
        Teacher.load(tmp_path)
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(teacher_folder, broken)
    file = broken / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(InvalidRequest, match="cannot be loaded"):
        Teacher.load(broken)


@pytest.mark.parametrize(("probe", "works"), [("import os; os.abort()", False), ("", True)])
def test_bfloat16_is_used_only_where_it_is_seen_to_run(
    probe: str, works: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A virtual machine may report AMX and kill whoever uses it: a process of its own finds out, once."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    monkeypatch.setattr(precision, "PROBE", probe)
    monkeypatch.setenv(precision.VARIABLE, "unset")
    monkeypatch.delenv(precision.VARIABLE)
    assert precision.cpu_has_bf16.__wrapped__() is works
    assert os.environ[precision.VARIABLE] == str(int(works))  # what processes that it starts will take
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert precision.cpu_has_bf16.__wrapped__() is works  # said beforehand


def test_a_check_that_looks_hacked_is_warned_of() -> None:
    """The rules that docs/design.md states; a reward that rises alone is no hack, nor is detail that comes back."""
    plain = {"reward": 0.0, "recall": 0.8, "detail": 1.0, "grid": 1.0}
    better = plain | {"reward": 1.0}
    for now, said in (
        (better, None),
        (better | {"recall": 0.6}, "recall falls while the reward rises"),
        (better | {"detail": 1.6}, "fine detail goes to 1.6 times the teacher's"),
        (better | {"detail": 0.5}, "fine detail goes to 0.5 times"),
        (better | {"grid": 2.0}, "a grid of pixels grows to 2 times"),
        (plain | {"reward": -1.0, "grid": 9.0}, None),
    ):
        watch = Watch(1)
        watch.look(plain)
        found = watch.look(now)
        assert (said or "") in found.get("warning", ""), now
        assert ("warning" in found) == (said is not None), now
        assert bool(watch.stopped) == (now is not better), now
    watch = Watch(1)
    watch.look(plain | {"judge": 0.5, "judge_error": 0.1})
    assert watch.look(plain | {"reward": 1.0, "judge": 0.35, "judge_error": 0.1}) == {}  # less than two standard errors
    again = Watch(1)
    again.load_state_dict(watch.state_dict())  # the best that was seen is in the checkpoint
    found = again.look(plain | {"reward": 2.0, "judge": 0.25, "judge_error": 0.1})
    assert found["warning"].startswith("the judge falls from 0.5 to 0.25 while the reward rises")
    assert again.stopped.startswith("the reward rises while the judge falls")
    watch = Watch(0)
    watch.look(plain | {"detail": 0.3})
    assert watch.look(better | {"detail": 0.5}) == {}


def test_training_goes_on_from_a_start_at_its_own_times(teacher_folder: Path, tmp_path: Path) -> None:
    """The step table of the start is that of the run, where it has one of as many steps."""
    import_pipeline(str(teacher_folder), tmp_path / "start", [2])
    config = DistillConfig.checked(
        updates=1,
        num_inference_steps=2,
        **{**SMALL, "batch_size": 4, "pool_size": 8, "schedule_updates": 0},
        warm_start=0.0,
    )
    start = load_student(tmp_path / "start")
    plain = distill(str(teacher_folder), config, start=start, progress=False)
    assert plain.tables[0].timesteps.tolist() == start.tables[0].timesteps.tolist()
    other = table_at(start.teacher.schedule, [777.0, 222.0], start.tables[0].prediction_type)
    start.tables = [*start.tables, table_at(start.teacher.schedule, [800.0], "v_prediction")]
    start.tables[0] = other
    student = distill(str(teacher_folder), config, start=start, progress=False)
    assert student.tables[0].timesteps.tolist() == [777.0, 222.0]
