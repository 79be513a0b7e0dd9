"""Shared by all tests: a tiny class-conditional student, as distill writes one, and the same one exported."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from made_once import altered, made, share_traces

pytest_plugins = ["coverage_summary", "cpu_times"]

# A busy machine is slow; that is no fault of what is tested.
settings.register_profile("redif", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("redif")


def examples(count: int) -> int:
    """How many of ``count`` random examples to try: a quarter, and all of them where the slow tests run, too."""
    return count if "slow" in os.environ.get("REDIF_TEST_MARKS", "").replace("not slow", "") else count // 4


def pytest_configure(config: pytest.Config) -> None:
    os.environ["REDIF_TEST_MARKS"] = config.getoption("markexpr")


os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test reaches for the network
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # also where a test imports ONNX Runtime before redif_sdk

if "PYTEST_XDIST_WORKER" in os.environ:  # workers side by side, each with its part of the cores
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))

AMX_PROBE = "import torch; a = torch.ones(64, 64, dtype=torch.bfloat16); a @ a"


def keep_off_broken_amx() -> None:
    """Some virtual machines report AMX and kill whoever uses it: then torch and OpenVINO are told to leave it alone."""
    processor = Path("/proc/cpuinfo")
    if "ONEDNN_MAX_CPU_ISA" in os.environ or not processor.is_file() or "amx_bf16" not in processor.read_text():
        return
    if subprocess.run([sys.executable, "-c", AMX_PROBE], capture_output=True, check=False).returncode:
        os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX512_CORE_BF16"
        os.environ["REDIF_CPU_BF16"] = "0"


keep_off_broken_amx()


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What engines compile goes into a folder of this run."""
    os.environ["REDIF_CACHE"] = str(tmp_path_factory.mktemp("cache"))


def pytest_runtest_setup() -> None:
    share_traces()


@pytest.fixture(scope="session", autouse=True)
def shared_files_are_only_read() -> Iterator[None]:
    """What the workers share is at the end what it was: a test that alters it would make others fail elsewhere."""
    yield
    assert altered() == []


def build_scheduler() -> Any:
    """The noise schedule of every model here, as the shipped teacher has it."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
    )


def build_student(folder: Path, *, classes: int | None = 10, channels_out: int = 4, seed: int = 0, **unet: Any) -> Path:
    """A student with random weights: 4 x 14 x 14 latents, grey 28 x 28 pictures, tables of 2 steps and 3 (eta 1)."""
    import torch
    from diffusers import UNet2DModel

    from redif_sdk.artifact.folder import write_manifest
    from redif_sdk.artifact.manifest import Manifest
    from redif_sdk.artifact.records import Condition, Latents, Network, Postprocess
    from redif_sdk.sampling.table import StepTable

    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "sample_size": 14,
        "in_channels": 4,
        "out_channels": channels_out,
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D"),
        "attention_head_dim": 64,
        "num_class_embeds": classes,
    }
    UNet2DModel(**(settings | unet)).save_pretrained(folder / "unet")
    scheduler = build_scheduler()
    scheduler.save_pretrained(folder / "scheduler")
    (folder / "README.md").write_text("# tiny\n")
    tables = [
        StepTable.from_scheduler(scheduler, num_inference_steps=2),
        StepTable.from_scheduler(scheduler, num_inference_steps=3, eta=1.0),
    ]
    manifest = Manifest(
        name="tiny",
        licence="mit",
        task="unconditional" if classes is None else "class-conditional",
        step_tables=[table.to_dict() for table in tables],
        latents=Latents(channels=4, height=14, width=14),
        condition=None if classes is None else Condition(num_classes=classes, class_names=list("abcdefghij")[:classes]),
        postprocess=Postprocess(pixel_shuffle=2),
        network=Network(class_path="diffusers.UNet2DModel", folder="unet"),
    )
    write_manifest(folder, manifest)
    return folder


SMALL = {
    "block_out_channels": (32,),
    "down_block_types": ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",),
    "add_attention": False,
}


def export_tiny(folder: Path) -> None:
    from redif_sdk.export import export

    export(build_student(folder))


def export_plain(folder: Path) -> None:
    from redif_sdk.export import export

    export(build_student(folder, classes=None, channels_out=8, **SMALL))


def export_full(folder: Path) -> None:
    from redif_sdk.export import export

    build_student(folder, **SMALL)
    export(folder, precisions=["fp32", "fp16", "bf16", "int8"], batches=(1, 3), sizes=[(28, 28), (36, 28)])


@pytest.fixture(scope="session")
def bare_student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student without graphs, of the shipped teacher's kind. Read only: shared by the session."""
    return build_student(tmp_path_factory.mktemp("bare") / "tiny")


@pytest.fixture(scope="session")
def tiny_student() -> Path:
    """The same student, exported to ONNX. Read only: shared by all workers."""
    return made("tiny", export_tiny)


@pytest.fixture(scope="session")
def plain_student() -> Path:
    """An exported unconditional student with an even smaller network that returns 2C channels. Read only."""
    return made("plain", export_plain)


@pytest.fixture(scope="session")
def full_student() -> Path:
    """A class-conditional student exported in every precision, with free sizes. Read only: shared by all workers."""
    return made("full", export_full)


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[[Path], Path]:
    """Copies a shared student into the test's own folder, where it may be altered."""

    def copy(student: Path) -> Path:
        return Path(shutil.copytree(student, tmp_path / student.name))

    return copy


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small real teacher: a diffusers folder with its own facts beside it."""
    import torch
    from diffusers import DDIMPipeline, UNet2DModel

    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
        num_class_embeds=4,  # the last is "no class"
    )
    scheduler = build_scheduler()
    folder = tmp_path_factory.mktemp("teacher") / "small"
    DDIMPipeline(unet, scheduler).save_pretrained(folder)
    about = {"name": "small", "licence": "MIT", "num_classes": 3, "class_names": ["a", "b", "c"], "null_class": 3}
    (folder / "redif_teacher.json").write_text(json.dumps({**about, "num_inference_steps": 6, "pixel_shuffle": 2}))
    return folder
