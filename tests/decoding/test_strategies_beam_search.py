"""Beam search: equal to sampling and to best-of-N where it should be, exact where everything can be enumerated."""

from __future__ import annotations

import pytest
import torch

from mavis_logits import MavisBeamSearch, MavisBestOfN, MavisSampling
from mavis_logits.testing import recompute_values
from search_helpers import row_of, run, texts, true_values
from tiny import EOS, make_adapter, make_base, make_head, make_value_model


@pytest.mark.parametrize("options", [{}, {"do_sample": False}, {"temperature": 0.7, "top_k": 9}])
@pytest.mark.parametrize("seed", range(3))
def test_one_beam_that_draws_one_token_is_sampling(base, value_model, prompts, options, seed):
    sampled = run(base, MavisSampling(value_model), prompts, seed, **options)
    searched = run(base, MavisBeamSearch(value_model, num_beams=1, interval=1, expand=1), prompts, seed, **options)
    assert torch.equal(searched.sequences, sampled.sequences)
    torch.testing.assert_close(searched.values, sampled.values)


def test_without_pruning_it_is_best_of_n(base, value_model, prompts):
    best = run(base, MavisBestOfN(value_model, num_samples=4), prompts, num_return_sequences=3)
    for settings in ({"interval": 9}, {"interval": 2, "expand": 1}):
        strategy = MavisBeamSearch(value_model, num_beams=4, **settings)
        found = run(base, strategy, prompts, num_return_sequences=3)
        assert torch.equal(found.sequences, best.sequences)
        torch.testing.assert_close(found.sequences_scores, best.sequences_scores)


def enumerate_all(base, model, prompt, k, length, weights):
    """Every sequence of candidates and its combined value, from scratch, best first."""
    going, done = [[]], []
    for _ in range(length):
        extended = []
        for new in going:
            logits = base(torch.tensor([prompt + new])).logits[0, -1]
            extended += [[*new, token] for token in logits.topk(k).indices.tolist()]
        done += [new for new in extended if new[-1] == EOS]
        going = [new for new in extended if new[-1] != EOS]
    scored = [
        (float(recompute_values(model, prompt + new[:-1], torch.tensor(new[-1:]))[0] @ weights), new)
        for new in done + going
    ]
    return sorted(scored, reverse=True)


@torch.no_grad()
@pytest.mark.parametrize("seed", range(3))
def test_enough_beams_find_the_best_of_all_sequences(prompts, seed):
    base, model = make_base(seed=seed), make_value_model("a", "b", seed=seed + 10)
    base.lm_head.weight[EOS] += 0.3 * base.lm_head.weight.std()  # some sequences end early
    strategy = MavisBeamSearch(model, {"a": 0.7, "b": 0.3}, top_k=3, num_beams=27, interval=1, expand=3)
    found = run(base, strategy, prompts, max_new_tokens=3, num_return_sequences=5, top_k=0)
    rows = texts(found.sequences, prompts)
    for i in range(3):
        every = enumerate_all(base, model, rows[5 * i][0], 3, 3, torch.tensor([0.7, 0.3]))
        assert [new for _, new in rows[5 * i : 5 * i + 5]] == [new for _, new in every[:5]]
        expected = torch.tensor([score for score, _ in every[:5]])
        torch.testing.assert_close(found.sequences_scores[5 * i : 5 * i + 5], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("interval", [1, 2, 3])
def test_a_prompt_alone_gives_what_it_gives_in_a_batch(base, value_model, prompts, interval):
    strategy = MavisBeamSearch(value_model, num_beams=3, interval=interval, expand=3)
    together = run(base, strategy, prompts, do_sample=False)
    for row, (_, new) in enumerate(texts(together.sequences, prompts)):
        alone = run(base, strategy, row_of(prompts, row), do_sample=False)
        assert texts(alone.sequences, row_of(prompts, row))[0][1] == new
        torch.testing.assert_close(alone.values[0], together.values[row], atol=1e-4, rtol=1e-4)


def test_weights_and_beta_of_every_request(base, value_model, prompts):
    weights, betas = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]]), torch.tensor([1.0, 8.0, 3.0])
    strategy = MavisBeamSearch(value_model, weights, betas, num_beams=3, interval=1)
    together = texts(run(base, strategy, prompts, do_sample=False).sequences, prompts)
    for row in range(3):
        alone = MavisBeamSearch(value_model, weights[row], float(betas[row]), num_beams=3, interval=1)
        single = row_of(prompts, row)
        assert texts(run(base, alone, single, do_sample=False).sequences, single)[0] == together[row]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"interval": 3, "expand": 4},
        {"candidate_min_p": 0.3},
        {"unscored": "keep"},
        {"unscored": "expected"},
        {"normalize": "gap"},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["model", "head", "both"])
def test_values_are_those_of_the_sequences(base, prompts, kind, settings):
    model, head = make_value_model("a", "b"), make_head(base, "c")
    functions = {"model": [model], "head": [head], "both": [model, head]}[kind]
    strategy = MavisBeamSearch(functions, num_beams=4, **{"interval": 1} | settings)
    found = run(base, strategy, prompts, num_return_sequences=4, max_new_tokens=7)
    values = true_values(base, functions, texts(found.sequences, prompts))
    torch.testing.assert_close(found.values, values, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.sequences_scores, values.mean(dim=1), atol=1e-4, rtol=1e-4)
    assert (found.sequences_scores.view(3, 4).diff(dim=1) <= 0).all()


@pytest.mark.parametrize(("architecture", "valued_by"), [("gpt2", "mistral"), ("mistral", "mamba"), ("gemma3", "gpt2")])
def test_other_architectures(prompts, architecture, valued_by):
    base, model = make_base(architecture), make_value_model("a", architecture=valued_by)
    found = run(base, MavisBeamSearch(model, num_beams=4, interval=1), prompts, num_return_sequences=4)
    values = true_values(base, [model], texts(found.sequences, prompts))
    torch.testing.assert_close(found.values, values, atol=1e-4, rtol=1e-4)


def test_fused_value_models(base, prompts):
    models = [make_adapter("a", seed=2), make_adapter("b", seed=3)]
    found = run(base, MavisBeamSearch(models, num_beams=4, interval=1, fuse=True), prompts, num_return_sequences=4)
    values = true_values(base, models, texts(found.sequences, prompts))
    torch.testing.assert_close(found.values, values, atol=1e-4, rtol=1e-4)


def test_the_whole_vocabulary(base, prompts):
    head = make_head(base, "a")
    found = run(
        base, MavisBeamSearch(head, num_beams=3, interval=1, top_k=None), prompts, top_k=0, num_return_sequences=3
    )
    values = true_values(base, [head], texts(found.sequences, prompts))
    torch.testing.assert_close(found.values, values, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("length", [2, 5])
def test_beams_differ(base, value_model, prompts, length):
    strategy = MavisBeamSearch(value_model, num_beams=4, interval=1, expand=3)
    found = run(base, strategy, prompts, num_return_sequences=4, max_new_tokens=length)
    rows = [tuple(prompt + new) for prompt, new in texts(found.sequences, prompts)]
    assert len(set(rows)) == len(rows)


def test_more_beams_are_worth_more(prompts):
    base, model = make_base(), make_value_model("a")
    worth = [
        float(
            run(
                base, MavisBeamSearch(model, num_beams=n, interval=1), prompts, max_new_tokens=12
            ).sequences_scores.mean()
        )
        for n in (1, 4, 16)
    ]
    assert worth[0] < worth[1] < worth[2]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 0}, "num_beams must be a whole number of at least 1, got 0"),
        ({"interval": 0}, "interval must be .* got 0"),
        ({"interval": 1.5}, "interval must be .* got 1.5"),
        ({"expand": -1}, "expand must be .* got -1"),
        ({"expand": 16}, "expand=16 tokens are to be drawn among top_k=15 candidates"),
    ],
)
def test_bad_settings(value_model, settings, message):
    with pytest.raises(ValueError, match=message):
        MavisBeamSearch(value_model, **settings)
