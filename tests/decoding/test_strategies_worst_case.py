"""Worst-case weights solve the game: no other weights are worse for the policy, no other policy is better."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from mavis_logits.decoding.strategies.worst_case import worst_case_weights

Floats = NDArray[np.float64]


def log_mean(values: Floats, beta: float, weights: Floats) -> float:
    """log mean_k exp(beta w V_k) of one row, values [K, M]."""
    scores = beta * values @ weights
    return float(np.logaddexp.reduce(scores) - np.log(len(values)))


def policy(values: Floats, beta: float, weights: Floats) -> Floats:
    scores = beta * values @ weights
    return np.exp(scores - np.logaddexp.reduce(scores))


def solve(values: Floats, beta: float, active: list[bool] | None = None) -> Floats:
    mask = np.array([active or [True] * values.shape[1]])
    return worst_case_weights(values[None], beta, mask)[0]


games = st.tuples(
    st.integers(1, 12), st.integers(1, 5), st.sampled_from([0.01, 0.3, 1.0, 5.0, 40.0]), st.integers(0, 10_000)
)


def game(blocks: int, objectives: int, seed: int) -> Floats:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(blocks, objectives)) * rng.exponential(size=objectives) + rng.normal(size=objectives)


@given(games)
def test_no_weights_on_the_simplex_are_worse_for_the_policy(drawn: tuple[int, int, float, int]) -> None:
    blocks, objectives, beta, seed = drawn
    values = game(blocks, objectives, seed)
    weights = solve(values, beta)
    assert (weights >= 0).all()
    assert weights.sum() == pytest.approx(1)
    found = log_mean(values, beta, weights)
    others = np.random.default_rng(seed).dirichlet(np.full(objectives, 0.5), size=50)
    for other in [*others, *np.eye(objectives)]:
        assert found <= log_mean(values, beta, other) + 1e-4


@given(games)
def test_the_policy_expects_no_more_of_weighted_objectives_than_of_the_others(
    drawn: tuple[int, int, float, int],
) -> None:
    """The condition for the equilibrium: against this policy, these weights are the worst."""
    blocks, objectives, beta, seed = drawn
    values = game(blocks, objectives, seed)
    weights = solve(values, beta)
    expected = policy(values, beta, weights) @ values
    assert weights @ expected == pytest.approx(expected.min(), abs=1e-4 + 1e-4 / beta)


@pytest.mark.parametrize("objectives", [2, 3])
@pytest.mark.parametrize("beta", [0.5, 3.0])
def test_equal_to_a_grid_search(objectives: int, beta: float) -> None:
    steps = 200 if objectives == 2 else 60
    for seed in range(5):
        values = game(6, objectives, seed) - np.arange(objectives) / 10
        grid = [
            np.array([*point, steps - sum(point)]) / steps
            for point in itertools.product(range(steps + 1), repeat=objectives - 1)
            if sum(point) <= steps
        ]
        best = min(grid, key=lambda w: log_mean(values, beta, w))
        weights = solve(values, beta)
        assert log_mean(values, beta, weights) <= log_mean(values, beta, best) + 1e-6
        assert np.abs(weights - best).max() <= 2 / steps + 0.02


def test_the_game_has_the_same_value_from_both_sides() -> None:
    """max over policies of min over weights, by a search over policies on two blocks, equals min over weights."""
    values, beta = np.array([[1.0, -0.5], [-1.0, 0.7]]), 2.0
    by_policy = []
    for share in np.linspace(1e-6, 1 - 1e-6, 20001):
        pi = np.array([share, 1 - share])
        by_policy.append((pi @ values).min() - (pi * np.log(2 * pi)).sum() / beta)
    assert max(by_policy) == pytest.approx(log_mean(values, beta, solve(values, beta)) / beta, abs=1e-6)


def test_an_objective_that_every_block_serves_less_gets_all_weight() -> None:
    values = np.array([[3.0, -2.0], [4.0, -3.0], [5.0, -1.0]])
    assert solve(values, 1.0) == pytest.approx([0, 1], abs=1e-6)


def test_objectives_that_take_no_part_have_no_weight() -> None:
    values = game(5, 3, 0)
    weights = solve(values, 2.0, [True, False, True])
    assert weights[1] == 0
    assert weights[[0, 2]] == pytest.approx(solve(values[:, [0, 2]], 2.0), abs=1e-6)


def test_without_influence_the_weights_are_equal() -> None:
    assert solve(game(5, 4, 0), 0.0) == pytest.approx([0.25] * 4)


def test_rows_are_games_of_their_own() -> None:
    values = np.stack([game(5, 3, seed) for seed in range(4)])
    beta = np.array([0.2, 1.0, 3.0, 10.0])
    active = np.array([[True, True, True], [True, False, True], [False, True, True], [True, False, False]])
    together = worst_case_weights(values, beta, active)
    for row in range(4):
        assert together[row] == pytest.approx(solve(values[row], beta[row], active[row].tolist()), abs=1e-5)
