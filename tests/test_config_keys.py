"""The walk over configuration keys (`config_walk.py`): equal to diffusers, or refused; and its page is up to date."""

from __future__ import annotations

import inspect
import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from redif_sdk.distill import Teacher
from redif_sdk.distill.teachers.config_keys import HARMLESS, HONOURED
from redif_sdk.errors import RedifError
from tests import config_walk, pipelines

pytestmark = pytest.mark.filterwarnings("ignore")  # diffusers deprecates what old configurations say

#: The short form: keys that a pipeline reads, keys that change sizes, and values that make no sense.
SHORT = [
    ("UNet2DModel", "time_embedding_type", "learned"),
    ("UNet2DModel", "sample_size", 7),
    ("UNet2DModel", "center_input_sample", True),
    ("UNet2DConditionModel", "addition_embed_type", "text"),
    ("UNet2DConditionModel", "time_cond_proj_dim", 8),
    ("DiTTransformer2DModel", "num_embeds_ada_norm", 1200),
    ("AutoencoderKL", "shift_factor", 0.3),
    ("AutoencoderKL", "scaling_factor", "x"),
    ("AutoencoderTiny", "upsampling_scaling_factor", 4),
    ("CLIPTextConfig", "use_attention_mask", True),
    ("CLIPTextConfig", "num_hidden_layers", 1),
    ("CLIPTokenizer", "padding_side", "left"),
]


def check(name: str, key: str, value: Any) -> None:
    said = config_walk.outcome(name, key, value)
    assert said in ("equal", "refused") or (said == "wider" and (name, key) in config_walk.WIDER), said


@pytest.mark.parametrize(("name", "key", "value"), SHORT)
def test_some_keys_are_equal_or_refused(name: str, key: str, value: Any) -> None:
    check(name, key, value)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "key", "value"), list(config_walk.cases()))
def test_every_key_is_equal_or_refused(name: str, key: str, value: Any) -> None:
    check(name, key, value)


@pytest.mark.parametrize("name", sorted(HONOURED))
def test_every_key_of_the_installed_class_is_listed_and_tried(name: str) -> None:
    import diffusers
    import transformers

    if name.endswith("Config"):
        keys = set(getattr(transformers, name)().to_dict())
    else:
        keys = set(inspect.signature(getattr(diffusers, name)).parameters)
    keys = {key for key in keys if not key.startswith("_")}
    assert not keys - HONOURED[name] - HARMLESS[name]
    assert not HONOURED[name] & HARMLESS[name]
    tried = set(config_walk.KINDS[name].values)
    assert not HONOURED[name] - tried
    if not name.endswith("Config"):
        assert not (keys & HARMLESS[name]) - tried


@pytest.mark.parametrize(("name", "pipeline"), [("CLIPTextConfig", "stable_diffusion"), ("T5Config", "pixart")])
def test_harmless_keys_change_nothing(name: str, pipeline: str, tmp_path: Path) -> None:
    """All of them at once, with values that nobody has."""
    before, after = tmp_path / "before", tmp_path / "after"
    getattr(pipelines, pipeline)().save_pretrained(before)
    shutil.copytree(before, after)
    file = after / "text_encoder/config.json"
    config = json.loads(file.read_text())
    typed = {
        "architectures": ["Other"],
        "attention_dropout": 0.5,
        "classifier_dropout": 0.5,
        "dropout": 0.5,
        "dropout_rate": 0.5,
        "chunk_size_feed_forward": 2,
        "dtype": "float16",
        "id2label": {"0": "a"},
        "label2id": {"a": 0},
        "model_type": config["model_type"],
        "problem_type": "regression",
        "pruned_heads": {},
        "task_specific_params": {"a": {}},
        "auto_map": {},
        "transformers_version": "4.0.0",
        "is_gated_act": config.get("is_gated_act"),  # derived: another one is refused
        "dense_act_fn": config.get("dense_act_fn"),
    }
    odd: dict[str, Any] = {}
    for key in HARMLESS[name]:
        own = config.get(key)
        if key in typed:
            odd[key] = typed[key]
        elif isinstance(own, bool):
            odd[key] = not own
        elif isinstance(own, int | float):
            odd[key] = own + 1
        elif own is None and key not in ("torch_dtype", "output_attentions", "dense_act_fn", "is_gated_act"):
            odd[key] = 1
    file.write_text(json.dumps(config | odd))
    texts = [Teacher.load(folder, prompts=pipelines.PROMPTS) for folder in (before, after)]
    states = [text.prompts(torch.tensor([0, 1])) for text in texts if text.prompts is not None]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.parametrize(("key", "value"), [("dense_act_fn", "silu"), ("is_gated_act", True)])
def test_what_t5_derives_may_not_be_another(key: str, value: object, tmp_path: Path) -> None:
    pipelines.pixart().save_pretrained(tmp_path)
    file = tmp_path / "text_encoder/config.json"
    config = json.loads(file.read_text())
    assert config.get(key) != value
    file.write_text(json.dumps(config | {key: value}))
    with pytest.raises(RedifError, match=f"{key}=|text_encoder are not those"):
        Teacher.load(tmp_path, prompts=pipelines.PROMPTS)


#: Files of a text-to-image pipeline, and values that no key has.
FILES = ["unet/config.json", "vae/config.json", "text_encoder/config.json", "tokenizer/tokenizer_config.json"]
ODD = [None, True, False, 0, -1, 1, 3, 10**7, 10**12, 1e300, 0.5, "", "x", "../x", [], [1], ["x", None], {}, {"a": [1]}]


@given(st.data())
@settings(max_examples=int(os.environ.get("REDIF_FUZZ_CONFIGS", "6")), suppress_health_check=list(HealthCheck))
def test_no_configuration_raises_anything_else(data: st.DataObject) -> None:
    """REDIF_FUZZ_CONFIGS=2000 tries more."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(shutil.copytree(config_walk.base("AutoencoderKL"), Path(place) / "pipeline"))
        file = folder / data.draw(st.sampled_from([*FILES, "model_index.json"]))
        document = json.loads(file.read_text())
        for key in data.draw(st.lists(st.sampled_from(sorted({*document, "colour"})), min_size=1, max_size=2)):
            document[key] = data.draw(st.sampled_from(ODD))
        file.write_text(json.dumps(document))
        try:
            teacher = Teacher.load(folder, prompts=pipelines.PROMPTS)
        except RedifError as error:
            said = str(error)
        else:
            said = f"taken: {tuple(teacher.images(torch.zeros(1, *teacher.shape)).shape)}"
    assert said
    assert "\n" not in said


def test_the_page_lists_every_class_key_and_value() -> None:
    text = config_walk.PAGE.read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)` \| (.*?) \| (.+) \|$", text, re.MULTILINE)
    assert [row[:3] for row in rows] == config_walk.static_rows(), "run python -m tests.config_walk"
    for _, _, _, said in rows:
        assert re.match(r"(equal|refused|harmless|taken|not run)", said)
