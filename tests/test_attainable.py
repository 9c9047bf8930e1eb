"""`benchmarks/attainable.py`: that what it calls the optimum among a tree's answers is one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from attainable import tilted

NUMBERS = st.lists(st.floats(-3, 3), min_size=2, max_size=8)


@given(NUMBERS, st.floats(0.05, 5), st.integers(0, 2**32 - 1))
def test_no_other_distribution_over_the_answers_has_more_reward_less_divergence(rewards, eta, seed) -> None:
    generator = np.random.default_rng(seed)
    weights = generator.dirichlet(np.ones(len(rewards)))[:, None]
    reward = np.array(rewards)[:, None]
    gain, kl = tilted(weights, reward, eta)
    assert kl >= -1e-9
    for other in generator.dirichlet(np.ones(len(rewards)), size=20):
        found = (other[:, None] - weights) * reward, other * np.log(other / weights[:, 0])
        assert gain[0] - eta * kl[0] >= found[0].sum() - eta * found[1].sum() - 1e-9


@given(NUMBERS, st.integers(0, 2**32 - 1))
def test_the_best_answers_gain_is_the_most_and_costs_what_they_are_likely(rewards, seed) -> None:
    weights = np.random.default_rng(seed).dirichlet(np.ones(len(rewards)))[:, None]
    reward = np.array(rewards)[:, None]
    gain, kl = tilted(weights, reward, 0.0)
    assert gain[0] == pytest.approx(reward.max() - (weights * reward).sum())
    assert kl[0] == pytest.approx(-np.log(weights[reward[:, 0] == reward.max()].sum()))
