from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mavis_training.fitting.efficiency import (
    baselines,
    leaf_shares,
    log_prob_weights,
    log_probs,
    sample_actions,
    sharpened,
    steering_efficiency,
    steering_parts,
)
from mavis_training.trees.data import LabelledTree
from mavis_training.trees.packing import pack
from mavis_training.trees.targets import node_targets
from mavis_training.trees.tree import Tree
from random_trees import random_tree

REFERENCE = np.array([0.4, 0.3, 0.2, 0.1])
REWARD = np.array([0.0, 1.0, 3.0, -2.0])  # of each token; a completion's is the sum over its two


class Table(nn.Module):
    """A value function that knows the token alone."""

    device = torch.device("cpu")

    def __init__(self, values):
        super().__init__()
        self.values = torch.tensor(values)[:, None]

    def forward(self, hidden, candidates):
        return self.values[candidates]


def two_token_tree(rng, index):
    """Four completions of two tokens, independent draws from REFERENCE."""
    tokens = rng.choice(4, size=8, p=REFERENCE)
    nodes = {"parent": [-1] * 4, "start": [0, 2, 4, 6], "length": [2] * 4, "terminal": [True] * 4}
    tree = Tree(f"p{index}", "p", [0], tokens, **nodes, logp_gen=np.zeros(4), logp_ref=np.zeros(4))
    rewards = REWARD[tokens].reshape(4, 2).sum(axis=1, keepdims=True)
    return LabelledTree(tree, rewards, node_targets(tree, rewards))


@pytest.fixture(scope="module")
def items():
    rng = np.random.default_rng(0)
    return [two_token_tree(rng, i) for i in range(600)]


def efficiency(values, items):
    generator = torch.Generator().manual_seed(0)
    embedding = torch.from_numpy(np.log(REFERENCE))[:, None].float()
    states = torch.ones(9, 1)
    parts = [steering_parts(Table(values), i, states, sample_actions(embedding, states, 8, generator)) for i in items]
    return steering_efficiency(parts, [item.rewards for item in items], ["reward"])["reward"]


def tilted(values, beta):
    """Exact reward gained and KL divergence of tilting both tokens."""
    policy = REFERENCE * np.exp(beta * np.array(values))
    policy /= policy.sum()
    return 2 * (policy - REFERENCE) @ REWARD, 2 * (policy * np.log(policy / REFERENCE)).sum()


def test_right_values_are_calibrated_and_gain_one(items):
    found = efficiency(REWARD, items)
    assert found["gain"] == pytest.approx(1, abs=0.07)
    assert found["calibration"] == pytest.approx(1, abs=0.07)


@pytest.mark.parametrize("values", [[0.0, 1.0, 0.0, 0.0], [1.0, 0.0, 2.0, 0.5], [0.0, -1.0, -3.0, 2.0]])
def test_the_gain_is_that_of_a_small_tilt(values, items):
    reward, divergence = tilted(values, 1e-3)
    deviation = np.sqrt(2 * (REFERENCE @ REWARD**2 - (REFERENCE @ REWARD) ** 2))
    wanted = reward / np.sqrt(2 * divergence) / deviation
    assert efficiency(values, items)["gain"] == pytest.approx(wanted, abs=0.07)


def test_exaggerated_values_gain_the_same_and_are_calibrated_less(items):
    once, thrice = efficiency(REWARD, items), efficiency(3 * REWARD, items)
    assert thrice["gain"] == pytest.approx(once["gain"])
    assert thrice["calibration"] == pytest.approx(once["calibration"] / 3)


def test_values_that_differ_nowhere_do_not_steer(items):
    assert efficiency(np.ones(4), items) == {"gain": 0.0, "calibration": 0.0}


def parts_with_log_probs(values, items):
    generator = torch.Generator().manual_seed(0)
    embedding, states = torch.from_numpy(np.log(REFERENCE))[:, None].float(), torch.ones(9, 1)
    parts = []
    for item in items:
        layout = pack(item.tree)
        drawn, before = sample_actions(embedding, states, 8, generator), torch.from_numpy(layout.previous)
        candidates = torch.cat([torch.from_numpy(layout.input_ids[layout.new])[:, None], drawn[before]], dim=1)
        likely = log_probs(embedding, states[before], candidates)
        np.testing.assert_allclose(likely.exp(), REFERENCE[candidates.numpy()], rtol=1e-5)
        parts.append(steering_parts(Table(values), item, states, drawn, likely))
    return parts


def test_log_pi_ref_makes_up_for_what_values_miss_of_it(items):
    """Right values less some of log pi_ref: so much of it is what is to be added again, and the gain is 1 again."""
    parts = parts_with_log_probs(REWARD - 2 * np.log(REFERENCE), items)
    weights = log_prob_weights(parts)
    assert weights == pytest.approx([2], rel=0.15)
    rewards = [item.rewards for item in items]
    alone, both = (
        steering_efficiency(sharpened(parts, w), rewards, ["reward"])["reward"]["gain"] for w in ([0], weights)
    )
    assert both == pytest.approx(1, abs=0.07)
    assert both > alone + 0.02
    plain = efficiency(REWARD - 2 * np.log(REFERENCE), items)["gain"]
    assert alone == pytest.approx(plain, abs=0.05)  # other draws


def test_tokens_outside_of_the_nucleus_count_as_the_least_likely_within():
    embedding, states = torch.from_numpy(np.log(REFERENCE))[:, None].float(), torch.ones(2, 1)
    tokens = torch.tensor([[0, 1], [2, 3]])
    found = log_probs(embedding, states, tokens, top_p=0.8).exp()  # of 0.4, 0.3 and 0.2
    torch.testing.assert_close(found, torch.tensor([[4 / 9, 3 / 9], [2 / 9, 2 / 9]]))


def test_no_log_pi_ref_beside_values_that_tell_nothing_and_a_bound_beside_those_that_tell_little(items):
    assert log_prob_weights(parts_with_log_probs(np.ones(4), items)) == [0]
    tiny = log_prob_weights(parts_with_log_probs(1e-3 * REWARD, items))
    spread = [np.sqrt(REFERENCE @ v**2 - (REFERENCE @ v) ** 2) for v in (1e-3 * REWARD, np.log(REFERENCE))]
    assert abs(tiny[0]) <= 2.05 * spread[0] / spread[1]


@settings(deadline=None)
@given(seed=st.integers(0, 1000))
def test_shares_and_baselines(seed):
    tree = random_tree(seed)
    leaves = tree.leaves()
    rewards = np.random.default_rng(seed).normal(size=(len(leaves), 2))
    share = leaf_shares(tree)
    assert share.sum() == pytest.approx(1)
    top = np.array([tree.path(leaf)[0] for leaf in leaves])
    for leaf, found in enumerate(baselines(tree, rewards)):
        others = top != top[leaf]
        np.testing.assert_allclose(found, np.average(rewards[others], axis=0, weights=share[others]))


def test_one_branch_has_no_baseline():
    tree = random_tree(0, root_children=1)
    with pytest.raises(ValueError, match="root_children of at least 2"):
        baselines(tree, np.zeros((len(tree.leaves()), 1)))


def test_actions_are_drawn_from_the_reference():
    embedding = torch.from_numpy(np.log(REFERENCE))[:, None].float()
    drawn = sample_actions(embedding, torch.ones(300, 1), 16, torch.Generator().manual_seed(0))
    assert drawn.shape == (300, 16)
    np.testing.assert_allclose(np.bincount(drawn.flatten(), minlength=4) / drawn.numel(), REFERENCE, atol=0.03)
