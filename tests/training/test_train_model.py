from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from mavis_logits.values.value_model import ValueModel
from mavis_training.train_model import LoraSettings, TrainModelConfig, train_model
from mavis_training.trees.data import load_trees, reward_units, split_by_prompt
from random_trees import make_store, random_tree, share_of_low
from tiny_models import TOKENIZER, tiny_llama, tiny_mamba
from trainings import assert_same_values, killed_after, watched

TREES = 80


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Trees that speak in low or in high token ids, and rewards for the one and the other."""
    trees = [random_tree(i) for i in range(TREES)]
    for i, tree in enumerate(trees):
        tree.tokens = 3 + tree.tokens % 20 + 25 * (i % 2)

    def low(tree):
        return share_of_low(tree) + 0.01 * tree.leaves()

    rewards = {"low": lambda tree: 10 * low(tree), "high": lambda tree: 1 - low(tree)}
    return make_store(tmp_path_factory.mktemp("trees"), trees, rewards)


@pytest.fixture
def config(store, tmp_path):
    return TrainModelConfig(
        store=str(store.folder),
        objectives=["low", "high"],
        output=str(tmp_path / "value"),
        lora=LoraSettings(rank=4, alpha=8, dropout=0.0),
        learning_rate=0.05,
        warmup_steps=0,
        epochs=4,
        batch_size=8,
        device="cpu",
        validation_share=0.2,
    )


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"targets": "tokens"},
        {"packing": "nodes", "batch_size": 32, "epochs": 8},
        {"lora": LoraSettings(rank=0), "learning_rate": 0.02},
    ],
)
def test_training_learns_and_saves(config, changes):
    config = dataclasses.replace(config, **changes)
    backbone = tiny_llama()
    model = train_model(config, backbone)
    metrics = json.loads(Path(config.output, "metrics.json").read_text())
    assert metrics["low"]["correlation"] > 0.15
    assert metrics["low"]["ranking"]["pairs"] > 10
    assert metrics["trees"] + metrics["training_trees"] == TREES
    loaded = ValueModel.from_pretrained(config.output, backbone=backbone if config.lora.rank else None)
    assert_same_values(loaded, model)
    assert loaded.config.objectives == ["low", "high"]
    assert loaded.config.base_model == "tiny"
    assert loaded.config.tokenizer_fingerprint == TOKENIZER
    assert loaded.config.recipe["zeta"] == 0.0
    assert config.store not in json.dumps(loaded.config.to_dict())


def test_a_recurrent_backbone_trains_on_plain_sequences(config):
    settings = {"lora": LoraSettings(0), "epochs": 1, "batch_size": 64, "drop_leaves": 1.0}
    with pytest.raises(ValueError, match="set packing to 'nodes'"):
        train_model(dataclasses.replace(config, **settings), tiny_mamba())
    model = train_model(dataclasses.replace(config, **settings, packing="nodes"), tiny_mamba())
    assert model.config.backbone_config.model_type == "mamba"


def test_reward_units_come_from_the_training_trees_alone(store):
    _, trees = load_trees(str(store.folder), ["low", "high"], zeta=0.0)
    training, validation = split_by_prompt(trees, 0.2)
    mean, scale = reward_units(training)
    leaves = np.concatenate([item.rewards for item in training])
    np.testing.assert_allclose(mean, leaves.mean(axis=0))
    np.testing.assert_allclose(scale, leaves.std(axis=0))
    assert {t.tree.prompt_id for t in training}.isdisjoint(t.tree.prompt_id for t in validation)


def test_a_killed_training_goes_on(config):
    whole = train_model(dataclasses.replace(config, output=config.output + "-whole"), tiny_llama())
    with killed_after(epoch=3):
        train_model(config, tiny_llama())
    half_written = Path(config.output, "checkpoints", "checkpoint-999")
    half_written.mkdir()
    (half_written / "trainable.safetensors").write_bytes(b"half")
    with watched("training_step") as steps:
        resumed = train_model(config, tiny_llama())
    assert 0 < len(steps) < 12  # one epoch of four remained
    assert_same_values(resumed, whole, 1e-3)


def test_bad_input(config, store):
    with pytest.raises(ValueError, match=r"no complete rewards for \['funny'\] \(it has \['high', 'low'\]\)"):
        train_model(dataclasses.replace(config, objectives=["funny"]), tiny_llama())
    with pytest.raises(ValueError, match="validation_share"):
        train_model(dataclasses.replace(config, validation_share=0.0), tiny_llama())
    with pytest.raises(ValueError, match="packing must be one of"):
        dataclasses.replace(config, packing="forest")
    with pytest.raises(ValueError, match="objectives is empty"):
        dataclasses.replace(config, objectives=[])


def steps_of_zero(config, **changes):
    """`config` with a learning rate of 0, so that training changes nothing."""
    return dataclasses.replace(config, learning_rate=0.0, epochs=1, drop_leaves=0.0, **changes)


@pytest.mark.parametrize("rank", [0, 4])
def test_the_next_iteration_goes_on_from_the_last_in_its_own_reward_units(config, tmp_path, rank):
    first = dataclasses.replace(config, lora=LoraSettings(rank, dropout=0.0), learning_rate=0.02, epochs=1)
    before = train_model(first, tiny_llama())
    second = steps_of_zero(first, initial=first.output, output=str(tmp_path / "second"), zeta=0.5, iteration=1, seed=1)
    after = train_model(second, tiny_llama())
    assert after.config.reward_mean != before.config.reward_mean
    assert after.config.iteration == 1
    assert after.config.recipe["initial"] == "value"
    assert bool(after.lora) == bool(rank)
    assert_same_values(after, before)
    trained = {name for name, p in after.named_parameters() if p.requires_grad}
    assert trained == {name for name, p in before.named_parameters() if p.requires_grad}


def test_an_adapter_may_be_merged_and_all_weights_trained_on(config, tmp_path):
    before = train_model(dataclasses.replace(config, epochs=1), tiny_llama())
    second = steps_of_zero(config, initial=config.output, output=str(tmp_path / "second"), lora=LoraSettings(0))
    after = train_model(second, tiny_llama())
    assert all(p.requires_grad for p in after.parameters())
    assert_same_values(after, before)
    assert_same_values(ValueModel.from_pretrained(second.output), before)


def test_training_does_not_go_on_from_something_else(config, tmp_path):
    train_model(dataclasses.replace(config, epochs=1, objectives=["high"]), tiny_llama())
    second = dataclasses.replace(config, initial=config.output, output=str(tmp_path / "second"))
    with pytest.raises(ValueError, match=r"its objectives is \['high'\], expected \['low', 'high'\]"):
        train_model(second, tiny_llama())
    second = dataclasses.replace(second, objectives=["high"])
    with pytest.raises(ValueError, match=r"its lora\.rank is 4, expected 8"):
        train_model(dataclasses.replace(second, lora=LoraSettings(8)), tiny_llama())
    with pytest.raises(ValueError, match="its num_layers is 2, expected 1"):
        train_model(dataclasses.replace(second, num_layers=1), tiny_llama())
    model_config = Path(config.output, "config.json")
    model_config.write_text(model_config.read_text().replace(TOKENIZER, "f" * 16))
    with pytest.raises(ValueError, match=r"its tokenizer is 'f{16}'"):
        train_model(second, tiny_llama())
    with pytest.raises(OSError, match="nowhere"):
        train_model(dataclasses.replace(second, initial=str(tmp_path / "nowhere")), tiny_llama())
