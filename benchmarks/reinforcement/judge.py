"""The judge of the experiment: prompts that no reinforcement saw, and networks that gave no reward.

`CaptionJudges` (EfficientNet-Lite0 and words; one a style, trained on the other styles) says how often the prompt's own
caption is the first of a hundred. The prompts are those of a fifth of the subjects, which are left out of every arm's
training prompts, and the compositions that the teacher itself never saw.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from redif_sdk.distill.measures import features
from redif_sdk.distill.measures.distances import frechet_distance_of
from redif_sdk.distill.measures.neighbours import spread
from redif_sdk.distill.measures.spectrum import Spectrum
from redif_sdk.distill.pool import Pairs
from redif_sdk.distill.teachers.base import Teacher
from zoo.captions import Captioned
from zoo.judge_text import CaptionJudges, Matching, describe, retrieval, summary
from zoo.score_text import STYLE
from zoo.score_text import describe as describe_for_scorer

LEFT_OUT_SEED, LEFT_OUT = 28, 0.2  # of the subjects
NOISE_SEED = 2800
AT_ONCE = 100
REPEATED, NOISES = 100, 4  # prompts that are drawn from several noises, for the variety in a prompt
HELD_OUT_NOISES = 8  # for each composition

Sample = Callable[[Tensor, Tensor], Tensor]


class PromptScorer(Matching, Protocol):
    """The reward: `zoo.score_text.Scorer`."""

    def score(self, descriptions: Tensor, prompts: list[str], names: list[str], /) -> Tensor: ...


def left_out(data: Captioned) -> set[str]:
    """The names of the subjects that no arm is trained on."""
    names = sorted({subject.name for subject in data.subjects})
    order = np.random.default_rng(LEFT_OUT_SEED).permutation(len(names))
    return {names[place] for place in order[: int(LEFT_OUT * len(names))]}


def training_part(pairs: Pairs, prompts: list[str], data: Captioned) -> Pairs:
    """The pairs whose prompts' subjects are not left out."""
    kept = left_out(data)
    allowed = torch.tensor([STYLE.sub("", prompt) not in kept for prompt in prompts])
    assert pairs.places is not None
    return pairs[torch.nonzero(allowed[pairs.places])[:, 0]]


@dataclass
class Panel:
    """The judge of one teacher's students.

    Attributes:
        count: prompts of subjects that were left out.
        scorer, names: of the reward, which is shown beside the judge.
    """

    teacher: Teacher
    data: Captioned
    judges: CaptionJudges
    scorer: PromptScorer
    names: list[str]
    count: int

    @cached_property
    def places(self) -> list[int]:
        """In the data: one image of each prompt that is judged."""
        kept = left_out(self.data)
        there = [
            place
            for place, subject in enumerate(self.data.subjects)
            if subject.name in kept and not self.data.held_out[place]
        ]
        return [there[k] for k in np.random.default_rng(1).permutation(len(there))[: self.count]]

    @torch.no_grad()
    def images(self, sample: Sample, prompts: list[str], seed: int) -> Tensor:
        """What ``sample(noise, condition)`` draws, (N, 3, 64, 64) in [-1, 1]."""
        draw = torch.Generator().manual_seed(seed)
        noise = torch.randn(len(prompts), *self.teacher.shape, generator=draw)
        condition = self.teacher.ask(prompts)
        parts = zip(noise.split(AT_ONCE), condition.split(AT_ONCE), strict=True)
        return torch.cat([self.teacher.images(sample(*part)).clamp(-1, 1) for part in parts])

    def quick(self, sample: Sample, count: int) -> dict[str, float]:
        """The judge's and the scorer's shares on the first ``count`` prompts: for curves."""
        places = self.places[:count]
        prompts = [self.data.prompt(place) for place in places]
        return self._shares(self.images(sample, prompts, NOISE_SEED), places, prompts)

    def _shares(self, images: Tensor, places: list[int], prompts: list[str]) -> dict[str, float]:
        judged = summary(self.judges.ranks(describe(images), places))
        seen = describe_for_scorer(images)
        own = [self.data.subjects[place].name for place in places]
        ranks = retrieval(self.scorer, seen, own, self.judges.known, seed=5)
        return {
            "top1": judged.top1,
            "top5": judged.top5,
            "scorer_top1": summary(ranks).top1,
            "score": float(self.scorer.score(seen, prompts, self.names).mean()),
        }

    def full(self, sample: Sample) -> dict[str, Any]:
        """Every figure: prompts left out, compositions held out, distance to real images, variety, spectrum."""
        places = self.places
        prompts = [self.data.prompt(place) for place in places]
        images = self.images(sample, prompts, NOISE_SEED)
        seen = features.embed(images)
        real = features.embed(self._real(places))
        again = [prompt for prompt in prompts[:REPEATED] for _ in range(NOISES)]
        varied = features.embed(self.images(sample, again, NOISE_SEED + 1))
        spectrum = Spectrum.of(images)
        held = np.flatnonzero(self.data.held_out).tolist() * HELD_OUT_NOISES
        new = [self.data.prompt(place) for place in held]
        return {
            **self._shares(images, places, prompts),
            "prompts": len(places),
            "fd_real": frechet_distance_of(seen, real),
            "spread": spread(varied, torch.arange(len(again)) // NOISES),
            "grid": spectrum.grid,
            "fine_energy": spectrum.fine_energy,
            "held_out": self._shares(self.images(sample, new, NOISE_SEED + 2), held, new),
        }

    def _real(self, places: list[int]) -> Tensor:
        return torch.tensor(self.data.images[places]).float() / 127.5 - 1
