from __future__ import annotations

import numpy as np
import pytest

from mavis_training.fitting.metrics import (
    Prediction,
    correlation,
    flatten,
    r_squared,
    sibling_pairs,
    validation_metrics,
)
from mavis_training.trees.data import LabelledTree
from mavis_training.trees.packing import pack
from mavis_training.trees.targets import node_targets
from random_trees import random_tree


def prediction(seed, transform=lambda x: x, prompt=True):
    tree = random_tree(seed)
    rewards = np.random.default_rng(seed).normal(size=(len(tree.leaves()), 2))
    item, layout = LabelledTree(tree, rewards, node_targets(tree, rewards)), pack(tree)
    values = transform(item.targets[layout.node[layout.new]])
    return Prediction(item, values, transform(item.root_target) if prompt else None)


def test_a_perfect_value_function():
    metrics = validation_metrics([prediction(seed) for seed in range(5)], ["a", "b"])
    for objective in ("a", "b"):
        m = metrics[objective]
        assert m["r2"] == pytest.approx(1)
        assert m["inner_correlation"] == pytest.approx(1)
        assert m["ranking"]["accuracy"] == 1
        assert m["ranking"]["at_end"] == 1
        assert m["ranking"]["pairs"] > 20
        assert m["by_fraction"]["1.0"]["within"] == pytest.approx(1)
        assert m["by_fraction"]["0.0"]["within"] == pytest.approx(0)  # the prompt does not tell its completions apart
        by_fraction = [m["by_fraction"][f]["correlation"] for f in ("0.0", "0.5", "1.0")]
        assert by_fraction[-1] == pytest.approx(1)
        assert by_fraction[0] < by_fraction[1] < 1


def test_scale_matters_to_r2_alone():
    metrics = validation_metrics([prediction(seed, lambda x: 3 * x + 1) for seed in range(5)], ["a", "b"])["a"]
    assert metrics["correlation"] == pytest.approx(1)
    assert metrics["ranking"]["accuracy"] == 1
    assert metrics["r2"] < 0


def test_a_wrong_sign_and_a_constant():
    assert validation_metrics([prediction(1, lambda x: -x)], ["a", "b"])["a"]["ranking"]["accuracy"] == 0
    constant = validation_metrics([prediction(1, lambda x: 0 * x, prompt=False)], ["a", "b"])["a"]
    assert constant["ranking"]["accuracy"] == 0.5
    assert constant["correlation"] == 0


def test_nothing_varies():
    flat, line = np.ones(3), np.arange(3.0)
    assert correlation(flat, line) == 0
    assert r_squared(line, flat) == 0


def test_by_depth_every_layer_is_judged_alone():
    predictions = [prediction(seed) for seed in range(5)]
    for p in predictions:  # wrong at the ends of nodes of the first layer alone
        tree = p.item.tree
        ends = np.cumsum(tree.length)[tree.parent == -1] - 1
        p.values[ends] *= -1
    layers = validation_metrics(predictions, ["a", "b"])["a"]["by_depth"]
    assert list(layers) == ["0", "1", "2", "3"]
    assert layers["1"]["correlation"] == pytest.approx(-1)
    assert [layers[d]["r2"] for d in "023"] == [pytest.approx(1)] * 3
    assert layers["0"]["nodes"] == 5
    assert sum(layers[d]["nodes"] for d in "123") == sum(len(p.item.tree) for p in predictions)
    headless = validation_metrics([prediction(1, prompt=False)], ["a", "b"])["a"]["by_depth"]
    assert list(headless) == ["1", "2", "3"]


def test_flat_names_tell_where_a_number_stood():
    assert flatten({"loss": 1.0, "a": {"by_depth": {"1": {"r2": 0.5}}}}) == {"loss": 1.0, "a/by_depth/1/r2": 0.5}


def test_pairs_are_siblings_that_part_at_their_first_tokens():
    tree = random_tree(4)
    found = {(int(a), int(b)) for a, b in sibling_pairs(tree)}
    assert len(found) > 3
    for a in range(len(tree)):
        for b in range(a + 1, len(tree)):
            parted = tree.own_tokens(a)[0] != tree.own_tokens(b)[0]
            assert ((a, b) in found) == (tree.parent[a] == tree.parent[b] and parted)
