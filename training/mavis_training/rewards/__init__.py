"""Rewards: functions of TRL's convention, and sequence classifiers."""

from .classifier import ClassifierReward, ClassifierSettings
from .load import Reward, RewardSpec, compute_rewards, describe_spec, load_reward, reward_digest, split_spec

__all__ = [
    "ClassifierReward", "ClassifierSettings", "Reward", "RewardSpec", "compute_rewards", "describe_spec",
    "load_reward", "reward_digest", "split_spec",
]  # fmt: skip
