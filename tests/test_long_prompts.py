"""Prompts beyond the text encoder's length: compel's chunks, and diffusers' images for the same states."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import compel
import hypothesis
import numpy as np
import pipelines
import pytest
import torch
from compel.prompt_parser import PromptParser
from hypothesis import settings
from hypothesis import strategies as st
from made_once import made
from numpy.typing import NDArray
from test_guidance import close, latents_of

from redif_sdk import FastPipeline
from redif_sdk.distill import import_pipeline
from redif_sdk.errors import InvalidRequest, UnsupportedModel
from redif_sdk.export import export
from redif_sdk.tokenizer import split

PROMPTS = pipelines.PROMPTS
LENGTH = pipelines.LENGTH
LONG = "a red heart and the cat. the dog in the house, a blue circle: sun and moon. green tree style emoji of a cat"
SHORT = "a red heart"
WORDS = " ".join(pipelines.WORDS * 3)  # without punctuation
STATES = "encoder_hidden_states"
ATOL = 2e-4


def make_sd(folder: Path) -> None:
    import_pipeline(pipelines.stable_diffusion(**pipelines.ONE_BLOCK), folder, [2], prompts=PROMPTS, guidance_scale=4.0)
    export(folder, batches=(1, 2), long_prompts=True)


@pytest.fixture(scope="module")
def student() -> Path:
    return made("long-sd", make_sd)


@pytest.fixture(scope="module", params=["onnxruntime", "openvino"])
def pipe(request: pytest.FixtureRequest, student: Path) -> FastPipeline:
    return FastPipeline.from_pretrained(student, runtime=request.param, num_threads=1)


def compels(pipeline: Any, prompt: str, *, weighted: bool) -> NDArray[np.float32]:
    """compel's states of a prompt that is not cut."""
    provider = compel.EmbeddingsProvider(
        pipeline.tokenizer,
        pipeline.text_encoder,
        truncate=False,
        downweight_mode=compel.DownweightMode.REMOVE,
        device="cpu",
    )
    parts = PromptParser().parse_conjunction(prompt).prompts[0].children if weighted else None
    texts, weights = ([p.text for p in parts], [p.weight for p in parts]) if parts else ([prompt], [1.0])
    with torch.no_grad():
        found: NDArray[np.float32] = provider.get_embeddings_for_weighted_prompt_fragments([texts], [weights]).numpy()
    return found


# ---------------------------------------------------------------- chunks


TOKENS = st.sampled_from(["a</w>", "b", ".</w>", ",</w>", ":</w>", "."])


@settings(deadline=None, max_examples=200)
@hypothesis.given(st.lists(TOKENS, max_size=40), st.integers(1, 9))
def test_chunks_end_where_compels_do(tokens: list[str], room: int) -> None:
    provider = object.__new__(compel.EmbeddingsProvider)
    provider.truncate_to_model_max_length = False
    modes = compel.SplitLongTextMode
    provider.split_long_text_mode = modes.SENTENCES | modes.COPY_FIRST_CLS_TOKEN

    class Same:
        def convert_ids_to_tokens(self, ids: list[str]) -> list[str]:
            return ids

    provider.tokenizer = Same()
    expected, left = [], list(tokens)
    while True:
        end = provider._find_next_best_split_point(left, max_length=room)
        expected.append(len(left[:end]))
        left = left[end:]
        if not left:
            break
    assert split(tokens, room) == expected


@pytest.mark.parametrize("prompt", [SHORT, LONG, WORDS, "", "<|endoftext|> a heart " * 6])
def test_the_states_are_compels(pipe: FastPipeline, prompt: str) -> None:
    expected = compels(pipelines.stable_diffusion(**pipelines.ONE_BLOCK), prompt, weighted=False)
    ours = pipe.encode_prompt(prompt, long=True)[STATES]
    assert ours.shape == expected.shape
    np.testing.assert_allclose(ours, expected, atol=2e-4)


@pytest.mark.parametrize("prompt", [f"(a heart)1.3 {LONG}", f"{LONG} and (a sun)0.6 with (moon)0.5 (tree)1.2"])
def test_long_prompts_have_weights(pipe: FastPipeline, prompt: str) -> None:
    expected = compels(pipelines.stable_diffusion(**pipelines.ONE_BLOCK), prompt, weighted=True)
    np.testing.assert_allclose(pipe.encode_prompt(prompt, long=True, weighted=True)[STATES], expected, atol=2e-4)


def test_prompts_of_one_list_have_the_chunks_of_the_longest(pipe: FastPipeline) -> None:
    both = pipe.encode_prompt([SHORT, LONG], long=True)[STATES]
    assert both.shape == (2, 3 * LENGTH, 32)
    np.testing.assert_allclose(both[1:], pipe.encode_prompt(LONG, long=True)[STATES], atol=1e-5)
    empty = pipe.encode_prompt("")[STATES]
    filled = np.concatenate([pipe.encode_prompt(SHORT)[STATES], empty, empty], 1)
    np.testing.assert_allclose(both[:1], filled, atol=1e-5)


def test_a_prompt_is_cut_unless_it_is_asked_for(pipe: FastPipeline, caplog: pytest.LogCaptureFixture) -> None:
    assert pipe.encode_prompt(LONG)[STATES].shape == (1, LENGTH, 32)
    assert "was cut off" in caplog.text
    caplog.clear()
    pipe.encode_prompt(LONG, long=True)
    assert "was cut off" not in caplog.text


# ---------------------------------------------------------------- images


def diffusers_latents(pipeline: Any, noise: NDArray[np.float32], **asked: Any) -> NDArray[np.float32]:
    """diffusers' latents: images of networks with random weights hardly show the prompt."""
    given = {name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value for name, value in asked.items()}
    with torch.no_grad():
        found: NDArray[np.float32] = pipeline(
            latents=torch.from_numpy(noise), num_inference_steps=2, output_type="latent", height=16, width=16, **given
        ).images.numpy()
    return found


def padded(states: NDArray[np.float32], empty: NDArray[np.float32], tokens: int) -> NDArray[np.float32]:
    """compel's padding to one length."""
    return np.concatenate([states, *[empty] * ((tokens - states.shape[1]) // LENGTH)], 1)


def test_latents_are_diffusers_own_for_the_same_states(pipe: FastPipeline) -> None:
    pipeline, noise = pipelines.stable_diffusion(**pipelines.ONE_BLOCK), latents_of(pipe, 1)
    states, empty = pipe.encode_prompt(LONG, long=True)[STATES], pipe.encode_prompt("")[STATES]
    negative, turned = pipe.encode_prompt("blue")[STATES], states[:, ::-1].copy()
    asked: dict[str, Any] = {"prompt_embeds": states, "latents": noise, "seed": 0}
    found = []
    for more, null in (
        ({}, empty),
        ({"negative_prompt": "blue"}, negative),
        ({"negative_prompt_embeds": negative}, negative),
        ({"negative_prompt_embeds": turned}, turned),
    ):
        null = padded(null, empty, states.shape[1])
        expected = diffusers_latents(
            pipeline, noise, prompt_embeds=states, negative_prompt_embeds=null, guidance_scale=4.0
        )
        found.append(pipe(**asked, **more, output_type="latent").images)
        np.testing.assert_allclose(found[-1], expected, atol=ATOL)
        fused = pipe(**asked, **more, output_type="uint8")
        assert fused.runtime_info["component"] == "generator"
        assert close(
            fused.images, pipe(**asked, **more, output_type="uint8", callback_on_step_end=lambda *_: None).images
        )
    assert np.abs(found[0] - found[1]).max() > 10 * ATOL
    assert np.abs(found[0] - found[3]).max() > 10 * ATOL
    unguided = diffusers_latents(pipeline, noise, prompt_embeds=states, guidance_scale=1.0)
    np.testing.assert_allclose(pipe(**asked, guidance_scale=1.0, output_type="latent").images, unguided, atol=ATOL)
    cut = pipe(LONG, latents=noise, seed=0, guidance_scale=1.0, output_type="latent").images
    assert np.abs(cut - unguided).max() > 10 * ATOL


def test_a_long_negative_prompt_makes_the_prompt_as_long(pipe: FastPipeline) -> None:
    noise, short = latents_of(pipe, 1), pipe.encode_prompt(SHORT)[STATES]
    null, empty = pipe.encode_prompt(LONG, long=True)[STATES], pipe.encode_prompt("")[STATES]
    ours = pipe(SHORT, negative_prompt_embeds=null, latents=noise, seed=0, output_type="latent").images
    expected = diffusers_latents(
        pipelines.stable_diffusion(**pipelines.ONE_BLOCK),
        noise,
        prompt_embeds=padded(short, empty, null.shape[1]),
        negative_prompt_embeds=null,
        guidance_scale=4.0,
    )
    np.testing.assert_allclose(ours, expected, atol=ATOL)
    whole = pipe(prompt_embeds=null, latents=noise, seed=0, output_type="uint8").images
    assert close(pipe.generate_array(noise[None], {STATES: null}), whole)


# ---------------------------------------------------------------- graphs


def test_the_gate_saw_long_prompts(pipe: FastPipeline) -> None:
    manifest = pipe.manifest
    assert manifest.takes_long_prompts
    assert {row["batch"] for row in manifest.verification if row["component"] == "long" and row["passed"]} == {1, 2}


def test_graphs_of_one_length_say_what_to_do(student: Path, tmp_path: Path) -> None:
    fixed = made("short-sd", make_short)
    pipe = FastPipeline.from_pretrained(fixed, runtime="onnxruntime")
    states = pipe.encode_prompt(LONG, long=True)[STATES]
    for given in ({"prompt_embeds": states}, {"prompt": SHORT, "negative_prompt_embeds": states}):
        with pytest.raises(InvalidRequest, match="export it again with redif export --long-prompts"):
            pipe(**given)
    assert close(
        pipe(prompt_embeds=pipe.encode_prompt(SHORT, long=True)[STATES], seed=0, output_type="uint8").images,
        pipe(SHORT, seed=0, output_type="uint8").images,
    )
    free = FastPipeline.from_pretrained(student, runtime="onnxruntime")
    with pytest.raises(InvalidRequest, match=f"have {LENGTH + 1} tokens; give a multiple of {LENGTH}"):
        free(prompt_embeds=np.zeros((1, LENGTH + 1, 32), np.float32))
    assert close(free(SHORT, seed=0, output_type="uint8").images, pipe(SHORT, seed=0, output_type="uint8").images)


def make_short(folder: Path) -> None:
    import_pipeline(pipelines.stable_diffusion(**pipelines.ONE_BLOCK), folder, [2], prompts=PROMPTS, guidance_scale=4.0)
    export(folder, batches=(1,))


@pytest.mark.slow
def test_sdxl_and_negative_prompts_at_one_call(tmp_path: Path) -> None:
    pipeline = pipelines.stable_diffusion_xl(pipelines.ddim())
    import_pipeline(pipeline, tmp_path / "xl", [2], prompts=PROMPTS, guidance_scale=4.0)
    export(tmp_path / "xl", batches=(1,), long_prompts=True)
    pipe = FastPipeline.from_pretrained(tmp_path / "xl")
    found = pipe.encode_prompt(LONG, long=True)
    kind = compel.ReturnedEmbeddingsType.PENULTIMATE_HIDDEN_STATES_NON_NORMALIZED
    expected = []
    for part in ("", "_2"):
        provider = compel.EmbeddingsProvider(
            getattr(pipeline, f"tokenizer{part}"),
            getattr(pipeline, f"text_encoder{part}"),
            truncate=False,
            returned_embeddings_type=kind,
            device="cpu",
        )
        with torch.no_grad():
            expected.append(provider.get_embeddings_for_weighted_prompt_fragments([[LONG]], [[1.0]]).numpy())
    np.testing.assert_allclose(found[STATES], np.concatenate(expected, -1), atol=2e-4)
    np.testing.assert_allclose(found["pooled_projections"], pipe.encode_prompt(LONG)["pooled_projections"], atol=1e-5)
    noise, pooled = latents_of(pipe, 1), found["pooled_projections"]
    ours = pipe(prompt_embeds=found[STATES], pooled_prompt_embeds=pooled, latents=noise, seed=0, output_type="latent")
    zeros = {"negative_prompt_embeds": np.zeros_like(found[STATES]), "negative_pooled_prompt_embeds": pooled * 0}
    theirs = diffusers_latents(
        pipeline, noise, prompt_embeds=found[STATES], pooled_prompt_embeds=pooled, guidance_scale=4.0, **zeros
    )
    np.testing.assert_allclose(ours.images, theirs, atol=ATOL)
    import_pipeline(pipeline, tmp_path / "nag", [2], prompts=PROMPTS, guidance_scale=1.0)
    with pytest.raises(UnsupportedModel, match="by its guidance; leave nag out"):
        export(tmp_path / "nag", batches=(1,), long_prompts=True, nag=True)


@pytest.mark.slow
def test_one_call_a_step_takes_long_negative_prompts(tmp_path: Path) -> None:
    import_pipeline(pipelines.latent_consistency(), tmp_path / "lcm", [2], prompts=PROMPTS)
    export(tmp_path / "lcm", batches=(1,), long_prompts=True, nag=True)
    pipe = FastPipeline.from_pretrained(tmp_path / "lcm")
    states = pipe.encode_prompt(LONG, long=True)[STATES]
    asked: dict[str, Any] = {"seed": 0, "output_type": "uint8"}
    away = pipe(prompt_embeds=states, negative_prompt="blue", **asked)
    assert away.runtime_info["component"] == "nag"
    assert not np.array_equal(away.images, pipe(prompt_embeds=states, **asked).images)
    asked["output_type"] = "latent"
    plain = pipe(prompt_embeds=states, negative_prompt="blue", nag_scale=1.0, **asked).images
    np.testing.assert_allclose(plain, pipe(prompt_embeds=states, **asked).images, atol=ATOL)


@pytest.mark.slow
def test_t5_has_no_chunks(tmp_path: Path) -> None:
    import_pipeline(pipelines.pixart(), tmp_path / "pixart", [2], prompts=PROMPTS)
    with pytest.raises(UnsupportedModel, match="takes no prompts in chunks"):
        export(tmp_path / "pixart", batches=(1,), long_prompts=True)
