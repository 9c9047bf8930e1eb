"""Best of N: the best by value or by reward, whatever is pruned on the way."""

from __future__ import annotations

import pytest
import torch

from mavis_logits import MavisBestOfN, MavisSampling
from search_helpers import row_of, run, texts, true_values
from tiny import make_head, make_value_model


class Words:
    """A tokenizer of which only decoding is needed: numbers, and nothing for padding and EOS."""

    def batch_decode(self, rows, skip_special_tokens):
        assert skip_special_tokens
        return [" ".join(str(token) for token in row if token > 1) for row in rows]


def words_of(rows):
    return Words().batch_decode(rows, skip_special_tokens=True)


@pytest.fixture
def words(monkeypatch):
    # Its fingerprint cannot be taken, and the tiny value functions have none to compare it with.
    monkeypatch.setattr("mavis_logits.backbone.needs.tokenizer_fingerprint", lambda tokenizer: "words")
    return Words()


@pytest.mark.parametrize("options", [{}, {"do_sample": False}, {"temperature": 0.7, "top_p": 0.9}])
def test_one_sample_is_sampling(base, value_model, prompts, options):
    sampled = run(base, MavisSampling(value_model), prompts, **options)
    best = run(base, MavisBestOfN(value_model, num_samples=1), prompts, **options)
    assert torch.equal(best.sequences, sampled.sequences)
    torch.testing.assert_close(best.values, sampled.values)


def test_it_returns_the_best_of_the_samples_that_sampling_draws(base, value_model, prompts):
    """As many rows for generate, the same draws: row by row the same samples, of which the most valuable is taken."""
    sampled = run(base, MavisSampling(value_model), prompts, num_return_sequences=5)
    best = run(base, MavisBestOfN(value_model, num_samples=5), prompts, num_return_sequences=5)
    for i in range(3):
        own = slice(5 * i, 5 * i + 5)
        order = sampled.values[own].mean(dim=1).argsort(descending=True, stable=True)
        torch.testing.assert_close(best.sequences_scores[own].max(), sampled.values[own].mean(dim=1)[order[0]])
        assert torch.equal(best.sequences[5 * i], sampled.sequences[own][order[0]])
        assert sorted(best.sequences[own].tolist()) == sorted(sampled.sequences[own].tolist())


@pytest.mark.parametrize(
    "settings",
    [{}, {"prune": {2: 4, 5: 2}}, {"candidate_min_p": 0.4}, {"unscored": "keep"}, {"unscored": "expected"}],
    ids=str,
)
def test_values_are_those_of_the_sequences(base, prompts, settings):
    functions = [make_value_model("a", "b"), make_head(base, "c")]
    strategy = MavisBestOfN(functions, {"a": 1.0, "c": 0.5}, num_samples=6, **settings)
    found = run(base, strategy, prompts, num_return_sequences=2)
    values = true_values(base, functions, texts(found.sequences, prompts))
    torch.testing.assert_close(found.values, values, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.sequences_scores, values @ torch.tensor([1.0, 0.0, 0.5]), atol=1e-4, rtol=1e-4)


def test_pruning_saves_steps_and_keeps_the_most_valuable(base, prompts):
    model = make_value_model("a")
    prompt = row_of(prompts, 0)
    never_ends = {"suppress_tokens": [1], "max_new_tokens": 6}
    strategy = MavisBestOfN(model, num_samples=6, prune={2: 3, 4: 1})
    found = run(base, strategy, prompt, **never_ends)
    assert strategy.stats.tokens == 2 * 6 + 2 * 3 + 2 * 1
    short = run(
        base, MavisBestOfN(model, num_samples=6), prompt, num_return_sequences=3, **never_ends | {"max_new_tokens": 2}
    )
    assert found.sequences[0, :7].tolist() in short.sequences.tolist()


def test_without_tilt_and_cut_it_samples_the_reference(base, value_model, prompts):
    plain = base.generate(**prompts, do_sample=True, top_k=0, max_new_tokens=1, num_return_sequences=400)
    torch.manual_seed(0)
    strategy = MavisBestOfN(value_model, beta=0.0, unscored="keep", num_samples=400)
    found = run(base, strategy, prompts, top_k=0, max_new_tokens=1, num_return_sequences=400)
    for i in range(3):
        own = slice(400 * i, 400 * i + 400)
        a, b = (torch.bincount(x[own, -1], minlength=97) / 400 for x in (plain, found.sequences))
        assert (a - b).abs().max() < 0.12
        assert (b > 0).sum() > 15  # tokens beyond the candidates, too


def test_one_reward_function(base, value_model, prompts, words):
    calls = []

    def longest_number(prompts, completions, **columns):
        calls.append((prompts, completions, columns))
        return [max([int(word) for word in text.split()] or [0]) for text in completions]

    plain = run(base, MavisBestOfN(value_model, num_samples=4), prompts, num_return_sequences=4)
    everything = texts(plain.sequences, prompts)
    expected = [max([token for token in new if token > 1] or [0]) for _, new in everything]
    strategy = MavisBestOfN(
        value_model,
        num_samples=4,
        tokenizer=words,
        reward_functions=longest_number,
        reward_columns={"id": ["x", "y", "z"]},
    )
    found = run(base, strategy, prompts, num_return_sequences=2)
    for i in range(3):
        assert found.sequences_scores[2 * i] == max(expected[4 * i : 4 * i + 4])
        assert found.sequences_scores[2 * i] >= found.sequences_scores[2 * i + 1]
    ((given, completions, columns),) = calls
    assert given == [text for text in words_of([prompt for prompt, _ in everything[::4]]) for _ in range(4)]
    assert sorted(completions) == sorted(words_of([new for _, new in everything]))
    assert words_of(columns.pop("completion_ids")) == completions
    assert columns == {"id": [name for name in "xyz" for _ in range(4)]}
    values = true_values(base, [value_model], texts(found.sequences, prompts))
    torch.testing.assert_close(found.values, values, atol=1e-4, rtol=1e-4)


def length(prompts, completions, **columns):
    return [float(len(text)) for text in completions]


def evens(prompts, completions, **columns):
    return [sum(int(word) % 2 == 0 for word in text.split()) for text in completions]


def test_reward_functions_of_trl_are_called_as_trl_calls_them(base, value_model, prompts, words):
    """With names, only what they take, `async` ones too."""

    async def by_text(completions):
        return [float(len(text)) for text in completions]

    def by_ids(completion_ids, log_metric=None, **columns):
        return [float(len(text)) for text in words_of(completion_ids)]

    found = [
        run(base, MavisBestOfN(value_model, num_samples=4, tokenizer=words, reward_functions=function), prompts)
        for function in (by_text, by_ids)
    ]
    assert (found[0].sequences == found[1].sequences).all()
    assert (found[0].sequences_scores == found[1].sequences_scores).all()


def test_several_reward_functions_are_mixed(base, value_model, prompts, words):
    weights = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 2.0]])
    functions = {"a": length, "b": evens}
    strategy = MavisBestOfN(value_model, weights, num_samples=4, tokenizer=words, reward_functions=functions)
    found = run(base, strategy, prompts, num_return_sequences=4)
    completions = words_of([new for _, new in texts(found.sequences, prompts)])
    rewards = torch.tensor([length([], completions), evens([], completions)]).T
    expected = (rewards.view(3, 4, 2) * weights[:, None]).sum(dim=2)
    torch.testing.assert_close(found.sequences_scores.view(3, 4), expected)
    strategy = MavisBestOfN(
        value_model, num_samples=4, tokenizer=words, reward_functions={"evens": evens}, reward_weights={"evens": 2.0}
    )
    found = run(base, strategy, prompts, num_return_sequences=4)
    completions = words_of([new for _, new in texts(found.sequences, prompts)])
    torch.testing.assert_close(found.sequences_scores, 2.0 * torch.tensor(evens([], completions), dtype=torch.float32))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_samples": 0}, "num_samples must be .* got 0"),
        ({"num_samples": True}, "num_samples must be .* got True"),
        ({"prune": {4: 5}}, "must keep fewer and fewer of 5 samples"),
        ({"prune": {4: 2, 8: 3}}, "must keep fewer and fewer"),
        ({"prune": {0: 2}}, "prune, tokens must be .* got 0"),
        ({"prune": {3: 0.5}}, "prune, samples must be .* got 0.5"),
        ({"reward_functions": length}, "pass tokenizer="),
        (
            {"reward_functions": {"c": length}, "tokenizer": "words"},
            r"reward functions \['c'\], but weights for \['a', 'b'\]",
        ),
        ({"reward_functions": {"a": length}, "reward_weights": {"a": 1, "d": 1}, "tokenizer": "words"}, "weights for"),
    ],
)
def test_bad_settings(value_model, words, settings, message):
    if "tokenizer" in settings:
        settings = settings | {"tokenizer": words}
    with pytest.raises(ValueError, match=message):
        MavisBestOfN(value_model, **settings)


def test_bad_calls(base, value_model, prompts, words):
    with pytest.raises(ValueError, match="num_samples=5 with do_sample=False"):
        run(base, MavisBestOfN(value_model), prompts, do_sample=False)
    with pytest.raises(ValueError, match="num_return_sequences=3, but MavisBestOfN ends with 2"):
        run(base, MavisBestOfN(value_model, prune={4: 2}), prompts, num_return_sequences=3)
    with pytest.raises(ValueError, match=r"reward_columns\['id'\] has 2 entries, but the batch has 3 prompts"):
        run(base, MavisBestOfN(value_model, reward_columns={"id": [1, 2]}), prompts)
    for result, message in (
        ([1.0], "returned 1 numbers for 15"),
        ([float("nan")] * 15, "15 of 15 completions no finite number: it is nan"),
    ):
        strategy = MavisBestOfN(value_model, tokenizer=words, reward_functions=lambda result=result, **_: result)
        with pytest.raises(ValueError, match=message):
            run(base, strategy, prompts)
