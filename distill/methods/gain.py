"""The gain of a student's output, learnt at the end of a run: averages over what is uncertain lose contrast.

It is one number, so it is searched. The reward is of the whole population: minus the Frechet distance to the pool.
"""

from __future__ import annotations

import torch

from redif_sdk.distill.compute.costs import flops
from redif_sdk.distill.context import Context
from redif_sdk.distill.measures.distances import Statistics, frechet_distance
from redif_sdk.distill.policy import StudentPolicy
from redif_sdk.distill.rewards.feature import FeatureNetwork, FeatureReward

GAINS = tuple(round(0.9 + 0.02 * k, 2) for k in range(16))  # .90 to 1.20
FIT_UPDATES, FIT_BATCH = 50, 64  # of the feature network that judges gains


def gain_cost(context: Context, count: int) -> float:
    """What :func:`learn_gain` spends, in forward-equivalents."""
    if not count:
        return 0.0
    used = min(count, len(context.pairs))
    decoding = flops(context.teacher.images, context.pairs.target[:1]) / context.unit  # 0 where latents are pixels
    decoded = len(context.pairs) + (len(GAINS) + 1) * used
    image = context.teacher.images(context.pairs.target[:1])
    with torch.random.fork_rng(devices=[]):
        judge = flops(FeatureNetwork(image.shape[1], 1).to(image.device), image) / context.unit
    judged = 3 * FIT_UPDATES * FIT_BATCH + (len(GAINS) + 1) * used
    return used * context.policy.num_inference_steps + decoding * decoded + judge * judged


@torch.no_grad()
def learn_gain(context: Context, student: StudentPolicy, count: int) -> float:
    """The gain on the student's output at which ``count`` of its images are nearest to the pool's, as a population.

    Nearest by Frechet distance (Heusel et al. 2017) in the features of a network trained on the pool alone.
    """
    pool = context.pairs[: min(count, len(context.pairs))]
    parts = [pool[low : low + 128] for low in range(0, len(pool), 128)]
    outputs = torch.cat([student.sample(part.noise, part.condition) for part in parts])
    with torch.enable_grad():
        judge = FeatureReward.fit(context.teacher, context.pairs, context.config.seed, FIT_UPDATES, FIT_BATCH)
    seen = context.teacher.seen  # images, also where the rewards see latents
    wanted = Statistics.of(judge.embed(seen(pool.target)))
    distances = [frechet_distance(Statistics.of(judge.embed(seen(gain * outputs))), wanted) for gain in GAINS]
    context.policy.meter.auxiliary_calls += gain_cost(context, count) - len(pool) * student.num_inference_steps
    return GAINS[distances.index(min(distances))]
