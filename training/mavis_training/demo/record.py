"""What the demo tries and what came of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..rewards.load import Reward


@dataclass(frozen=True)
class Setting:
    """One way to answer: weight of each objective and strength beta. No weights: the model by itself."""

    name: str
    weights: dict[str, float] = field(default_factory=dict)
    beta: float = 0.0


@dataclass(frozen=True)
class Stage:
    """What stays the same in all settings."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    prompts: list[str]
    judges: dict[str, Reward]
    seeds: int
    max_new_tokens: int
    temperature: float


@dataclass(frozen=True)
class Measured:
    """Answers for S seeds and P prompts in one setting, and arrays [S, P]: reward by objective, KL in nats."""

    setting: Setting
    answers: list[list[str]]
    rewards: dict[str, np.ndarray]
    kl: np.ndarray
