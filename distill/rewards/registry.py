"""The rewards by name. A new one is a module beside this file, and a line in `REWARDS`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from redif_sdk.distill.pool import Pairs
from redif_sdk.distill.rewards.bands import BandsReward
from redif_sdk.distill.rewards.batch import positional
from redif_sdk.distill.rewards.chat import ChatReward
from redif_sdk.distill.rewards.discriminator import Discriminator
from redif_sdk.distill.rewards.distribution import DistributionReward
from redif_sdk.distill.rewards.endpoint import EndpointReward
from redif_sdk.distill.rewards.feature import FeatureReward
from redif_sdk.distill.rewards.mmd import MmdReward
from redif_sdk.distill.rewards.perceptual import LpipsReward, pretrained
from redif_sdk.distill.rewards.pixel import PixelReward
from redif_sdk.distill.rewards.prompt_score import PREFIX, PromptScore
from redif_sdk.distill.rewards.protocol import LearningReward, Reward, name_of
from redif_sdk.distill.rewards.texture import TextureReward
from redif_sdk.distill.teachers.base import Teacher
from redif_sdk.errors import InvalidRequest

__all__ = ["FITTED", "REWARDS", "RewardSpec", "make_rewards", "reward_names", "weighted"]

Factory = Callable[[Teacher, Pairs, int], Reward]
REWARDS: dict[str, Factory] = {
    "pixel": lambda teacher, pairs, seed: PixelReward(),
    "feature": FeatureReward.fit,
    "texture": lambda teacher, pairs, seed: TextureReward(),
    "bands": lambda teacher, pairs, seed: BandsReward(),
    "lpips": lambda teacher, pairs, seed: LpipsReward(),
    "discriminator": lambda teacher, pairs, seed: Discriminator.make(teacher, seed, pairs.noise.device),
    "mmd": MmdReward.fit,
    "distribution": lambda teacher, pairs, seed: DistributionReward(),
}
FITTED = ("feature", "mmd")  # to the pool, when they are made
#: Rewards that are named with what they are made of: a folder or Hub id, or an address.
FROM: dict[str, Callable[[str], Reward]] = {
    "clip:": pretrained,
    "dino:": pretrained,
    PREFIX: lambda name: PromptScore.load(name.removeprefix(PREFIX)),
    "chat:": ChatReward.named,
    "http://": EndpointReward,
    "https://": EndpointReward,
}

SERVERS = ("chat:", "http://", "https://")

RewardSpec = str | Reward | Sequence["str | Reward"] | Mapping["str | Reward", float]


def weighted(spec: RewardSpec) -> list[tuple[str | Reward, float]]:
    """Each reward of ``spec`` with its weight."""
    if isinstance(spec, Mapping):
        return [(reward, float(weight)) for reward, weight in spec.items()]
    if isinstance(spec, str):
        parts = [part.strip() for part in spec.split("+")]
        return [(part, 1.0) for part in parts]
    if callable(spec):
        return [(spec, 1.0)]
    return [(reward, 1.0) for reward in spec]


def reward_names(spec: RewardSpec) -> list[str]:
    """The rewards' names in ``spec``, checked: "feature", "feature+pixel", a callable, a list or {reward: weight}.

    Raises:
        InvalidRequest: an unknown name, or no reward at all.
    """
    names = []
    for reward, _ in weighted(spec):
        if not isinstance(reward, str):
            if positional(reward) not in (0, 1, 3):
                raise InvalidRequest(
                    f"the reward {name_of(reward)} takes {positional(reward)} arguments; it is called with one, a "
                    "Batch, or with three: images, targets, condition"
                )
            names.append(name_of(reward))
        elif reward.startswith(SERVERS):  # named without its secrets
            names.append(name_of(_from(reward)))
        elif reward in REWARDS or reward.startswith(tuple(FROM)):
            names.append(reward)
        else:
            known = ", ".join([*sorted(REWARDS), *(f"{kind}FOLDER" for kind in FROM if kind not in SERVERS)])
            raise InvalidRequest(
                f"unknown reward {reward!r}; known: {known}, chat:URL#MODEL, the address of one, or any callable"
            )
    if not names:
        raise InvalidRequest("no reward is given; name at least one, e.g. 'feature'")
    return names


def _from(name: str) -> Reward:
    """The reward of a name that begins with a key of `FROM`."""
    return next(make for prefix, make in FROM.items() if name.startswith(prefix))(name)


def make_rewards(spec: RewardSpec, teacher: Teacher, pairs: Pairs, seed: int) -> list[tuple[Reward, float]]:
    """The rewards in ``spec`` with their weights, on the device of ``pairs``.

    Args:
        spec: "feature", "feature+pixel", an address, a callable, a list of these, or {reward: weight}.
        teacher, pairs: what rewards are fitted to that have features or networks of their own.
        seed: of their weights.

    Raises:
        InvalidRequest: an unknown name, a model that cannot be loaded, or a reward that learns and keeps no state.
    """
    reward_names(spec)

    def make(reward: str | Reward) -> Reward:
        if not isinstance(reward, str):
            return reward
        return REWARDS[reward](teacher, pairs, seed) if reward in REWARDS else _from(reward)

    made = [(make(reward), weight) for reward, weight in weighted(spec)]
    for reward, _ in made:
        if hasattr(reward, "learn") and not isinstance(reward, LearningReward):
            raise InvalidRequest(
                f"the reward {name_of(reward)} has `learn`, but no `state_dict` or `load_state_dict`; add both, "
                "so that a run can be resumed"
            )
    return made
