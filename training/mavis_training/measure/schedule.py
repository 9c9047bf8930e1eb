"""The target-KL schedule of section 3.3: raise beta until the reward stalls, then find zeta. Pure functions."""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class TargetKl:
    """A bound on the policy's divergence, for which beta and zeta are found in every iteration.

    Attributes:
        kl: the bound in nats per completion (equation 7).
        betas: strengths of the tilt to try, rising.
        zetas: KL penalty multipliers to try, rising.
        tolerance: rewards that differ by less than this many standard errors count as equal.
    """

    kl: float
    betas: list[float] = field(default_factory=lambda: [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0])
    zetas: list[float] = field(default_factory=lambda: [0.0, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2])
    tolerance: float = 1.0

    def __post_init__(self) -> None:
        if not self.kl > 0:
            raise ValueError(f"target_kl.kl must be a number of nats above 0, got {self.kl}")
        for name in ("betas", "zetas"):
            grid = getattr(self, name)
            if not grid or min(grid) < 0 or any(a >= b for a, b in itertools.pairwise(grid)):
                raise ValueError(f"target_kl.{name} must rise and be at least 0, got {grid}")
        if self.tolerance < 0:
            raise ValueError(f"target_kl.tolerance must be at least 0, got {self.tolerance}")


@dataclass(frozen=True)
class Measurement:
    """A policy on P validation prompts.

    Attributes:
        rewards: `[P]`, weighted sum of the objectives.
        log_ratios: `[P]`, log pi / pi_ref of the completions; their mean is the KL divergence (equation 7).
        summary: means and errors, for people.
        by_objective: every reward of every completion, `[S * P]` for S seeds.
    """

    rewards: NDArray[np.float64]
    log_ratios: NDArray[np.float64]
    summary: dict[str, Any] = field(default_factory=dict)
    by_objective: dict[str, NDArray[np.float64]] = field(default_factory=dict)

    @property
    def kl(self) -> float:
        """Divergence from the reference, nats per completion."""
        return float(self.log_ratios.mean())

    def score(self, kl_weight: float = 0.0) -> NDArray[np.float64]:
        """`[P]`, reward minus `kl_weight` times log-ratio: equation 1 with eta for the weight."""
        return self.rewards - kl_weight * self.log_ratios


def gain(new: Measurement, old: Measurement, kl_weight: float = 0.0) -> tuple[float, float]:
    """How much higher the score is, prompt by prompt: mean and standard error (0 for a single prompt)."""
    difference = new.score(kl_weight) - old.score(kl_weight)
    count = len(difference)
    error = float(difference.std(ddof=1) / np.sqrt(count)) if count > 1 else 0.0
    return float(difference.mean()), error


def improves(new: Measurement, old: Measurement, tolerance: float, kl_weight: float = 0.0) -> bool:
    """Whether the score rose by more than `tolerance` standard errors of the difference."""
    mean, error = gain(new, old, kl_weight)
    return mean > tolerance * error


def raise_beta(
    measure: Callable[[float], Measurement], betas: Sequence[float], target: TargetKl, may_exceed: bool
) -> float:
    """Go up the grid until the reward stalls or the divergence passes the target.

    Args:
        measure: the policy at a beta; asked in rising order, once for each.
        betas: the grid.
        target: bound and tolerance.
        may_exceed: the last beta may have passed the bound, because the next iteration's zeta will bring it down;
            else it is the last one within (the first of the grid if none is).
    """
    chosen, best = betas[0], measure(betas[0])
    for beta in betas[1:]:
        if best.kl > target.kl:
            break
        trial = measure(beta)
        if not improves(trial, best, target.tolerance) or (trial.kl > target.kl and not may_exceed):
            break
        chosen, best = beta, trial
    return chosen


def find_zeta(measure: Callable[[float], Measurement], target: TargetKl) -> float:
    """The smallest zeta of the grid whose policy keeps within the target, by bisection; the largest if none does.

    A value function is trained for every zeta that is asked for, at most log2(n + 1) rounded up of n. What is returned
    was measured within the target (if anything was), also where noise makes the divergence not quite monotone.
    """
    within = bisect_left(target.zetas, True, key=lambda zeta: measure(zeta).kl <= target.kl)
    return target.zetas[min(within, len(target.zetas) - 1)]
