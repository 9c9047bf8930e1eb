"""Which weights somebody wants, found by showing two answers at a time."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..core.preferences import WeightFinder

if TYPE_CHECKING:
    from torch import Tensor

MOST = 10  # choices
SURE = 0.05  # standard deviation of every weight at which no more is asked


@dataclass
class Finding:
    """Choices between answers to one question.

    Attributes:
        objectives: M names.
        answers: K texts.
        rewards: [K, M], in standard deviations: what the value functions say of each whole answer.
    """

    objectives: list[str]
    answers: list[str]
    rewards: Tensor
    finder: WeightFinder = field(init=False)
    pair: tuple[int, int] = field(init=False)

    def __post_init__(self) -> None:
        self.finder = WeightFinder(self.objectives)
        self.pair = self.finder.next_pair(self.rewards)

    @property
    def done(self) -> bool:
        """Whether enough has been asked."""
        return self.finder.choices >= MOST or max(self.finder.uncertainty.values()) < SURE

    def choose(self, first: bool) -> None:
        """Learn that the first or the second of the pair is preferred, and go on to the next one."""
        chosen, other = self.pair if first else self.pair[::-1]
        self.finder.tell(self.rewards[chosen], self.rewards[other])
        self.pair = self.finder.next_pair(self.rewards)

    def told(self) -> str:
        """The weights so far, with how sure they are."""
        sure = self.finder.uncertainty
        return ", ".join(f"{name} {weight:.2f} ± {sure[name]:.2f}" for name, weight in self.finder.weights.items())
