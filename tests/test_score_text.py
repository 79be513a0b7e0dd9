"""The reward that sees prompts, trained on toy images with a tiny text encoder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from redif_sdk.errors import InvalidRequest
from redif_sdk.reward_server.app import load_scorer
from zoo import captions, judge_text, score_text
from zoo.captions import Captioned, Subject
from zoo.judge_text import CaptionJudges, Several
from zoo.score_text import Scorers, Sentences

COLOURS = {"red": (255, 0, 0), "green": (0, 200, 0), "blue": (0, 0, 255), "white": (230, 230, 230)}


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text encoder of transformers with random weights, which knows words."""
    folder = tmp_path_factory.mktemp("language")
    words = ["[PAD]", "[UNK]", *COLOURS, "heart", "emoji", "a", "an", "of", "love"]
    tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(words), hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data() -> Captioned:
    """Squares of four colours in three styles."""
    images, subjects, styles = [], [], []
    for name, colour in COLOURS.items():
        for place, style in enumerate(captions.STYLES):
            image = np.full((3, 64, 64), 255, np.uint8)
            image[:, 16:48, place * 8 : place * 8 + 36] = np.array(colour)[:, None, None]
            images.append(image)
            subjects.append(Subject(f"{name} heart", (), ("love",)))
            styles.append(style)
    nothing = np.zeros(12, bool)
    return Captioned(np.stack(images), tuple(subjects), tuple(styles), ("1",) * 12, ("Symbols",) * 12, nothing)


@pytest.fixture(scope="module")
def scorer(language: Path, data: Captioned) -> Scorers:
    return score_text.train(data, Sentences(language), score_text.views_of(data), updates=60, batch=24, seeds=2)


def test_it_tells_colours_and_leaves_the_style_out(
    scorer: Scorers, data: Captioned, language: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"{name} heart" for name in COLOURS]
    score_text.save(scorer, names, {"real": {}}, tmp_path / "scorer")
    monkeypatch.setenv("REDIF_SCORER", str(tmp_path / "scorer"))
    monkeypatch.setattr(score_text, "language_model", lambda: language)
    monkeypatch.chdir(Path(__file__).parent.parent)
    served = load_scorer("zoo/score_text.py:score")
    assert served.__name__ == "score"
    shown = [Image.fromarray(data.images[3 * k].transpose(1, 2, 0)) for k in range(4)]
    table = np.array([score_text.score(shown, [f"{name}, noto style"] * 4) for name in names])
    for axis in (0, 1):
        np.testing.assert_array_equal(table.argmax(axis), np.arange(4))
    assert (table < 0).all()  # log-probabilities
    styled = [score_text.score(shown, [f"{name}, {style}" for name in names]) for style in captions.STYLES.values()]
    np.testing.assert_allclose(score_text.score(shown, names), np.mean(styled, 0), rtol=1e-5)
    assert len({tuple(np.round(row, 4)) for row in styled}) == 3  # each style has a model of its own
    np.testing.assert_allclose(np.exp(table).sum(0), 1, rtol=1e-4)  # among the four names: its own counts once


def test_no_model_is_trained_on_the_style_that_it_scores(scorer: Scorers, data: Captioned, language: Path) -> None:
    """A model of the other styles stays the same when the images of its own change."""
    views = score_text.views_of(data)
    noto = torch.tensor([style == "Noto" for style in data.styles])
    views[:, noto] = views[:, noto].roll(1, 1)
    again = score_text.train(data, Sentences(language), views, updates=60, batch=24, seeds=2)
    for style in captions.STYLES:
        ours, theirs = (model.of[style].state_dict()["members.1.image.1.weight"] for model in (scorer, again))
        assert bool(torch.allclose(ours, theirs, atol=1e-3)) == (style == "Noto"), style


def test_a_place_without_a_scorer_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"has no scorer; make one with python -m zoo\.score_text -o"):
        score_text.load(str(tmp_path / "nothing"))


@pytest.mark.parametrize(
    ("name", "about"),
    [("models.Noto.mean", {"look": score_text.LOOK}), ("models.Noto.members.0.mean", {})],
    ids=["one seed", "features of 64 pixels"],
)
def test_a_scorer_of_an_earlier_version_is_refused(tmp_path: Path, name: str, about: dict[str, int]) -> None:
    save_file({name: torch.zeros(3)}, tmp_path / score_text.WEIGHTS)
    (tmp_path / score_text.ABOUT).write_text(json.dumps(about))
    with pytest.raises(InvalidRequest, match="is of an earlier version; make it again"):
        score_text.load(str(tmp_path))


def test_what_measures_it_is_not_trained_on() -> None:
    """Whole characters, so that none is trained on in another style; and what teachers do not see either."""
    characters = tuple(str(k // 3) for k in range(300))
    subjects = tuple(Subject(f"thing {k // 3}") for k in range(300))
    out = np.zeros(300, bool)
    out[7] = True
    images = np.zeros((300, 3, 1, 1), np.uint8)
    data = Captioned(images, subjects, tuple(captions.STYLES) * 100, characters, ("Objects",) * 300, out)
    kept = score_text.kept(data)
    assert kept[7]
    assert 30 <= kept.sum() <= 31
    whole = {character for character, held in zip(characters, kept, strict=True) if held} - {"2"}
    assert all(kept[k] for k in range(300) if characters[k] in whole)
    np.testing.assert_array_equal(kept, score_text.kept(data))


def test_agreement_counts_both_sides(scorer: Scorers, data: Captioned, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score_text, "kept", lambda data: np.arange(12) % 3 == 0)
    seen = score_text.describe(torch.tensor(data.images).float() / 127.5 - 1)
    figures = score_text.measure(data, scorer, seen, CaptionJudges(data, updates=20))
    assert figures["held_out"] == {"images": 4, "top1": 1.0, "top5": 1.0}
    assert figures["shuffled"]["scorer"] == 0
    for part in (figures["real"], figures["shuffled"]):
        assert part["both"] <= min(part["scorer"], part["judge"])
        assert part["neither"] == pytest.approx(1 - part["scorer"] - part["judge"] + part["both"])
    assert json.loads(json.dumps(figures)) == figures


def test_its_own_gradient_can_be_followed(scorer: Scorers, data: Captioned) -> None:
    """The white box of the experiment: the same scores but for the rounding to a file's levels, and a gradient."""
    images = (torch.tensor(data.images[:2]).float() / 127.5 - 1).mul(0.9).requires_grad_()
    prompts, names = ["red heart", "red heart"], ["blue heart", "green heart"]
    followed = scorer.score(score_text.describe(images, rounded=False), prompts, names)
    with torch.no_grad():
        asked = scorer.score(score_text.describe(images), prompts, names)
    torch.testing.assert_close(followed.detach(), asked, atol=0.05, rtol=0.05)
    assert not asked.requires_grad
    (gradient,) = torch.autograd.grad(followed.sum(), images)
    assert torch.isfinite(gradient).all()
    assert (gradient.abs().amax((1, 2, 3)) > 0).all()


def test_several_models_score_the_mean_of_theirs(scorer: Scorers, data: Captioned) -> None:
    seen = score_text.describe(torch.tensor(data.images[:4]).float() / 127.5 - 1)
    names = [f"{name} heart" for name in COLOURS]
    several = scorer.of["Noto"]
    assert isinstance(several, Several)
    with torch.no_grad():
        each = [member.see(seen) @ member.read(names).T * member.scale.exp() for member in several.members]
        both = several.see(seen) @ several.read(names).T
    assert not torch.allclose(*each)
    torch.testing.assert_close(both, (each[0] + each[1]) / 2)


def test_judges_of_several_seeds_are_kept(data: Captioned, tmp_path: Path) -> None:
    """A judge that was kept is the one that was trained, of all its seeds."""
    kept, places = tmp_path / "made" / "judges.safetensors", list(range(12))
    first = CaptionJudges(data, updates=5, seeds=(1, 2), kept=kept)
    again = CaptionJudges(data, updates=0, seeds=(1, 2), descriptions=first.descriptions, kept=kept)
    names = [data.subjects[place].name for place in places]
    for style in captions.STYLES:
        ours, theirs = (judges.judges[style].see(first.descriptions) for judges in (first, again))
        torch.testing.assert_close(ours, theirs, atol=0, rtol=0)
        assert ours.shape[1] == 2 * judge_text.WIDTH
    np.testing.assert_array_equal(
        first.ranks(first.descriptions, places, names), again.ranks(first.descriptions, places, names)
    )
