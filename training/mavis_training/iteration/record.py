"""What came of an iteration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..measure.schedule import Measurement
from ..sampling.config import PolicyConfig
from .stages import Stage


@dataclass(frozen=True)
class Iterated:
    """A finished iteration.

    Attributes:
        zeta: KL penalty multiplier that V^i was trained with.
        beta: of the policy that V^i guides.
        policy: that policy.
        stages: "collect", "label", "train" and "validate", with what they found and took.
        measured: the policy on the validation prompts.
        tried: in a target-KL schedule, every measurement that led to zeta and beta.
    """

    zeta: float
    beta: float
    policy: PolicyConfig
    stages: dict[str, Stage]
    measured: Measurement
    tried: list[dict[str, Any]]
