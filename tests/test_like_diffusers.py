"""What people who come from diffusers write: its arguments work, or say what to write instead."""

from __future__ import annotations

import asyncio
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import redif_sdk
from redif_sdk import FastPipeline, PipelineOutput
from redif_sdk.errors import InvalidRequest, RuntimeUnavailable
from redif_sdk.images import to_uint8
from redif_sdk.sampling.noise import noise as draw

ASKED: dict[str, Any] = {"class_labels": [0, 3], "seed": 5}


@pytest.fixture(scope="module")
def pipe(full_student: Path) -> FastPipeline:
    return FastPipeline.from_pretrained(full_student, runtime="onnxruntime", num_threads=1)


def test_output_types_are_the_same_images(pipe: FastPipeline) -> None:
    plain = pipe(**ASKED, output_type="uint8").images
    tensor = pipe(**ASKED, output_type="pt").images
    assert isinstance(tensor, torch.Tensor)
    assert tensor.dtype == torch.float32
    assert np.array_equal((tensor * 255).round().permute(0, 2, 3, 1).numpy().astype(np.uint8), plain)
    latents = pipe(**ASKED, output_type="latent").images
    decoded = to_uint8(latents, pipe.manifest.postprocess)
    assert np.abs(decoded.astype(int) - plain.astype(int)).max() <= 1
    with pytest.raises(InvalidRequest, match="use one of pil, np, uint8, pt, latent"):
        pipe(**ASKED, output_type="webp")


def test_a_generator_is_refused_by_what_to_give_instead(pipe: FastPipeline) -> None:
    generator = torch.Generator().manual_seed(5)
    with pytest.raises(InvalidRequest, match=r"give seed=.*latents=torch.randn\(shape, generator=generator\)"):
        pipe(**ASKED, generator=generator)
    latents = pipe.manifest.latents
    drawn = torch.randn(2, latents.channels, latents.height, latents.width, generator=generator)
    images = pipe(class_labels=[0, 3], latents=drawn, seed=5, output_type="uint8").images
    assert images.shape[0] == 2
    own = draw([(5, 0), (5, 1)], drawn.shape[1:])[0]
    same = pipe(class_labels=[0, 3], latents=own, seed=5, output_type="uint8").images
    assert np.array_equal(same, pipe(**ASKED, output_type="uint8").images)


def test_callbacks_are_given_the_latents_alone(pipe: FastPipeline) -> None:
    seen = []
    pipe(**ASKED, callback_on_step_end=lambda *a: seen.append(a[3]), callback_on_step_end_tensor_inputs=["latents"])
    assert all(set(tensors) == {"latents"} for tensors in seen)
    with pytest.raises(InvalidRequest, match="the latents alone, not prompt_embeds"):
        pipe(**ASKED, callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"])


@pytest.mark.parametrize("dtype", [torch.float32, "float32"])
def test_a_dtype_is_a_precision(full_student: Path, dtype: Any) -> None:
    loaded = FastPipeline.from_pretrained(full_student, runtime="onnxruntime", torch_dtype=dtype)
    assert loaded.runtime_info["precision"] == "fp32"
    for wrong in (torch.float64, torch.int8):
        with pytest.raises(InvalidRequest, match="float16 is precision=fp16"):
            FastPipeline.from_pretrained(full_student, torch_dtype=wrong)
    with pytest.raises(InvalidRequest, match="give precision alone"):
        FastPipeline.from_pretrained(full_student, torch_dtype=torch.float16, precision="fp32")


def test_a_closed_pipeline_says_so(full_student: Path) -> None:
    with FastPipeline.from_pretrained(full_student, runtime="onnxruntime") as loaded:
        assert re.fullmatch(
            r"<FastPipeline tiny: class-conditional, [\d, ]+ steps, onnxruntime fp32 on cpu>", repr(loaded)
        )
        assert isinstance(loaded(**ASKED), PipelineOutput)
    for call in (lambda: loaded(**ASKED), lambda: list(loaded.stream(class_labels=1, seed=1))):
        with pytest.raises(RuntimeUnavailable, match="was closed; load it again"):
            call()
    loaded.close()
    assert "onnxruntime fp32" in repr(loaded)
    assert redif_sdk.PipelineOutput is PipelineOutput


def test_an_event_loop_goes_on_meanwhile(pipe: FastPipeline) -> None:
    async def both() -> tuple[PipelineOutput, int]:
        ticks, call = 0, asyncio.ensure_future(pipe.agenerate(**ASKED, output_type="uint8", callback_on_step_end=slow))
        while not call.done():
            await asyncio.sleep(0.005)
            ticks += 1
        return await call, ticks

    def slow(*_: Any) -> None:
        time.sleep(0.05)

    out, ticks = asyncio.run(both())
    assert np.array_equal(out.images, pipe(**ASKED, output_type="uint8", callback_on_step_end=lambda *_: None).images)
    assert ticks > 3
