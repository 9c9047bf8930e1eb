from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mavis_training.trees.targets import is_validation, kept_nodes, log_ratios, node_targets, root_target
from random_trees import random_tree

seeds = st.integers(0, 10_000)


def random_rewards(tree, seed, objectives=2):
    return np.random.default_rng(seed).normal(size=(len(tree.leaves()), objectives))


def leaf_weights(tree):
    """Share of each leaf in the root's target: the product over its path of one over the number of siblings."""
    return np.array(
        [np.prod([1 / len(tree.children(tree.parent[i])) for i in tree.path(leaf)]) for leaf in tree.leaves()]
    )


@given(seeds, st.floats(0, 2))
def test_the_root_target_is_the_weighted_mean_of_the_leaves(seed, zeta):
    tree = random_tree(seed)
    rewards = random_rewards(tree, seed)
    penalised = rewards - zeta * log_ratios(tree)[tree.leaves(), None]
    weights = leaf_weights(tree)
    assert weights.sum() == pytest.approx(1)
    np.testing.assert_allclose(root_target(tree, node_targets(tree, rewards, zeta)), weights @ penalised, atol=1e-12)


@given(seeds, st.floats(0, 2))
def test_the_prompts_target_is_the_same_under_both_penalties(seed, zeta):
    """All of a completion follows the prompt: the first nodes' own tokens are penalised too (equation 8)."""
    tree = random_tree(seed)
    rewards = random_rewards(tree, seed)
    whole = root_target(tree, node_targets(tree, rewards, zeta))
    continuation = node_targets(tree, rewards, zeta, "continuation")
    np.testing.assert_allclose(root_target(tree, continuation, zeta), whole, atol=1e-12)


@given(seeds)
def test_every_inner_target_is_its_childrens_mean(seed):
    tree = random_tree(seed)
    rewards = random_rewards(tree, seed)
    targets = node_targets(tree, rewards)
    np.testing.assert_array_equal(targets[tree.leaves()], rewards)
    for node in set(range(len(tree))) - set(tree.leaves().tolist()):
        np.testing.assert_allclose(targets[node], targets[tree.children(node)].mean(axis=0), atol=1e-12)


@given(seeds)
def test_without_penalty_the_log_probabilities_do_not_matter(seed):
    tree, other = random_tree(seed), random_tree(seed)
    other.logp_gen = other.logp_gen * 3 + 1
    rewards = random_rewards(tree, seed)
    np.testing.assert_array_equal(node_targets(tree, rewards), node_targets(other, rewards))
    other.logp_gen = other.logp_ref
    np.testing.assert_allclose(node_targets(other, rewards, zeta=5.0), node_targets(tree, rewards))


@given(seeds, st.floats(-3, 3), st.floats(-3, 3))
def test_targets_are_linear_in_rewards(seed, a, b):
    tree = random_tree(seed)
    first, second = random_rewards(tree, seed), random_rewards(tree, seed + 1)
    combined = a * node_targets(tree, first) + b * node_targets(tree, second)
    np.testing.assert_allclose(node_targets(tree, a * first + b * second), combined, atol=1e-9)


@given(seeds)
def test_log_ratios_add_up_along_paths(seed):
    tree = random_tree(seed)
    own = tree.logp_gen - tree.logp_ref
    for leaf in tree.leaves():
        assert log_ratios(tree)[leaf] == pytest.approx(own[tree.path(leaf)].sum())


@given(seeds, st.floats(0, 1), st.integers(0, 5))
def test_balancing_drops_leaves_only(seed, share, choice):
    tree = random_tree(seed)
    kept = kept_nodes(tree, share, choice)
    inner = np.setdiff1d(np.arange(len(tree)), tree.leaves())
    assert kept[inner].all()
    assert (~kept).sum() == int(len(tree.leaves()) * share)
    np.testing.assert_array_equal(kept, kept_nodes(tree, share, choice))


def test_the_validation_share_is_about_right():
    held_out = [is_validation(f"prompt-{i}", 0.1) for i in range(2000)]
    assert 150 < sum(held_out) < 250


def test_bad_input():
    with pytest.raises(ValueError, match="penalty must be one of completion, continuation, got 'prefix'"):
        node_targets(random_tree(0), np.zeros((1, 1)), 0.1, "prefix")
    tree = random_tree(0)
    with pytest.raises(ValueError, match=r"expected rewards \[leaves, M\]"):
        node_targets(tree, np.zeros((len(tree.leaves()) + 1, 2)))
    with pytest.raises(ValueError, match=r"drop_leaves must be from 0 to 1, got 1.5"):
        kept_nodes(tree, 1.5, 0)
