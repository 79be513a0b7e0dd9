"""Weights in prompts: compel's syntax and arithmetic, from the exported text encoder."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import compel
import numpy as np
import pipelines
import pytest
import torch
from compel.prompt_parser import PromptParser
from hypothesis import given, settings
from hypothesis import strategies as st
from made_once import made

from redif_sdk import FastPipeline
from redif_sdk.distill import import_pipeline
from redif_sdk.errors import InvalidRequest
from redif_sdk.export import export
from redif_sdk.inputs.weighting import parsed

PROMPTS = pipelines.PROMPTS
THEIRS = PromptParser()


def fragments(prompt: str) -> list[tuple[str, float]]:
    return [(fragment.text.replace(" ", ""), round(fragment.weight, 5)) for fragment in parsed(prompt)]


def compels(prompt: str) -> list[tuple[str, float]]:
    children = THEIRS.parse_conjunction(prompt).prompts[0].children
    return [(fragment.text.replace(" ", ""), round(fragment.weight, 5)) for fragment in children]


@pytest.mark.parametrize(
    "prompt",
    [
        "a red heart",
        "a (red heart)1.4 on a table-",
        "a (very (old)1.5 man)0.8, standing",
        "a (plain group) here",
        "semi-dry wine+, 3-4 cats",
        "a - b",
        r"x \(y\) z",
        "(word).5 (a, b)1.2c",
        '"two words"++ x',
        "f(x) a(b)1.2",
        "(a)--b c++ code",
    ],
)
def test_prompts_are_read_as_by_compel(prompt: str) -> None:
    assert fragments(prompt) == compels(prompt)


def group(inner: Any) -> Any:
    parts = st.tuples(st.lists(inner, min_size=1, max_size=3), st.sampled_from(["", "+", "--", "1.3", ".5"]))
    return parts.map(lambda part: f"({' '.join(part[0])}){part[1]}")


WORDS = st.sampled_from(["red", "heart", "semi-dry", "3-4", "it's", "heart+", "old--", r"\(", "blue++"])
EXPRESSIONS = st.lists(st.recursive(WORDS, group, max_leaves=4), min_size=1, max_size=4).map(" ".join)


@settings(deadline=None, max_examples=60)
@given(EXPRESSIONS)
def test_any_nesting_is_read_as_by_compel(prompt: str) -> None:
    assert fragments(prompt) == compels(prompt)


@settings(deadline=None, max_examples=200)
@given(st.text(alphabet='ab ()+-.5",\\', max_size=30))
def test_any_text_is_a_prompt_or_one_clear_error(prompt: str) -> None:
    with contextlib.suppress(InvalidRequest):
        assert all(fragment.weight >= 0 for fragment in parsed(prompt))


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a (b", r"has a \( without its \)"),
        ("a b)", r"has a \) too many"),
        ("(a)1000", "has the weight 1000; give at most 100"),
        ('("a", "b").blend(1, 1)', r"\.blend\(\.\.\.\) is not supported"),
        ("(" * 50 + ")" * 50, "deeper than 32"),
    ],
)
def test_what_is_not_of_the_syntax_is_refused(prompt: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        parsed(prompt)


# ---------------------------------------------------------------- the encoded prompt


def make_sd(folder: Path) -> None:
    import_pipeline(pipelines.stable_diffusion(**pipelines.ONE_BLOCK), folder, [2], prompts=PROMPTS, guidance_scale=4.0)
    export(folder, batches=(1,))


@pytest.fixture(scope="module")
def pipe() -> FastPipeline:
    return FastPipeline.from_pretrained(made("weighted-sd", make_sd), runtime="onnxruntime", num_threads=1)


@pytest.mark.parametrize(
    "prompt", ["a red heart", "a (red)1.4 heart", "a (red heart)0.5 (blue)0.25 star++", "star " * 40]
)
def test_the_states_are_compels(pipe: FastPipeline, prompt: str) -> None:
    pipeline = pipelines.stable_diffusion(**pipelines.ONE_BLOCK)
    provider = compel.EmbeddingsProvider(
        pipeline.tokenizer, pipeline.text_encoder, downweight_mode=compel.DownweightMode.REMOVE, device="cpu"
    )
    ours = pipe.encode_prompt([prompt, PROMPTS[0]], weighted=True)["encoder_hidden_states"]
    parts = THEIRS.parse_conjunction(prompt).prompts[0].children
    with torch.no_grad():
        theirs = provider.get_embeddings_for_weighted_prompt_fragments(
            [[part.text for part in parts]], [[part.weight for part in parts]]
        )
    np.testing.assert_allclose(ours[:1], theirs.numpy(), atol=2e-4)
    np.testing.assert_allclose(ours[1:], pipe.encode_prompt(PROMPTS[0])["encoder_hidden_states"], atol=1e-5)


def test_weighted_prompts_make_images(pipe: FastPipeline) -> None:
    encoded = pipe.encode_prompt("a (red heart)1.5", weighted=True)["encoder_hidden_states"]
    asked = {"seed": 1, "output_type": "uint8"}
    weighted = pipe(prompt_embeds=encoded, negative_prompt="blue", **asked).images
    assert not np.array_equal(weighted, pipe("a red heart", negative_prompt="blue", **asked).images)


@pytest.mark.slow
def test_sdxl_has_weights_and_pooled_text_is_plain(tmp_path: Path) -> None:
    import_pipeline(pipelines.stable_diffusion_xl(), tmp_path / "xl", [2], prompts=PROMPTS, guidance_scale=1.0)
    export(tmp_path / "xl", batches=(1,))
    pipe = FastPipeline.from_pretrained(tmp_path / "xl")
    found, plain = pipe.encode_prompt("a (red)1.4 heart", weighted=True), pipe.encode_prompt("a red heart")
    np.testing.assert_allclose(found["pooled_projections"], plain["pooled_projections"], atol=1e-5)
    assert np.abs(found["encoder_hidden_states"] - plain["encoder_hidden_states"]).max() > 1e-3


@pytest.mark.slow
def test_t5_has_no_weights(tmp_path: Path) -> None:
    import_pipeline(pipelines.pixart(), tmp_path / "pixart", [2], prompts=PROMPTS)
    export(tmp_path / "pixart", batches=(1,))
    with pytest.raises(InvalidRequest, match="whose text encoders are T5EncoderModel"):
        FastPipeline.from_pretrained(tmp_path / "pixart").encode_prompt("a", weighted=True)
