"""Drawing several tokens at once, ranking, and telling copies apart."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mavis_logits import MavisSampling
from mavis_logits.decoding.strategies.beams import draw_distinct, first_alike, ranking
from mavis_logits.decoding.strategies.session import Session
from tiny import make_base, make_head, make_value_model

tables = st.integers(1, 3).flatmap(
    lambda rows: st.integers(1, 7).flatmap(
        lambda columns: st.lists(
            st.lists(st.integers(0, 4), min_size=columns, max_size=columns), min_size=rows, max_size=rows
        )
    )
)


@given(tables)
def test_first_alike(table):
    found = first_alike(torch.tensor(table)).tolist()
    columns = len(table[0])
    assert found == [[r * columns + row.index(key) for key in row] for r, row in enumerate(table)]


@given(tables, tables, st.booleans())
def test_ranking(scores, keys, distinct):
    rows, columns = min(len(scores), len(keys)), min(len(scores[0]), len(keys[0]))
    scores = [[float(s) if s else float("-inf") for s in row[:columns]] for row in scores[:rows]]
    first = first_alike(torch.tensor([row[:columns] for row in keys[:rows]]))
    order = ranking(torch.tensor(scores), first, distinct)
    for r in range(rows):
        copies = [int(first[r, c]) != r * columns + c for c in range(columns)]
        expected = sorted(range(columns), key=lambda c: -scores[r][c])
        if distinct:
            expected.sort(key=lambda c: 2 * (scores[r][c] == float("-inf")) + copies[c])
        assert order[r].tolist() == expected


def session_of(steering, base, copies):
    prompt = torch.tensor([[5, 6, 7]])
    session = Session(steering, base, prompt)
    session.__enter__()
    session.reference()
    session.select(torch.zeros(copies, dtype=torch.long))
    return session


@torch.no_grad()
@pytest.mark.parametrize("settings", [{}, {"top_k": None}, {"unscored": "keep"}, {"unscored": "expected"}], ids=str)
def test_two_tokens_are_drawn_without_replacement(settings):
    base = make_base()
    steering = MavisSampling(make_head(base, "a"), beta=2.0, model=base, **{"top_k": 4} | settings)
    session = session_of(steering, base, 4000)
    torch.manual_seed(0)
    drawn = draw_distinct(session, 2, sample=True)
    policy = session.score().log_probs(97)[0].exp()
    assert (drawn.tokens[:, 0] != drawn.tokens[:, 1]).all()
    for i in policy.topk(4).indices.tolist():
        first = drawn.tokens[:, 0] == i
        assert float(first.float().mean()) == pytest.approx(float(policy[i]), abs=0.04)
        for j in policy.topk(4).indices.tolist():
            if j != i:
                pair = (first & (drawn.tokens[:, 1] == j)).float().mean()
                assert float(pair) == pytest.approx(float(policy[i] * policy[j] / (1 - policy[i])), abs=0.04)
    session.__exit__()


@torch.no_grad()
def test_the_likeliest_are_taken_without_sampling():
    base, model = make_base(), make_value_model("a")
    session = session_of(MavisSampling(model), base, 2)
    step = session.score()
    drawn = draw_distinct(session, 3, sample=False)
    places = step.tilted[0].topk(3).indices
    assert drawn.tokens.tolist() == [step.candidates[0, places].tolist()] * 2
    torch.testing.assert_close(drawn.scores[0], step.combined[0, places])
    session.__exit__()


@torch.no_grad()
def test_where_there_are_too_few_candidates_the_rest_is_no_way_on():
    base, model = make_base(), make_value_model("a")
    session = session_of(MavisSampling(model, candidate_min_p=1.0), base, 2)  # leaves the likeliest alone
    drawn = draw_distinct(session, 3, sample=True)
    assert torch.isfinite(drawn.scores).sum(dim=1).tolist() == [1, 1]
    assert (drawn.tokens[torch.isfinite(drawn.scores)] == session.reference().argmax(dim=1)).all()
    session.__exit__()
