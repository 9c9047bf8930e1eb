"""Choosing how a value function is best used: candidates, normalisation and strength, at a wanted divergence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..calibrate import next_strength

# What is tried, the likeliest first: values themselves over many candidates are best for heads in docs/results; value
# models pay for every candidate. Values count in standard deviations of their rewards, so that one strength fits all.
# What is no candidate is best kept where the temperature is high: a cut costs divergence for nothing.
GRIDS: dict[str, list[dict[str, Any]]] = {
    "head": [
        {"top_k": 200, "normalize": "standard", "unscored": "expected"},
        {"top_k": 200, "normalize": "standard", "candidate_min_p": 0.02},
        {"top_k": 15, "normalize": "minmax"},
    ],
    "policy": [{"top_k": 200, "normalize": "standard", "unscored": "expected"}],
    "model": [
        {"top_k": 15, "normalize": "minmax"},
        {"top_k": 15, "normalize": "standard", "unscored": "expected"},
        {"top_k": 15, "normalize": "standard"},
    ],
}
# As which multiples of the chosen strength is measured, and what they are called behind an objective's name.
STRENGTHS = {"": 1.0, ", half as strong": 0.5, ", twice as strong": 2.0}
_NEAR = 0.15  # of the wanted divergence
_TRIES = 4


@dataclass(frozen=True)
class Trial:
    """Settings that were tried.

    Attributes:
        settings: fields of `MavisConfig`, `beta` among them.
        kl: nats an answer, mean over the objectives steered towards one by one.
        gains: by objective, in standard deviations of the reward of the model left alone.
    """

    settings: dict[str, Any]
    kl: float
    gains: dict[str, float]

    @property
    def gain(self) -> float:
        """Mean over the objectives."""
        return float(np.mean(list(self.gains.values())))


def choose(
    measure: Callable[[dict[str, Any]], Trial],
    grid: list[dict[str, Any]],
    kl: float | None,
    in_time: Callable[[], bool],
) -> tuple[Trial, list[Trial]]:
    """The settings with the highest gain at the divergence `kl`, and all that were tried.

    A tilt by beta A diverges by about beta^2 Var(A) / 2 a token (`fitting.efficiency`), so that a second try of a
    strength is near the mark as a rule.

    Args:
        measure: tries settings.
        grid: settings without `beta`.
        kl: wanted, in nats; None for most reward.
        in_time: whether there is time for another try; the first two are made all the same.
    """
    tried: list[Trial] = []
    for settings in grid:
        if len(tried) > 1 and not in_time():
            break
        beta = 3.0
        found: list[Trial] = []
        for _ in range(_TRIES):
            trial = measure({**settings, "beta": float(f"{beta:.3g}")})
            found.append(trial)
            tried.append(trial)
            if len(tried) > 1 and not in_time():
                break
            if kl is None:
                if trial.gain < max(one.gain for one in found):  # it has passed the top
                    break
                beta *= 1.6
            elif abs(trial.kl - kl) <= _NEAR * kl:
                break
            elif len(found) > 1 and trial.kl < kl and trial.kl < 1.05 * max(one.kl for one in found[:-1]):
                break  # the best candidates are taken already: no strength diverges further
            else:
                beta = next_strength([(one.settings["beta"], one.kl) for one in found], kl)
                if beta < 1e-2 * found[0].settings["beta"]:  # its cut alone diverges further
                    break
    if kl is None:
        return max(tried, key=lambda trial: trial.gain), tried
    within = [trial for trial in tried if trial.kl <= (1 + 2 * _NEAR) * kl]
    near = [trial for trial in within if trial.kl >= (1 - 2 * _NEAR) * kl]
    if near or within:
        return max(near or within, key=lambda trial: trial.gain), tried
    return min(tried, key=lambda trial: trial.kl), tried
