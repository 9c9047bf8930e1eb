from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from transformers import GPT2Config, GPT2LMHeadModel, MambaConfig, MambaModel, Qwen2Config, Qwen2ForCausalLM

from mavis_logits.backbone import Backbone
from mavis_logits.values.value_model import ValueModel
from mavis_training.fitting.value_trainer import value_loss
from mavis_training.trees.data import LabelledTree
from mavis_training.trees.packing import (
    node_examples,
    pack,
    packed_inputs,
    plain_inputs,
    require_packable,
    term_inputs,
    tree_example,
)
from mavis_training.trees.targets import kept_nodes, node_targets
from random_trees import random_tree
from rare_models import RARE, make
from tiny import ARCHITECTURES
from tiny_models import tiny_llama

UNPACKED = {"bart", "bloom", "gpt_neo", "mamba", "mpt", "openai-gpt", "qwen3_next"}
SCALE = torch.tensor([0.7, 1.9])


def value_model(backbone):
    model = ValueModel.from_backbone(backbone, objectives=["a", "b"], reward_mean=[0.1, 0.2], reward_scale=[0.7, 1.9])
    torch.manual_seed(1)
    torch.nn.init.normal_(model.head.weight)
    return model


def backbones():
    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(
        GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=64, initializer_range=0.3)
    )
    sliding = Qwen2Config(
        vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, use_sliding_window=True, sliding_window=4, max_window_layers=1, initializer_range=0.3,
    )  # fmt: skip
    return {"llama": tiny_llama(), "gpt2": gpt2.eval(), "sliding": Qwen2ForCausalLM(sliding).eval()}


def labelled(seed, layers=3):
    tree = random_tree(seed, layers=layers)
    rewards = np.random.default_rng(1).normal(size=(len(tree.leaves()), 2))
    return LabelledTree(tree, rewards, node_targets(tree, rewards))


@given(st.integers(0, 10_000))
def test_the_layout_spells_every_path(seed):
    tree = random_tree(seed)
    layout = pack(tree)
    visible = layout.visible()
    for node in range(len(tree)):
        whole = np.concatenate([tree.prompt_tokens, tree.completion(node)])
        seen = np.flatnonzero(visible[layout.last[node]])
        np.testing.assert_array_equal(layout.input_ids[seen], whole)
        np.testing.assert_array_equal(layout.position_ids[seen], np.arange(len(whole)))
        walked, at = [], layout.last[node]
        while at >= len(tree.prompt_tokens):
            walked.append(at)
            at = layout.previous[at - len(tree.prompt_tokens)]
        np.testing.assert_array_equal([*range(len(tree.prompt_tokens)), *walked[::-1]], seen)


@pytest.mark.parametrize("every_token", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "sliding"])
def test_packed_loss_and_gradients_equal_one_sequence_per_node(kind, attention, every_token):
    items = [labelled(seed) for seed in range(3)]
    prepared = [(item, kept_nodes(item.tree, 0.5, 0), every_token) for item in items]
    packed = [tree_example(*parts) for parts in prepared]
    plain = [example for parts in prepared for example in node_examples(*parts)]
    assert sum(len(e.terms) for e in packed) == sum(len(e.terms) for e in plain)

    model = value_model(backbones()[kind])
    model.backbone.set_attn_implementation(attention)
    assert_same_loss_and_gradients(model, packed, plain)


@pytest.mark.parametrize("architecture", sorted(set(ARCHITECTURES) | set(RARE)))
def test_every_family_is_packed_right_or_not_at_all(architecture):
    """MPT and GPT-Neo accept a packed tree and give other gradients: those are told apart by trial."""
    model = value_model(make(architecture))
    trees = Backbone.of(model.backbone).trees
    if trees.kind != "packed":
        assert architecture in UNPACKED
        with pytest.raises(ValueError, match=r"cannot read a packed tree .*: set packing"):
            require_packable(model.backbone, "set packing to 'nodes'")
        return
    assert architecture not in UNPACKED
    item = labelled(1, layers=4)
    parts = (item, kept_nodes(item.tree, 0.5, 0), True)
    assert_same_loss_and_gradients(model, [tree_example(*parts)], node_examples(*parts))


@settings(max_examples=15, deadline=None)
@given(
    seeds=st.lists(st.integers(0, 10_000), min_size=1, max_size=3),
    drop_leaves=st.sampled_from([0.0, 0.5, 1.0]),
    every_token=st.booleans(),
    rank=st.sampled_from([0, 4]),
)
def test_packed_loss_and_gradients_equal_for_any_trees_terms_and_weights(seeds, drop_leaves, every_token, rank):
    items = [labelled(seed, layers=1 + seed % 4) for seed in seeds]
    prepared = [(item, kept_nodes(item.tree, drop_leaves, 0), every_token) for item in items]
    packed = [tree_example(*parts) for parts in prepared]
    plain = [example for parts in prepared for example in node_examples(*parts)]
    assert sum(len(e.input_ids) for e in packed) <= sum(len(e.input_ids) for e in plain)
    model = value_model(tiny_llama())
    if rank:
        model.add_lora(LoraConfig(r=rank, target_modules="all-linear", init_lora_weights=False))
        model.eval()
    assert_same_loss_and_gradients(model, packed, plain)


def assert_same_loss_and_gradients(model, packed, plain):
    """Of a batch of whole trees and of one of a sequence per node."""
    found = []
    for inputs, examples in (
        (packed_inputs(packed, Backbone.of(model.backbone).windows, torch.float32), packed),
        (plain_inputs(plain), plain),
    ):
        model.zero_grad()
        loss = value_loss(model(**inputs).values, term_inputs(examples), SCALE)
        loss.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        found.append((loss.item(), gradients))
    (loss, gradients), (twin, twins) = found
    assert loss == pytest.approx(twin, rel=1e-5)
    assert gradients.keys() == twins.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, twins[name], rtol=1e-3, atol=1e-4)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 4))
def test_values_at_every_token_are_those_of_its_path(seed, layers):
    tree = random_tree(seed, layers=layers)
    layout = pack(tree)
    model = value_model(tiny_llama()).double()  # in which rounding is no excuse
    with torch.inference_mode():
        values = model(**packed_inputs([layout], Backbone.of(model.backbone).windows, torch.float64)).values[0]
        for leaf in tree.leaves():
            seen = np.flatnonzero(layout.visible()[layout.last[leaf]])
            alone = model(torch.from_numpy(layout.input_ids[seen])[None]).values[0]
            torch.testing.assert_close(values[seen], alone, rtol=1e-4, atol=1e-5)


def test_refusals():
    tree = random_tree(0)
    tree.prompt_tokens = tree.prompt_tokens[:0]
    with pytest.raises(ValueError, match="empty prompt"):
        pack(tree)
    mamba = MambaModel(MambaConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1))
    with pytest.raises(ValueError, match=r"MambaModel cannot .* tree \(.*recurrent state.*\): choose another"):
        require_packable(mamba, "choose another")
