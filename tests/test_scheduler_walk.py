"""Every scheduler class of diffusers: equal to diffusers' own loop, or refused by an error of ours."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import diffusers
import pytest

from benchmarks import scheduler_walk
from redif_sdk.distill.teachers.known_schedulers import KNOWN
from redif_sdk.errors import UnsupportedModel
from redif_sdk.sampling.from_diffusers import _READERS
from redif_sdk.sampling.scheduler_keys import HARMLESS, READ, STRAY, check_keys
from redif_sdk.sampling.table import StepTable

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/schedulers.md"
WORDS = {"equal", "refused", "unclipped", "no noise"}


def page_rows() -> dict[tuple[str, str], tuple[str, str]]:
    found = re.findall(r"^\| `(\w+)` \| (.+?) \| ([\w ]+) \| ([\w ]+) \|$", PAGE.read_text(), re.MULTILINE)
    return {(name, option): (target, imported) for name, option, target, imported in found}


def test_every_class_with_its_defaults_is_equal_or_refused_as_the_page_says() -> None:
    page = page_rows()
    for name, option, target, imported in scheduler_walk.walk(short=True):
        assert {target.word, imported.word} <= WORDS, (name, target, imported)
        if name in KNOWN:
            assert page[name, option] == (target.word, imported.word)
        else:
            assert (target.word, imported.word) == ("refused", "refused")
            assert f"scheduler {name} is not supported; use one of DDIMScheduler" in target.detail


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("DDIMScheduler", {"timestep_spacing": "trailing", "set_alpha_to_one": False}),
        ("EulerDiscreteScheduler", {"use_karras_sigmas": True, "final_sigmas_type": "sigma_min"}),
        ("DPMSolverMultistepScheduler", {"use_lu_lambdas": True, "solver_order": 1}),
        ("UniPCMultistepScheduler", {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}),
        ("FlowMatchEulerDiscreteScheduler", {"shift_terminal": 0.1}),
    ],
)
def test_some_options(name: str, option: dict[str, object]) -> None:
    found = {scheduler_walk.target(name, option).word, scheduler_walk.imported(name, option).word}
    assert found <= WORDS


@pytest.mark.slow
def test_every_class_with_every_option_is_equal_or_refused_as_the_page_says() -> None:
    page = page_rows()
    for name, option, target, imported in scheduler_walk.walk(sorted(KNOWN)):
        assert {target.word, imported.word} <= WORDS, (name, option, target, imported)
        assert page[name, option] == (target.word, imported.word)


def test_the_page_has_every_class_of_the_installed_diffusers() -> None:
    text, rows = PAGE.read_text(), page_rows()
    assert [name for name in scheduler_walk.classes() if f"`{name}`" not in text] == []
    wanted = {(name, scheduler_walk.words(config)) for name in KNOWN for config in scheduler_walk.options(name)}
    assert wanted == set(rows)
    assert {word for pair in rows.values() for word in pair} <= WORDS


@pytest.mark.parametrize("name", sorted(READ))
def test_every_key_is_read_or_known_to_be_harmless(name: str) -> None:
    keys = set(inspect.signature(getattr(diffusers, name).__init__).parameters) - {"self", "kwargs"}
    assert keys == {*READ[name], *HARMLESS[name]}
    assert not set(READ[name]) & set(HARMLESS[name])


def test_the_lists_of_keys_are_those_of_the_classes() -> None:
    assert set(READ) == set(HARMLESS) == set(_READERS)
    for name in KNOWN:
        keys = set(inspect.signature(getattr(diffusers, name).__init__).parameters) - {"self", "kwargs"}
        assert keys <= STRAY, name


def test_an_unknown_key_is_refused_and_one_of_another_class_is_not() -> None:
    config = {"_class_name": "DDIMScheduler", "_diffusers_version": "0.42.1", "skip_prk_steps": True}
    check_keys("DDIMScheduler", config)
    with pytest.raises(UnsupportedModel, match="'magic'"):
        StepTable.from_scheduler({**config, "magic": 1}, num_inference_steps=2)
