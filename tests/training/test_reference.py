"""The reference policy is one and the same wherever it is sampled from, whatever a generation config asks for."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from chat_model import chat_model
from mavis_logits.values.value_model import ValueModel
from mavis_training.base.prompts import encode_prompts
from mavis_training.collect import CollectConfig, collect
from mavis_training.measure.completions import complete
from mavis_training.measure.settings import steerings
from mavis_training.sampling.reference import Reference, require_trees_fit
from mavis_training.trees.data import LabelledTree
from mavis_training.trees.targets import node_targets
from mavis_training.trees.tree_store import TreeStore
from random_trees import random_tree, share_of_low
from tiny_models import tiny_llama

ROWS = [{"id": f"p{i}", "prompt": f"w{i} w{i + 9}"} for i in range(6)]
ASKED = [
    {"repetition_penalty": 5.0}, {"min_p": 0.5}, {"suppress_tokens": [10, 11, 12]}, {"no_repeat_ngram_size": 1},
    {"temperature": 0.1}, {"top_k": 1}, {"typical_p": 0.2}, {"forced_eos_token_id": 1}, {"min_new_tokens": 12},
    {"bad_words_ids": [[5], [6]]}, {"begin_suppress_tokens": [9]}, {"num_beams": 2}, {"eta_cutoff": 0.5},
]  # fmt: skip


def written(asked, steered=False):
    model, tokenizer = chat_model()
    for name, value in asked.items():
        setattr(model.generation_config, name, value)
    before = model.generation_config.to_dict()
    steering = None
    if steered:
        value = ValueModel.from_backbone(model, ["low"])
        steering = steerings({"x": {"beta": 1.0}}, {"low": value}, model, tokenizer)["x"]
    torch.manual_seed(0)
    done = complete(model, tokenizer, encode_prompts(ROWS, tokenizer, 99), 12, steering, 1)
    assert model.generation_config.to_dict() == before  # given back
    return done


@pytest.mark.parametrize("asked", ASKED, ids=lambda asked: next(iter(asked)))
def test_no_generation_config_changes_what_the_reference_writes(asked):
    plain, found = written({}), written(asked)
    assert found.texts == plain.texts
    assert found.log_ratios == [0.0] * len(ROWS)
    name, value = next(iter(asked.items()))
    assert found.reference["not_applied"][name] == value
    assert plain.reference["not_applied"] == {}


def test_what_is_not_applied_is_said(tmp_path, capsys):
    model, tokenizer = chat_model()
    model.generation_config.repetition_penalty = 1.1
    said = Reference.of(model, tokenizer).notice("org/model")
    assert "Not applied of its generation config" in said
    assert "repetition_penalty 1.1" in said
    model.generation_config.repetition_penalty = None
    assert Reference.of(model, tokenizer).notice("org/model") is None


def short_model():
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=chat_model()[0].config.vocab_size, n_positions=32, n_embd=16, n_layer=2, n_head=2, eos_token_id=1,
        bos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


@pytest.mark.parametrize("extra", [0, 1])
def test_prompts_that_leave_no_room_are_found_before_any_work(tmp_path, extra):
    _, tokenizer = chat_model()
    rows = [*ROWS, {"id": "long", "prompt": " ".join(["w1"] * (26 + extra))}]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = CollectConfig(
        str(tmp_path / "prompts.jsonl"), str(tmp_path / "trees"), max_new_tokens=6, layers=1, root_children=1,
        chat_template="none", device="cpu",
    )  # fmt: skip
    assert len(encode_prompts(rows, tokenizer, 99, "none")[-1]) == 26 + extra
    if not extra:
        assert len(collect(config, short_model(), tokenizer)) == len(rows)
        return
    with pytest.raises(ValueError, match=r"longer than the 32 tokens that the base model can read: long \(27\)"):
        collect(config, short_model(), tokenizer)
    assert not (tmp_path / "trees").exists() or not TreeStore.open(tmp_path / "trees").shards()


def test_trees_deeper_than_a_backbone_reads_are_refused():
    tree = random_tree(0)
    rewards = share_of_low(tree)[:, None]
    item = LabelledTree(tree, rewards, node_targets(tree, rewards))
    depth = len(tree.prompt_tokens) + int(tree.end().max())
    require_trees_fit([item], tiny_llama(max_position_embeddings=depth))
    with pytest.raises(ValueError, match=f"has {depth} tokens .* more than the {depth - 1}"):
        require_trees_fit([item], tiny_llama(max_position_embeddings=depth - 1))


def test_at_another_temperature_and_nucleus_that_is_the_reference():
    model, tokenizer = chat_model()
    value = ValueModel.from_backbone(model, ["low"])
    with torch.no_grad():
        value.head.weight.normal_()
    prompts = encode_prompts(ROWS, tokenizer, 99)
    settings = {"none": {"beta": 0.0, "top_k": 50}, "some": {"beta": 3.0, "top_k": 50}}
    made = steerings(settings, {"low": value}, model, tokenizer, plain=False)
    untilted, tilted = (complete(model, tokenizer, prompts, 12, made[name], 1, 0.5, 0.8) for name in settings)
    assert untilted.log_ratios == pytest.approx([0.0] * len(ROWS), abs=1e-4)
    assert sum(tilted.log_ratios) > 0.5
    assert tilted.reference["temperature"] == 0.5
    assert tilted.reference["top_p"] == 0.8
    cold = complete(model, tokenizer, prompts, 12, None, 1, temperature=1e-3)
    nucleus = complete(model, tokenizer, prompts, 12, None, 1, top_p=1e-6)
    batch = tokenizer.pad({"input_ids": prompts}, return_tensors="pt", padding_side="left")
    greedy = model.generate(**batch, do_sample=False, max_new_tokens=12)[:, batch["input_ids"].shape[1] :]
    assert cold.texts == nucleus.texts == tokenizer.batch_decode(greedy, skip_special_tokens=True)
