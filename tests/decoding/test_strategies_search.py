"""What holds for every strategy that ranks sequences."""

from __future__ import annotations

import pytest
import torch
from transformers import MaxLengthCriteria, StoppingCriteriaList, TextStreamer

from mavis_logits import MavisBeamSearch, MavisBestOfN, MavisConfig, MavisLogitsProcessor
from search_helpers import run, texts
from tiny import EOS, PAD, make_base, make_value_model

KINDS = {
    "beam search": lambda functions, *args, **kwargs: MavisBeamSearch(
        functions, *args, num_beams=4, interval=2, **kwargs
    ),
    "best of n": lambda functions, *args, **kwargs: MavisBestOfN(functions, *args, num_samples=4, **kwargs),
}


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


def test_seeds(base, value_model, prompts, kind):
    first, again, other = (run(base, kind(value_model), prompts, seed).sequences for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert first.shape != other.shape or not torch.equal(first, other)


def test_a_strategy_is_used_again(base, value_model, prompts, kind):
    strategy = kind(value_model)
    first = run(base, strategy, prompts, num_return_sequences=2)
    run(base, strategy, {name: x[:1] for name, x in prompts.items()}, seed=5)
    assert torch.equal(run(base, strategy, prompts, num_return_sequences=2).sequences, first.sequences)


@pytest.mark.parametrize("count", [1, 3])
def test_what_is_returned(base, value_model, prompts, kind, count):
    found = run(base, kind(value_model), prompts, num_return_sequences=count)
    assert found.values.shape == (3 * count, 2)
    assert (found.sequences_scores.view(3, count).diff(dim=1) <= 0).all()
    rows = texts(found.sequences, prompts)  # prompts, padding
    assert max(len(new) for _, new in rows) == found.sequences.shape[1] - 5  # no column of padding alone
    torch.manual_seed(0)
    ids = base.generate(
        **prompts, custom_generate=kind(value_model), do_sample=True, max_new_tokens=8, num_return_sequences=count
    )
    assert torch.equal(ids, found.sequences)


class StopAt:
    """Ends every row whose last token is one of `tokens`; remembers what it was shown."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens, self.shapes = torch.tensor(tokens), []

    def __call__(self, input_ids, scores, **kwargs):
        self.shapes.append(tuple(input_ids.shape))
        return torch.isin(input_ids[:, -1], self.tokens)


def test_stopping_criteria_end_rows(base, value_model, prompts, kind):
    stop = StopAt(list(range(2, 60)))
    found = run(
        base, kind(value_model), prompts, stopping_criteria=StoppingCriteriaList([stop]), num_return_sequences=4
    )
    assert stop.shapes == [(12, 6 + step) for step in range(len(stop.shapes))]  # all rows, ended ones too
    for row in found.sequences[:, 5:].tolist():
        new = [token for i, token in enumerate(row) if PAD not in row[:i]]
        assert not any(2 <= token < 60 for token in new[:-2])
    ended = [row for row in found.sequences[:, 5:].tolist() if PAD in row[1:]]
    assert ended  # some ended before others


def test_all_rows_stop_at_once(base, value_model, prompts, kind):
    criteria = StoppingCriteriaList([MaxLengthCriteria(8)])
    assert run(base, kind(value_model), prompts, stopping_criteria=criteria).sequences.shape[1] == 8


def test_a_prompt_whose_sequences_all_end_waits_for_the_others(prompts, kind):
    base, model = make_base(), make_value_model("a")
    only_eos = StopAt([])

    def force(input_ids, scores):
        """The second prompt can only end."""
        second = (input_ids[:, 3] == 10) & (input_ids[:, 2] == PAD)
        ends = torch.full_like(scores, -torch.inf)
        ends[:, EOS] = 0.0
        return torch.where(second[:, None], ends, scores)

    found = run(
        base, kind(model), prompts, logits_processor=[force], stopping_criteria=StoppingCriteriaList([only_eos]),
        num_return_sequences=2,
    )  # fmt: skip
    rows = texts(found.sequences, prompts)
    assert [new for _, new in rows[2:4]] == [[EOS], [EOS]]
    assert max(len(new) for _, new in rows) == 8


def test_the_reference_is_what_generate_would_sample_from(base, value_model, prompts, kind):
    found = run(base, kind(value_model), prompts, top_k=1, num_return_sequences=4)
    greedy = base.generate(**prompts, do_sample=False, max_new_tokens=8)
    for row, (_, new) in enumerate(texts(found.sequences, prompts)):
        assert new == texts(greedy, prompts)[row // 4][1]


def test_settings_per_request(base, value_model, prompts, kind):
    weights = torch.tensor([[1.0, 0.0], [0.0, 1.0], [3.0, -1.0]])
    found = run(base, kind(value_model, weights), prompts, num_return_sequences=2)
    torch.testing.assert_close(found.sequences_scores, (found.values * weights.repeat_interleave(2, dim=0)).sum(dim=1))


def test_nan_is_noticed(base, value_model, prompts, kind):
    with torch.no_grad():
        value_model.head.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="the value function for 'a' gave nan"):
        run(base, kind(value_model), prompts)


def test_bad_calls(base, value_model, prompts, kind):
    with pytest.raises(ValueError, match="ends with 4 sequences a prompt"):
        run(base, kind(value_model), prompts, num_return_sequences=5)
    with pytest.raises(ValueError, match="returns no scores of single steps: leave output_scores out"):
        run(base, kind(value_model), prompts, output_scores=True)
    with pytest.raises(ValueError, match="weights are given for 2 requests"):
        run(base, kind(value_model, torch.ones(2, 2)), prompts)
    with pytest.raises(ValueError, match="beta are given for 6 requests, but there are 3 prompts"):
        run(base, kind(value_model, None, torch.ones(6)), prompts, num_return_sequences=2)
    with pytest.raises(ValueError, match="steers by itself"):
        run(base, kind(value_model), prompts, logits_processor=[MavisLogitsProcessor(value_model)])


def test_bad_settings(value_model, kind):
    with pytest.raises(ValueError, match="cannot stream"):
        kind(value_model, streamer=object.__new__(TextStreamer))
    with pytest.raises(ValueError, match="no trace can show"):
        kind(value_model, trace=True)
    with pytest.raises(ValueError, match="unknown setting 'betas'"):
        kind(value_model, betas=1)
    assert kind(value_model, config=MavisConfig(top_k=7)).config.top_k == 7
