"""The judge of the experiment: prompts that no reinforcement saw, and networks that gave no reward.

`CaptionJudges` (EfficientNet-Lite0 and words; one a style, trained on the other styles) says how often the prompt's own
caption is the first of a hundred. No prompt that is judged is among any arm's training prompts. They are of three
kinds: subjects in a style in which no arm trains on them ("red heart, noto style", where it has "red heart" and the
other styles); subjects that no arm trains on at all; and the compositions that the teacher itself never saw. Beside
them stand prompts that arms train on, from noises that they do not.
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
from zoo.judge_text import CaptionJudges, describe, summary
from zoo.score_text import STYLE, STYLE_OF
from zoo.score_text import describe as describe_for_scorer

LEFT_OUT_SEED, LEFT_OUT = 28, 0.1  # of the subjects: left out in every style
NOISE_SEED = 2800
AT_ONCE = 100
REPEATED, NOISES = 100, 4  # prompts that are drawn from several noises, for the variety in a prompt
HELD_OUT_NOISES = 8  # for each composition

Sample = Callable[[Tensor, Tensor], Tensor]


class PromptScorer(Protocol):
    """The reward: `zoo.score_text.Scorers`."""

    def score(self, descriptions: Tensor, prompts: list[str], names: list[str], /) -> Tensor: ...

    def ranks(self, descriptions: Tensor, names: list[str], styles: list[str], known: list[str], /) -> Tensor: ...


@dataclass(frozen=True)
class LeftOut:
    """What no arm is trained on: subjects by name, and of every other subject one style (name, style)."""

    subjects: frozenset[str]
    prompts: frozenset[tuple[str, str]]

    @classmethod
    def of(cls, data: Captioned) -> LeftOut:
        """Drawn with a fixed seed, of what the teacher was trained on."""
        styles: dict[str, list[str]] = {}
        for subject, style, held in zip(data.subjects, data.styles, data.held_out, strict=True):
            styles.setdefault(subject.name, []).extend([] if held else [style])
        draw = np.random.default_rng(LEFT_OUT_SEED)
        names = sorted(styles)
        order = [names[place] for place in draw.permutation(len(names))]
        subjects = order[: int(LEFT_OUT * len(names))]
        others = sorted(name for name in order[len(subjects) :] if styles[name])
        return cls(frozenset(subjects), frozenset((name, str(draw.choice(sorted(styles[name])))) for name in others))

    def has(self, prompt: str) -> bool:
        """Whether a prompt is left out."""
        name, style = STYLE.sub("", prompt), STYLE.search(prompt)
        return name in self.subjects or (style is not None and (name, STYLE_OF[style[2]]) in self.prompts)

    def allowed(self, prompts: list[str]) -> list[int]:
        """The places of the prompts that arms may train on."""
        return [place for place, prompt in enumerate(prompts) if not self.has(prompt)]


def training_part(pairs: Pairs, allowed: list[int]) -> Pairs:
    """The pairs whose prompts, by their places, are allowed."""
    assert pairs.places is not None
    return pairs[torch.nonzero(torch.isin(pairs.places, torch.tensor(allowed)))[:, 0]]


@dataclass
class Panel:
    """The judge of one teacher's students.

    Attributes:
        count: prompts of each kind that is judged, at most.
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
        """In the data: one image of each prompt, its subject in a style that was left out."""
        return self._places(lambda name, style: (name, style) in self._left_out.prompts)

    @cached_property
    def _new_subjects(self) -> list[int]:
        return self._places(lambda name, style: name in self._left_out.subjects)

    @cached_property
    def _trained_on(self) -> list[int]:
        left_out = self._left_out
        return self._places(lambda name, style: name not in left_out.subjects and (name, style) not in left_out.prompts)

    @cached_property
    def _left_out(self) -> LeftOut:
        return LeftOut.of(self.data)

    def _places(self, wanted: Callable[[str, str], bool]) -> list[int]:
        data = self.data
        there = [
            place
            for place, (subject, style) in enumerate(zip(data.subjects, data.styles, strict=True))
            if wanted(subject.name, style) and not data.held_out[place]
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
        return self._drawn(sample, self.places[:count], NOISE_SEED)

    def _shares(self, images: Tensor, places: list[int], prompts: list[str]) -> dict[str, float]:
        judged = summary(self.judges.ranks(describe(images), places))
        seen = describe_for_scorer(images)
        own = [self.data.subjects[place].name for place in places]
        ranks = self.scorer.ranks(seen, own, [self.data.styles[place] for place in places], self.judges.known)
        return {
            "top1": judged.top1,
            "top5": judged.top5,
            "scorer_top1": summary(ranks).top1,
            "score": float(self.scorer.score(seen, prompts, self.names).mean()),
        }

    def full(self, sample: Sample) -> dict[str, Any]:
        """Every figure: prompts of every kind, distance to real images, variety, spectrum."""
        places = self.places
        prompts = [self.data.prompt(place) for place in places]
        images = self.images(sample, prompts, NOISE_SEED)
        seen = features.embed(images)
        real = features.embed(self._real(places))
        again = [prompt for prompt in prompts[:REPEATED] for _ in range(NOISES)]
        varied = features.embed(self.images(sample, again, NOISE_SEED + 1))
        spectrum = Spectrum.of(images)
        held = np.flatnonzero(self.data.held_out).tolist() * HELD_OUT_NOISES
        return {
            **self._shares(images, places, prompts),
            "prompts": len(places),
            "fd_real": frechet_distance_of(seen, real),
            "spread": spread(varied, torch.arange(len(again)) // NOISES),
            "grid": spectrum.grid,
            "fine_energy": spectrum.fine_energy,
            "trained_on": self._drawn(sample, self._trained_on, NOISE_SEED + 4),
            "new_subjects": self._drawn(sample, self._new_subjects, NOISE_SEED + 3),
            "held_out": self._drawn(sample, held, NOISE_SEED + 2),
        }

    def _drawn(self, sample: Sample, places: list[int], seed: int) -> dict[str, float]:
        prompts = [self.data.prompt(place) for place in places]
        return self._shares(self.images(sample, prompts, seed), places, prompts) | {"prompts": len(places)}

    def _real(self, places: list[int]) -> Tensor:
        return torch.tensor(self.data.images[places]).float() / 127.5 - 1
