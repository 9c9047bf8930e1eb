"""Learning rules on whole completions, against sums made token by token."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from mavis_logits.values.value_head import ValueHead
from mavis_training.fitting.efficiency import baselines, leaf_shares, sample_actions
from mavis_training.fitting.paths import along, fit_paths, ordered_right, paths_of, rule_loss, together
from mavis_training.fitting.states import compute_actions, read_actions, tree_states
from mavis_training.train_head import TrainHeadConfig, train_head
from mavis_training.trees.data import LabelledTree
from mavis_training.trees.packing import pack
from mavis_training.trees.targets import node_targets
from random_trees import make_store, random_tree, share_of_low
from tiny_models import tiny_llama


def branching(count, seed=0):
    """Trees whose prompt has at least two children, with two rewards."""
    found = []
    for i in range(20 * count):
        tree = random_tree(1000 * seed + i)
        if (tree.parent == -1).sum() > 1 and len(found) < count:
            low = share_of_low(tree)
            rewards = np.stack([10 * low, np.arange(len(low), dtype=float) % 3], axis=1)
            found.append(LabelledTree(tree, rewards, node_targets(tree, rewards)))
    return found


def parts_of(items, model, count=3):
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randint(0, 50, (len(pack(i.tree)), count), generator=generator, dtype=torch.int32) for i in items]
    states = [tree_states(model, pack(item.tree)) for item in items]
    return [paths_of(*each) for each in zip(items, states, drawn, strict=True)], states, drawn


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


def new_head(model, **config):
    torch.manual_seed(1)
    return ValueHead.for_model(model, ["a", "b"], width=16, reward_mean=[5.0, 1.0], reward_scale=[2.0, 0.5], **config)


def test_sums_are_those_made_token_by_token(model):
    items = branching(3)
    parts, states, drawn = parts_of(items, model)
    head = new_head(model).eval()
    with torch.no_grad():
        sums, variances, ratios, taken = along(head, together(parts), 1.5)
    row = position = 0
    for item, own, actions in zip(items, states, drawn, strict=True):
        tree, layout = item.tree, pack(item.tree)
        for leaf in tree.leaves():
            total, spread, ratio = torch.zeros(2), torch.zeros(2), torch.zeros(2)
            for node in tree.path(int(leaf)):
                for place in np.flatnonzero(layout.node == node):
                    before = int(layout.previous[place - len(tree.prompt_tokens)])
                    tokens = torch.cat([torch.tensor([layout.input_ids[place]]), actions[before].long()])
                    with torch.no_grad():
                        said = head(own[before][None].float(), tokens[None])[0] / torch.tensor([2.0, 0.5])
                    total += said[0] - said[1:].mean(dim=0)
                    spread += said[1:].var(dim=0)
                    ratio += 1.5 * said[0] - (1.5 * said[1:]).exp().mean(dim=0).log()
            torch.testing.assert_close(sums[row], total, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(variances[row], spread, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(ratios[row], ratio, atol=1e-4, rtol=1e-4)
            row += 1
        position += len(layout.new)
    assert row == len(sums)
    assert position == len(taken)


def test_the_rules_are_their_formulas(model):
    items = branching(3)
    parts, _, _ = parts_of(items, model)
    head = new_head(model).eval()
    scale = np.array([2.0, 0.5])
    with torch.no_grad():
        each = [tuple(x.numpy() for x in along(head, part, 2.0)[:3]) for part in parts]
        rules = ("sums", "gain", "pairs", "balance")
        found = {rule: float(rule_loss(head, together(parts), rule, 0.0, 2.0)) for rule in rules}
        anchored = float(rule_loss(head, together(parts), "gain", 0.5))
    squares, covariance, variance, pairs, balance = [], [], [], [], []
    for item, (sums, spread, ratio) in zip(items, each, strict=True):
        share = leaf_shares(item.tree)[:, None]
        centred = (item.rewards - baselines(item.tree, item.rewards)) / scale
        squares.append((share * (centred - sums) ** 2).sum(axis=0))
        covariance.append((share * centred * sums).sum(axis=0))
        variance.append((share * spread).sum(axis=0))
        residual = ratio - 2.0 * item.rewards / scale
        balance.append((share * (residual - (share * residual).sum(axis=0)) ** 2).sum(axis=0) / 4)
        for i in range(len(sums)):
            for j in range(i):
                for m in range(2):
                    if item.rewards[i, m] != item.rewards[j, m]:
                        better, worse = (i, j) if item.rewards[i, m] > item.rewards[j, m] else (j, i)
                        pairs.append(np.log1p(np.exp(-(sums[better, m] - sums[worse, m]))))
    assert found["sums"] == pytest.approx(np.mean(squares), rel=1e-4)
    gain = np.mean(covariance, axis=0) / np.sqrt(np.mean(variance, axis=0) + 1e-6)
    assert found["gain"] == pytest.approx(-gain.mean(), rel=1e-3, abs=1e-5)
    assert found["pairs"] == pytest.approx(np.mean(pairs), rel=1e-4)
    assert found["balance"] == pytest.approx(np.mean(balance), rel=1e-4)
    with torch.no_grad():
        *_, taken = along(head, together(parts))
    targets = torch.cat([part.targets for part in parts])
    position = float(((taken - targets) / torch.tensor(scale)).square().mean())
    assert anchored == pytest.approx(found["gain"] + 0.5 * position, rel=1e-4)


@pytest.mark.parametrize("rule", ["sums", "gain", "pairs", "balance"])
def test_a_rule_learns_which_completions_are_better(model, rule):
    items = branching(120)
    parts, _, _ = parts_of(items, model)
    head = new_head(model)
    config = TrainHeadConfig(
        "s", ["a", "b"], "o", rule=rule, epochs=12, learning_rate=5e-3, warmup_steps=5, weight_decay=0.1, anchor=0.0
    )
    before = ordered_right(head, parts[:30])["a"]
    history = fit_paths(head, parts[30:], parts[:30], config)
    after = ordered_right(head, parts[:30])["a"]
    assert after > max(before, 0.57)
    assert min(history) < history[0]


def test_actions_are_drawn_once_and_known_again(model, tmp_path):
    store = make_store(tmp_path / "trees", [random_tree(i) for i in range(6)], {"a": share_of_low})
    compute_actions(store, model, tmp_path / "states", 4, seed=0)
    first = read_actions(store, tmp_path / "states")
    (path,) = (tmp_path / "states").glob("*.actions.safetensors")
    written = path.stat().st_mtime_ns
    compute_actions(store, model, tmp_path / "states", 4, seed=0)
    assert path.stat().st_mtime_ns == written
    assert [tuple(x.shape) for x in first] == [(len(pack(tree)), 4) for tree in store]
    with pytest.raises(ValueError, match="holds 4 actions at each place, not 5"):
        compute_actions(store, model, tmp_path / "states", 5, seed=0)


def test_actions_at_a_temperature_and_a_nucleus():
    embedding, states = torch.eye(6), torch.tensor([[3.0, 2.0, 1.0, 0.0, 0.0, 0.0]])
    drawn = sample_actions(embedding, states, 4000, torch.Generator().manual_seed(0), 0.5, 0.95)
    probability = torch.softmax(states[0] / 0.5, dim=0)  # 0.86, 0.12, 0.02: two of them are the nucleus
    expected = probability[:2] / probability[:2].sum()
    assert set(drawn.unique().tolist()) == {0, 1}
    assert float((drawn == 0).float().mean()) == pytest.approx(float(expected[0]), abs=0.02)


def test_a_head_is_trained_by_a_rule_from_a_store(model, tmp_path):
    store = make_store(
        tmp_path / "trees", [item.tree for item in branching(80)], {"low": lambda t: 10 * share_of_low(t)}
    )
    config = TrainHeadConfig(
        str(store.folder), ["low"], str(tmp_path / "head"), rule="gain", anchor=1.0, width=32, dropout=0.0, epochs=5,
        batch_size=64, learning_rate=0.005, warmup_steps=5, validation_share=0.2, device="cpu",
    )  # fmt: skip
    train_head(config, model)
    metrics = json.loads(Path(config.output, "metrics.json").read_text())
    assert metrics["ordered_right"]["low"]["after"] > 0.6
    assert len(metrics["rule_loss_by_epoch"]) >= 1
    assert metrics["low"]["correlation"] > 0.0  # the anchor keeps the level of the values
    again = dataclasses.replace(config, rule="positions")
    train_head(again, model)  # replaces it
    assert "ordered_right" not in json.loads(Path(config.output, "metrics.json").read_text())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rule": "sum"}, "positions, sums, gain, pairs, balance"),
        ({"anchor": -1.0}, "anchor must be"),
        ({"actions": 1}, "at least 2"),
    ],
)
def test_bad_input(changes, message):
    with pytest.raises(ValueError, match=message):
        TrainHeadConfig("s", ["a"], "o", **changes)
