"""Rewards that see the prompt: a user's function as a server, chat models, and image-text models of transformers."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pipelines
import pytest
import torch
from torch import Tensor

from redif_sdk.distill import pool
from redif_sdk.distill.config import DistillConfig
from redif_sdk.distill.rewards import Batch, EndpointReward, make_rewards, reward_names
from redif_sdk.distill.rewards.chat import ChatReward
from redif_sdk.distill.rewards.prompt_score import PromptScore
from redif_sdk.distill.teachers.base import Teacher
from redif_sdk.distill.training.loop import Trainer
from redif_sdk.errors import InvalidRequest, RuntimeUnavailable, TrainingDiverged
from redif_sdk.reward_server.app import load_scorer
from redif_sdk.reward_server.protocol import RewardAnswer, RewardRequest, schema
from tests.test_endpoint import serving

ROOT = Path(__file__).resolve().parent.parent
#: The scorer of docs/rewards.md, as it stands there, and others.
OF_THE_DOCS = re.search(r"```python\n(# my_scorer\.py.*?)```", (ROOT / "docs/rewards.md").read_text(), re.DOTALL)
SCORER = """

def both(images, prompts, class_names=None):
    return {"colour": score(images, prompts), "length": np.array([len(prompt) for prompt in prompts])}


def broken(images):
    raise ZeroDivisionError("no such luck")


def short(images):
    return [1.0]


def of_what(images, mood):
    return [0.0]
"""


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    return Teacher.from_diffusers(pipelines.stable_diffusion(), prompts=["a red heart", "a blue star", "green"])


@pytest.fixture(scope="module")
def scorer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("scorer") / "colours.py"
    assert OF_THE_DOCS is not None
    file.write_text(OF_THE_DOCS[1] + SCORER)
    return file


@contextmanager
def reward_server(scorer: Path, function: str) -> Iterator[str]:
    """The address of ``redif serve-reward``, a process of its own."""
    program = "import sys; from redif_sdk.cli.main import main; sys.argv = ['redif', *sys.argv[1:]]; main()"
    command = [sys.executable, "-c", program, "serve-reward", f"{scorer}:{function}", "--port", "0"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, cwd=ROOT, **pipes) as process:
        try:
            said = ""
            while not (found := re.search(r"http://\S+/score", said)):
                line = process.stdout.readline()
                assert line, said
                said += line
            yield found[0]
        finally:
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=20)


def coloured(*channels: int) -> Tensor:
    images = torch.full((len(channels), 3, 8, 8), -1.0)
    for place, channel in enumerate(channels):
        images[place, channel] = 0.5
    return images


# ---------------------------------------------------------------- what a reward sees


def test_a_batch_says_what_was_asked_for(teacher: Teacher) -> None:
    batch = Batch(coloured(0, 2), coloured(0, 2), torch.tensor([2, 0]), teacher)
    assert batch.prompts == ["green", "a red heart"]
    assert batch.class_labels is None
    assert batch.class_names is None
    assert set(batch.conditions) == {"encoder_hidden_states"}
    classes = Batch(coloured(0, 2), coloured(0, 2), torch.tensor([1, 0]), Teacher.load("fashion-mnist"))
    assert classes.prompts is None
    assert classes.class_labels == [1, 0]
    assert classes.class_names == ["Trouser", "T-shirt/top"]
    assert classes.conditions["class_labels"].tolist() == [1, 0]
    assert Batch(coloured(0), coloured(0)).conditions == {}


def test_prompts_that_are_not_trained_on_can_be_asked_for(teacher: Teacher) -> None:
    assert teacher.prompts is not None
    noise = torch.randn(2, *teacher.shape, generator=torch.Generator().manual_seed(0))
    before = teacher.sample(noise[:1], torch.tensor([1]), 2)
    asked = teacher.ask(["  a violet   tree ", "a blue star"])
    assert asked[1] == 1  # it is one of the teacher's own
    assert Batch(coloured(0, 2), coloured(0, 2), asked, teacher).prompts == ["a violet tree", "a blue star"]
    drawn = teacher.sample(noise[:1].repeat(2, 1, 1, 1), asked, 2)
    torch.testing.assert_close(drawn[1:], before, rtol=0, atol=1e-3)
    assert (drawn[0] - drawn[1]).abs().max() > 0.01
    for number in range(8):  # more than there was room for
        teacher.ask([f"tree {number}"])
    again = teacher.sample(noise[:1], teacher.ask(["a violet tree"]), 2)
    torch.testing.assert_close(again[0], drawn[0], rtol=0, atol=1e-3)
    own = Teacher.from_diffusers(pipelines.stable_diffusion(), prompts=["a violet tree"])
    torch.testing.assert_close(own.sample(noise[:1], torch.tensor([0]), 2)[0], drawn[0], rtol=0, atol=1e-3)
    assert len(teacher.prompts) == 3
    assert teacher.num_conditions == 3
    with pytest.raises(InvalidRequest, match="takes no prompts; give it classes"):
        Teacher.load("fashion-mnist").ask(["a shoe"])


def test_a_reward_takes_a_batch_or_three_arguments() -> None:
    for reward in (lambda batch: batch.images.mean((1, 2, 3)), lambda i, t, c: i.mean((1, 2, 3)), sum_of):
        assert len(reward_names(reward)) == 1
    with pytest.raises(InvalidRequest, match="takes 2 arguments; it is called with one, a Batch, or with three"):
        reward_names(lambda images, prompts: images)


def sum_of(*arguments: Any, scale: float = 1.0) -> Tensor:
    return scale * arguments[0].images.sum((1, 2, 3))


# ---------------------------------------------------------------- a user's own scorer over HTTP


def test_a_users_scorer_sees_the_prompts_of_a_run(teacher: Teacher, scorer: Path) -> None:
    with reward_server(scorer, "score") as url:
        batch = Batch(coloured(0, 0, 1), coloured(0, 0, 1), torch.tensor([0, 1, 2]), teacher)
        red, blue, green = EndpointReward(url)(batch).tolist()
        assert red == green > 0 > blue
        assert httpx.get(url.replace("/score", "/health")).json() == {"status": "ok"}
        config = DistillConfig.checked(
            reward=url, updates=2, num_inference_steps=1, batch_size=3, warm_start=0.0, group_size=4
        )
        pairs, _ = pool.get(teacher, 12, "train")
        Trainer(teacher, config, pairs).run()
    with reward_server(scorer, "both") as url:
        scores = EndpointReward(f"{url}#length=0.5")(batch)
        assert isinstance(scores, dict)
        assert scores["length"].tolist() == [11, 11, 5]
        assert scores["colour"].tolist() == [red, blue, green]


def test_a_server_that_dies_costs_time_alone(teacher: Teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run ends with one line, and goes on where it was to the same weights."""
    monkeypatch.setattr("redif_sdk.distill.rewards.http.FIRST_PAUSE", 0.01)
    dead = {"after": 10**9}

    def brightness(number: int, body: dict[str, Any]) -> tuple[int, bytes]:
        if number >= dead["after"]:
            return 503, b"out of memory"
        return 200, json.dumps({"rewards": [len(image) % 97 for image in body["images"]]}).encode()

    def run(folder: Path, url: str, *, resume: bool = False) -> Trainer:
        config = DistillConfig.checked(
            reward=url, updates=6, num_inference_steps=1, batch_size=3, warm_start=0.0, group_size=4,
            checkpoint_seconds=0.001, schedule_updates=0, check_every=100,
        )  # fmt: skip
        pairs, _ = pool.get(teacher, 12, "train")
        trainer = Trainer(teacher, config, pairs, folder)
        trainer.run(resume)
        return trainer

    with serving(brightness) as url:
        whole = run(tmp_path / "whole", url)
        dead["after"] = 0
        with pytest.raises(RuntimeUnavailable, match=r"did not answer, 5 times \(status 503: out of memory\)"):
            run(tmp_path / "cut", url)
    dead["after"] = 4
    with serving(brightness) as url:
        with pytest.raises(RuntimeUnavailable):
            run(tmp_path / "cut", url, resume=(tmp_path / "cut" / "checkpoint.pt").exists())
        dead["after"] = 10**9
        again = run(tmp_path / "cut", url, resume=True)
    for name, weight in whole.ema.state_dict().items():
        assert torch.equal(weight, again.ema.state_dict()[name]), name


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("broken", "status 500: .*the reward failed: .*no such luck"),
        ("short", "status 500: .*the reward gave 1 numbers for 2 images"),
        ("score", "refused the images .status 422: .*the request has no prompts, which the reward needs"),
    ],
)
def test_what_is_wrong_with_a_scorer_reaches_the_run(
    scorer: Path, function: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("redif_sdk.distill.rewards.http.FIRST_PAUSE", 0.01)
    with (
        reward_server(scorer, function) as url,
        pytest.raises((RuntimeUnavailable, InvalidRequest), match=said),
    ):
        EndpointReward(url, retries=1)(Batch(coloured(0, 1), coloured(0, 1)))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("colours", "names no function; give MODULE:FUNCTION or FILE.py:FUNCTION"),
        ("no_such_module:score", "no_such_module cannot be imported: No module named"),
        ("{file}:missing", "has no function missing"),
        ("{file}:of_what", "of_what takes images, mood; a reward's function takes some of images, targets, prompts"),
        ("nowhere.py:score", "nowhere.py is no file"),
    ],
)
def test_a_name_without_a_scorer_is_refused(scorer: Path, name: str, said: str) -> None:
    with pytest.raises(InvalidRequest, match=re.escape(said)):
        load_scorer(name.format(file=scorer))


def test_the_published_schema_is_the_protocols() -> None:
    published = json.loads((ROOT / "docs/schema/reward.json").read_text())
    assert published == schema(), "run make schema"
    request, answer = (jsonschema.Draft202012Validator(published[kind]) for kind in ("request", "answer"))
    request.validate(RewardRequest(images=["aGk="], prompts=["a star"]).model_dump())
    answer.validate({"rewards": [1, None, 2.5]})
    answer.validate({"scores": {"looks": [1.0]}})
    assert RewardAnswer.model_validate({"rewards": [1, 2]}).by_name() == {"": [1.0, 2.0]}
    assert list(answer.iter_errors({"rewards": ["high"]}))


# ---------------------------------------------------------------- a chat model as a judge


def completion(text: str | None) -> bytes:
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()


def test_a_chat_model_is_asked_about_each_prompt(teacher: Teacher, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []

    def judge(number: int, body: dict[str, Any]) -> tuple[int, bytes]:
        seen.append(body)
        prompt = body["messages"][0]["content"][1]["text"].rsplit("\n", 1)[1]
        said = {"green": "I would say 7.5 of 10.", "a red heart": "**3**", "a blue star": "Lovely!"}[prompt]
        return 200, completion(said)

    batch = Batch(coloured(0, 1, 2), coloured(0, 1, 2), torch.tensor([2, 0, 1]), teacher)
    with serving(judge) as url:
        ((reward, _),) = make_rewards(f"chat:{url.removesuffix('/score')}/v1#tiny-vlm", teacher, pool.Pairs, 0)
        assert isinstance(reward, ChatReward)
        assert reward(batch).tolist() == [7.5, 3, 3]
        assert reward.unjudged == 1
        with pytest.raises(InvalidRequest, match=r"give a question without \{prompt\}"):
            reward(Batch(coloured(0), coloured(0)))
    assert {body["model"] for body in seen} == {"tiny-vlm"}
    assert seen[0]["messages"][0]["content"][0]["image_url"]["url"].startswith("data:image/png;base64,iVBOR")
    with serving(lambda number, body: (200, b'{"error": "no"}')) as url, pytest.raises(InvalidRequest, match="no chat"):
        ChatReward(url, "m")(batch)
    with (
        serving(lambda number, body: (200, completion(None))) as url,
        pytest.raises(TrainingDiverged, match="none of 3"),
    ):
        ChatReward(url, "m")(batch)
    with pytest.raises(InvalidRequest, match="no model is named; give chat:"):
        reward_names("chat:http://127.0.0.1:9/v1")


# ---------------------------------------------------------------- image-text models of transformers


def image_text_model(kind: str, folder: Path) -> Any:
    """A tiny one with random weights, saved with a tokenizer."""
    import transformers

    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokenizer = pipelines.clip_tokenizer()
    text = {**size, "vocab_size": len(tokenizer), "max_position_embeddings": tokenizer.model_max_length}
    vision = {**size, "image_size": 28, "patch_size": 14}
    torch.manual_seed(0)
    if kind == "clip":
        ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
        config = transformers.CLIPConfig(text_config={**text, **ends}, vision_config=vision, projection_dim=8)
        model: Any = transformers.CLIPModel(config)
    elif kind == "siglip":
        model = transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=vision))
    else:
        config = transformers.BlipConfig(text_config=text, vision_config=vision, image_text_hidden_size=8)
        model = transformers.BlipForImageTextRetrieval(config)
    for weight in model.parameters():
        weight.data += 0.05 * torch.randn_like(weight)
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.25] * 3}))
    return model, tokenizer


@pytest.mark.parametrize("kind", ["clip", "siglip", "blip"])
def test_image_text_models_score_images_by_their_prompts(teacher: Teacher, tmp_path: Path, kind: str) -> None:
    """As transformers' own forward pass has it, whatever prompts come together; with a gradient."""
    model, tokenizer = image_text_model(kind, tmp_path / "model")
    ((reward, _),) = make_rewards(f"prompt-score:{tmp_path / 'model'}", teacher, pool.Pairs, 0)
    images = torch.rand(4, 3, 28, 28, generator=torch.Generator().manual_seed(1)) * 2 - 1
    batch = Batch(images.clone().requires_grad_(), images, torch.tensor([0, 2, 0, 1]), teacher)
    scores = reward(batch)
    assert isinstance(scores, Tensor)
    assert batch.prompts is not None
    wanted = []
    for image, prompt in zip(images, batch.prompts, strict=True):
        tokens = tokenizer([prompt], padding="max_length" if kind == "siglip" else True, return_tensors="pt")
        tokens = {name: tokens[name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            out = model(pixel_values=(image[None] / 2 + 0.5 - 0.5) / 0.25, **tokens)
        wanted.append(
            float(out.itm_score[0, 1] - out.itm_score[0, 0]) if kind == "blip" else float(out.logits_per_image)
        )
    torch.testing.assert_close(scores.detach(), torch.tensor(wanted), rtol=1e-3, atol=1e-4)
    assert len({round(value, 3) for value in wanted}) == 4
    scores.sum().backward()
    assert batch.images.grad is not None
    assert batch.images.grad.abs().sum() > 0
    with pytest.raises(InvalidRequest, match="needs prompts or class names"):
        reward(Batch(images, images))


def test_a_model_that_scores_no_prompts_is_refused(tmp_path: Path) -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    tiny = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    CLIPVisionModelWithProjection(CLIPVisionConfig(**tiny, intermediate_size=16)).save_pretrained(tmp_path)
    with pytest.raises(InvalidRequest, match=r"^[^ ]* is a CLIPVisionModelWithProjection, which gives no score"):
        PromptScore.load(str(tmp_path))
    with pytest.raises(InvalidRequest, match="cannot be loaded for prompt-score:"):
        PromptScore.load(str(tmp_path / "none"))
