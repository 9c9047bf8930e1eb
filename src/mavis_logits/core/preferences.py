"""From choices between answers to a weight vector: which lambda makes a user's choices likely, and how sure that is.

A user who weighs objectives by lambda prefers answer a to b with probability sigmoid(k lambda . (r_a - r_b)), r the
rewards in standard deviations and k how decided the user is (Bradley-Terry). Ten choices are few: what is asked next is
the pair whose outcome tells most about lambda (Houlsby et al., 2011).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_PARTICLES = 4096
_DECIDED = (1.5, 0.7)  # mean and deviation of log k before anything is known: about 1 to 18


class WeightFinder:
    """Weights on the simplex from choices between pairs of answers.

    Args:
        objectives: names of the M objectives, two or more.
        seed: of the particles.

    Raises:
        ValueError: fewer than two objectives.
    """

    def __init__(self, objectives: Sequence[str], seed: int = 0) -> None:
        if len(objectives) < 2:
            raise ValueError(f"a choice tells between two objectives or more, got {list(objectives)}")
        self.objectives = list(objectives)
        self.choices = 0
        generator = torch.Generator().manual_seed(seed)
        exponential = -torch.rand(_PARTICLES, len(objectives), generator=generator).clamp(min=1e-9).log()
        self._weights = exponential / exponential.sum(dim=1, keepdim=True)  # uniform on the simplex
        mean, deviation = _DECIDED
        self._decided = (mean + deviation * torch.randn(_PARTICLES, generator=generator)).exp()
        self._log_posterior = torch.zeros(_PARTICLES)

    @property
    def weights(self) -> dict[str, float]:
        """The mean of lambda under all choices so far, by objective; they sum to 1."""
        return dict(zip(self.objectives, (self._posterior @ self._weights).tolist(), strict=True))

    @property
    def uncertainty(self) -> dict[str, float]:
        """The standard deviation of lambda, by objective."""
        mean = self._posterior @ self._weights
        variance = self._posterior @ (self._weights - mean).square()
        return dict(zip(self.objectives, variance.sqrt().tolist(), strict=True))

    def tell(self, chosen: Sequence[float] | Tensor, other: Sequence[float] | Tensor) -> None:
        """Learn from a choice.

        Args:
            chosen, other: rewards [M] of the answer that was preferred and of the other, in standard deviations.

        Raises:
            ValueError: not one finite reward for each objective.
        """
        difference = self._rewards(chosen) - self._rewards(other)
        self._log_posterior += torch.nn.functional.logsigmoid(self._decided * (self._weights @ difference))
        self.choices += 1

    def next_pair(self, rewards: Sequence[Sequence[float]] | Tensor) -> tuple[int, int]:
        """Which two of some answers to show next: those whose outcome tells most.

        Args:
            rewards: [K, M] of K answers, two or more, in standard deviations.

        Raises:
            ValueError: fewer than two answers, or rewards that do not fit the objectives.
        """
        rows = [self._rewards(row) for row in rewards]
        if len(rows) < 2:
            raise ValueError(f"a choice is between two answers, got {len(rows)}")
        pairs = torch.combinations(torch.arange(len(rows)))
        every = torch.stack(rows)
        difference = every[pairs[:, 0]] - every[pairs[:, 1]]  # [pairs, M]
        first = torch.sigmoid(self._decided[:, None] * (self._weights @ difference.T))  # [particles, pairs]
        gain = _entropy(self._posterior @ first) - self._posterior @ _entropy(first)
        best = pairs[int(gain.argmax())]
        return int(best[0]), int(best[1])

    @property
    def _posterior(self) -> Tensor:
        return self._log_posterior.softmax(dim=0)

    def _rewards(self, given: Sequence[float] | Tensor) -> Tensor:
        row = torch.as_tensor(given, dtype=torch.float32)
        if row.shape != (len(self.objectives),) or not torch.isfinite(row).all():
            raise ValueError(f"expected a finite reward for each of {self.objectives}, got {row.tolist()}")
        return row


def _entropy(probability: Tensor) -> Tensor:
    """Of a coin, in nats."""
    p = probability.clamp(1e-6, 1 - 1e-6)
    return -(p * p.log() + (1 - p) * (1 - p).log())
