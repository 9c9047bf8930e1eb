from __future__ import annotations

import dataclasses
import errno
import math
import os

import numpy as np
import pytest

from mavis_logits.backbone.fingerprint import tokenizer_fingerprint
from mavis_training.label import LabelConfig, label
from mavis_training.trees.tree import leaf_texts
from mavis_training.trees.tree_store import StoreMetadata, TreeStore
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

    message = r"trees-00001.h5 could not be labelled for 'fragile' with test: .* gave 10 of 10 .* it is nan .*'p2'"
    with pytest.raises(ValueError, match=message):
        run(store, fragile=fails_on_the_second_shard)
    assert [shard.has_rewards("fragile") for shard in store.shards()] == [True, False]
    run(store, fragile=fails_on_the_second_shard)
    assert store.objectives() == ["fragile"]
    assert calls[1] == calls[2]
    assert len(calls) == 3


def test_a_reward_that_raises_half_way(store):
    calls = []

    def out_of_memory(prompts, completions):
        calls.append(prompts[0])
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return [1.0] * len(prompts)

    message = (
        r"trees-00001.h5 could not be labelled for 'big' with test: reward 'big' raised RuntimeError in out_of_memory, "
        r".*test_label.py, line \d+, of prompt 'p2': RuntimeError\('out of memory'\)\n"
        "The shards labelled before it are kept.*run the same command again"
    )
    with pytest.raises(ValueError, match=message) as raised:
        run(store, big=out_of_memory)
    assert isinstance(raised.value.__cause__, RuntimeError)
    assert [shard.has_rewards("big") for shard in store.shards()] == [True, False]
    run(store, big=out_of_memory)
    assert store.objectives() == ["big"]
    assert calls[1] == calls[2] != calls[0]


def test_a_full_disk_keeps_what_was_labelled(store, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match=r"reward-length.h5 could not be written \(No space"):
            run(store, length=length)
    assert not list(store.folder.glob("*reward*"))
    run(store, length=length)
    assert store.objectives() == ["length"]


def test_rewards_of_another_source_are_not_mixed_in(store):
    run(store, length=length)
    store.write([random_tree(3)])
    spec = {"model": "other", "label": 1}
    message = r"has rewards for 'length' from 'test', this run has .*other.*delete .*trees-\*.reward-length.h5"
    with pytest.raises(ValueError, match=message):
        label(LabelConfig(str(store.folder), {"length": spec}), {"length": length}, tiny_tokenizer())
    assert store.objectives() == []
    run(store, length=length)
    for path in store.folder.glob("trees-*.reward-length.h5"):  # as the message says
        path.unlink()
    label(LabelConfig(str(store.folder), {"length": spec}), {"length": length}, tiny_tokenizer())
    assert store.objectives() == ["length"]
    assert store.shards()[0].reward_source("length") == '{"label": 1, "model": "other"}'


def test_a_column_that_not_all_prompts_have(store):
    store.write([dataclasses.replace(random_tree(3), columns={})])
    with pytest.raises(ValueError, match=r"trees-00002.h5 .*'length' needs \['rank'\]"):
        run(store, length=length)
    assert [shard.has_rewards("length") for shard in store.shards()] == [True, True, False]


def test_another_tokenizer_is_refused(store):
    other = tiny_tokenizer()
    other.add_tokens(["extra"])
    config = LabelConfig(str(store.folder), {"length": "test"})
    with pytest.raises(ValueError, match="use the same tokenizer"):
        label(config, rewards={"length": length}, tokenizer=other)


def test_no_rewards_is_an_error():
    with pytest.raises(ValueError, match="at least one objective"):
        LabelConfig("store", {})
    with pytest.raises(ValueError, match="unknown key 'lable'"):
        LabelConfig("store", {"a": {"model": "b", "lable": 1}})


def test_every_objective_needs_a_function(store):
    with pytest.raises(ValueError, match=r"rewards has \['b'\], and none for \['a'\]"):
        label(LabelConfig(str(store.folder), {"a": "test"}), {"b": length}, tiny_tokenizer())
