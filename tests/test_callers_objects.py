"""What the caller gives is never changed: weights, flags, device, dtype, scheduler, tokenizer, adapters, settings."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pipelines
import pytest
import torch
from blackbox import CONFIG, black_box
from networks import Tiny
from pipelines import UNET_LAYERS, lora, pixels
from torch import nn

from redif_sdk.distill import Teacher, distill, import_pipeline
from redif_sdk.distill.evaluation.examine import examine_teacher

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::redif_sdk.errors.WorseThanStart"),
]


def module_state(module: nn.Module) -> dict[str, Any]:
    """Everything of a network that a caller could notice."""
    found: dict[str, Any] = {}
    for key, part in module.named_modules():
        hooks = [len(vars(part)[name]) for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")]
        plain = {name: value for name, value in vars(part).items() if isinstance(value, bool | int | float | str)}
        found[f"module {key}"] = (id(part), type(part), sorted(vars(part)), hooks, plain)
    for key, value in (*module.named_parameters(), *module.named_buffers()):
        content = hashlib.sha256(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        flags = (value.requires_grad, value.grad is None, value.dtype, value.device, tuple(value.shape))
        found[f"tensor {key}"] = (id(value), value.data_ptr(), content.hexdigest(), *flags)
    config = getattr(module, "config", None)
    found["config"] = str(config)
    return found


def state(pipeline: Any) -> dict[str, Any]:
    """A pipeline object's whole state, by component."""
    found: dict[str, Any] = {"attributes": {name: id(value) for name, value in vars(pipeline).items()}}
    for name, part in vars(pipeline).items():
        if isinstance(part, nn.Module):
            found[name] = module_state(part)
        elif hasattr(part, "backend_tokenizer"):
            found[name] = (part.backend_tokenizer.to_str(), part.model_max_length, part.padding_side)
        elif "scheduler" in name:
            found[name] = {key: str(value) for key, value in vars(part).items()}
        else:
            found[name] = str(part)
    return found


def as_a_caller_has_it(pipeline: Any) -> Any:
    """In training mode, some weights frozen, with gradients, a scheduler in the middle of a run, an adapter."""
    for part in (value for value in vars(pipeline).values() if isinstance(value, nn.Module)):
        part.train()
        for index, weight in enumerate(part.parameters()):
            weight.requires_grad_(bool(index % 2))
        first = next(iter(part.parameters()))
        first.grad = torch.ones_like(first)
    pipeline.scheduler.set_timesteps(
        3, **({"mu": 0.5} if pipeline.scheduler.config.get("use_dynamic_shifting") else {})
    )
    return pipeline


def with_adapter() -> Any:
    pipeline = pipelines.stable_diffusion()
    lora(pipeline.unet, UNET_LAYERS)
    return pipeline


def in_bfloat16() -> Any:
    return pipelines.stable_diffusion(**pipelines.ONE_BLOCK).to(torch.bfloat16)


SIZE = {"height": 16, "width": 16}
KINDS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "pixels": (pixels, {}),
    "sd-with-adapter": (with_adapter, {"prompts": pipelines.PROMPTS}),
    "sd-bfloat16": (in_bfloat16, {"prompts": pipelines.PROMPTS}),
    "sdxl": (pipelines.stable_diffusion_xl, {"prompts": pipelines.PROMPTS}),
    "sd3": (pipelines.stable_diffusion_3, {"prompts": pipelines.PROMPTS}),
    "flux": (pipelines.flux, {"prompts": pipelines.PROMPTS, **SIZE}),
    "dit": (pipelines.dit, {}),
}


#: These are called as the others are.
SLOW = {"sdxl", "sd3", "dit"}


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=[pytest.mark.slow] * (kind in SLOW)) for kind in KINDS])
def test_a_pipeline_is_as_it_was(kind: str, tmp_path: Path) -> None:
    make, options = KINDS[kind]
    pipeline = as_a_caller_has_it(make())
    before = state(pipeline)
    import_pipeline(pipeline, tmp_path / "student", [2], **options)
    assert state(pipeline) == before, "import"
    teacher = Teacher.from_diffusers(pipeline, num_inference_steps=2, **options)
    examine_teacher(teacher, config=CONFIG, device="cpu")
    assert state(pipeline) == before, "doctor"
    distill(teacher, CONFIG, progress=False).save_pretrained(tmp_path / "distilled")
    assert state(pipeline) == before, "distill"


@pytest.mark.parametrize("compiled", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_student_and_an_exported_module_are_as_they_were(compiled: bool, tmp_path: Path) -> None:
    from redif_sdk.export import export

    network: Any = Tiny(0.5).train()
    network.body[0].bias.requires_grad_(False)
    given = torch.compile(network, backend="eager") if compiled else network
    before = module_state(network)
    student = distill(black_box(), CONFIG, student=given, progress=False)
    student.save_pretrained(tmp_path / "student")
    assert module_state(network) == before
    again = distill(black_box(given), CONFIG, start=student, progress=False)
    export(tmp_path / "student", network=given, batches=(1,), runtimes=["onnxruntime"])
    assert module_state(network) == before
    own = module_state(student.inner)
    assert again.inner is not student.inner
    assert module_state(student.inner) == own
