from __future__ import annotations

import dataclasses
import subprocess
import sys
import textwrap

import h5py
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mavis_training.trees.sample import Sample
from mavis_training.trees.tree_store import FORMAT_VERSION, StoreMetadata, Tree, TreeStore
from random_trees import random_tree


def metadata(**changes) -> StoreMetadata:
    fields = {"model": "tiny", "tokenizer_fingerprint": "abc", "sampling": {"max_new_tokens": 12, "seed": 0}} | changes
    return StoreMetadata(**fields)


@given(st.integers(0, 10_000), st.integers(1, 4))
def test_paths_partition_the_tree(seed, layers):
    tree = random_tree(seed, layers=layers)
    leaves = tree.leaves()
    assert tree.terminal[leaves].all()
    assert tree.terminal.sum() == len(leaves)
    assert set().union(*(tree.path(leaf) for leaf in leaves)) == set(range(len(tree)))
    for node in range(len(tree)):
        assert tree.path(node)[-1] == node
        assert tree.parent[tree.path(node)[0]] == -1
        assert len(tree.completion(node)) == tree.end()[node]
        for child in tree.children(node):
            assert np.array_equal(tree.completion(child)[: tree.end()[node]], tree.completion(node))
    assert len(tree.completion(-1)) == 0
    assert tree.path(-1) == []


@given(st.integers(0, 10_000), st.integers(1, 4), st.integers(1, 6), st.integers(0, 3))
def test_some_answers_of_a_tree_are_as_they_were(seed, layers, answers, more):
    tree = random_tree(seed, layers=layers)
    sample = Sample(answers=answers)
    thin, chosen = sample.thin(tree), sample.leaves(tree)
    assert len(chosen) == len(thin.leaves()) == min(answers, len(tree.leaves()))
    for number, leaf in zip(chosen, thin.leaves(), strict=True):
        whole = tree.leaves()[number]
        assert np.array_equal(thin.completion(leaf), tree.completion(whole))
        for one, other in zip(thin.path(leaf), tree.path(whole), strict=True):
            assert thin.logp_ref[one] == tree.logp_ref[other]
    tops = {thin.path(leaf)[0] for leaf in thin.leaves()}
    assert len(tops) == min(answers, int((tree.parent == -1).sum()))
    assert set(chosen) <= set(Sample(answers=answers + more).leaves(tree))


def test_a_sample_of_a_store_has_the_rewards_of_its_answers(tmp_path):
    store = TreeStore.create(tmp_path, metadata())
    for part in (range(5), range(5, 9)):
        shard = store.write([random_tree(seed) for seed in part])
        trees = shard.trees()
        shard.write_rewards("a", [np.arange(len(t.leaves())) + 100.0 * int(t.prompt_id[1:]) for t in trees], "test")
    some = store.sampled(trees=6, answers=2)
    labelled = list(some.labelled(["a"]))
    assert len(labelled) == len(some) == 6
    assert len(store) == 9
    for tree, rewards in labelled:
        whole = next(other for other in store if other.prompt_id == tree.prompt_id)
        for leaf, reward in zip(tree.leaves(), rewards[:, 0], strict=True):
            number = int(reward - 100 * int(tree.prompt_id[1:]))
            assert np.array_equal(whole.completion(whole.leaves()[number]), tree.completion(leaf))
    assert some.prompt_ids() < store.sampled(trees=7, answers=2).prompt_ids()
    assert store.sampled(None, None) is store
    for wrong in ({"trees": 1, "answers": None}, {"trees": None, "answers": 0}):
        with pytest.raises(ValueError, match="must be at least"):
            store.sampled(**wrong)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parent": [1, -1]}, "parents come first"),
        ({"parent": [-1, 0], "terminal": [True, True]}, "terminal node has children"),
        ({"length": [2, 3]}, "outside the tree's 4"),
        ({"length": [2]}, "one length"),
    ],
)
def test_a_malformed_tree_is_refused(change, message):
    fields = {
        "parent": [-1, 0],
        "start": [0, 2],
        "length": [2, 2],
        "logp_gen": [0, 0],
        "logp_ref": [0, 0],
        "terminal": [False, True],
    }
    Tree("p", "x", [1], [1, 2, 3, 4], **fields)
    with pytest.raises(ValueError, match=message):
        Tree("p", "x", [1], [1, 2, 3, 4], **(fields | change))


def test_store_round_trip_and_resume(tmp_path):
    trees = [random_tree(i) for i in range(5)]
    store = TreeStore.create(tmp_path, metadata())
    assert len(store) == 0
    assert store.objectives() == []
    store.write(trees[:2])
    assert store.write([]) is None
    again = TreeStore.create(tmp_path, metadata(created="later", versions={"torch": "9"}))
    again.write(trees[2:])
    assert list(TreeStore.open(tmp_path)) == trees
    assert len(again) == 5
    assert again.prompt_ids() == {t.prompt_id for t in trees}


def test_rewards_lie_beside_the_trees(tmp_path):
    store = TreeStore.create(tmp_path, metadata())
    trees = [random_tree(i) for i in range(4)]
    first, second = store.write(trees[:3]), store.write(trees[3:])
    before = first.path.read_bytes()
    rewards = [np.arange(len(t.leaves()), dtype=float) + i for i, t in enumerate(trees)]
    first.write_rewards("helpful", rewards[:3], source="test")
    assert store.objectives() == []
    with pytest.raises(ValueError, match=r"trees-00001.h5 has no rewards for 'helpful'"):
        store.rewards("helpful")
    second.write_rewards("helpful", rewards[3:], source="test")
    assert store.objectives() == ["helpful"]
    assert first.path.read_bytes() == before
    assert (first.reward_source("helpful"), first.reward_source("funny")) == ("test", None)
    for (tree, labels), expected_tree, expected in zip(
        store.labelled(["helpful", "helpful"]), trees, rewards, strict=True
    ):
        assert tree == expected_tree
        assert np.array_equal(labels, np.stack([expected, expected], axis=1))


def test_bad_rewards_are_refused(tmp_path):
    store = TreeStore.create(tmp_path, metadata())
    tree = random_tree(0)
    shard = store.write([tree])
    good = np.zeros(len(tree.leaves()))
    with pytest.raises(ValueError, match="expected"):
        shard.write_rewards("helpful", [good[1:]], source="test")
    with pytest.raises(ValueError, match="1 rewards that are NaN or infinite"):
        shard.write_rewards("helpful", [np.where(np.arange(len(good)) == 1, np.nan, good)], source="test")
    with pytest.raises(ValueError, match="file name"):
        shard.write_rewards("../x", [good], source="test")
    assert not store.objectives()
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"model": "other"}, "model"),
        ({"tokenizer_fingerprint": "zzz"}, "tokenizer_fingerprint"),
        ({"sampling": {"max_new_tokens": 12, "seed": 1}}, "sampling"),
        ({"policy": {"beta": 5.0}}, "policy"),
        ({"weights_fingerprint": "b"}, "weights_fingerprint"),
    ],
)
def test_other_settings_need_another_folder(tmp_path, change, field):
    TreeStore.create(tmp_path, metadata(weights_fingerprint="a"))
    with pytest.raises(ValueError, match=f"begun with {field} ="):
        TreeStore.create(tmp_path, metadata(**change))


def test_another_tokenizer_is_refused(tmp_path):
    TreeStore.create(tmp_path, metadata())
    assert len(TreeStore.open(tmp_path, tokenizer_fingerprint="abc")) == 0
    with pytest.raises(ValueError, match="tokenizer abc, but the tokenizer given is xyz"):
        TreeStore.open(tmp_path, tokenizer_fingerprint="xyz")


def test_another_base_model_is_refused(tmp_path):
    TreeStore.create(tmp_path / "known", metadata(weights_fingerprint="a"))
    for right in ("a", None):
        assert len(TreeStore.open(tmp_path / "known", weights_fingerprint=right)) == 0
    with pytest.raises(ValueError, match="sampled from tiny with weights a, but the base model given has weights b"):
        TreeStore.open(tmp_path / "known", weights_fingerprint="b")
    old = TreeStore.create(tmp_path / "old", metadata())
    assert len(TreeStore.open(old.folder, weights_fingerprint="b")) == 0  # a store of before fingerprints were kept
    assert len(TreeStore.create(old.folder, metadata(weights_fingerprint="b"))) == 0


def test_no_store(tmp_path):
    with pytest.raises(FileNotFoundError, match="mavis collect"):
        TreeStore.open(tmp_path)
    (tmp_path / "metadata.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        TreeStore.open(tmp_path)
    (tmp_path / "metadata.json").write_text('{"format_version": 1, "colour": 1}')
    with pytest.raises(ValueError, match="not the metadata of a tree store"):
        TreeStore.open(tmp_path)


def test_newer_formats_are_refused(tmp_path):
    store = TreeStore.create(tmp_path, metadata())
    shard = store.write([random_tree(0)])
    with h5py.File(shard.path, "r+") as file:
        file.attrs["format_version"] = FORMAT_VERSION + 1
    with pytest.raises(ValueError, match="upgrade it"):
        list(store)
    shard.path.unlink()
    shard = store.write([random_tree(0)])
    shard.write_rewards("helpful", [np.zeros(len(random_tree(0).leaves()))], source="test")
    with h5py.File(shard.reward_path("helpful"), "r+") as file:
        file.attrs["format_version"] = FORMAT_VERSION + 1
    for read in (shard.rewards, shard.reward_source):
        with pytest.raises(ValueError, match=rf"reward-helpful.h5 has format_version {FORMAT_VERSION + 1}.*upgrade it"):
            read("helpful")
    assert list(store) == [random_tree(0)]
    with pytest.raises(ValueError, match="upgrade it"):
        TreeStore.create(tmp_path / "other", dataclasses.replace(metadata(), format_version=FORMAT_VERSION + 1))


@given(st.floats(0.05, 0.95), st.booleans())
def test_a_damaged_shard_is_an_error_or_harmless(tmp_path_factory, where, truncate):
    store = TreeStore.create(tmp_path_factory.mktemp("store"), metadata())
    trees = [random_tree(i) for i in range(3)]
    shard = store.write(trees)
    content = bytearray(shard.path.read_bytes())
    at = int(len(content) * where)
    shard.path.write_bytes(content[:at] if truncate else content[:at] + bytes([content[at] ^ 0xFF]) + content[at + 1 :])
    try:
        read = list(store)
    except OSError as error:
        message = str(error)
    else:
        message = "" if truncate or read != trees else "truncated or corrupt"
    assert "truncated or corrupt" in message


def test_a_killed_writer_loses_only_what_was_in_flight(tmp_path):
    script = """
        import os, sys
        from random_trees import random_tree
        from mavis_training.tree_store import StoreMetadata, TreeStore

        store = TreeStore.create(sys.argv[1], StoreMetadata("tiny", "abc", {"max_new_tokens": 12, "seed": 0}))
        store.write([random_tree(0)])
        def die(source, target):
            os.kill(os.getpid(), 9)
        os.replace = die
        store.write([random_tree(1)])
    """
    paths = [p for p in sys.path if p]
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)], env={"PYTHONPATH": ":".join(paths)}
    )
    assert run.returncode == -9
    assert list(tmp_path.glob("*.tmp"))
    assert list(TreeStore.open(tmp_path)) == [random_tree(0)]
    store = TreeStore.create(tmp_path, metadata())
    assert not list(tmp_path.glob("*.tmp"))
    store.write([random_tree(1)])
    assert list(store) == [random_tree(0), random_tree(1)]


def stored(folder, trees, size=2):
    store = TreeStore.create(folder, metadata())
    for number in range(0, len(trees), size):
        store.write(trees[number : number + size])
    return store


def named(count):
    return [dataclasses.replace(random_tree(seed), prompt_id=f"p{seed}") for seed in range(count)]


def test_packing_keeps_every_tree_in_fewer_bytes(tmp_path):
    trees = named(21)
    store = stored(tmp_path, trees)
    before = sum(shard.path.stat().st_size for shard in store.shards())
    planned = [next(store.free_numbers())]  # by a collection that is running
    store.pack(8)
    assert sorted(len(shard.trees()) for shard in store.shards()) == [1, 2, 2, 8, 8]
    assert planned[0] not in store._numbers()
    store.pack(8, rest=True)
    assert sorted(len(shard.trees()) for shard in store.shards()) == [5, 8, 8]
    found = {tree.prompt_id: tree for tree in store}
    assert len(store) == len(found) == 21
    for tree in trees:
        assert np.array_equal(found[tree.prompt_id].tokens, tree.tokens)
    assert sum(shard.path.stat().st_size for shard in store.shards()) < before / 2
    files = {shard.path.name for shard in store.shards()}
    store.pack(8, rest=True)  # nothing is left to do
    assert {shard.path.name for shard in store.shards()} == files


@pytest.mark.parametrize("rest", [False, True])
def test_a_packing_that_was_killed_goes_on(tmp_path, monkeypatch, rest):
    size = 20 if rest else 4
    store = stored(tmp_path, named(10))
    monkeypatch.setattr(type(store.shards()[0].path), "unlink", lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        store.pack(size, rest)
    assert len(store) == (20 if rest else 14)  # what was packed is there twice
    monkeypatch.undo()
    store.pack(size, rest)
    assert len(store) == len(store.prompt_ids()) == 10


def test_packing_leaves_labelled_shards_alone(tmp_path):
    store = stored(tmp_path, named(6))
    shard = store.shards()[0]
    shard.write_rewards("a", [np.arange(float(len(tree.leaves()))) for tree in shard.trees()], "by hand")
    store.pack(4, rest=True)
    assert shard in store.shards()
    assert len(shard.rewards("a")) == len(shard.trees())
    assert len(store) == 6
    assert len(store.shards()) == 2
