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
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from diffusers.models.normalization import AdaLayerNormContinuous
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
UNET_ALPHA = ALPHA["UNet2DConditionModel"]


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
    found = normalised_guidance(z, negative, torch.full((3,), scale), 0.3)
    for image in range(3):
        for token in range(4):
            a, b = z[image, token].double(), negative[image, token].double()
            g = scale * a - (scale - 1) * b
            ratio = g.abs().sum() / a.abs().sum()
            g = g * min(float(ratio), TAU) / ratio
            torch.testing.assert_close(found[image, token].double(), 0.3 * g + 0.7 * a, rtol=1e-4, atol=1e-5)


def test_a_scale_of_one_and_an_equal_negative_change_nothing() -> None:
    z, negative = torch.randn(2, 3, 4, 5)
    assert torch.equal(normalised_guidance(z, negative, torch.ones(3), 0.5), z)
    torch.testing.assert_close(normalised_guidance(z, z, torch.full((3,), 9.0), 0.5), z)


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
        z = normalised_guidance(read[0], read[1], torch.full((len(hidden_states),), self.scale), UNET_ALPHA)
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


@pytest.mark.parametrize("make", [pipelines.dit, pipelines.pixart])
def test_other_families_are_refused(make: Any) -> None:
    message = "cannot take negative prompts by NAG; UNet2DConditionModel"
    with pytest.raises(UnsupportedModel, match=message), negatives(make().transformer):
        pass


# ---------------------------------------------------------------- joint attention, written out


def in_heads(projected: Tensor, heads: int, norm: Any) -> Tensor:
    """(T, H d) -> (H, T, d), normalised where the layer does so."""
    found = projected.unflatten(1, (heads, -1)).transpose(0, 1)
    return found if norm is None else norm(found)


def turned(heads: Tensor, rope: Any) -> Tensor:
    """Rotary embedding of (H, T, d): neighbours are a complex number."""
    if rope is None:
        return heads
    even, odd = heads[..., 0::2], heads[..., 1::2]
    return heads * rope[0] + torch.stack([-odd, even], -1).flatten(-2) * rope[1]


def softmax_of(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(H, T, d) -> (T, H d)."""
    return ((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v).transpose(0, 1).flatten(1)


def attended(attn: Any, image: Tensor, text: Tensor, rope: Any = None) -> tuple[Tensor, Tensor]:
    """What image (N, D) and text (L, D) read from each other in a block of two streams, before they are projected."""
    n, made = attn.heads, {}
    for kind, norm in (("q", "norm_q"), ("k", "norm_k"), ("v", "")):
        own = in_heads(getattr(attn, f"to_{kind}")(image), n, getattr(attn, norm, None) if norm else None)
        added = norm.replace("norm_", "norm_added_")
        other = in_heads(getattr(attn, f"add_{kind}_proj")(text), n, getattr(attn, added, None) if norm else None)
        made[kind] = torch.cat([other, own], 1)
    read = softmax_of(turned(made["q"], rope), turned(made["k"], rope), made["v"])
    return read[len(text) :], read[: len(text)]


def modulated(norm: Any, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return norm(x) * (1 + scale) + shift


def two_streams(
    block: Any, image: Tensor, texts: list[Any], temb: list[Tensor], s: float, alpha: float, rope: Any
) -> Any:
    """A block of SD3 or Flux for one image (N, D) and its two texts (L, D)."""
    first = block.norm1(image[None], emb=temb[0])
    normed, gate, shift, scale, gate_ff = (part[0] for part in first[:5])
    read, after = [], []
    for text, emb in zip(texts, temb, strict=True):
        last = isinstance(block.norm1_context, AdaLayerNormContinuous)
        context = block.norm1_context(text[None], emb) if last else block.norm1_context(text[None], emb=emb)
        parts = [context[0]] if last else [part[0] for part in context]
        z, t = attended(block.attn, normed, parts[0], rope)
        read.append(z)
        if last:
            after.append(None)
            continue
        text = text + parts[1] * block.attn.to_add_out(t)
        after.append(text + parts[4] * block.ff_context(modulated(block.norm2_context, text, parts[3], parts[2])))
    z = normalised_guidance(read[0][None], read[1][None], torch.tensor([s]), alpha)[0]
    image = image + gate * block.attn.to_out[0](z)
    if getattr(block, "attn2", None) is not None:
        own, n = block.attn2, block.attn2.heads
        q, k, v = (in_heads(to(first[5][0]), n, norm) for to, norm in (
            (own.to_q, own.norm_q), (own.to_k, own.norm_k), (own.to_v, None)))  # fmt: skip
        image = image + first[6][0] * own.to_out[0](softmax_of(q, k, v))
    return image + gate_ff * block.ff(modulated(block.norm2, image, scale, shift)), after


def sd3_by_hand(network: Any, x: Tensor, t: Tensor, states: list[Tensor], pooled: list[Tensor], s: float) -> Tensor:
    """f (C, H, W) of one image, x (1, C, H, W)."""
    image = network.pos_embed(x)[0]
    temb = [network.time_text_embed(t, one) for one in pooled]
    texts = [network.context_embedder(one)[0] for one in states]
    for block in network.transformer_blocks:
        image, texts = two_streams(block, image, texts, temb, s, ALPHA["SD3Transformer2DModel"], None)
    out = network.proj_out(network.norm_out(image[None], temb[0]))[0]
    side, patch = x.shape[-1] // 2, 2
    return out.view(side, side, patch, patch, -1).permute(4, 0, 2, 1, 3).reshape(-1, 2 * side, 2 * side)


def flux_by_hand(
    network: Any, given: dict[str, Tensor], states: list[Tensor], pooled: list[Tensor], s: float
) -> Tensor:
    """The output (N, D) of one image; ``given``: what Flux's network takes beside the prompt."""
    alpha, length = ALPHA["FluxTransformer2DModel"], states[0].shape[1]
    rope = network.pos_embed(torch.cat([given["txt_ids"], given["img_ids"]]))
    image = network.x_embedder(given["hidden_states"])[0]
    temb = [network.time_text_embed(given["timestep"] * 1000, given["guidance"] * 1000, one) for one in pooled]
    texts = [network.context_embedder(one)[0] for one in states]
    for block in network.transformer_blocks:
        image, texts = two_streams(block, image, texts, temb, s, alpha, rope)
    lanes = [torch.cat([text, image]) for text in texts]
    for block in network.single_transformer_blocks:
        attn, read, normed = block.attn, [], []
        for lane, emb in zip(lanes, temb, strict=True):
            normed.append([part[0] for part in block.norm(lane[None], emb=emb)])
            parts = ((attn.to_q, attn.norm_q), (attn.to_k, attn.norm_k), (attn.to_v, None))
            q, k, v = (in_heads(to(normed[-1][0]), attn.heads, norm) for to, norm in parts)
            read.append(softmax_of(turned(q, rope), turned(k, rope), v))
        z = normalised_guidance(read[0][None, length:], read[1][None, length:], torch.tensor([s]), alpha)[0]
        for place, (lane, own) in enumerate(zip(lanes, normed, strict=True)):
            both = torch.cat([read[place][:length], z])
            wide = block.act_mlp(block.proj_mlp(own[0]))
            lanes[place] = lane + own[1] * block.proj_out(torch.cat([both, wide], 1))
    shown: Tensor = network.proj_out(network.norm_out(lanes[0][None, length:], temb[0]))[0]
    return shown


def stirred(network: Any) -> Any:
    """A network whose last layers are no zeros, and whose biases count."""
    torch.manual_seed(5)
    with torch.no_grad():
        for weight in network.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    return network.eval()


def sd3_network(**more: Any) -> Any:
    config = dict(pipelines.stable_diffusion_3().transformer.config)
    return stirred(SD3Transformer2DModel.from_config({**config, "num_layers": 3, **more}))


@pytest.mark.parametrize("more", [{}, {"qk_norm": "rms_norm", "dual_attention_layers": (0, 1)}], ids=["SD3", "SD3.5"])
def test_sd3_is_the_reference(more: dict[str, Any]) -> None:
    network = sd3_network(**more)
    x, t = torch.randn(2, 16, 8, 8), torch.tensor([400.0, 20.0])
    states, pooled = torch.randn(2, 2, 7, 64), torch.randn(2, 2, 48)
    scales = torch.tensor([4.0, 1.0])
    asked = {"encoder_hidden_states": torch.cat([*states], 1), "pooled_projections": torch.cat([*pooled], 1)}
    with torch.no_grad():
        plain = network(x, states[0], pooled[0], t, return_dict=False)[0]
        with negatives(network) as attention:
            attention.scale = scales
            found = network(hidden_states=x, timestep=t, **asked, return_dict=False)[0]
        for one in (0, 1):
            part = slice(one, one + 1)
            expected = sd3_by_hand(
                network, x[part], t[part], [*states[:, part]], [*pooled[:, part]], float(scales[one])
            )
            torch.testing.assert_close(found[one], expected, rtol=1e-4, atol=1e-4)
        again = network(x, states[0], pooled[0], t, return_dict=False)[0]
    assert torch.equal(plain, again), "the hooks stayed"
    torch.testing.assert_close(found[1], plain[1], rtol=1e-5, atol=1e-5)  # a scale of 1
    assert (found[0] - plain[0]).abs().max() > 1e-3


def test_flux_is_the_reference() -> None:
    config = {**dict(pipelines.flux().transformer.config), "num_layers": 2, "num_single_layers": 2}
    network = stirred(FluxTransformer2DModel.from_config(config))
    rows = torch.tensor([[0.0, row, column] for row in range(2) for column in range(3)])
    given = {
        "hidden_states": torch.randn(2, 6, 16),
        "timestep": torch.tensor([0.4, 0.9]),
        "guidance": torch.tensor([3.5, 2.0]),
        "img_ids": rows,
    }
    states, pooled, scales = torch.randn(2, 2, 5, 32), torch.randn(2, 2, 32), torch.tensor([6.0, 1.0])
    with torch.no_grad():
        own = {"encoder_hidden_states": states[0], "pooled_projections": pooled[0], "txt_ids": torch.zeros(5, 3)}
        plain = network(**given, **own, return_dict=False)[0]
        with negatives(network) as attention:
            attention.scale = scales
            both = {"encoder_hidden_states": torch.cat([*states], 1), "pooled_projections": torch.cat([*pooled], 1)}
            found = network(**given, **both, txt_ids=torch.zeros(10, 3), return_dict=False)[0]
        for one in (0, 1):
            part = slice(one, one + 1)
            alone = {name: value if name == "img_ids" else value[part] for name, value in given.items()}
            alone["txt_ids"] = torch.zeros(5, 3)
            expected = flux_by_hand(network, alone, [*states[:, part]], [*pooled[:, part]], float(scales[one]))
            torch.testing.assert_close(found[one], expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(network(**given, **own, return_dict=False)[0], plain)
    torch.testing.assert_close(found[1], plain[1], rtol=1e-5, atol=1e-5)
    assert (found[0] - plain[0]).abs().max() > 1e-3


JOINT: dict[str, tuple[Any, dict[str, Any]]] = {
    "sd3": (pipelines.stable_diffusion_3, {"guidance_scale": 1.0}),
    "flux": (pipelines.flux, {"height": 16, "width": 16}),
}


def make_joint(name: str, folder: Path) -> None:
    maker, options = JOINT[name]
    pipeline = maker()
    stirred(pipeline.transformer)
    import_pipeline(pipeline, folder, [2], prompts=PROMPTS, **options)
    manifest = StudentFolder(folder).manifest
    network = manifest.network.model_copy(update={"guidance": None})
    write_manifest(folder, manifest.model_copy(update={"network": network}))
    export(folder, batches=(1, 3), nag=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_students_of_joint_attention_take_negative_prompts(name: str) -> None:
    """Their graph passed the gate in every engine here, and does what the network does."""
    folder = made(f"nag-{name}", lambda folder: make_joint(name, folder))
    manifest = StudentFolder(folder).manifest
    graph = manifest.graph("nag", "fp32")
    assert graph is not None
    inputs = [spec.name for spec in graph.inputs]
    assert inputs[-3:] == ["null.encoder_hidden_states", "null.pooled_projections", "nag_scale"]
    rows = [row for row in manifest.verification if row["component"] == "nag"]
    assert {row["runtime"] for row in rows} >= {"onnxruntime", "openvino"}
    assert all(row["passed"] for row in rows)
    pipe = FastPipeline.from_pretrained(folder, runtime="onnxruntime", num_threads=1)
    asked = {"seed": 1, "output_type": "latent"}
    plain = np.asarray(pipe(PROMPTS[:2], **asked).images)
    away = np.asarray(pipe(PROMPTS[:2], negative_prompt=["blue", "old"], nag_scale=6, **asked).images)
    assert np.abs(away - plain).max() > 1e-2
    nothing = np.asarray(pipe(PROMPTS[:2], negative_prompt="blue", nag_scale=1, **asked).images)
    np.testing.assert_allclose(nothing, plain, rtol=1e-3, atol=1e-3)
    alone = pipe(PROMPTS[1], negative_prompt="old", nag_scale=6, seed=[(1, 1)], output_type="latent").images
    np.testing.assert_allclose(np.asarray(alone), away[1:], rtol=1e-3, atol=1e-3)


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
