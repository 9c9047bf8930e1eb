from __future__ import annotations

import math

import numpy as np
import pytest

from mavis_logits.fingerprint import tokenizer_fingerprint
from mavis_training.label import LabelConfig, label, leaf_texts
from mavis_training.tree_store import StoreMetadata, TreeStore
from random_trees import random_tree
from tiny_models import tiny_tokenizer


@pytest.fixture
def store(tmp_path):
    metadata = StoreMetadata("tiny", tokenizer_fingerprint(tiny_tokenizer()), {"max_new_tokens": 12})
    store = TreeStore.create(tmp_path / "store", metadata)
    store.write([random_tree(0), random_tree(1)])
    store.write([random_tree(2)])
    return store


def length(prompts, completions, rank, **columns):
    return [len(text.split()) + 100 * r for text, r in zip(completions, rank, strict=True)]


def run(store, **rewards):
    config = LabelConfig(str(store.folder), dict.fromkeys(rewards, "test"))
    return label(config, rewards=rewards, tokenizer=tiny_tokenizer())


def test_every_leaf_gets_the_reward_of_its_text(store):
    run(store, length=length, negative=lambda prompts, completions: [-1.0] * len(prompts))
    assert store.objectives() == ["length", "negative"]
    for tree, rewards in store.labelled(["length", "negative"]):
        texts = leaf_texts(tree, tiny_tokenizer())
        assert len(texts) == len(tree.leaves())
        wanted = [len(text.split()) + 100 * tree.columns["rank"] for text in texts]
        np.testing.assert_array_equal(rewards, np.stack([wanted, np.full(len(wanted), -1.0)], axis=1))


def test_done_work_is_kept_and_not_repeated(store):
    calls = []

    def fails_on_the_second_shard(prompts, completions):
        calls.append(prompts[0])
        return [math.nan if len(calls) == 2 else 1.0] * len(prompts)

    with pytest.raises(ValueError, match="is nan"):
        run(store, fragile=fails_on_the_second_shard)
    assert [shard.has_rewards("fragile") for shard in store.shards()] == [True, False]
    run(store, fragile=fails_on_the_second_shard)
    assert store.objectives() == ["fragile"]
    assert calls[1] == calls[2]
    assert len(calls) == 3


def test_another_tokenizer_is_refused(store):
    other = tiny_tokenizer()
    other.add_tokens(["extra"])
    config = LabelConfig(str(store.folder), {"length": "test"})
    with pytest.raises(ValueError, match="use the same tokenizer"):
        label(config, rewards={"length": length}, tokenizer=other)


def test_no_rewards_is_an_error():
    with pytest.raises(ValueError, match="at least one objective"):
        LabelConfig("store", {})
