"""Reading objectives in words with a cache, held against reading everything from scratch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mavis_logits.scoring.rows import RowTracker
from mavis_logits.scoring.words import WordsScorer
from mavis_logits.testing import _next, recompute_words
from tiny import ARCHITECTURES, VOCABULARY, make_base, make_words


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
@pytest.mark.filterwarnings("ignore:the instructions .* are read from scratch")
def test_rows_that_grow_change_places_go_back_and_leave(architecture, cached):
    base = make_base(architecture)
    words = make_words(base, "a", "b")
    scorer, tracker, rng = WordsScorer(words, cached), RowTracker(), np.random.default_rng(0)
    sequences = [rng.integers(3, VOCABULARY, size=n) for n in (5, 2, 9)]
    for step in range(8):
        candidates = np.stack([rng.choice(VOCABULARY, size=4, replace=False) for _ in sequences])
        given = torch.from_numpy(candidates)
        found = scorer.score(tracker.plan(sequences), given)
        for row, sequence in enumerate(sequences):
            with torch.no_grad():
                plain = torch.log_softmax(base(torch.tensor(sequence)[None]).logits[0, -1].float(), dim=-1)
            expected = recompute_words(words, base, sequence, given[row]) + plain[given[row]][:, None]
            torch.testing.assert_close(found[row], expected, atol=2e-4, rtol=1e-3)
        tracker.update(sequences, candidates)
        sequences = _next(sequences, candidates, rng, VOCABULARY, step)


def test_the_same_rows_twice_cost_no_second_pass():
    base = make_base()
    scorer, tracker = WordsScorer(make_words(base, "a")), RowTracker()
    sequences, candidates = [np.array([5, 6, 7]), np.array([8, 9])], torch.tensor([[1, 2], [3, 4]])
    first = scorer.score(tracker.plan(sequences), candidates)
    tracker.update(sequences, candidates.numpy())
    read = []
    base.register_forward_pre_hook(lambda *_: read.append(1))
    assert torch.equal(scorer.score(tracker.plan(sequences), candidates), first)
    assert not read
    longer = [np.array([5, 6, 7]), np.array([8, 9, 3])]  # one row goes on, the other stays
    torch.testing.assert_close(scorer.score(tracker.plan(longer), candidates)[0], first[0])
