"""Reconciliation: following a plan turns the cached rows into exactly the incoming sequences."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mavis_logits.scoring.rows import Plan, RowTracker, Tokens, endings, strip_padding

PAD, EOS = 0, 1
# Three tokens only, so that prefixes are shared and candidates chosen often.
sequences = st.lists(st.integers(0, 2), min_size=1, max_size=6).map(lambda x: np.array(x, dtype=np.int64))
batches = st.lists(sequences, min_size=1, max_size=4)


@st.composite
def histories(draw: Any) -> list[tuple[list[Tokens], Tokens]]:
    """Calls of a scorer: sequences, and the candidates scored after each."""
    calls = []
    for _ in range(draw(st.integers(1, 4))):
        rows = draw(batches)
        k = draw(st.integers(1, 3))
        candidates = [draw(st.permutations(range(3)))[:k] for _ in rows]
        calls.append((rows, np.array(candidates, dtype=np.int64)))
    return calls


def shared(a: Tokens, b: Tokens) -> int:
    width = min(len(a), len(b))
    return next((i for i in range(width) if a[i] != b[i]), width)


def replay(plan: Plan, rows: list[Tokens], candidates: Tokens) -> list[list[int]]:
    """What a cache that obeys the plan holds afterwards."""
    result = []
    for i in range(len(plan.sequences)):
        if plan.source is None:
            assert plan.kept[i] == 0
            assert plan.chosen[i] == -1
            row: list[int] = []
        else:
            source = int(plan.source[i])
            row = rows[source][: plan.kept[i]].tolist()
            if plan.chosen[i] >= 0:
                assert plan.kept[i] == len(rows[source]), "a candidate stands behind the whole row only"
                row.append(int(candidates[source][plan.chosen[i]]))
        result.append(row + plan.pending[i].tolist())
    return result


@given(histories())
def test_following_the_plan_gives_the_incoming_sequences(history: list[tuple[list[Tokens], Tokens]]) -> None:
    tracker = RowTracker()
    rows: list[Tokens] = []
    candidates = np.empty((0, 0), dtype=np.int64)
    for incoming, scored in history:
        plan = tracker.plan(incoming)
        assert replay(plan, rows, candidates) == [s.tolist() for s in incoming]
        tracker.update(incoming, scored)
        rows, candidates = incoming, scored


@given(histories(), batches)
def test_no_cached_row_shares_more_than_the_one_that_is_kept(history: Any, incoming: list[Tokens]) -> None:
    tracker = RowTracker()
    rows, scored = history[-1]
    tracker.update(rows, scored)
    plan = tracker.plan(incoming)
    for sequence, kept in zip(incoming, plan.kept, strict=True):
        assert kept == max(shared(sequence, row) for row in rows)


@given(histories(), st.data())
def test_the_next_token_of_every_row_is_taken_in_place(history: Any, data: st.DataObject) -> None:
    tracker = RowTracker()
    rows, scored = history[-1]
    tracker.update(rows, scored)
    choice = [data.draw(st.integers(0, scored.shape[1] - 1)) for _ in rows]
    grown = [np.append(row, scored[i][choice[i]]) for i, row in enumerate(rows)]
    plan = tracker.plan(grown)
    if plan.in_place:  # always, unless another cached row happens to begin this one with more tokens
        assert plan.kept.tolist() == [len(row) for row in rows]
        assert plan.chosen.tolist() == choice
        assert not any(len(tokens) for tokens in plan.pending)
    else:
        assert any(shared(sequence, row) == len(sequence) for sequence in grown for row in rows)


def test_a_new_prompt_needs_nothing_cached() -> None:
    tracker = RowTracker()
    prompt = [np.array([5, 6]), np.array([7])]
    plan = tracker.plan(prompt)
    assert plan.source is None
    assert not plan.in_place
    tracker.update(prompt, np.array([[1], [2]]))
    assert tracker.plan([np.array([9, 9])]).source is None
    tracker.reset()
    assert tracker.plan(prompt).source is None


def test_beams_rejections_and_a_second_turn_are_one_case() -> None:
    tracker = RowTracker()
    tracker.update([np.array([5, 6, 7]), np.array([5, 8])], np.array([[3, 4], [3, 4]]))
    plan = tracker.plan([np.array([5, 8, 4]), np.array([5, 6, 7, 3, 9, 9]), np.array([5, 6, 2])])
    assert plan.source is not None
    assert plan.source.tolist() == [1, 0, 0]
    assert plan.kept.tolist() == [2, 3, 2]
    assert plan.chosen.tolist() == [1, 0, -1]
    assert [p.tolist() for p in plan.pending] == [[], [9, 9], [2]]
    assert not plan.in_place


@given(batches, st.integers(0, 4))
def test_padding_is_stripped_from_the_left_only(rows: list[Tokens], extra: int) -> None:
    rows = [np.append([2], row) for row in rows]  # a real first token; padding may follow
    width = max(map(len, rows)) + extra
    batch = np.array([[PAD] * (width - len(row)) + row.tolist() for row in rows])
    assert [row.tolist() for row in strip_padding(batch, PAD)] == [row.tolist() for row in rows]
    assert [len(row) for row in strip_padding(batch, None)] == [width] * len(rows)


def test_a_row_of_nothing_but_padding_is_an_empty_prompt() -> None:
    with pytest.raises(
        ValueError, match=r"row 1 of the batch is an empty prompt: it holds nothing but padding \(token 0"
    ):
        strip_padding(np.array([[PAD, 5], [PAD, PAD]]), PAD)


def test_a_lone_token_is_a_prompt_even_if_it_is_the_padding_token() -> None:
    assert [row.tolist() for row in strip_padding(np.array([[PAD], [5]]), PAD)] == [[PAD], [5]]


def test_rows_end_with_padding_after_eos() -> None:
    rows = [[5, 6, EOS, PAD], [5, EOS, PAD, PAD], [5, 6, 7, EOS], [5, 6, 7, PAD], [5, 6, 7, 8], [PAD, PAD, 5, EOS]]
    closed, ended, over = endings([row[-2:] for row in rows], 4, frozenset({EOS}), PAD)
    assert closed == [True, True, False, False, False, False]
    assert ended == [False, False, True, False, False, True]
    assert over == [True, True, True, True, False, True]
    assert not any(endings([row[-2:] for row in rows], 4, frozenset({EOS}), None).closed)
    assert endings([[EOS, EOS], [6, EOS]], 3, frozenset({EOS}), EOS).closed == [True, False]
    assert endings([[], []], 0, frozenset({EOS}), PAD) == ([False] * 2,) * 3


def test_prompts_that_all_look_closed_are_prompts() -> None:
    assert not any(endings([[EOS, PAD], [EOS, PAD]], 3, frozenset({EOS}), PAD).closed)
    assert not any(endings([[EOS, PAD], [5, 6]], 2, frozenset({EOS}), PAD).closed)
