"""Totals and traces of steering."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mavis_logits.trace import MavisStats, MavisTrace

EOS = 1


def step(length: int, rows: int = 2, **changed: Any) -> dict[str, Any]:
    """A step over the candidates 1 to 3, each of whose log-ratios is its number / 10 plus the length."""
    candidates = torch.tensor([[1, 2, 3]]).expand(rows, 3)
    reference = torch.full((rows, 3), -2.0)
    return {
        "length": length,
        "live": torch.ones(rows, dtype=torch.bool),
        "candidates": candidates,
        "reference": reference,
        "tilted": reference + candidates / 10 + length,
        "values": torch.zeros(rows, 3, 1),
        "beta": torch.ones(rows),
        "kl": torch.full((rows,), 0.25),
        "taken": torch.full((rows,), -1),
    } | changed


def make_trace(*steps: dict[str, Any]) -> MavisTrace:
    trace = MavisTrace(["a"], frozenset({EOS}))
    for each in steps:
        trace.add(**each)
    return trace


def test_stats_add_up() -> None:
    stats = MavisStats()
    assert stats.kl == 0.0
    stats.add(3, torch.tensor([0.5, 0.25, 0.0]), 0.5)
    stats.add(2, torch.tensor([0.25, 1.0]), 0.25)
    assert (stats.steps, stats.tokens, stats.seconds, stats.passed_through) == (2, 5, 0.75, 0)
    assert stats.kl == pytest.approx(2.0)


def test_log_ratios_are_those_of_the_tokens_taken() -> None:
    trace = make_trace(step(5), step(6))
    assert len(trace) == 2
    assert [each.length for each in trace] == [5, 6]  # type: ignore[attr-defined]
    ratios = trace.log_ratios(torch.tensor([[2, 3], [3, 2]]))
    torch.testing.assert_close(ratios, torch.tensor([[5.2, 6.3], [5.3, 6.2]]))


def test_nothing_counts_after_the_end_of_a_row() -> None:
    trace = make_trace(step(5), step(6), step(7, live=torch.tensor([False, True])))
    ratios = trace.log_ratios(torch.tensor([[EOS, 0, 0], [2, 3, EOS]]))
    torch.testing.assert_close(ratios, torch.tensor([[5.1, 0.0, 0.0], [5.2, 6.3, 7.1]]))


def test_a_row_that_is_not_live_counts_nothing() -> None:
    trace = make_trace(step(5), step(6, live=torch.tensor([False, True])))
    torch.testing.assert_close(trace.log_ratios(torch.tensor([[2, 9], [2, 2]]))[:, 1], torch.tensor([0.0, 6.2]))


def test_fewer_tokens_than_steps_are_fine() -> None:
    assert make_trace(step(5), step(6)).log_ratios(torch.tensor([[2], [2]])).shape == (2, 1)


@pytest.mark.parametrize(
    ("completions", "message"),
    [
        ([[2, 2, 2], [2, 2, 2]], r"2 rows x 3 tokens, but the trace holds 2 steps of \{2\} rows"),
        ([[2, 2]], r"1 rows x 2 tokens, but the trace holds 2 steps of \{2\} rows"),
        ([[2, 2], [2, 9]], r"token 1 of row 1 \(9\) was no candidate of the traced step"),
    ],
)
def test_completions_of_another_call_are_refused(completions: list[list[int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_trace(step(5), step(6)).log_ratios(torch.tensor(completions))


def test_an_empty_trace_refuses_completions() -> None:
    with pytest.raises(ValueError, match="the trace holds 0 steps"):
        make_trace().log_ratios(torch.tensor([[2]]))


def test_the_token_taken_is_filled_in() -> None:
    trace = make_trace(step(5))
    trace.took(torch.tensor([2, 3]))
    assert trace[0].taken.tolist() == [2, 3]
    trace.took(torch.tensor([7]))  # of another batch: not ours
    assert trace[0].taken.tolist() == [2, 3]
    MavisTrace(["a"]).took(torch.tensor([1]))
