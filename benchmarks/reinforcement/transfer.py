"""Does the judge agree with what the scorer prefers? Without any training, on the shipped student's images.

    python -m benchmarks.reinforcement.transfer [--steps 2] [--prompts 200] [--json FILE]

Two ways to please the scorer: take its favourite of N images of a prompt, which are all the student's own; and move
each image's latents along the scorer's gradient, as far as it takes. What the judge, which gave no reward, thinks
better of too is what can be learnt; what the scorer alone likes is fooled. How well the judge agrees with itself,
trained again with other seeds, bounds both.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.reinforcement.judge import AT_ONCE, NOISE_SEED
from benchmarks.reinforcement.run import Experiment
from redif_sdk.results import document, write_json
from zoo import score_text
from zoo.judge_text import JUDGES, CaptionJudges, describe, summary

NOISES = (1, 2, 4, 8)
OTHERS = range(100, 100 + len(JUDGES))  # seeds of another judge
ASCENT, STEP = (2, 4, 8, 12), 0.05  # steps along the gradient, each at this rms, in latents


class Seen:
    """The judge and the scorer on images of the prompts at the data's ``places``."""

    def __init__(self, experiment: Experiment, places: list[int], other: CaptionJudges) -> None:
        self.experiment, self.places, self.other, data = experiment, places, other, experiment.data
        self.prompts = [data.prompt(place) for place in places]
        self.subjects = [data.subjects[place].name for place in places]
        self.styles = [data.styles[place] for place in places]

    @torch.no_grad()
    def ranks(self, latents: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The judge's ranks of latents (N, C, H, W), the scorer's ranks, its scores, the other judge's ranks."""
        experiment, panel = self.experiment, self.experiment.panel
        images = torch.cat([experiment.teacher.images(part).clamp(-1, 1) for part in latents.split(AT_ONCE)])
        seen, described = score_text.describe(images), describe(images)
        return (
            panel.judges.ranks(described, self.places),
            experiment.scorer.ranks(seen, self.subjects, self.styles, panel.judges.known),
            experiment.scorer.score(seen, self.prompts, experiment.names),
            self.other.ranks(described, self.places),
        )

    def direction(self, latents: Tensor) -> Tensor:
        """The gradient of the scores, at an rms of 1 in each image's latents."""
        found = []
        for low in range(0, len(latents), 25):
            part = latents[low : low + 25].clone().requires_grad_()
            images = self.experiment.teacher.images(part)
            seen = score_text.describe(images.clamp(-1, 1) + images - images.detach(), rounded=False)
            scores = self.experiment.scorer.score(seen, self.prompts[low : low + 25], self.experiment.names)
            found.append(torch.autograd.grad(scores.sum(), part)[0])
        along = torch.cat(found)
        return along / along.square().mean((1, 2, 3), keepdim=True).sqrt().clamp_min(1e-12)


def agreement(ours: Tensor, theirs: Tensor) -> float:
    """The correlation of (N, G) and (N, G) within the groups."""
    ours, theirs = ours - ours.mean(1, keepdim=True), theirs - theirs.mean(1, keepdim=True)
    return float((ours * theirs).sum() / (ours.square().sum() * theirs.square().sum()).sqrt())


def row(how: str, judged: Tensor, scored: Tensor) -> dict[str, Any]:
    """Shares of images whose caption is the first of a hundred, and among the first five."""
    judge, scorer = summary(judged), summary(scored)
    return {"how": how, "judge": judge.top1, "judge_top5": judge.top5, "scorer": scorer.top1}


def measure(experiment: Experiment, steps: int) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """The rows; and within a prompt the correlations of the judge's log rank with the scorer's log-probability, and
    with its own of other seeds."""
    places, most = experiment.panel.places, max(NOISES)
    draw = torch.Generator().manual_seed(NOISE_SEED)
    noise = torch.randn(most * len(places), *experiment.teacher.shape, generator=draw)
    other = experiment.judges(OTHERS)
    one = Seen(experiment, places, other)
    condition = experiment.teacher.ask(one.prompts * most)
    sample, parts = experiment.policy(steps).sample, zip(noise.split(AT_ONCE), condition.split(AT_ONCE), strict=True)
    with torch.no_grad():
        latents = torch.cat([sample(*part) for part in parts])
    every = Seen(experiment, places * most, other).ranks(latents)
    judged, scored, scores, others = (found.unflatten(0, (most, -1)).T for found in every)
    rows, everyone = [], torch.arange(len(places))
    for count in NOISES:
        best = scores[:, :count].argmax(1)
        rows.append(row(f"best of {count}", judged[everyone, best], scored[everyone, best]))
    best = (-others).argmax(1)
    rows.append(row(f"best of {most} by a judge of other seeds", judged[everyone, best], scored[everyone, best]))
    moved = latents[: len(places)]
    for step in range(1, max(ASCENT) + 1):
        moved = moved + STEP * one.direction(moved)
        if step in ASCENT:
            far = float((moved - latents[: len(places)]).square().mean().sqrt())
            rows.append(row(f"{step} steps of its gradient, moved by {far:.2f}", *one.ranks(moved)[:2]))
    levels = -torch.log1p(judged.float())
    agree = {"scorer": agreement(scores, levels), "judge": agreement(-torch.log1p(others.float()), levels)}
    return rows, agree


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--scorer", type=Path, default=Path("build/scorer"))
    parser.add_argument("--data-dir", default=None)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args(arguments)
    experiment = Experiment(asked.scorer, asked.data_dir, asked.prompts)
    rows, agree = measure(experiment, asked.steps)
    for found in rows:
        print("{how:44} judge {judge:.1%}, among five {judge_top5:.1%}, scorer {scorer:.1%}".format_map(found))
    print(
        "correlation with the judge within a prompt: scorer {scorer:.2f}, judge of other seeds {judge:.2f}".format_map(
            agree
        )
    )
    if asked.json:
        write_json(asked.json, document("reward transfer", rows, agreement=agree, num_prompts=asked.prompts))


if __name__ == "__main__":
    main()
