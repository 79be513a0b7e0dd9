"""What a student is rewarded for: a file a reward, their protocol, the registry of names, and the advantage.

A reward is a black box that takes a `Batch` of N images and gives (N,): higher is better, and it needs no gradient.
"""

from redif_sdk.distill.rewards.advantage import Advantage
from redif_sdk.distill.rewards.batch import Batch
from redif_sdk.distill.rewards.discriminator import Discriminator
from redif_sdk.distill.rewards.endpoint import EndpointReward
from redif_sdk.distill.rewards.feature import FeatureReward
from redif_sdk.distill.rewards.pixel import PixelReward
from redif_sdk.distill.rewards.protocol import LearningReward, Reward, RewardContext, name_of
from redif_sdk.distill.rewards.registry import REWARDS, make_rewards, reward_names
from redif_sdk.distill.rewards.texture import TextureReward

__all__ = [
    "REWARDS",
    "Advantage",
    "Batch",
    "Discriminator",
    "EndpointReward",
    "FeatureReward",
    "LearningReward",
    "PixelReward",
    "Reward",
    "RewardContext",
    "TextureReward",
    "make_rewards",
    "name_of",
    "reward_names",
]
