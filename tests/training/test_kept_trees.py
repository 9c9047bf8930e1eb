"""No setting of collecting, labelling, distilling, tuning or iterating leaves kept work stale."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch

import collecting
import iterating
from mavis_logits.values.value_head import ValueHead
from mavis_training.collect import CollectConfig, PolicyConfig, collect
from mavis_training.iterate import IterateConfig, IterationConfig, iterate
from mavis_training.label import LabelConfig, label
from mavis_training.trees.tree_store import TreeStore

# Other values of what shapes a tree; of places, other content; None: shapes none.
COLLECTED = {
    "prompts": "edited", "store": None, "model": "edited", "limit": None, "skip": None, "max_new_tokens": 7,
    "layers": 2,
    "top_p": 0.5, "root_children": 2, "children": 3, "two_layers": False, "temperature": 0.7, "policy": "head",
    "backend": "vllm",
    "vllm": None, "chat_template": "none", "max_prompt_tokens": None, "prompts_per_shard": None, "dtype": "bfloat16",
    "device": None, "seed": 4,
}  # fmt: skip
FREE = {"skip": 1, "limit": 9, "max_prompt_tokens": 99, "prompts_per_shard": 3}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A model, prompts, trees, a head."""
    folder = tmp_path_factory.mktemp("inputs")
    collecting.write_inputs(folder, 4)
    collect(collecting.config(folder, "trees"))
    model = iterating.chat_model()[0]
    head = ValueHead.for_model(model, ["low"], 8, 1, 0.0)
    torch.nn.init.normal_(head.out.weight)
    head.save_pretrained(folder / "head")
    return folder


@pytest.fixture
def work(inputs, tmp_path):
    """A copy of them to spoil."""
    shutil.copytree(inputs, tmp_path / "work")
    return tmp_path / "work"


def edit(folder: Path, name: str) -> None:
    """Other content in the same place."""
    if name == "prompts":
        path = folder / "prompts.jsonl"
        path.write_text(path.read_text().replace('"w1 ', '"w9 '))
    else:
        model, _ = iterating.chat_model()
        torch.manual_seed(9)
        model.lm_head.weight.data.normal_()
        model.save_pretrained(folder / "model")


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(CollectConfig)])
def test_no_setting_of_collecting_goes_on_with_other_trees(inputs, work, name):
    value, config = COLLECTED[name], collecting.config(work, "trees")  # a new setting needs a line there
    before = collecting.content(work / "trees")
    if value is None:
        if name in FREE:
            collect(dataclasses.replace(config, **{name: FREE[name]}))
            assert collecting.content(work / "trees").keys() == before.keys()
        return
    if value == "edited":
        edit(work, name)
    else:
        value = PolicyConfig(str(work / "head")) if name == "policy" else value
        config = dataclasses.replace(config, **{name: value})
    with pytest.raises((ValueError, ImportError)) as refused:
        collect(config)
    if name != "backend":
        assert "another" in str(refused.value)
    collecting.assert_alike(work / "trees", inputs / "trees")


def test_the_reference_is_kept_with_the_trees(work):
    metadata = TreeStore.open(work / "trees").metadata
    assert metadata.reference["temperature"] == 1.0
    assert metadata.reference["eos_token_id"] == [1]
    path = work / "trees" / "metadata.json"
    path.write_text(path.read_text().replace('"eos_token_id": [', '"eos_token_id": [7, '))
    with pytest.raises(ValueError, match="reference"):
        collect(collecting.config(work, "trees"))
    old = json.loads(path.read_text()) | {"reference": None}  # of a version that did not know it
    path.write_text(json.dumps(old))
    collect(collecting.config(work, "trees"))


LABELLED = {
    "store": None, "rewards": {"low": "text_rewards:high"}, "tokenizer": None, "device": None, "fresh": None,
    "keep": None,
}  # fmt: skip


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(LabelConfig)])
def test_no_setting_of_labelling_keeps_other_rewards(work, name):
    config = LabelConfig(str(work / "trees"), {"low": "text_rewards:low"}, str(work / "model"))
    label(config)
    if LABELLED[name] is not None:
        with pytest.raises(ValueError, match="--fresh true"):
            label(dataclasses.replace(config, **{name: LABELLED[name]}))


@pytest.mark.parametrize("what", ["prompts", "model", "held-out", "reward"])
def test_an_iteration_is_not_gone_on_with_on_other_content(tmp_path, monkeypatch, what):
    iterating.write_inputs(tmp_path, prompts=12, held_out=4)
    (tmp_path / "own_reward.py").write_text("from text_rewards import low\n")
    monkeypatch.syspath_prepend(tmp_path)
    rewards = {"low": str(tmp_path / "own_reward.py") + ":low"}
    config = iterating.make(
        tmp_path, tmp_path / "run", rewards=rewards, iterations=[IterationConfig()], collect=collecting.SHAPE
    )
    first = iterate(config)
    assert iterate(config)["iterations"][0]["measured"] == first["iterations"][0]["measured"]
    if what == "reward":
        (tmp_path / "own_reward.py").write_text("from text_rewards import high as low\n")
    elif what == "held-out":
        path = Path(config.validation.prompts)
        path.write_text(path.read_text().replace('"prompt": "', '"prompt": "w5 '))
    else:
        edit(tmp_path, what)
    with pytest.raises(ValueError, match=r"was begun with|hold.* of another"):
        iterate(config)
    assert isinstance(config, IterateConfig)
