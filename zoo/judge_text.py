"""The evaluation of text-to-image teachers: does an image show its prompt?

A small image-text model, trained here on real emoji: a head on EfficientNet-Lite0's features and a coarse thumbnail,
and a mean of word vectors, trained contrastively. There is one model for each style, trained on the *other* styles. So
it never saw the image that a sample may be a copy of, and its score on real images of its style is that of a perfect
sample. Figures: is the right caption the first, or among the first five, of a hundred? Which of a student's images of
one prompt shows it better, two seeds of a judge hardly agree on; `Several` seeds together do.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn import functional as F

from redif_sdk.artifact.atomic import atomic_write
from redif_sdk.distill.measures.features import embed
from zoo import captions
from zoo.captions import Captioned, Subject

WIDTH = 128
THUMBNAIL = 8
LOOK = 128  # side in pixels at which features are computed: the judges are right on 55 % of real images, at 64 on 45 %
CANDIDATES = 100
UPDATES, BATCH = 800, 256
SEED = 7
JUDGES = range(SEED, SEED + 8)  # seeds of the judge of several: two such judges agree, single ones hardly


def describe(images: Tensor) -> Tensor:
    """The input of a `CaptionJudge` for images (N, 3, H, W) in [-1, 1]: features and a thumbnail, (N, 1280 + 192)."""
    parts = []
    for part in images.split(100):
        large = F.interpolate(part, size=(LOOK, LOOK), mode="bilinear", align_corners=False)
        parts.append(torch.cat([embed(large), F.adaptive_avg_pool2d(part, THUMBNAIL).flatten(1)], 1))
    return torch.cat(parts)


def words_of(text: str) -> list[str]:
    return re.findall(r"[a-z0-9']+", text.lower())


class CaptionJudge(nn.Module):
    """Image descriptions and captions -> one space."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, descriptions: Tensor, subjects: Sequence[Subject]) -> None:
        super().__init__()
        known = {word for text in captions.texts(subjects) for word in words_of(text)}
        self.places = {word: place for place, word in enumerate(sorted(known), 1)}  # 0: an unknown word
        self.register_buffer("mean", descriptions.mean(0))
        self.register_buffer("deviation", descriptions.std(0) + 1e-3)
        self.words = nn.EmbeddingBag(len(self.places) + 1, WIDTH, mode="mean")
        self.picture = nn.Sequential(
            nn.Dropout(0.3), nn.Linear(descriptions.shape[1], 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)
        )
        self.scale = nn.Parameter(torch.tensor(2.5))

    def read(self, texts: Sequence[str]) -> Tensor:
        """Captions -> (N, WIDTH) of length 1."""
        listed = [[self.places.get(word, 0) for word in words_of(text)] or [0] for text in texts]
        starts = np.cumsum([0, *(len(places) for places in listed[:-1])])
        flat = torch.tensor([place for places in listed for place in places])
        return F.normalize(self.words(flat, torch.tensor(starts)), dim=-1)

    def see(self, descriptions: Tensor) -> Tensor:
        """(N, D) of :func:`describe` -> (N, WIDTH) of length 1."""
        return F.normalize(self.picture((descriptions - self.mean) / self.deviation), dim=-1)


def train_judge(
    descriptions: Tensor, subjects: Sequence[Subject], *, seed: int = SEED, updates: int = UPDATES, batch: int = BATCH
) -> CaptionJudge:
    """Train a `CaptionJudge` on the descriptions of real images and their subjects, of any style."""
    torch.manual_seed(seed)
    judge = CaptionJudge(descriptions, subjects)
    names = {subject.name: place for place, subject in enumerate(dict.fromkeys(subjects))}
    classes = torch.tensor([names[subject.name] for subject in subjects])
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    draw = torch.Generator().manual_seed(seed)
    for _ in range(updates):
        index = torch.randint(0, len(subjects), (batch,), generator=draw)
        keys = torch.randint(0, captions.KEYS, (batch,), generator=draw).tolist()
        drawn = [captions.plain(subjects[i], key) for i, key in zip(index.tolist(), keys, strict=True)]
        scores = judge.see(descriptions[index]) @ judge.read(drawn).T * judge.scale.exp()
        loss = contrastive_loss(scores, classes[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return judge.eval()


def contrastive_loss(scores: Tensor, classes: Tensor) -> Tensor:
    """Of ``scores`` (B, B) of images by captions: each is matched with those of its class (B,), in both directions."""
    same = (classes[:, None] == classes).float()
    target = same / same.sum(1, keepdim=True)  # a subject may be in the batch twice
    return F.cross_entropy(scores, target) + F.cross_entropy(scores.T, target)


@dataclass(frozen=True)
class Retrieval:
    """Shares of images whose caption is the first, and among the first five, of ``CANDIDATES``."""

    top1: float
    top5: float
    pictures: int


class Matching(Protocol):
    """Reads texts and sees descriptions of images: vectors of one space, (N, D) each, whose products are scores."""

    def read(self, texts: Sequence[str], /) -> Tensor: ...

    def see(self, descriptions: Tensor, /) -> Tensor: ...


class Several(nn.Module):
    """Models of several seeds as one, whose scores are the means of theirs.

    Each of ``members`` has ``read``, ``see``, and ``scale``: the logarithm of what its scores are multiplied by.
    The vectors are theirs side by side, at a length at which the product of two is the mean score.
    """

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        self.members: Any = nn.ModuleList(members)

    def read(self, texts: Sequence[str]) -> Tensor:
        """Texts -> (N, D)."""
        return torch.cat([member.read(texts) * self._length(member) for member in self.members], 1)

    def see(self, descriptions: Tensor) -> Tensor:
        """Descriptions of images (N, E) -> (N, D)."""
        return torch.cat([member.see(descriptions) * self._length(member) for member in self.members], 1)

    def _length(self, member: Any) -> Any:
        return (member.scale.exp() / len(self.members)).sqrt()


@torch.no_grad()
def retrieval(judge: Matching, descriptions: Tensor, names: Sequence[str], known: Sequence[str], seed: int) -> Tensor:
    """The rank, from 0, of each image's own name among itself and others drawn from ``known``: (N,) int64."""
    pool = sorted(set(known))
    texts = judge.read(pool)
    places = {name: place for place, name in enumerate(pool)}
    own = torch.tensor([places[name] for name in names])
    others = min(CANDIDATES, len(pool)) - 1
    draw, seen, ranks = torch.Generator().manual_seed(seed), judge.see(descriptions), []
    for picture, right in zip(seen, own.tolist(), strict=True):
        candidates = torch.randperm(len(pool) - 1, generator=draw)[:others]
        candidates += candidates >= right  # all but its own
        ranks.append(int((texts[candidates] @ picture >= texts[right] @ picture).sum()))
    return torch.tensor(ranks)


def ranks_by_style(
    models: Mapping[str, Matching],
    descriptions: Tensor,
    names: Sequence[str],
    styles: Sequence[str],
    known: Sequence[str],
) -> Tensor:
    """As :func:`retrieval`, of each image by the model of its style: (N,) int64."""
    ranks = torch.zeros(len(names), dtype=torch.int64)
    for style, model in models.items():
        mine = [place for place, other in enumerate(styles) if other == style]
        if mine:
            ranks[mine] = retrieval(model, descriptions[mine], [names[place] for place in mine], known, seed=5)
    return ranks


class CaptionJudges:
    """The judges of all styles."""

    def __init__(
        self,
        data: Captioned,
        *,
        updates: int = UPDATES,
        descriptions: Tensor | None = None,
        seeds: Sequence[int] = (SEED,),
        kept: Path | None = None,
    ) -> None:
        """Train on the real images of ``data``, including those held out from teachers.

        Args:
            data: captioned images.
            updates: of each model.
            descriptions: of the images, where they were computed before.
            seeds: one model of each style is trained for each.
            kept: a safetensors file; what is in it is not trained again.
        """
        self.data = data
        self.descriptions = (
            describe(torch.tensor(data.images).float() / 127.5 - 1) if descriptions is None else descriptions
        )
        self.known = [subject.name for subject in data.subjects]
        done, styles = kept is not None and kept.is_file(), np.array(data.styles)
        self.judges = {
            style: Several(
                [
                    train_judge(
                        self.descriptions[torch.tensor(styles != style)],
                        [subject for subject, other in zip(data.subjects, data.styles, strict=True) if other != style],
                        updates=0 if done else updates,
                        seed=seed,
                    )
                    for seed in seeds
                ]
            )
            for style in captions.STYLES
        }
        every = nn.ModuleDict(self.judges)
        if kept is not None and done:
            every.load_state_dict(load_file(kept))
        elif kept is not None:
            kept.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(kept, save({name: tensor.contiguous() for name, tensor in every.state_dict().items()}))
        training = torch.tensor(~data.held_out)
        self._training = np.flatnonzero(~data.held_out)
        self._mean = self.descriptions.mean(0)
        self._deviation = self.descriptions.std(0) + 1e-3
        self._near = self._normal(self.descriptions[training])

    def _normal(self, descriptions: Tensor) -> Tensor:
        return F.normalize((descriptions - self._mean) / self._deviation, dim=-1)

    def ranks(self, descriptions: Tensor, places: Sequence[int], names: Sequence[str] | None = None) -> Tensor:
        """Ranks of images generated from the prompts of the data's ``places``; ``names``: of other prompts instead."""
        names = [self.data.subjects[place].name for place in places] if names is None else names
        styles = [self.data.styles[place] for place in places]
        return ranks_by_style(self.judges, descriptions, names, styles, self.known)

    def verdict(self, descriptions: Tensor, places: Sequence[int]) -> dict[str, object]:
        """All figures of images ``descriptions`` that were generated from the prompts of the data's ``places``."""
        nearest = self._training[(self._normal(descriptions) @ self._near.T).argmax(1).numpy()]
        data = self.data
        return {
            **asdict(summary(self.ranks(descriptions, places))),
            "nearest_subject": float(
                np.mean([data.subjects[i].name == data.subjects[j].name for i, j in zip(nearest, places, strict=True)])
            ),
            "nearest_style": float(
                np.mean([data.styles[i] == data.styles[j] for i, j in zip(nearest, places, strict=True)])
            ),
        }

    def controls(self, descriptions: Tensor, places: Sequence[int]) -> dict[str, object]:
        """Two controls: the same prompts with the real images; and the given images with each other's prompts."""
        names = [self.data.subjects[place].name for place in places]
        half = len(names) // 2
        moved = [*names[half:], *names[:half]]  # neighbours may be one subject in several styles
        return {
            "real": asdict(summary(self.ranks(self.descriptions[list(places)], places))),
            "shuffled": asdict(summary(self.ranks(descriptions, places, moved))),
        }


def summary(ranks: Tensor) -> Retrieval:
    return Retrieval(float((ranks == 0).float().mean()), float((ranks < 5).float().mean()), len(ranks))
