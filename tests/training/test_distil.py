from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from mavis_logits.values.value_head import ValueHead
from mavis_logits.values.value_model import ValueModel
from mavis_training import distil as distilling
from mavis_training.cards import CardConfig, write_card
from mavis_training.distil import DistilConfig, agreement, distil, taught_trees
from mavis_training.fitting.teachers import VALUES_FOLDER, load_teachers
from mavis_training.train_model import LoraSettings
from mavis_training.trees.data import open_stores
from random_trees import make_store, random_tree
from tiny_models import TOKENIZER, tiny_llama, tiny_mamba, tiny_tokenizer
from trainings import assert_same_values, killed_after, watched

TREES = [random_tree(i) for i in range(40)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A store without rewards, two value models of different sizes and iterations, and a value head."""
    folder = tmp_path_factory.mktemp("distil")
    make_store(folder / "trees", TREES)
    common = {"tokenizer_fingerprint": TOKENIZER, "reward_mean": [3.0], "reward_scale": [2.0]}
    small = ValueModel.from_backbone(tiny_llama(), ["low"], iteration=1, num_layers=1, **common)
    large = ValueModel.from_backbone(tiny_llama(seed=3), ["high"], iteration=2, **common)
    nat = {"log_prob_weight": {"0.5": [0.1], "1": [0.3]}}
    head = ValueHead.for_model(tiny_llama(), ["mid"], width=8, **common, **nat)
    torch.manual_seed(0)
    with torch.no_grad():
        for model in (small, large):
            model.head.weight.normal_(std=0.5)
    for name, function in (("low", small), ("high", large), ("mid", head)):
        function.save_pretrained(folder / name)
    return folder


@pytest.fixture
def config(folders, tmp_path):
    return DistilConfig(
        store=str(folders / "trees"),
        teachers={"low": str(folders / "low"), "high": str(folders / "high")},
        output=str(tmp_path / "student"),
        model=None,
        lora=LoraSettings(rank=0),
        learning_rate=0.02,
        warmup_steps=0,
        epochs=3,
        batch_size=8,
        device="cpu",
        validation_share=0.2,
    )


def test_a_student_of_its_teachers_architecture_reaches_them(config, folders):
    """The teacher's own backbone under a new head: the head is to be found again, and the backbone to be left alone."""
    one = dataclasses.replace(
        config,
        teachers={"low": str(folders / "low")},
        lora=LoraSettings(rank=1, alpha=1, dropout=0.0, target_modules=["o_proj"]),
        num_layers=1,
        epochs=20,
        learning_rate=0.05,
        batch_size=4,
    )
    with watched("evaluate") as found:
        student = distil(one, backbone=tiny_llama())
    assert found[-1]["eval_loss"] < min(0.02, found[0]["eval_loss"] / 10)
    assert student.config.reward_mean == [3.0]
    agreed = json.loads(Path(one.output, "agreement.json").read_text())
    assert agreed["low"]["r2"] > 0.9
    assert agreed["low"]["ranking"] > 0.9
    assert agreed["low"]["pairs"] > 10
    assert agreed["trees"] + agreed["training_trees"] == len(TREES)


def test_teachers_of_different_kinds_sizes_and_iterations(config, folders, tmp_path):
    base = tiny_llama()
    teachers = {**config.teachers, "mid": str(folders / "mid")}
    make_store(tmp_path / "more", [random_tree(i) for i in range(40, 50)], model="other")
    stores = [config.store, str(tmp_path / "more")]
    lora = LoraSettings(rank=4, alpha=8, dropout=0.0)
    three = dataclasses.replace(config, teachers=teachers, store=stores, lora=lora, num_layers=1)
    student = distil(three, model=base, backbone=base)
    loaded = ValueModel.from_pretrained(three.output, backbone=base)
    assert loaded.config.objectives == ["low", "high", "mid"]
    assert loaded.config.iteration == 2
    assert loaded.config.log_prob_weight == {"0.5": [0.0, 0.0, 0.1], "1": [0.0, 0.0, 0.3]}
    assert loaded.config.recipe["teacher_iterations"] == {"low": 1, "high": 2, "mid": 0}
    assert (loaded.config.tokenizer_fingerprint, loaded.config.base_model) == (
        TOKENIZER,
        "other",
    )
    assert str(tmp_path) not in json.dumps(loaded.config.to_dict())
    assert_same_values(loaded, student)
    agreed = json.loads(Path(three.output, "agreement.json").read_text())
    assert agreed["trees"] + agreed["training_trees"] == 50
    assert all(agreed[name]["correlation"] > 0.1 for name in teachers)
    assert not Path(three.output, "metrics.json").exists()  # the trees have no rewards


def test_taught_trees_hold_each_teachers_column(config, folders):
    base = tiny_llama()
    given = {**config.teachers, "mid": str(folders / "mid")}
    stores, teachers = open_stores(config.store), load_teachers(given, base, torch.float32, "cpu")
    item = taught_trees(stores, teachers, ["mid", "low"], keep=False)[7]
    by_name = {name: t for t in teachers for name in t.outputs}
    for column, name in enumerate(["mid", "low"]):
        np.testing.assert_allclose(item.values[:, column], by_name[name].values(item.tree)[:, 0], atol=1e-5)
    ends = np.cumsum(item.tree.length) - 1
    np.testing.assert_array_equal(item.targets, item.values[ends])
    np.testing.assert_array_equal(item.rewards, item.values[ends[item.tree.leaves()]])


def test_with_rewards_the_student_is_measured_against_them_too(config, tmp_path):
    rewards = dict.fromkeys(("low", "high"), lambda tree: np.arange(len(tree.leaves())))
    stores = [tmp_path / "labelled", tmp_path / "others"]
    for folder, part, model in zip(stores, (TREES[:20], TREES[20:]), ("tiny", "other"), strict=True):
        make_store(folder, part, rewards, model=model)
    distil(dataclasses.replace(config, store=list(map(str, stores)), epochs=1), backbone=tiny_llama())
    metrics = json.loads(Path(config.output, "metrics.json").read_text())
    agreed = json.loads(Path(config.output, "agreement.json").read_text())
    assert set(metrics["low"]) >= {"by_fraction", "ranking", "r2"}
    assert metrics["low"]["correlation"] != agreed["low"]["correlation"]
    write_card(CardConfig(config.output, plots=False))  # a student is published as any value function
    assert "low" in Path(config.output, "README.md").read_text()


def test_a_killed_distillation_goes_on(config):
    whole = distil(dataclasses.replace(config, output=config.output + "-whole"), backbone=tiny_llama())
    assert list(Path(config.store, VALUES_FOLDER).rglob("*.safetensors"))
    with killed_after(epoch=2):
        distil(config, backbone=tiny_llama())
    with watched("training_step") as steps:
        resumed = distil(config, backbone=tiny_llama())
    assert 0 < len(steps) <= 5  # one epoch of three remained
    assert not Path(config.output, "checkpoints").exists()
    assert_same_values(resumed, whole, 1e-3)


def test_going_on_from_a_student(config):
    again = dataclasses.replace(config, initial=config.output, output=config.output + "-2", learning_rate=1e-4)
    with watched("evaluate") as found:
        distil(config, backbone=tiny_llama())
        distil(again)
    assert found[3]["eval_loss"] < found[0]["eval_loss"]  # the second training starts where the first one ended


def test_agreement_is_perfect_only_for_the_teachers_own_values(folders, config):
    stores, teachers = open_stores(config.store), load_teachers(config.teachers, None, torch.float32, "cpu")
    items = taught_trees(stores, teachers, ["low", "high"], keep=False)
    same = [item.values.astype(float) for item in items]
    flipped = [values * [1, -1] + [10, 0] for values in same]
    for values in agreement(same, items, ["low", "high"]).values():
        assert values["r2"] == values["ranking"] == 1
        assert values["step_correlation"] == pytest.approx(1)
    worse = agreement(flipped, items, ["low", "high"])
    assert (worse["low"]["ranking"], worse["high"]["ranking"]) == (1, 0)
    assert worse["low"]["r2"] < 0
    assert worse["high"]["step_correlation"] == pytest.approx(-1)


def test_an_interrupted_distillation_refuses_other_settings_and_a_finished_one_is_not_done_again(config, folders):
    with killed_after(epoch=1):
        distil(config, backbone=tiny_llama())
    with pytest.raises(ValueError, match=r"learning_rate was 0\.02, is now 0\.1"):
        distil(dataclasses.replace(config, learning_rate=0.1), backbone=tiny_llama())
    swapped = {"low": config.teachers["low"], "high": config.teachers["high"]}
    assert Path(config.output, "training.json").exists()
    done = distil(dataclasses.replace(config, teachers=swapped), backbone=tiny_llama())
    with watched("training_step") as steps:
        assert_same_values(distil(config, backbone=tiny_llama()), done)
    assert not steps


def test_bad_input(config, folders, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="teachers is empty"):
        dataclasses.replace(config, teachers={})
    with pytest.raises(ValueError, match="store is empty"):
        dataclasses.replace(config, store=[])
    with pytest.raises(OSError, match="not a tree store"):
        distil(dataclasses.replace(config, store=str(tmp_path / "none")), backbone=tiny_llama())
    with pytest.raises(ValueError, match="one or several different folders"):
        distil(dataclasses.replace(config, store=[config.store] * 2), backbone=tiny_llama())
    fresh = make_store(tmp_path / "fresh", TREES[:3])
    with pytest.raises(ValueError, match=r"validation_share 0\.0"):
        distil(dataclasses.replace(config, store=str(fresh.folder), validation_share=0.0), backbone=tiny_llama())
    assert not (fresh.folder / VALUES_FOLDER).exists()  # told before the teachers were asked
    with pytest.raises(ValueError, match="did you mean 'report_to'"):
        dataclasses.replace(config, trainer={"report": "none"})
    with pytest.raises(ValueError, match=r"cannot read a packed tree .*recurrent state.*: choose a student"):
        distil(config, backbone=tiny_mamba())
    with pytest.raises(ValueError, match="its objectives is"):
        distil(dataclasses.replace(config, initial=str(folders / "low")))
    make_store(tmp_path / "other", TREES, tokenizer_fingerprint="0" * 16)
    with pytest.raises(ValueError, match=r"trees and .*other cannot .*: their tokenizer_fingerprint differ"):
        distil(dataclasses.replace(config, store=[config.store, str(tmp_path / "other")]), backbone=tiny_llama())
    with pytest.raises(ValueError, match="low reads tokens of another tokenizer"):
        distil(dataclasses.replace(config, store=str(tmp_path / "other")), backbone=tiny_llama())
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["more"])
    monkeypatch.setattr(distilling, "load_chat_model", lambda name, dtype: (tiny_llama(), tokenizer))
    with pytest.raises(ValueError, match="org/student has another tokenizer"):
        distil(dataclasses.replace(config, backbone="org/student"))
