"""Weights from choices: near the truth after ten, whatever it is; what they do as laws."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mavis_logits.core.preferences import WeightFinder


def found(truth: torch.Tensor, seed: int, choices: int = 10, decided: float = 8.0) -> tuple[WeightFinder, float]:
    """What a simulated user of some weights is found to want, and the largest error."""
    generator = torch.Generator().manual_seed(seed)
    finder = WeightFinder([f"o{i}" for i in range(len(truth))])
    answers = torch.randn(20, len(truth), generator=generator)
    for _ in range(choices):
        a, b = finder.next_pair(answers)
        prefers = torch.rand(1, generator=generator) < torch.sigmoid(decided * truth @ (answers[a] - answers[b]))
        finder.tell(*((answers[a], answers[b]) if prefers else (answers[b], answers[a])))
    error = max(abs(x - float(y)) for x, y in zip(finder.weights.values(), truth, strict=True))
    return finder, error


@pytest.mark.parametrize("count", [2, 3])
def test_ten_choices_find_the_weights_to_a_tenth(count) -> None:
    """Mean error of simulated users, of weights all over the simplex."""
    generator = torch.Generator().manual_seed(0)
    errors = []
    for seed in range(25):
        truth = -torch.rand(count, generator=generator).log()
        errors.append(found(truth / truth.sum(), seed)[1])
    assert sum(errors) / len(errors) < 0.1


def test_the_uncertainty_is_what_the_error_is() -> None:
    inside = total = 0
    for seed in range(20):
        truth = torch.tensor([0.2, 0.8]) if seed % 2 else torch.tensor([0.6, 0.4])
        finder, _ = found(truth, seed)
        for (name, mean), real in zip(finder.weights.items(), truth.tolist(), strict=True):
            inside += abs(mean - real) < 2 * finder.uncertainty[name]
            total += 1
    assert inside / total > 0.8


@settings(max_examples=20)
@given(st.lists(st.floats(-2, 2), min_size=3, max_size=3), st.lists(st.floats(-2, 2), min_size=3, max_size=3))
def test_a_choice_moves_the_weights_towards_what_was_chosen(chosen, other) -> None:
    finder = WeightFinder(["a", "b", "c"])
    difference = torch.tensor(chosen) - torch.tensor(other)

    def liked() -> float:
        return float(torch.tensor(list(finder.weights.values())) @ difference)

    before = liked()
    finder.tell(chosen, other)
    assert liked() >= before - 1e-4
    assert sum(finder.weights.values()) == pytest.approx(1, abs=1e-4)
    assert min(finder.weights.values()) >= 0


def test_nothing_is_asked_that_tells_nothing() -> None:
    finder = WeightFinder(["a", "b"])
    assert set(finder.next_pair([[0.0, 0.0], [0.0, 0.0], [1.0, -1.0]])) & {2}
    assert finder.next_pair([[1.0, 1.0], [-1.0, -1.0], [1.0, -1.0], [-1.0, 1.0]]) == (2, 3)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="two objectives or more"):
        WeightFinder(["a"])
    finder = WeightFinder(["a", "b"])
    with pytest.raises(ValueError, match="finite reward for each"):
        finder.tell([1.0], [0.0])
    with pytest.raises(ValueError, match="finite reward for each"):
        finder.tell([1.0, float("nan")], [0.0, 0.0])
    with pytest.raises(ValueError, match="between two answers"):
        finder.next_pair([[1.0, 0.0]])
