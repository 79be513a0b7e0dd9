"""The contenders of `redif bench` that need torch: plain and compiled torch, diffusers, and the teacher in diffusers.

They sample the student as its own card does, or as its step table says, and are given what serves them best. How they
are timed and compared stands in `redif_sdk.bench.rounds`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from redif_sdk.artifact.records import Postprocess
from redif_sdk.bench.rounds import Contender, Fresh, Generate, Prepared, Workload
from redif_sdk.distill.compute.device import cpu_has_bf16
from redif_sdk.distill.teachers.base import Teacher
from redif_sdk.errors import RuntimeUnavailable, first_line
from redif_sdk.images import scale_and_offset
from redif_sdk.models.denoiser import Denoiser, guided
from redif_sdk.runtimes import parse_device
from redif_sdk.sampling.loop import run_steps

__all__ = ["NAMES", "contenders", "gemm_peak", "teacher_contender"]

NAMES = ("torch-eager", "torch-compile", "diffusers-eager", "diffusers-pipeline")

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
CLASS_PATH = "UNet2DModel"
COMPILED_RUNS = 1  # of a fresh process that compiles first

#: (x, t, condition) -> f, with t a number of the schedule as a scalar tensor.
Network = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def contenders(precisions: Sequence[str]) -> list[Contender]:
    """Torch as it is and compiled, in each of `precisions` that it computes in, and diffusers' stock classes."""
    found = []
    for precision in precisions:
        if precision in DTYPES:
            found += [_torch(precision, compiled=False), _torch(precision, compiled=True)]
    stock = Contender("diffusers-eager", "torch", "fp32", _stock, _stock_fresh)
    return [*found, stock, Contender("diffusers-pipeline", "torch", "fp32", _pipeline)]


def _device(work: Workload) -> torch.device:
    """Torch's device for the workload's, with its threads set. RuntimeUnavailable if it is not there."""
    kind, index = parse_device(work.device)
    if kind == "cuda" and not torch.cuda.is_available():
        raise RuntimeUnavailable(f"torch {torch.__version__} finds no CUDA device; use --device cpu")
    if kind not in ("cpu", "cuda"):
        raise RuntimeUnavailable(f"torch is not measured on {work.device}; use cpu or cuda")
    if work.num_threads is not None:
        torch.set_num_threads(work.num_threads)
    return torch.device(f"cuda:{index}" if kind == "cuda" else "cpu")


def _check_precision(precision: str, device: torch.device) -> None:
    """RuntimeUnavailable where the processor would emulate the precision: that would be no contender."""
    if precision == "bf16" and device.type == "cpu" and not cpu_has_bf16():
        raise RuntimeUnavailable("this processor has no AMX that torch can use; its bf16 would be slower than fp32")
    if precision == "fp16" and device.type == "cpu":
        raise RuntimeUnavailable("torch computes fp16 slowly on processors; it is measured on GPUs")


def _load(work: Workload, precision: str) -> tuple[Any, torch.device]:
    """The student's network for inference, and where it is."""
    from diffusers import UNet2DModel

    network, device = work.manifest.network, _device(work)
    if network.class_path.rpartition(".")[2] != CLASS_PATH:
        raise RuntimeUnavailable(f"{work.manifest.name}'s network is a {network.class_path}, not a {CLASS_PATH}")
    _check_precision(precision, device)
    unet = UNet2DModel.from_pretrained(
        work.student.path / network.folder,
        use_safetensors=True,
        local_files_only=True,
        torch_dtype=DTYPES[precision],
    )
    return unet.to(device).eval().requires_grad_(False), device


def _to_images(x: Tensor, postprocess: Postprocess) -> NDArray[np.uint8]:
    """Latents to images, uint8 (B, H, W, C): the arithmetic of `redif_sdk.images.to_uint8`."""
    if postprocess.pixel_shuffle > 1:
        x = F.pixel_shuffle(x, postprocess.pixel_shuffle)
    scale, offset = (float(value) for value in scale_and_offset(postprocess))
    levels: NDArray[np.uint8] = (
        (x * scale + offset).clamp(0, 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    )
    return levels


def _inputs(
    noise: NDArray[np.float32], labels: NDArray[np.int64] | None, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    moved = torch.from_numpy(noise).to(device)
    return moved, None if labels is None else torch.from_numpy(labels).to(device)


# ---------------------------------------------------------------- torch, by the step table


def _torch(precision: str, *, compiled: bool) -> Contender:
    """The network in a loop of its own: less than diffusers' scheduler does, and so the fastest that torch can be."""

    def prepare(work: Workload) -> Prepared:
        unet, device = _load(work, precision)
        network = Denoiser(unet, diffusers_call=True)
        call: Any = torch.compile(network, dynamic=False) if compiled else network
        return Prepared(_checked(_by_table(work, call, device, DTYPES[precision])), "torch", precision)

    def fresh(work: Workload) -> Fresh:
        _check_precision(precision, _device(work))
        asked = _asked(work) | {"compile": compiled, "dtype": str(DTYPES[precision]).rpartition(".")[2]}
        return Fresh(TORCH_PROGRAM, asked, COMPILED_RUNS if compiled else None)

    return Contender("torch-compile" if compiled else "torch-eager", "torch", precision, prepare, fresh)


def _by_table(work: Workload, network: Network, device: torch.device, dtype: torch.dtype) -> Generate:
    """The step table's loop around `network`; the state stays in float32, whatever the network computes in."""
    table, guidance = work.table, work.manifest.network.guidance
    times = [torch.full((work.batch,), float(t), device=device) for t in table.timesteps]

    def predict(x: Tensor, t: Tensor, condition: Tensor | None) -> Tensor:
        return network(x.to(dtype), t, condition).float()

    @torch.inference_mode()
    def generate(noise: NDArray[np.float32], labels: NDArray[np.int64] | None) -> NDArray[np.uint8]:
        z, condition = _inputs(noise, labels, device)

        def clean(k: int, x: Tensor) -> Tensor:
            x0: Tensor = table.clean(k, x, guided(predict, guidance, x, times[k], condition))
            return x0

        x = run_steps(table, table.start(z[0]), z, clean)
        return _to_images(x, work.manifest.postprocess)

    return generate


def _checked(generate: Generate) -> Generate:
    """The same, its first call's failure to compile told as RuntimeUnavailable."""
    from torch._dynamo.exc import TorchDynamoException

    def guarded(noise: NDArray[np.float32], labels: NDArray[np.int64] | None) -> NDArray[np.uint8]:
        try:
            return generate(noise, labels)
        except TorchDynamoException as error:
            raise RuntimeUnavailable(
                f"torch.compile failed: {first_line(error, None)}; it needs a C++ compiler"
            ) from error

    return guarded


# ---------------------------------------------------------------- diffusers' stock classes


def _scheduler(work: Workload) -> Any:
    """The student's own scheduler, set to the table's times as the student's card sets it.

    RuntimeUnavailable where no setting of it samples the table.
    """
    import diffusers

    folder = work.student.path / "scheduler"
    name = json.loads((folder / "scheduler_config.json").read_text())["_class_name"]
    scheduler = getattr(diffusers, name).from_pretrained(folder)
    _set_times(scheduler, work)
    times = [float(t) for t in scheduler.timesteps]
    if work.table.noise_slices > 1 or times != [float(t) for t in work.table.timesteps]:
        raise RuntimeUnavailable(f"diffusers' {name} does not sample the table of {work.steps} steps")
    return scheduler


def _set_times(scheduler: Any, work: Workload) -> None:
    if type(scheduler).__name__ == "DPMSolverMultistepScheduler":
        scheduler.set_timesteps(timesteps=[round(float(t)) for t in work.table.timesteps])
    else:
        scheduler.set_timesteps(work.steps)


def _stock(work: Workload) -> Prepared:
    """UNet2DModel and the student's scheduler, called as the student's card calls them."""
    unet, device = _load(work, "fp32")
    scheduler, guidance = _scheduler(work), work.manifest.network.guidance
    network = Denoiser(unet, diffusers_call=True, guidance=guidance)

    @torch.no_grad()
    def generate(noise: NDArray[np.float32], labels: NDArray[np.int64] | None) -> NDArray[np.uint8]:
        z, condition = _inputs(noise, labels, device)
        _set_times(scheduler, work)
        x = z[0] * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            f = network(x, t.expand(len(x)).to(device), condition)
            x = scheduler.step(f, t, x).prev_sample
        return _to_images(x, work.manifest.postprocess)

    return Prepared(generate, "torch", "fp32")


def _stock_fresh(work: Workload) -> Fresh:
    return Fresh(DIFFUSERS_PROGRAM, _asked(work))


def _asked(work: Workload) -> dict[str, Any]:
    guidance = work.manifest.network.guidance
    return {
        "unet": str(work.student.path / work.manifest.network.folder),
        "scheduler": str(work.student.path / "scheduler"),
        "times": [float(t) for t in work.table.timesteps],
        "shuffle": work.manifest.postprocess.pixel_shuffle,
        "value_range": work.manifest.postprocess.value_range,
        "guidance": None if guidance is None else [guidance.scale, guidance.null_class],
        "threads": work.num_threads,
        "device": work.device,
    }


def _pipeline(work: Workload) -> Prepared:
    """DDIMPipeline, diffusers' own for an unconditional UNet2DModel; there is none for a class-conditional one.

    It draws its starting noise itself. Here it is handed the workload's, so that its images can be compared.
    """
    from diffusers import DDIMPipeline
    from diffusers.pipelines.ddim import pipeline_ddim

    if work.manifest.condition is not None:
        raise RuntimeUnavailable("diffusers has no pipeline for a class-conditional UNet2DModel")
    unet, device = _load(work, "fp32")
    pipe = DDIMPipeline(unet, _scheduler(work)).to(device)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler.set_timesteps(work.steps)
    times = [float(t) for t in pipe.scheduler.timesteps]
    if work.manifest.postprocess.pixel_shuffle > 1 or times != [float(t) for t in work.table.timesteps]:
        raise RuntimeUnavailable("diffusers' DDIMPipeline does not sample this student's table")
    drawn = pipeline_ddim.randn_tensor

    def generate(noise: NDArray[np.float32], labels: NDArray[np.int64] | None) -> NDArray[np.uint8]:
        pipeline_ddim.randn_tensor = lambda *_, **__: torch.from_numpy(noise[0]).to(device)
        try:
            made = pipe(batch_size=noise.shape[1], num_inference_steps=work.steps, output_type="np")
        finally:
            pipeline_ddim.randn_tensor = drawn
        levels: NDArray[np.uint8] = np.rint(made.images * 255).astype(np.uint8)
        return levels

    return Prepared(generate, "torch", "fp32")


# ---------------------------------------------------------------- the teacher


def teacher_contender(source: str) -> Contender:
    """The teacher at its own number of steps: diffusers' UNet2DModel and DDIMScheduler, guided where it is.

    Raises InvalidRequest or UnsupportedModel for a teacher that cannot be loaded.
    """
    teacher = Teacher.load(source)
    steps = teacher.num_inference_steps

    def prepare(work: Workload) -> Prepared:
        device = _device(work)
        if teacher.folder is None:
            raise RuntimeUnavailable(f"the teacher {teacher.name} has no folder that diffusers could load")
        return Prepared(_teacher_sampler(teacher, work, device), "torch", "fp32")

    def fresh(work: Workload) -> Fresh:
        guidance = teacher.guidance
        asked = {
            "unet": str(teacher.folder / "unet") if teacher.folder else "",
            "scheduler": str(teacher.folder / "scheduler") if teacher.folder else "",
            "steps": steps,
            "times": None,
            "guidance": None if guidance is None else [guidance.scale, guidance.null_class],
            "shuffle": teacher.postprocess.pixel_shuffle,
            "value_range": teacher.postprocess.value_range,
        }
        return Fresh(DIFFUSERS_PROGRAM, _asked(work) | asked)

    return Contender(
        "teacher",
        "torch",
        "fp32",
        prepare,
        fresh,
        compared=False,
        steps=steps,
        network_calls=steps * teacher.calls_per_step,
        required=True,
    )


def _teacher_sampler(teacher: Teacher, work: Workload, device: torch.device) -> Generate:
    from diffusers import DDIMScheduler, UNet2DModel

    assert teacher.folder is not None
    unet = UNet2DModel.from_pretrained(teacher.folder / "unet", use_safetensors=True, local_files_only=True)
    network = Denoiser(unet.to(device).eval().requires_grad_(False), diffusers_call=True, guidance=teacher.guidance)
    scheduler = DDIMScheduler.from_pretrained(teacher.folder / "scheduler")
    start = torch.randn((work.batch, *teacher.shape), generator=torch.Generator().manual_seed(0)).to(device)
    classes = teacher.num_conditions or None

    @torch.no_grad()
    def generate(noise: NDArray[np.float32], labels: NDArray[np.int64] | None) -> NDArray[np.uint8]:
        asked = np.arange(work.batch) if labels is None else labels
        condition = None if classes is None else torch.from_numpy(asked % classes).to(device)
        x = torch.from_numpy(noise[0]).to(device) if noise.shape[1:] == start.shape else start
        scheduler.set_timesteps(teacher.num_inference_steps)
        for t in scheduler.timesteps:
            f = network(x, t.expand(len(x)).to(device), condition)
            x = scheduler.step(f, t, x).prev_sample
        return _to_images(x, teacher.postprocess)

    return generate


def gemm_peak(precision: str, num_threads: int | None = None) -> float | None:
    """Operations a second of the best of 18 products of square matrices by torch; None where it has no fast ones."""
    if precision == "bf16" and not cpu_has_bf16():
        return None
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    best = 0.0
    for size in (1536, 1792, 2048):
        a, b = (torch.ones((size, size), dtype=DTYPES[precision]) for _ in range(2))
        out = torch.empty_like(a)
        for _ in range(6):
            start = time.perf_counter()
            torch.matmul(a, b, out=out)
            best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


# ---------------------------------------------------------------- the same in a fresh process

# What both programs begin with: the network and its inputs, as the student's card has them.
_HEAD = """
import json, sys
asked = json.loads(sys.argv[1])
import numpy as np
import torch
from diffusers import UNet2DModel
if asked["threads"] is not None:
    torch.set_num_threads(asked["threads"])
inputs = {name: torch.from_numpy(value) for name, value in np.load(asked["inputs"]).items()}
dtype = getattr(torch, asked.get("dtype", "float32"))
unet = UNet2DModel.from_pretrained(asked["unet"], torch_dtype=dtype).to(asked["device"])
labels = inputs.get("class_labels")
labels = None if labels is None else labels.to(asked["device"])
x = (inputs["init_scale"] * inputs["noise"][0]).to(asked["device"])

def network(x, t):
    if labels is None:
        return unet(x, t).sample[:, : x.shape[1]]
    if asked["guidance"] is None:
        return unet(x, t, class_labels=labels).sample[:, : x.shape[1]]
    scale, null = asked["guidance"]
    both = torch.cat([labels, torch.full_like(labels, null)])
    f, unasked = unet(torch.cat([x, x]), t, class_labels=both).sample[:, : x.shape[1]].chunk(2)
    return unasked + scale * (f - unasked)
"""

_TAIL = """
if asked["shuffle"] > 1:
    x = torch.nn.functional.pixel_shuffle(x, asked["shuffle"])
low, high = asked["value_range"]
levels = ((x.clamp(low, high) - low) * (255 / (high - low))).round().to(torch.uint8)
images = levels.permute(0, 2, 3, 1).cpu().numpy()
"""

DIFFUSERS_PROGRAM = (
    _HEAD
    + """
import diffusers
name = json.load(open(asked["scheduler"] + "/scheduler_config.json"))["_class_name"]
scheduler = getattr(diffusers, name).from_pretrained(asked["scheduler"])
if asked["times"] is None:
    scheduler.set_timesteps(asked["steps"])
elif name == "DPMSolverMultistepScheduler":
    scheduler.set_timesteps(timesteps=[round(t) for t in asked["times"]])
else:
    scheduler.set_timesteps(len(asked["times"]))
for t in scheduler.timesteps:
    with torch.no_grad():
        x = scheduler.step(network(x, t), t, x).prev_sample
"""
    + _TAIL
)

TORCH_PROGRAM = (
    _HEAD
    + """
if asked["compile"]:
    unet = torch.compile(unet, dynamic=False)
noise = inputs["noise"].to(asked["device"])
with torch.inference_mode():
    for k, (t, p, q, r, s, c) in enumerate(inputs["table"].tolist()):
        f = network(x.to(dtype), torch.tensor(t, device=x.device)).float()
        x = r * (p * x + q * f) + s * x + c * noise[min(k + 1, len(noise) - 1)]
"""
    + _TAIL
)
