from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mavis_training.measure.schedule import Measurement, TargetKl, find_zeta, gain, improves, raise_beta

GRID = [1.0, 2.0, 3.0, 4.0, 6.0]
SIZES = st.lists(st.floats(0, 30), min_size=5, max_size=5)


def measurement(reward: float, kl: float, prompts: int = 8) -> Measurement:
    """Rewards that differ between prompts, but by the same amounts in every measurement."""
    return Measurement(reward + np.linspace(-1, 1, prompts), kl + np.linspace(-1, 1, prompts))


@given(st.lists(st.floats(0, 30), min_size=1, max_size=12), st.floats(0.5, 29))
def test_zeta_is_the_smallest_that_keeps_the_bound(divergences, bound):
    """For a divergence that falls as zeta grows, bisection finds what trying all of them in order would."""
    zetas = [i / 100 for i in range(len(divergences))]
    falling = dict(zip(zetas, sorted(divergences, reverse=True), strict=True))
    asked = []

    def measure(zeta):
        asked.append(zeta)
        return measurement(0, falling[zeta])

    target = TargetKl(bound, zetas=zetas)
    found = find_zeta(measure, target)
    assert found == next((zeta for zeta in zetas if measurement(0, falling[zeta]).kl <= bound), zetas[-1])
    assert found in asked
    assert len(set(asked)) == len(asked) <= math.ceil(math.log2(len(zetas) + 1))


@given(st.lists(st.floats(0, 30), min_size=1, max_size=12), st.floats(0.5, 29))
def test_noise_cannot_put_zeta_beyond_the_bound(divergences, bound):
    """Whatever the divergences, what is found was measured within the bound if any of those asked for was."""
    zetas = [i / 100 for i in range(len(divergences))]
    asked = {}

    def measure(zeta):
        asked[zeta] = measurement(0, divergences[zetas.index(zeta)])
        return asked[zeta]

    found = find_zeta(measure, TargetKl(bound, zetas=zetas))
    assert asked[found].kl <= bound or all(m.kl > bound for m in asked.values())


@given(SIZES, SIZES, st.floats(0.5, 25), st.booleans())
def test_beta_rises_while_it_pays(steps, costs, bound, may_exceed):
    """For rewards and divergences that never fall: the last beta before the stall, or where the bound is passed."""
    rewards = dict(zip(GRID, np.cumsum(steps), strict=True))
    divergences = dict(zip(GRID, np.cumsum(costs), strict=True))
    asked = []

    def measure(beta):
        asked.append(beta)
        return measurement(rewards[beta], divergences[beta])

    found = raise_beta(measure, GRID, TargetKl(bound), may_exceed)
    assert asked == GRID[: len(asked)]  # in order, each once
    within = [beta for beta in GRID if measurement(0, divergences[beta]).kl <= bound]
    if found != GRID[0]:
        before = GRID[GRID.index(found) - 1]
        assert rewards[found] > rewards[before]
        assert before in within
        assert may_exceed or found in within
    if found != GRID[-1] and found in within:
        following = GRID[GRID.index(found) + 1]
        stalled = improves(
            measurement(rewards[following], divergences[following]),
            measurement(rewards[found], divergences[found]),
            1.0,
        )
        assert not stalled or (following not in within and not may_exceed)


def test_a_gain_is_judged_by_the_prompts_own_differences():
    old = Measurement(np.array([0.0, 10.0, 20.0]), np.array([1.0, 2.0, 3.0]))
    new = Measurement(np.array([1.0, 11.0, 22.0]), np.array([2.0, 3.0, 5.0]))
    mean, error = gain(new, old)
    assert mean == pytest.approx(4 / 3)
    assert error == pytest.approx(1 / 3)
    assert improves(new, old, 3.9)
    assert not improves(new, old, 4.1)
    assert not improves(new, old, 0.0, kl_weight=1.0)  # all of it was paid for in nats
    assert gain(Measurement(np.ones(1), np.ones(1)), Measurement(np.zeros(1), np.ones(1))) == (1.0, 0.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kl": 0.0}, "kl must be a number of nats above 0, got 0"),
        ({"kl": 1.0, "betas": [2.0, 1.0]}, "betas must rise"),
        ({"kl": 1.0, "zetas": []}, "zetas must rise"),
        ({"kl": 1.0, "zetas": [-1.0, 0.0]}, "zetas must rise and be at least 0"),
        ({"kl": 1.0, "tolerance": -1.0}, "tolerance must be at least 0"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        TargetKl(**settings)
