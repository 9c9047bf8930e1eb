"""Numbers of a trade-off: fronts, hypervolume, spacing, mean inner product, dominance; intervals over prompts.

Rewards are in standard deviations of the unsteered model's, less its mean, so that 0 is the model left alone. The unit
of sampling is the prompt: a bootstrap draws prompts with all their seeds and all methods at once, so that what is hard
about a prompt is shared by everything that is compared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import moocore
import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Points:
    """What a method reached.

    Attributes:
        gains: [K, P, M], mean over seeds, of K cells, P prompts and M objectives.
        weights: [K, M], lambda of each cell.
        kl: [K] nats; NaN where a method has none.
    """

    gains: Array
    weights: Array
    kl: Array

    def at_most(self, kl: float | None) -> Points:
        """The cells that spend no more; those whose divergence is not known do not count."""
        kept = np.ones(len(self.kl), dtype=bool) if kl is None else self.kl <= kl
        return Points(self.gains[kept], self.weights[kept], self.kl[kept])


def hypervolume(points: Array, corner: Array) -> float:
    """Volume between a corner and the front of points [K, M], more being better; 0 without points."""
    return float(moocore.hypervolume(points, ref=corner, maximise=True)) if len(points) else 0.0


def front(points: Array) -> NDArray[np.bool_]:
    """[K] which points none dominates."""
    return np.asarray(moocore.is_nondominated(points, maximise=True), dtype=bool) if len(points) else np.zeros(0, bool)


def spacing(points: Array) -> float | None:
    """Standard deviation of the distances of the front's points to their nearest neighbours (Schott, 1995); None for
    fewer than three of them."""
    own = points[front(points)]
    if len(own) < 3:
        return None
    distances = np.abs(own[:, None] - own[None]).sum(axis=2)
    np.fill_diagonal(distances, np.inf)
    return float(distances.min(axis=1).std(ddof=1))


def mean_inner_product(points: Array, weights: Array) -> float | None:
    """MIP: mean over the weightings of lambda times reward, the best cell of each; None without points."""
    if not len(points):
        return None
    product = (points * weights).sum(axis=1)
    best: dict[tuple[float, ...], float] = {}
    for value, own in zip(product, weights, strict=True):
        key = tuple(np.round(own, 6))
        best[key] = max(value, best.get(key, -np.inf))
    return float(np.mean(list(best.values())))


def coverage(ours: Array, theirs: Array) -> float | None:
    """Share of their front that a point of ours is at least as good as in everything (C metric); None without one."""
    own = theirs[front(theirs)]
    if not len(own):
        return None
    return float(np.mean([bool(len(ours)) and bool((ours >= point).all(axis=1).any()) for point in own]))


def resampled(prompts: int, resamples: int, seed: int = 0) -> NDArray[np.int_]:
    """[B, P] which prompts each bootstrap sample has."""
    return np.random.default_rng(seed).integers(prompts, size=(resamples, prompts))


def interval(values: Sequence[float], level: float) -> tuple[float, float]:
    """Percentile interval of a bootstrap's values."""
    low, high = np.quantile(np.asarray(values), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def bootstrap(
    statistic: Callable[[dict[str, Array]], float], methods: Mapping[str, Points], draws: NDArray[np.int_]
) -> list[float]:
    """A statistic of all methods' mean points [K, M], for every draw of prompts.

    Args:
        statistic: of the means by method.
        methods: points by method.
        draws: [B, P], of `resampled`.
    """
    counts = np.stack([np.bincount(draw, minlength=draws.shape[1]) for draw in draws]) / draws.shape[1]
    means = {name: np.einsum("bp,kpm->bkm", counts, points.gains) for name, points in methods.items()}
    return [statistic({name: mean[b] for name, mean in means.items()}) for b in range(len(draws))]


def p_value(values: Sequence[float], at: float) -> float:
    """Two-sided: how easily a bootstrap's values lie on the other side of `at`; never 0."""
    found = np.asarray(values)
    share = min(float((found <= at).mean()), float((found >= at).mean()))
    return min(1.0, 2 * max(share, 1 / (len(found) + 1)))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """p-values corrected for as many comparisons as there are (Holm, 1979)."""
    order = sorted(p_values, key=p_values.__getitem__)
    found, largest = {}, 0.0
    for i, name in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - i) * p_values[name]))
        found[name] = largest
    return {name: found[name] for name in p_values}
