"""Value heads taught by tuned policies: targets and what heads say, against reading every answer alone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM

from chat_model import chat_model, save_random_adapter
from collecting import collect_here
from mavis_logits import ValueHead, ValuePolicy, ValuePolicyConfig
from mavis_logits.backbone.fingerprint import parameters_fingerprint
from mavis_logits.steering.steering import Steering
from mavis_logits.values.value_policy import SETTINGS
from mavis_training.collect import describe
from mavis_training.fitting.efficiency import leaf_shares
from mavis_training.fitting.policies import (
    answers_of,
    gather_taught,
    head_ratios,
    likelihoods,
    mean_taught_loss,
    ratio_metrics,
    rewarded_loss,
    said_by_policies,
    taught_loss,
)
from mavis_training.fitting.states import compute_taught, read_taught, tree_states
from mavis_training.label import LabelConfig, label
from mavis_training.train_head import TrainHeadConfig, train_head
from mavis_training.trees.data import LabelledTree, load_trees, open_stores, reward_units, split_by_prompt
from mavis_training.trees.packing import pack


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Labelled trees of the chat model, and two policies on it."""
    folder = tmp_path_factory.mktemp("policies")
    collect_here(folder)
    model, tokenizer = chat_model()
    rewards = {"a": "text_rewards:low", "b": "text_rewards:high"}
    label(LabelConfig(str(folder / "trees"), rewards), tokenizer=tokenizer)
    for seed, name in enumerate("ab"):
        save_random_adapter(folder / name, seed, std=0.15)
        ValuePolicyConfig.of(model, name, eta=0.5).save_pretrained(folder / name)
    return folder


def given(place: Path, output: Path, **changes) -> TrainHeadConfig:
    settings = {
        "teachers": {name: str(place / name) for name in "ab"}, "device": "cpu", "epochs": 20, "width": 64,
        "dropout": 0.0, "weight_decay": 0.0, "batch_size": 64, "warmup_steps": 5, "patience": 20, "tokens": 24,
        "layer": "output",
    } | changes  # fmt: skip
    return TrainHeadConfig(str(place / "trees"), ["a", "b"], str(output), **settings)


@torch.no_grad()
def test_what_policies_say_is_what_they_say_of_every_answer_read_alone(place) -> None:
    model, _ = chat_model()
    policies = {name: ValuePolicy.from_pretrained(place / name, model) for name in "ab"}
    for item in load_trees(str(place / "trees"), ["a"], 0.0)[1][:4]:
        layout = pack(item.tree)
        said, previous = said_by_policies(item.tree, model, policies, 12), np.unique(layout.previous)
        for where in layout.paths():
            ids = torch.from_numpy(layout.input_ids[where])[None]
            every = [model, *(policy.backbone for policy in policies.values())]
            plain, *tuned = (one(ids).logits[0].log_softmax(-1) for one in every)
            asked = np.flatnonzero(np.isin(where, previous))
            rows = np.searchsorted(previous, where[asked])
            tokens = said["tokens"][rows].long()
            reference = plain[asked].gather(1, tokens)
            torch.testing.assert_close(said["reference"][rows].float(), reference, atol=2e-2, rtol=0)
            for m, one in enumerate(tuned):
                expected = one[asked].gather(1, tokens) - reference
                torch.testing.assert_close(said["ratios"][rows, :, m].float(), expected, atol=2e-2, rtol=0)
            mean = torch.stack([plain, *tuned])[:, asked].exp().mean(dim=0)
            assert bool((mean.topk(12).values.sum(-1) <= mean.gather(1, tokens).sum(-1) + 1e-4).all())


@torch.no_grad()
def test_a_model_that_cannot_read_a_packed_tree_is_read_path_by_path(place) -> None:
    torch.manual_seed(0)
    mamba = MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2)).eval()
    for item in load_trees(str(place / "trees"), ["a"], 0.0)[1][:3]:
        layout = pack(item.tree)
        found, before = likelihoods(mamba, layout), layout.before()
        for where in layout.paths():
            alone = mamba(torch.from_numpy(layout.input_ids[where])[None], use_cache=False).logits[0].log_softmax(-1)
            asked = np.flatnonzero(np.isin(where, before))
            rows = np.searchsorted(before, where[asked])
            torch.testing.assert_close(found[rows], alone[asked], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_what_a_head_makes_likelier_is_what_it_does_over_the_whole_vocabulary(place) -> None:
    """Where it is asked about all tokens; and about fewer, the others are left as they are."""
    model, _ = chat_model()
    head = ValueHead.for_model(model, ["a", "b"], width=16)
    torch.nn.init.normal_(head.out.weight, std=0.3)
    policies = {name: ValuePolicy.from_pretrained(place / name, model) for name in "ab"}
    for count in (10**6, 6):
        for item in load_trees(str(place / "trees"), ["a"], 0.0)[1][:3]:
            tree, layout = item.tree, pack(item.tree)
            states, said = tree_states(model, layout).float(), said_by_policies(tree, model, policies, count)
            found = head_ratios(head, tree, states, said)
            previous, last = np.unique(layout.previous), len(layout.input_ids) - len(layout.new)
            for where in layout.paths():
                logits = model(torch.from_numpy(layout.input_ids[where])[None]).logits[0].log_softmax(-1)
                for place_, at in enumerate(where[:-1]):
                    if where[place_ + 1] < last:
                        continue  # a token of the prompt
                    token = int(layout.input_ids[where[place_ + 1]])
                    asked = said["tokens"][int(np.searchsorted(previous, at))].long()
                    values = torch.zeros(logits.shape[1], 2)
                    values[asked] = head(states[at][None], asked[None])[0]
                    tilted = (logits[place_][:, None] + values).log_softmax(dim=0)
                    rest = torch.ones(logits.shape[1], dtype=torch.bool)
                    rest[asked] = False
                    inside = torch.tensor([token]) if token in asked.tolist() else torch.nonzero(rest)[:, 0]
                    expected = tilted[inside].logsumexp(dim=0) - logits[place_][inside].logsumexp(dim=0)
                    own = found[np.flatnonzero(layout.new == where[place_ + 1])[0]]
                    np.testing.assert_allclose(own, expected, atol=2e-2)


def test_another_strength_is_another_policy(place, tmp_path) -> None:
    """To a store whose trees were sampled by it, steered, and to what is kept of its sayings."""
    model, tokenizer = chat_model()
    policies = [ValuePolicy.from_adapter(place / "a", "a", model, strength) for strength in (1.0, 2.0)]
    told = [describe(Steering(policy, model=model, tokenizer=tokenizer)) for policy in policies]
    assert told[0]["value_functions"][0]["weights"] == parameters_fingerprint(policies[0].backbone)  # as ever
    assert told[0] != told[1]
    store = open_stores(str(place / "trees"))[0]
    compute_taught(store, model, {"a": policies[0]}, tmp_path, 5)
    with pytest.raises(ValueError, match="use another folder"):
        compute_taught(store, model, {"a": policies[1]}, tmp_path, 5)


def test_a_head_learns_what_its_teachers_say(place, tmp_path) -> None:
    model, _ = chat_model()
    head = train_head(given(place, tmp_path), model)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["explained"] > 0.3
    assert metrics["validation_loss_by_epoch"][-1] < metrics["validation_loss_by_epoch"][0]
    assert head.config.reward_scale == [1.0, 1.0]
    assert head.config.recipe["teachers"] == {"a": "a", "b": "b"}
    assert head.config.settings == SETTINGS
    stores, trees = load_trees(str(place / "trees"), ["a", "b"], 0.0)
    said = read_taught(stores[0], tmp_path / "states")
    assert len(said) == len(trees)
    # The share that is explained, from what was kept: a head that says nothing explains nothing.
    taught = gather_taught([(i.tree, tree_states(model, pack(i.tree)), s) for i, s in zip(trees, said, strict=True)])
    nothing = ValueHead.for_model(model, ["a", "b"], width=8)
    torch.nn.init.zeros_(nothing.out.weight)
    assert mean_taught_loss(nothing, taught, 64) == pytest.approx(mean_taught_loss(None, taught, 64), rel=1e-4)
    assert mean_taught_loss(head, taught, 64) < 0.7 * mean_taught_loss(None, taught, 64)
    again = train_head(given(place, tmp_path), model)  # is finished
    for name, tensor in head.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)


def test_metrics_are_in_standard_deviations_of_the_rewards(place, tmp_path) -> None:
    model, _ = chat_model()
    head = train_head(given(place, tmp_path, epochs=3), model)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    stores, trees = load_trees(str(place / "trees"), ["a", "b"], 0.0)
    said = dict(zip(map(id, trees), read_taught(stores[0], tmp_path / "states"), strict=True))
    training, validation = split_by_prompt(trees, TrainHeadConfig.validation_share)
    deviations = reward_units(training)[1]
    ratios = [0.5 * head_ratios(head, i.tree, tree_states(model, pack(i.tree)), said[id(i)]) for i in validation]
    standard = [LabelledTree(i.tree, i.rewards / deviations, i.targets / deviations) for i in validation]
    expected = ratio_metrics(standard, ratios, ["a", "b"])
    for name in "ab":
        assert metrics[name]["r2"] == pytest.approx(expected[name]["r2"], abs=1e-3)


@torch.no_grad()
def test_the_loss_with_rewards_is_that_of_every_answer_by_itself(place) -> None:
    model, _ = chat_model()
    torch.manual_seed(0)
    head = ValueHead.for_model(model, ["a", "b"], width=16).eval()
    torch.nn.init.normal_(head.out.weight, std=0.3)
    policies = {name: ValuePolicy.from_pretrained(place / name, model) for name in "ab"}
    items = load_trees(str(place / "trees"), ["a", "b"], 0.0)[1][:4]
    parts = [(i.tree, tree_states(model, pack(i.tree)), said_by_policies(i.tree, model, policies, 9)) for i in items]
    taught, etas, deviations = gather_taught(parts), torch.tensor([0.5, 0.2]), np.array([2.0, 0.7])
    answers = answers_of(taught, items, deviations)
    wrong, count, states = [], 0, 0
    for item, (tree, own, said) in list(zip(items, parts, strict=True))[1:3]:
        ratios = head_ratios(head, tree, own, said)
        new, leaves = pack(tree), tree.leaves()
        sums = np.array([ratios[np.isin(new.node[new.new], tree.path(int(leaf)))].sum(axis=0) for leaf in leaves])
        missed, share = etas.numpy() * sums - item.rewards / deviations, leaf_shares(tree)
        wrong.append((share @ missed**2 - (share @ missed) ** 2).mean())
        count, states = count + len(leaves), states + len(new.before())
    rows = torch.cat([torch.arange(*own.states) for own in answers[1:3]])
    expected = states / count * float(taught_loss(head, taught, rows)) + 0.3 * float(np.mean(wrong))
    assert float(rewarded_loss(head, taught, answers[1:3], etas, 0.3)) == pytest.approx(expected, rel=1e-4)


def test_rewards_teach_what_teachers_do_not_know(place, tmp_path) -> None:
    """The teachers here are random: what the head foresees of rewards it has from these."""
    model, _ = chat_model()
    found = {}
    for share in (0.0, 20.0):
        train_head(given(place, tmp_path / str(share), reward_share=share, epochs=40, learning_rate=1e-2), model)
        metrics = json.loads((tmp_path / str(share) / "metrics.json").read_text())
        found[share] = metrics["a"]["by_fraction"]["1.0"]["within"]
    assert found[20.0] > found[0.0] + 0.2


def test_a_head_of_factors_learns_from_a_few_answers_of_some_trees(place, tmp_path) -> None:
    model, _ = chat_model()
    head = train_head(given(place, tmp_path, rank=16, trees=8, answers=2, epochs=60, learning_rate=1e-2), model)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["explained"] > 0.2
    assert head.config.rank == 16
    stores, trees = load_trees(str(place / "trees"), ["a", "b"], 0.0, most=8, answers=2)
    assert len(trees) == 8
    assert len(read_taught(stores[0], tmp_path / "states")) == 8
    assert all(len(item.tree.leaves()) <= 2 for item in trees)
    with pytest.raises(ValueError, match="use another folder"):
        train_head(given(place, tmp_path, rank=16, trees=8, answers=1), model)


def test_metrics_of_a_perfect_policy_are_perfect(place) -> None:
    """One whose log-ratio grows by the reward that every token adds."""
    trees = load_trees(str(place / "trees"), ["a"], 0.0)[1]
    ratios = []
    for item in trees:
        tree = item.tree
        own = np.zeros((len(tree.tokens), 1))
        ends = tree.offsets() + tree.length - 1
        own[ends[tree.leaves()], 0] = item.rewards[:, 0]
        ratios.append(own)
    found = ratio_metrics(trees, ratios, ["a"])["a"]["by_fraction"]["1.0"]
    assert found["correlation"] == pytest.approx(1.0)
    assert found["r2"] == pytest.approx(1.0)


def test_what_does_not_go_together_is_refused(place, tmp_path) -> None:
    for changes, message in (
        ({"teachers": {"a": "x"}}, "a policy for each of the objectives"),
        ({"rule": "sums"}, "take the place of a rule"),
        ({"initial": "x"}, "begins anew"),
        ({"tokens": 1}, "at least 2"),
        ({"rank": 0}, "rank must be at least 1"),
        ({"reward_share": -1.0}, "at least 0, beside teachers"),
        ({"reward_share": float("nan")}, "at least 0, beside teachers"),
        ({"reward_share": 1.0, "teachers": {}}, "at least 0, beside teachers"),
    ):
        with pytest.raises(ValueError, match=message):
            given(place, tmp_path, **changes)
    model, _ = chat_model()
    train_head(given(place, tmp_path / "one", epochs=1), model)
    with pytest.raises(ValueError, match="use another folder"):
        train_head(given(place, tmp_path / "one", epochs=1, tokens=5), model)
