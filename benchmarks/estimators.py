"""What does reinforcement add to regression, by estimator? The table of docs/results/rewards.md.

``python benchmarks/estimators.py [--updates 400] [--seeds 0 1] [-o FILE]``: one-step students of the shipped teacher,
from the same start, for the same number of updates (and so of gradient samples): plain regression, and ReDiF with the
texture reward after the same warm start, its direction estimated from one number an image, from the reward's map, and
by its gradient. Evaluated on noises that are used neither for training nor for evaluating the quickstart's students.
Forward-equivalents and seconds are printed; the rewards' own cost is in the seconds only.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from redif_sdk.distill import DistillConfig, Teacher
from redif_sdk.distill import pool as pairs
from redif_sdk.distill.evaluation.arena import outputs
from redif_sdk.distill.measures.distances import Judge
from redif_sdk.distill.measures.features import embed
from redif_sdk.distill.rewards import Batch, TextureReward
from redif_sdk.distill.training.loop import Trainer
from redif_sdk.results import document, write_json

SAMPLES, JUDGING_SEED = 800, 1  # of the "train" slots: the quickstart's pool has seed 0, its evaluation other slots


class OneNumber:
    """The texture reward without its map: what an ordinary black-box reward looks like."""

    name = "texture (one number)"

    def __call__(self, batch: Batch) -> Tensor:
        return TextureReward()(batch).mean((1, 2))


EXPLORING = {"exploration": 0.03, "exploration_rank": 0, "group_size": 32, "step_delta": 2.5}
CONTENDERS: dict[str, dict[str, Any]] = {
    "regression": {"method": "regression"},
    "redif, same-state, one number": {"reward": OneNumber(), **EXPLORING},
    "redif, same-state, by place": {"reward": "texture", **EXPLORING},
    "redif, pathwise": {"reward": "texture", "estimator": "pathwise", "step_delta": 5.0},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--updates", type=int, default=400)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("-o", "--output", type=Path, default=None)
    asked = parser.parse_args()
    teacher = Teacher.load("fashion-mnist")
    pool, _ = pairs.get(teacher, DistillConfig().pool_size, "train")
    held, _ = pairs.get(teacher, SAMPLES, "train", seed=JUDGING_SEED)
    judge = Judge(teacher.images(held.target), embed)
    rows = []
    for seed in asked.seeds:
        for name, settings in CONTENDERS.items():
            fixed = {
                "num_inference_steps": asked.steps,
                "updates": asked.updates,
                "seed": seed,
                "learning_rate": 2.5e-3,
            }
            config = DistillConfig.checked(**{**fixed, "reward": "texture", "warm_start": 0.5, **settings})
            policy = Trainer(teacher, config, pool).run()
            quality = judge.quality(teacher.images(outputs(policy.sample, held)))
            spent = {"forward_equivalents": policy.meter.forward_equivalents, "seconds": policy.meter.seconds}
            rows.append({"contender": name, "seed": seed, "updates": asked.updates, **quality.row(), **spent})
            print(json.dumps(rows[-1]), flush=True)
    if asked.output:
        write_json(asked.output, document("estimators", rows, threads=torch.get_num_threads()))


if __name__ == "__main__":
    main()
