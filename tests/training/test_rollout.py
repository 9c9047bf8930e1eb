"""Sampled trees against the slow way: every completion read again from scratch, token by token."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mavis_logits import MavisConfig
from mavis_logits.steering.steering import Steering
from mavis_training.collect import CollectConfig
from mavis_training.sampling.growth import Growth, extension_length
from mavis_training.sampling.rollout import sample_trees
from tiny import make_base, make_head, make_value_model

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12]]
ROWS = [{"id": f"p{i}", "prompt": "text", "kind": "test"} for i in range(len(PROMPTS))]
EOS = {3, 4}


def shape(**changes):
    return CollectConfig("prompts", "store", **({"max_new_tokens": 12, "layers": 3, "root_children": 3} | changes))


def steered(base, kind, **settings):
    values = make_head(base, "a", "b") if kind == "head" else make_value_model("a", "b")
    given_settings = {"beta": 3.0, "top_k": 6, "weights": {"a": 1.0, "b": -0.5}} | settings
    return Steering({"a": values, "b": values}, model=base, config=MavisConfig.from_dict(given_settings))


@torch.no_grad()
def reference(base, tokens, temperature, top_p=1.0):
    scores = torch.log_softmax(base(torch.tensor([tokens])).logits[0, -1].float() / temperature, dim=-1)
    best = scores.sort(descending=True)
    kept = best.indices[best.values.exp().cumsum(0) - best.values.exp() < top_p]  # what lies before is less than top_p
    return torch.log_softmax(torch.full_like(scores, -torch.inf).scatter(0, kept, scores[kept]), dim=-1)


@torch.no_grad()
def policy(base, tokens, temperature, steering, top_p=1.0):
    """log pi_gen of every next token, by Algorithm 2 with one forward for each candidate."""
    scores = reference(base, tokens, temperature, top_p)
    if steering is None:
        return scores
    config, values = steering.config, steering.functions.all[0]
    top = scores.topk(min(config.top_k or len(scores), int(scores.isfinite().sum())))
    if hasattr(values, "backbone"):
        tried = torch.stack([values(torch.tensor([[*tokens, int(c)]])).values[0, -1] for c in top.indices])
    else:
        caught = []
        hook = base.get_output_embeddings().register_forward_pre_hook(lambda _, args: caught.append(args[0][:, -1]))
        base(torch.tensor([tokens]))
        hook.remove()
        tried = values(caught[0], top.indices[None])[0]
    combined = tried @ torch.tensor([config.weights["a"], config.weights["b"]])
    if config.normalize == "minmax" and len(combined) > 1:
        combined = (combined - combined.min()) / (combined.max() - combined.min())
    tilted = torch.full_like(scores, -torch.inf)
    return torch.log_softmax(tilted.scatter(0, top.indices, top.values + config.beta * combined), dim=-1)


def check(trees, base, temperature, steering, top_p=1.0):
    for tree, prompt in zip(trees, PROMPTS, strict=True):
        for node in range(len(tree)):
            end = len(tree.completion(node))
            start = end - int(tree.length[node])
            tokens = prompt + tree.completion(node).tolist()
            logp_gen = logp_ref = 0.0
            for t in range(start, end):
                before, token = tokens[: len(prompt) + t], tokens[len(prompt) + t]
                logp_gen += float(policy(base, before, temperature, steering, top_p)[token])
                logp_ref += float(reference(base, before, 1.0)[token])
            assert math.isclose(tree.logp_gen[node], logp_gen, abs_tol=2e-3)
            assert math.isclose(tree.logp_ref[node], logp_ref, abs_tol=2e-3)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (0.7, 0.8)])
@pytest.mark.parametrize("kind", ["reference", "head", "model"])
def test_log_probabilities_are_those_of_reading_every_completion_again(kind, temperature, top_p):
    base = make_base()
    steering = None if kind == "reference" else steered(base, kind)
    trees = sample_trees(base, ROWS, PROMPTS, EOS, shape(), 1, temperature, steering, top_p)
    check(trees, base, temperature, steering, top_p)


def test_a_head_may_score_the_whole_vocabulary():
    base = make_base()
    steering = steered(base, "head", top_k=None, normalize="none")
    check(sample_trees(base, ROWS, PROMPTS, EOS, shape(max_new_tokens=6), 2, 1.0, steering), base, 1.0, steering)


@given(
    T=st.integers(1, 14), layers=st.integers(1, 4), root=st.integers(1, 4), children=st.integers(1, 3),
    split=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_trees_have_the_shape_of_algorithm_3(T, layers, root, children, split, seed):
    wanted = shape(max_new_tokens=T, layers=layers, root_children=root, children=children, two_layers=split)
    for tree in sample_trees(make_base(), ROWS, PROMPTS, EOS, wanted, seed):
        leaves = set(tree.leaves().tolist())
        assert len(tree.children(-1)) == root
        for node in range(len(tree)):
            length = len(tree.completion(node))
            ended = int(tree.completion(node)[-1]) in EOS
            assert not EOS & set(tree.completion(node)[:-1].tolist())
            assert bool(tree.terminal[node]) == (node in leaves) == (ended or length == T)
            assert len(tree.path(node)) <= layers
            if node not in leaves:
                assert len(tree.children(node)) == children
        if split and layers > 1 and T > 1:
            first = [n for n in tree.children(-1) if n in leaves]
            assert all(tree.length[n] == 1 or int(tree.completion(n)[-1]) not in EOS for n in first)


def test_a_completion_that_ended_in_the_first_layer_is_split():
    wanted = shape(max_new_tokens=9, layers=2, root_children=1, children=3)
    growth = Growth(ROWS[:1], PROMPTS[:1], EOS, wanted, random.Random(0))
    (branch,) = growth.start()
    for token in (5, 6, 7, 3):
        branch.add(token, -1.0, -2.0)
    assert growth.finished(branch)
    going_on = growth.finish(branch)
    assert len(going_on) == 2  # K - 1: the rest of the completion is the first child
    for other in going_on:
        assert other.layer == 1
        assert other.limit == other.left == 9 - len(other.before) + len(PROMPTS[0])
        for _ in range(other.limit):
            other.add(8, -1.0, -1.0)
        assert growth.finish(other) == []
    (tree,) = growth.trees()
    assert tree.parent.tolist() == [-1, 0, 0, 0]
    assert tree.completion(1).tolist() == [5, 6, 7, 3]
    assert tree.logp_gen[:2].sum() == -4
    assert tree.logp_ref[:2].sum() == -8


def test_the_seed_decides_the_trees():
    base = make_base()
    first, again, other = (sample_trees(base, ROWS, PROMPTS, EOS, shape(), seed) for seed in (1, 1, 2))
    assert first == again != other
    assert first[0].columns == {"kind": "test"}


def test_extension_lengths_average_to_an_equal_share():
    rng = random.Random(0)
    drawn = [extension_length(0, 48, 3, rng) for _ in range(4000)]
    assert min(drawn) == 1
    assert max(drawn) == 31
    assert abs(sum(drawn) / len(drawn) - 16) < 0.6
    assert extension_length(2, 7, 3, rng) == 7
    assert extension_length(0, 1, 5, rng) == 1


def test_an_empty_prompt_is_named():
    with pytest.raises(ValueError, match="'p1' has no tokens"):
        sample_trees(make_base(), ROWS[:2], [[5], []], EOS, shape(), 0)
