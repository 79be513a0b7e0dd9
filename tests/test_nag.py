"""Negative prompts by normalised attention guidance: the paper's equations, the graph, and what a caller sees of it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pipelines
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made_once import made
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

from redif_sdk import FastPipeline
from redif_sdk.artifact.folder import StudentFolder, write_manifest
from redif_sdk.cli.main import app
from redif_sdk.distill import import_pipeline
from redif_sdk.errors import InvalidRequest, UnsupportedModel
from redif_sdk.export import export, store
from redif_sdk.models.nag import ALPHA, TAU, negatives, normalised_guidance

PROMPTS = pipelines.PROMPTS


def make_distilled(folder: Path) -> None:
    """A student as `distill` leaves it: no guidance."""
    import_pipeline(pipelines.stable_diffusion(**pipelines.ONE_BLOCK), folder, [2], prompts=PROMPTS, guidance_scale=1.0)
    manifest = StudentFolder(folder).manifest
    network = manifest.network.model_copy(update={"guidance": None})
    write_manifest(folder, manifest.model_copy(update={"network": network}))
    export(folder, batches=(1, 3), nag=True)


@pytest.fixture(scope="module")
def student() -> Path:
    """A student of one call a step with the graph "nag". Read only."""
    return made("nag", make_distilled)


@pytest.fixture(scope="module", params=["onnxruntime", "openvino"])
def pipe(request: pytest.FixtureRequest, student: Path) -> FastPipeline:
    return FastPipeline.from_pretrained(student, runtime=request.param, num_threads=1)


# ---------------------------------------------------------------- the equations


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 1000), st.floats(1.01, 20))
def test_tokens_are_extrapolated_and_their_norm_is_bounded(seed: int, scale: float) -> None:
    z, negative = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(seed))
    found = normalised_guidance(z, negative, torch.full((3,), scale))
    for image in range(3):
        for token in range(4):
            a, b = z[image, token].double(), negative[image, token].double()
            g = scale * a - (scale - 1) * b
            ratio = g.abs().sum() / a.abs().sum()
            g = g * min(float(ratio), TAU) / ratio
            torch.testing.assert_close(found[image, token].double(), ALPHA * g + (1 - ALPHA) * a, rtol=1e-4, atol=1e-5)


def test_a_scale_of_one_and_an_equal_negative_change_nothing() -> None:
    z, negative = torch.randn(2, 3, 4, 5)
    assert torch.equal(normalised_guidance(z, negative, torch.ones(3)), z)
    torch.testing.assert_close(normalised_guidance(z, z, torch.full((3,), 9.0)), z)


class ByHand:
    """The reference: softmax of products, written out."""

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, **_: Any) -> Tensor:
        read = []
        for states in encoder_hidden_states.chunk(2, dim=1):
            rows = []
            for x, context in zip(hidden_states, states, strict=True):
                q, k, v = attn.to_q(x), attn.to_k(context), attn.to_v(context)
                width = q.shape[1] // attn.heads
                heads = [slice(h * width, (h + 1) * width) for h in range(attn.heads)]
                rows.append(torch.cat([(q[:, h] @ k[:, h].T / width**0.5).softmax(1) @ v[:, h] for h in heads], 1))
            read.append(torch.stack(rows))
        z = normalised_guidance(read[0], read[1], torch.full((len(hidden_states),), self.scale))
        return attn.to_out[0](z)  # type: ignore[no-any-return]


def test_the_network_is_the_reference() -> None:
    unet = pipelines.stable_diffusion(**pipelines.ONE_BLOCK).unet
    x, t, states = torch.randn(2, 4, 8, 8), torch.tensor([400.0, 20.0]), torch.randn(2, 24, 32)
    before = dict(unet.attn_processors)
    with torch.no_grad():
        with negatives(unet) as attention:
            attention.scale = torch.full((2,), 4.0)
            found = unet(x, t, encoder_hidden_states=states).sample
        assert dict(unet.attn_processors) == before
        crossing = {name: ByHand(4.0) if "attn2" in name else one for name, one in before.items()}
        unet.set_attn_processor(crossing)
        expected = unet(x, t, encoder_hidden_states=states).sample
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [pipelines.flux, pipelines.stable_diffusion_3, pipelines.pixart])
def test_other_families_are_refused(make: Any) -> None:
    message = "cannot take negative prompts by NAG; UNet2DConditionModel"
    with pytest.raises(UnsupportedModel, match=message), negatives(make().transformer):
        pass


# ---------------------------------------------------------------- the graph


def test_the_graph_is_valid_and_in_the_gate(student: Path) -> None:
    manifest = StudentFolder(student).manifest
    graph = manifest.graph("nag", "fp32")
    assert graph is not None
    onnx.checker.check_model(onnx.load(student / graph.file), full_check=True)
    assert [spec.name for spec in graph.inputs][-2:] == ["null.encoder_hidden_states", "nag_scale"]
    rows = [row for row in manifest.verification if row["component"] == "nag"]
    assert {row["runtime"] for row in rows} >= {"onnxruntime", "openvino"}
    assert all(row["passed"] for row in rows)


def test_weights_beside_the_denoiser_are_not_written_again(
    student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "LARGEST_FILE", 1000)
    folder = Path(shutil.copytree(student, tmp_path / "student"))
    manifest = export(folder, batches=(1,), nag=True)
    denoiser, nag = manifest.graph("denoiser", "fp32"), manifest.graph("nag", "fp32")
    assert denoiser is not None
    assert nag is not None
    assert set(denoiser.data) <= set(nag.data)
    own = [folder / file for file in nag.data if file not in denoiser.data]
    assert sum(file.stat().st_size for file in own) < (folder / denoiser.data[0]).stat().st_size / 10
    images = [
        FastPipeline.from_pretrained(path, runtime="onnxruntime")(PROMPTS[0], seed=0, negative_prompt="blue").images[0]
        for path in (folder, student)
    ]
    assert np.abs(np.asarray(images[0], int) - np.asarray(images[1], int)).max() <= 1


def test_students_that_have_no_use_for_it_are_refused(tmp_path: Path, tiny_student: Path) -> None:
    with pytest.raises(UnsupportedModel, match="takes no prompts, so it has no use for negative ones"):
        export(Path(shutil.copytree(tiny_student, tmp_path / "classes")), nag=True)
    import_pipeline(pipelines.stable_diffusion(**pipelines.ONE_BLOCK), tmp_path / "guided", [2], prompts=PROMPTS)
    with pytest.raises(UnsupportedModel, match="takes negative prompts by its guidance"):
        export(tmp_path / "guided", nag=True)


# ---------------------------------------------------------------- what a caller sees


def test_a_negative_prompt_moves_the_image(pipe: FastPipeline) -> None:
    asked = {"seed": 1, "output_type": "uint8"}
    plain = pipe(PROMPTS[:2], **asked).images
    away = pipe(PROMPTS[:2], negative_prompt=["blue", "old"], nag_scale=6, **asked)
    assert away.runtime_info["component"] == "nag"
    assert not np.array_equal(away.images, plain)
    nothing = pipe(PROMPTS[:2], negative_prompt="blue", nag_scale=1, **asked).images
    assert np.abs(nothing.astype(int) - plain.astype(int)).max() <= 1
    alone = pipe(PROMPTS[1], negative_prompt="old", nag_scale=6, seed=[(1, 1)], output_type="uint8").images
    assert np.abs(alone.astype(int) - away.images[1:].astype(int)).max() <= 1
    encoded = pipe.encode_prompt(["blue", "old"])["encoder_hidden_states"]
    same = pipe(PROMPTS[:2], negative_prompt_embeds=encoded, nag_scale=6, **asked).images
    assert np.array_equal(same, away.images)


def test_scales_that_do_nothing_are_refused(pipe: FastPipeline) -> None:
    with pytest.raises(InvalidRequest, match="nag_scale=3 has no effect: give a negative prompt"):
        pipe(PROMPTS[0], nag_scale=3)
    with pytest.raises(InvalidRequest, match="nag_scale is -1; give a number from 0 on"):
        pipe(PROMPTS[0], negative_prompt="a", nag_scale=-1)
    with pytest.raises(InvalidRequest, match=r"guidance_scale=3\.0 is not supported"):
        pipe(PROMPTS[0], negative_prompt="a", guidance_scale=3.0)


def test_the_command_line_and_the_mark(student: Path, tmp_path: Path) -> None:
    run, out = CliRunner(), tmp_path / "out.png"
    asked = [
        "generate",
        str(student),
        PROMPTS[0],
        "--seed",
        "3",
        "--negative-prompt",
        "blue",
        "-o",
        str(out),
        "--quiet",
    ]
    result = run.invoke(app, [*asked, "--nag-scale", "4"])
    assert result.exit_code == 0, result.output
    expected = FastPipeline.from_pretrained(student)(PROMPTS[0], seed=3, negative_prompt="blue", nag_scale=4)
    assert np.array_equal(np.asarray(Image.open(out)), np.asarray(expected.images[0]))
    again = run.invoke(app, ["whence", str(out), "--student", str(student)])
    assert again.exit_code == 0, again.output
