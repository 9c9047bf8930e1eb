"""Worst-case weights: the objectives' side of a game against the policy (robust multi-objective decoding, RMOD)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
PRECISION = 1e-7  # how far the function that the weights minimise may be from its minimum, in nats
_GROWTH = 30.0  # by which the barrier fades from one centre to the next
_CENTRED = 1e-4  # slope along Newton's step at which a centre counts as found
_MOST_STEPS = 60
_HALVINGS = 30


def worst_case_weights(values: Floats, beta: Floats | float, active: NDArray[np.bool_]) -> Floats:
    """The weights of the game max over pi, min over w of: sum_m w_m E_pi[V_m] - KL(pi || uniform) / beta.

    pi is a distribution on K blocks, which were themselves drawn from the reference; w is one on M objectives. For
    given w the best pi is proportional to exp(beta sum_m w_m V_m), so that the weights minimise a convex function,
    log mean_k exp(beta sum_m w_m V_mk). At the minimum pi expects the same of all objectives that have weight, and no
    less of the others. Found by an interior-point method: Newton's, on the function plus a fading barrier.

    Args:
        values: [R, K, M], finite, of objectives on one scale.
        beta: one number or [R], at least 0; at 0 the policy cannot choose, and the weights are equal.
        active: [R, M], the objectives that take part: at least one a row.

    Returns:
        [R, M], at least 0 and summing to 1; 0 for objectives that take no part.
    """
    scaled = values * np.reshape(beta, (-1, 1, 1))
    # The same taken from all: the function moves by a constant.
    scaled = scaled - scaled.max(axis=(1, 2), keepdims=True)
    weights = active / active.sum(axis=1, keepdims=True)
    sharpness = 1.0
    while True:
        weights = _centre(scaled, weights, sharpness, active)
        if values.shape[2] / sharpness <= PRECISION:  # bounds the distance from the minimum
            return weights / weights.sum(axis=1, keepdims=True)
        sharpness *= _GROWTH


def _centre(scaled: Floats, weights: Floats, sharpness: float, active: NDArray[np.bool_]) -> Floats:
    """Minimise sharpness * f(w) - sum_m log w_m over the simplex, from `weights` on."""
    for _ in range(_MOST_STEPS):
        logits = _combined(scaled, weights)
        policy = np.exp(logits - logits.max(axis=1, keepdims=True))
        policy /= policy.sum(axis=1, keepdims=True)
        # The step u is in units of the weights, w (1 + u): well conditioned however small a weight is, and 0 stays 0.
        own = scaled * weights[:, None]
        mean = (policy[..., None] * own).sum(axis=1)
        spread = (own - mean[:, None]) * np.sqrt(policy)[..., None]
        matrix = np.eye(scaled.shape[2]) + sharpness * spread.swapaxes(1, 2) @ spread
        downhill = 1 - sharpness * mean
        solved = np.linalg.solve(matrix, np.stack([downhill, weights], axis=2))
        step, level = solved[..., 0], solved[..., 1]
        step = step - level * ((weights * step).sum(axis=1) / (weights * level).sum(axis=1))[:, None]  # keeps the sum
        step = np.where(active, step, 0.0)
        slope = (downhill * step).sum(axis=1)
        if (slope <= _CENTRED).all():
            break
        weights = weights * (1 + _length(scaled, weights, sharpness, active, step, slope)[:, None] * step)
    return weights


def _length(
    scaled: Floats, weights: Floats, sharpness: float, active: NDArray[np.bool_], step: Floats, slope: Floats
) -> Floats:
    """[R] how far to go along `step`: inside the simplex, and with a gain in proportion to the slope (Armijo)."""

    def function(w: Floats) -> Floats:
        logits = _combined(scaled, w)
        top = logits.max(axis=1, keepdims=True)
        log_sum = top[:, 0] + np.log(np.exp(logits - top).sum(axis=1))
        return sharpness * log_sum - np.log(w, out=np.zeros_like(w), where=active).sum(axis=1)

    length = np.minimum(1.0, 0.99 / np.maximum(-step.min(axis=1), 1e-12))
    before = function(weights)
    for _ in range(_HALVINGS):
        enough = function(weights * (1 + length[:, None] * step)) <= before - 0.1 * length * slope
        if enough.all():
            break
        length = np.where(enough, length, length / 2)
    return length


def _combined(scaled: Floats, weights: Floats) -> Floats:
    return (scaled @ weights[:, :, None])[..., 0]
