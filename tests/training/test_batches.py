from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mavis_logits.backbone import Backbone
from mavis_logits.values.value_model import ValueModel
from mavis_training.fitting.batches import Collator, GroupedBatches, ReadingSet, TrainingSet, collect_values
from mavis_training.trees.data import LabelledTree
from mavis_training.trees.packing import pack
from mavis_training.trees.targets import kept_nodes, node_targets
from random_trees import random_tree
from tiny_models import tiny_llama

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=40)


def labelled(seed):
    tree = random_tree(seed)
    rewards = np.random.default_rng(seed).normal(size=(len(tree.leaves()), 2))
    return LabelledTree(tree, rewards, node_targets(tree, rewards))


def value_model():
    model = ValueModel.from_backbone(tiny_llama(), objectives=["a", "b"])
    torch.manual_seed(0)
    torch.nn.init.normal_(model.head.weight)
    return model


@given(LENGTHS, st.integers(1, 120), st.integers(0, 5))
def test_an_epoch_has_every_sequence_once_within_the_budget(lengths, tokens, epoch):
    batches = GroupedBatches(lengths, tokens=tokens)
    batches.set_epoch(epoch)
    dealt = list(batches)
    assert sorted(index for batch in dealt for index in batch) == list(range(len(lengths)))
    assert len(dealt) == len(batches)
    for batch in dealt:
        padded = max(lengths[i] for i in batch) * len(batch)
        assert padded <= tokens or len(batch) == 1


@given(LENGTHS, st.integers(1, 10), st.integers(1, 120))
def test_both_limits_hold_and_batches_are_no_smaller_than_they_must_be(lengths, sequences, tokens):
    dealt = list(GroupedBatches(lengths, tokens, sequences, seed=None))
    assert max(map(len, dealt)) <= sequences
    assert [lengths[i] for batch in dealt for i in batch] == sorted(lengths)
    for batch, following in pairwise(dealt):
        longest = lengths[following[0]]
        assert len(batch) == sequences or longest * (len(batch) + 1) > tokens


def test_epochs_differ_in_order_and_repeat_by_their_number():
    batches = GroupedBatches([5] * 8 + [7] * 8, tokens=14)
    first = list(batches)
    batches.set_epoch(1)
    second = list(batches)
    batches.set_epoch(0)
    assert first == list(batches)
    assert first != second


@pytest.mark.parametrize("limits", [{}, {"tokens": 0}, {"tokens": 8, "sequences": -1}])
def test_batches_without_a_limit_are_refused(limits):
    with pytest.raises(ValueError, match="needs a limit of at least 1"):
        GroupedBatches([3], **limits)


@pytest.mark.parametrize("every_token", [False, True])
@pytest.mark.parametrize("packing", ["trees", "nodes"])
def test_lengths_are_those_of_the_sequences(packing, every_token):
    trees = [labelled(seed) for seed in range(4)]
    kept = [kept_nodes(item.tree, 0.5, 0) for item in trees]
    sequences = TrainingSet(trees, kept, packing, every_token)
    assert [len(sequences[i].input_ids) for i in range(len(sequences))] == sequences.lengths
    assert len(sequences) == (4 if packing == "trees" else sum(1 + k.sum() for k in kept))


def test_a_packed_tree_leaves_out_what_no_term_needs():
    item = labelled(3)
    everything = np.ones(len(item.tree), dtype=bool)
    inner = everything.copy()
    inner[item.tree.leaves()] = False
    whole, pruned = (TrainingSet([item], [kept]).lengths[0] for kept in (everything, inner))
    assert whole - pruned == item.tree.length[item.tree.leaves()].sum()
    first_leaf = np.zeros(len(item.tree), dtype=bool)
    first_leaf[item.tree.leaves()[0]] = True
    path = item.tree.path(int(item.tree.leaves()[0]))
    expected = len(item.tree.prompt_tokens) + item.tree.length[path].sum()
    assert TrainingSet([item], [first_leaf]).lengths == [expected]


def test_readings_of_either_kind_give_every_tokens_value():
    trees = [labelled(seed) for seed in range(5)]
    model = value_model()
    found = {}
    for packing in ("trees", "nodes"):
        readings = ReadingSet(trees, packing)
        collator = Collator(Backbone.of(model.backbone).windows, model.dtype, packing)
        starts = torch.from_numpy(np.cumsum(readings.sizes) - readings.sizes)
        into, count = torch.zeros(int(readings.sizes.sum()), 2), torch.zeros(int(readings.sizes.sum()))
        for batch in GroupedBatches(readings.lengths, tokens=200, seed=None):
            inputs = collator.readings([readings[i] for i in batch])
            where = {name: inputs.pop(name) for name in ("trees", "places")}
            with torch.inference_mode():
                collect_values(model(**inputs).values, where, starts, into, count)
        assert count.min() == 1 or packing == "nodes"
        found[packing] = into / count[:, None]
    assert readings.sizes.tolist() == [len(pack(item.tree)) for item in trees]
    torch.testing.assert_close(found["trees"], found["nodes"], rtol=1e-4, atol=1e-5)
