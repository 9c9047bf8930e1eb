"""What does not belong together is refused before any work, and leaves what was there as it was."""

from __future__ import annotations

import pytest

from collecting import config as collect_config
from collecting import write_inputs
from mavis_training.collect import collect
from mavis_training.label import LabelConfig, label
from mavis_training.train_head import TrainHeadConfig, train_head
from mavis_training.train_model import LoraSettings, TrainModelConfig, train_model
from mavis_training.trees.data import load_trees, split_by_prompt
from mavis_training.trees.tree_store import TreeStore
from tiny_models import tiny_llama, tiny_tokenizer

REWARDS = {"low": "text_rewards:low"}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model, another one of the same tokenizer, prompts, and a labelled store of the first one's trees."""
    folder = tmp_path_factory.mktemp("files")
    write_inputs(folder, 6)
    tiny_llama(seed=1).save_pretrained(folder / "other")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(folder / "other")
    collect(collect_config(folder, "trees"))
    label(LabelConfig(str(folder / "trees"), REWARDS))
    return folder


@pytest.fixture
def unchanged(files):
    """Every file of the store is, after the test, what it was before."""

    def content():
        return {path.name: path.read_bytes() for path in (files / "trees").iterdir()}

    before = content()
    yield files
    assert content() == before


def test_a_store_is_not_gone_on_with_by_another_model(unchanged):
    with pytest.raises(ValueError, match=r"trees was begun with model = .*model', this run has .*other'"):
        collect(collect_config(unchanged, "trees", model=str(unchanged / "other")))


def test_nor_by_other_weights_of_the_same_name(unchanged):
    model = tiny_llama(seed=2)
    model.config.name_or_path = str(unchanged / "model")
    with pytest.raises(ValueError, match="begun with weights_fingerprint"):
        collect(collect_config(unchanged, "trees"), model, tiny_tokenizer())


def test_a_head_is_not_trained_on_the_trees_of_another_model(unchanged, tmp_path):
    config = TrainHeadConfig(
        str(unchanged / "trees"), ["low"], str(tmp_path / "head"), str(unchanged / "other"), validation_share=0.5
    )
    with pytest.raises(ValueError, match=r"sampled from .*model with weights .* the base model given has weights"):
        train_head(config)
    assert not (tmp_path / "head").exists()


def test_stores_of_two_models_are_not_trained_on_together(unchanged):
    collect(collect_config(unchanged, "others", model=str(unchanged / "other")))
    label(LabelConfig(str(unchanged / "others"), REWARDS))
    stores = [str(unchanged / "trees"), str(unchanged / "others")]
    with pytest.raises(ValueError, match="cannot be trained on together: their model differ"):
        load_trees(stores, ["low"], 0.0)


def test_a_store_is_not_labelled_with_another_tokenizer(unchanged, tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["more"])
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="use the same tokenizer, or collect new trees"):
        label(LabelConfig(str(unchanged / "trees"), {"high": "text_rewards:high"}, str(tmp_path)))


def test_an_empty_split_says_what_to_do(unchanged, tmp_path):
    _, trees = load_trees(str(unchanged / "trees"), ["low"], 0.0)
    for share, sides in ((0.0, "6 for training and 0 for validation"), (1.0, "0 for training and 6 for validation")):
        with pytest.raises(ValueError, match=f"{sides} at validation_share {share}: collect more trees or change"):
            split_by_prompt(trees, share)
    config = TrainModelConfig(
        str(unchanged / "trees"), ["low"], str(tmp_path / "model"), backbone=str(unchanged / "model"),
        lora=LoraSettings(0), validation_share=0.0, device="cpu",
    )  # fmt: skip
    with pytest.raises(ValueError, match="0 for validation"):
        train_model(config)
    assert not (tmp_path / "model").exists()


def test_an_empty_store_says_what_to_do(files):
    source = TreeStore.open(files / "trees")
    empty = TreeStore.create(files / "empty", source.metadata)
    with pytest.raises(ValueError, match="has no trees yet: run `mavis collect`"):
        load_trees(str(empty.folder), ["low"], 0.0)
    label(LabelConfig(str(empty.folder), REWARDS))
    assert list(empty.folder.glob("*.h5")) == []
