from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mavis_logits.values.value_head import ValueHead
from mavis_training.fitting import states as states_module
from mavis_training.fitting.states import compute_states, read_states, states_path, tree_states
from mavis_training.train_head import TrainHeadConfig, starting_head, train_head
from mavis_training.trees.data import set_reward_units
from mavis_training.trees.packing import pack
from random_trees import add_shard, make_store, random_tree, share_of_low
from tiny_models import TOKENIZER, tiny_llama


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Trees whose reward is the share of low token ids."""
    trees = [random_tree(i) for i in range(80)]
    rewards = {"low": lambda t: 10 * share_of_low(t), "high": lambda t: 1 - share_of_low(t)}
    store = make_store(tmp_path_factory.mktemp("trees"), trees[:40], rewards)
    add_shard(store, trees[40:], rewards)
    return store


@pytest.fixture
def config(store, tmp_path):
    return TrainHeadConfig(
        store=str(store.folder),
        objectives=["low", "high"],
        output=str(tmp_path / "head"),
        width=32,
        dropout=0.0,
        epochs=5,
        batch_size=64,
        learning_rate=0.005,
        warmup_steps=5,
        validation_share=0.2,
        device="cpu",
    )


@pytest.mark.parametrize(("layer", "read"), [("output", None), (2, 2), ("third", 1)])
def test_training_learns_and_saves(config, layer, read):
    model = tiny_llama()
    head = train_head(dataclasses.replace(config, layer=layer), model)
    metrics = json.loads(Path(config.output, "metrics.json").read_text())
    assert metrics["low"]["correlation"] > 0.1
    assert metrics["low"]["ranking"]["accuracy"] > 0.55
    assert metrics["trees"] + metrics["training_trees"] == 80
    loaded = ValueHead.from_pretrained(config.output).bind(model)
    hidden = torch.randn(3, 16)
    with torch.inference_mode():
        torch.testing.assert_close(loaded(hidden), head(hidden))
    assert loaded.config.objectives == ["low", "high"]
    assert loaded.config.layer == read
    assert loaded.config.tokenizer_fingerprint == TOKENIZER
    assert config.store not in json.dumps(loaded.config.to_dict())
    found = [metrics["steering"][name] for name in ("low", "high")]
    assert loaded.config.log_prob_weight == [float(f"{one['log_prob_weight']:.4g}") for one in found]
    assert all(one["gain"] >= one["gain_of_values"] - 1e-9 for one in found)


def test_trees_of_several_temperatures_say_what_log_pi_ref_counts_for_at_each(config, tmp_path):
    trees = [random_tree(i) for i in range(100, 140)]
    rewards = {"low": lambda t: 10 * share_of_low(t), "high": lambda t: 1 - share_of_low(t)}
    cold = make_store(tmp_path / "cold", trees, rewards, sampling={"max_new_tokens": 12, "temperature": 0.5})
    both = dataclasses.replace(config, store=[config.store, str(cold.folder)])
    head = train_head(both, tiny_llama())
    metrics = json.loads(Path(config.output, "metrics.json").read_text())
    found = {"1": metrics["steering"], "0.5": metrics["steering at temperature 0.5, top-p 1"]}
    expected = {
        at: [float(f"{one[name]['log_prob_weight']:.4g}") for name in head.config.objectives]
        for at, one in found.items()
    }
    assert head.config.log_prob_weight == expected
    assert ValueHead.from_pretrained(config.output).config.log_prob_weight == expected
    middle = [(a + b) / 2 for a, b in zip(expected["1"], expected["0.5"], strict=True)]
    assert head.config.log_prob_weight_at(0.75) == pytest.approx(middle)


def test_values_alone_where_nothing_is_to_stand_beside_them(config):
    assert train_head(dataclasses.replace(config, sharpen=False), tiny_llama()).config.log_prob_weight is None


def test_states_are_what_enters_the_output_embedding():
    tree, model = random_tree(3), tiny_llama()
    layout = pack(tree)
    states = tree_states(model, layout)
    assert states.dtype == torch.bfloat16
    for leaf in tree.leaves():
        seen = np.flatnonzero(layout.visible()[layout.last[leaf]])
        with torch.inference_mode():
            alone = model.model(torch.from_numpy(layout.input_ids[seen])[None]).last_hidden_state[0]
        torch.testing.assert_close(states[seen].float(), alone, rtol=1e-2, atol=1e-2)


def test_states_of_a_layer_are_those_that_the_model_itself_tells():
    tree, model = random_tree(3), tiny_llama()
    layout = pack(tree)
    states = tree_states(model, layout, layer=1)
    for leaf in tree.leaves():
        seen = np.flatnonzero(layout.visible()[layout.last[leaf]])
        with torch.inference_mode():
            ids = torch.from_numpy(layout.input_ids[seen])[None]
            alone = model.model(ids, output_hidden_states=True).hidden_states[1][0]
        torch.testing.assert_close(states[seen].float(), alone, rtol=1e-2, atol=1e-2)


def test_the_prefill_pass_goes_on_where_it_stood(store, tmp_path, monkeypatch):
    model, calls = tiny_llama(), []
    compute_states(store, model, tmp_path)
    _, second = store.shards()
    kept = read_states(store, tmp_path)
    states_path(tmp_path, second).unlink()
    monkeypatch.setattr(states_module, "tree_states", lambda *a: calls.append(1) or tree_states(*a))
    compute_states(store, model, tmp_path)
    assert len(calls) == len(second.trees())
    assert all(torch.equal(a, b) for a, b in zip(kept, read_states(store, tmp_path), strict=True))


def test_bad_states_are_refused(store, tmp_path):
    compute_states(store, tiny_llama(), tmp_path)
    with pytest.raises(ValueError, match="use another folder"):
        compute_states(store, tiny_llama(seed=1), tmp_path)
    with pytest.raises(ValueError, match="states of layer None, not 1: use another folder"):
        compute_states(store, tiny_llama(), tmp_path, layer=1)
    path = states_path(tmp_path, store.shards()[0])
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(OSError, match="truncated or corrupt"):
        read_states(store, tmp_path)
    with pytest.raises(OSError, match="truncated or corrupt"):
        compute_states(store, tiny_llama(), tmp_path)


def test_early_stopping_keeps_the_best_epoch(config):
    config = dataclasses.replace(config, epochs=30, learning_rate=0.05, patience=1)
    train_head(config, tiny_llama())
    metrics = json.loads(Path(config.output, "metrics.json").read_text())
    history = metrics["validation_loss_by_epoch"]
    assert len(history) < 30
    assert int(np.argmin(history)) == len(history) - 2


def test_going_on_from_a_head_starts_with_what_it_says(config, tmp_path):
    model = tiny_llama()
    first = train_head(dataclasses.replace(config, layer=2), model)
    following = dataclasses.replace(config, initial=config.output, output=str(tmp_path / "next"), width=7, dropout=0.3)
    assert following.layer_of(model) == 2
    units = np.array([5.0, -1.0]), np.array([0.1, 30.0])
    start = starting_head(following, model, units)
    hidden = torch.randn(3, 16)
    with torch.inference_mode():
        torch.testing.assert_close(start.eval()(hidden), first(hidden), rtol=1e-4, atol=1e-4)
    assert start.config.reward_mean == [5.0, -1.0]
    assert start.config.width == 32
    assert {m.p for m in start.modules() if isinstance(m, torch.nn.Dropout)} == {0.3}

    history = json.loads(Path(config.output, "metrics.json").read_text())["validation_loss_by_epoch"]
    second = train_head(dataclasses.replace(following, iteration=1, epochs=1, learning_rate=1e-5), model)
    gone_on = json.loads(Path(tmp_path, "next", "metrics.json").read_text())["validation_loss_by_epoch"]
    assert gone_on[0] == pytest.approx(min(history), rel=0.01)
    assert second.config.iteration == 1
    assert second.config.recipe["width"] == 32
    assert second.config.recipe["initial"] == "head"


def test_a_head_to_go_on_from_must_fit(config):
    train_head(config, tiny_llama())
    following = dataclasses.replace(config, initial=config.output)
    with pytest.raises(ValueError, match="this run is for"):
        train_head(dataclasses.replace(following, objectives=["high"]), tiny_llama())
    with pytest.raises(ValueError, match="was trained on the hidden states of"):
        train_head(following, tiny_llama(seed=1))


@given(
    mean=st.lists(st.floats(-100, 100), min_size=2, max_size=2),
    scale=st.lists(st.floats(0.01, 100), min_size=2, max_size=2),
)
def test_reward_units_do_not_change_values(mean, scale):
    head = ValueHead.for_model(tiny_llama(), ["a", "b"], width=8, reward_mean=[1.0, -2.0], reward_scale=[3.0, 0.5])
    hidden = torch.ones(2, 16).cumsum(1)
    with torch.no_grad():
        before = head(hidden)
        set_reward_units(head, np.array(mean), np.array(scale))
        torch.testing.assert_close(head(hidden), before, rtol=1e-3, atol=1e-3)


def test_several_stores_are_trained_on_together(config, store, tmp_path):
    trees = [random_tree(i, layers=2) for i in range(40)]
    rewards = {"low": lambda tree: np.ones(len(tree.leaves())), "high": lambda tree: np.zeros(len(tree.leaves()))}
    other = make_store(tmp_path / "other", trees, rewards)  # the same prompts, and a shard of the same name
    both = [str(store.folder), str(other.folder)]
    model = tiny_llama()
    train_head(dataclasses.replace(config, store=both, epochs=1), model)
    metrics = json.loads(Path(config.output, "metrics.json").read_text())
    assert metrics["trees"] + metrics["training_trees"] == 120
    folders = dataclasses.replace(config, store=both).states_folders()
    for of_one, folder in zip((store, other), folders, strict=True):
        states = read_states(of_one, folder)
        assert [len(s) for s in states] == [len(t.prompt_tokens) + len(t.tokens) for t in of_one]
    with pytest.raises(ValueError, match="holds states of trees"):
        train_head(dataclasses.replace(config, store=both[::-1], states=[str(f) for f in folders]), model)


def test_bad_input(config):
    with pytest.raises(ValueError, match="states names 1 folders for 2 stores"):
        dataclasses.replace(config, store=["a", "b"], states="c")
    with pytest.raises(ValueError, match="no complete rewards"):
        train_head(dataclasses.replace(config, objectives=["funny"]), tiny_llama())
    with pytest.raises(ValueError, match="width must be at least 1, got 0"):
        dataclasses.replace(config, width=0)
    for layer in (0, "middle"):
        with pytest.raises(ValueError, match=f"a number from 1 on, 'third' or 'output', got {layer!r}"):
            dataclasses.replace(config, layer=layer)
    with pytest.raises(ValueError, match="state after layer 5, but LlamaForCausalLM has 2 layers"):
        train_head(dataclasses.replace(config, layer=5), tiny_llama())
