"""What is tried with a type as the backbone of a value model: values, copies, checkpoints, adapters, training."""

from __future__ import annotations

import os
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from peft import LoraConfig
from torch import Tensor

from mavis_logits import MavisLogitsProcessor, MavisSampling, ValueModel
from mavis_training.fitting.value_trainer import value_loss
from mavis_training.trees.data import LabelledTree
from mavis_training.trees.packing import (
    node_examples,
    packed_inputs,
    plain_inputs,
    require_packable,
    term_inputs,
    tree_example,
)
from mavis_training.trees.targets import node_targets
from mavis_training.trees.tree import Tree
from model_twins import (
    BETA,
    GREEDY,
    STEPS,
    TOLERANCE,
    K,
    Nothing,
    Subject,
    Wrong,
    difference,
    forget,
    fresh_values,
    hold,
    prefixes,
)
from model_types import EOS, PAD, build


def _values_read(subject: Subject, model: ValueModel, sampling: bool = False, steps: int = STEPS) -> str:
    """Values that a value model gave along a tiny Llama's decoding, against those recomputed."""
    base = build("llama", 1, vocab_size=subject.vocabulary)
    worst = {"from scratch": 0.0}
    for inputs in (subject.prompts, subject.single):
        kind = MavisSampling if sampling else MavisLogitsProcessor
        mavis = kind(model, {"a": 1.0}, BETA, top_k=K, pad_token_id=PAD, eos_token_id=EOS, trace=True)
        use = {"custom_generate": mavis, "top_k": 0} if sampling else {"logits_processor": [mavis]}
        sequences = base.generate(**inputs, **use, **GREEDY | {"max_new_tokens": steps})
        for step, row, prefix in prefixes(inputs, sequences):
            traced = mavis.trace.steps[step]
            expected = fresh_values(model, prefix, traced.candidates[row])
            error = difference(traced.values[row, :, 0], expected) / max(1.0, float(expected.std()))
            worst["from scratch"] = max(worst["from scratch"], error)
            if error > TOLERANCE:
                cached = cached_values(model, prefix, int(inputs["attention_mask"][row].sum()), traced.candidates[row])
                error = difference(traced.values[row, :, 0], cached) / max(1.0, float(cached.std()))
                worst["cached"] = max(worst.get("cached", 0.0), error)
    if worst["from scratch"] <= TOLERANCE:
        return f"from scratch, off by {worst['from scratch']:.1g}"
    if worst["cached"] <= TOLERANCE:
        return f"cached, off by {worst['cached']:.1g} (from scratch: {worst['from scratch']:.1g})"
    raise Wrong("values off by " + ", ".join(f"{e:.2g} from those {n}" for n, e in worst.items()))


@torch.no_grad()
def cached_values(model: ValueModel, prefix: Tensor, prompt: int, candidates: Tensor) -> Tensor:
    """[k] values of the candidates as transformers decodes: the prompt, then token by token on its cache."""
    found = []
    for token in candidates:
        tokens = torch.cat([prefix, token[None]])[None]
        output = model(tokens[:, :prompt], use_cache=True)
        for at in range(prompt, tokens.shape[1]):
            mask = torch.ones(1, at + 1, dtype=torch.long)
            output = model(tokens[:, at : at + 1], mask, past_key_values=output.past_key_values, use_cache=True)
        found.append(output.values[0, -1, 0])
    return torch.stack(found)


def value(subject: Subject) -> str:
    return _values_read(subject, subject.own)


def value_sampling(subject: Subject) -> str:
    return _values_read(subject, subject.own, sampling=True)


def same_states(subject: Subject) -> str:
    """The copied backbone computes what the model computes."""
    model = subject.own
    ids = subject.single["input_ids"]
    with torch.no_grad():
        own = model.backbone(input_ids=ids).last_hidden_state
        output = subject.model(input_ids=ids, output_hidden_states=True)
    states = getattr(output, "hidden_states", None)
    if not states:
        raise Nothing("transformers gives no hidden states of this type")
    if states[-1].shape != own.shape:
        raise Nothing(f"its last hidden states are {list(states[-1].shape)}, the decoder's {list(own.shape)}")
    hold(difference(own, states[-1]) / float(own.std()), "last hidden states")
    return ""


@torch.no_grad()
def _apart(subject: Subject, model: ValueModel, other: ValueModel) -> float:
    """The largest difference of their values, in standard deviations of these."""
    worst = 0.0
    for ids in (subject.single["input_ids"], subject.prompts["input_ids"][:1]):
        forget(model)
        forget(other)
        mine, theirs = model(ids).values, other(ids).values
        worst = max(worst, difference(mine, theirs) / max(1.0, float(mine.std())))
    return worst


def _same_values(subject: Subject, model: ValueModel, other: ValueModel, tolerance: float = 1e-4) -> None:
    hold(_apart(subject, model, other), "values after loading", tolerance)


def reload(subject: Subject) -> None:
    model = subject.own
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        _same_values(subject, model, ValueModel.from_pretrained(folder))


def truncated(subject: Subject) -> str:
    model = subject.own_value_model(1)
    found = _values_read(subject, model, steps=2)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        _same_values(subject, model, ValueModel.from_pretrained(folder))
    return found


def lora(subject: Subject) -> None:
    """An adapter on every linear layer."""
    try:
        model = subject.own_value_model(lora=LoraConfig(r=2, target_modules="all-linear"))
        with torch.no_grad():
            model(subject.single["input_ids"])
    except Exception as error:
        if any(f"{os.sep}peft{os.sep}" in frame.filename for frame in traceback.extract_tb(error.__traceback__)[-2:]):
            raise Nothing(f"PEFT's LoRA does not fit: {' '.join(str(error).split())[:200]}") from error
        raise
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        _same_values(subject, model, ValueModel.from_pretrained(folder, backbone=subject.model, merge=False), TOLERANCE)
        noise = 4 * _noise(subject, model, ValueModel.from_pretrained(folder, backbone=subject.model, merge=False))
        merged = ValueModel.from_pretrained(folder, backbone=subject.model, merge=True)
        _same_values(subject, model, merged, max(10 * TOLERANCE, noise))  # merging rounds weights


@torch.no_grad()
def _noise(subject: Subject, model: ValueModel, twin: ValueModel) -> float:
    """How far the values move if all weights move in their last place: far, where layers run over and over."""
    generator = torch.Generator().manual_seed(5)
    for parameter in twin.backbone.parameters():
        ups = torch.randint(0, 2, parameter.shape, generator=generator) * 2 - 1
        parameter.mul_(1 + torch.finfo(parameter.dtype).eps * ups)
    return _apart(subject, model, twin)


def _tree() -> LabelledTree:
    """A prompt with two answers, of which one goes on in two ways; longer than every window."""
    rng = np.random.default_rng(0)
    lengths = np.array([3, 4, 3, 2])
    tree = Tree(
        prompt_id="p", prompt="p", prompt_tokens=rng.integers(3, 90, 7), tokens=rng.integers(3, 90, lengths.sum()),
        parent=np.array([-1, -1, 0, 0]), start=np.cumsum([0, *lengths[:-1]]), length=lengths,
        logp_gen=np.zeros(4), logp_ref=np.zeros(4), terminal=np.array([False, True, True, True]), columns={},
    )  # fmt: skip
    rewards = rng.normal(size=(3, 1))
    return LabelledTree(tree, rewards, node_targets(tree, rewards))


def _gradients(model: ValueModel, values: Tensor, examples: Any) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    terms = term_inputs(examples)
    value_loss(values, terms, torch.tensor([2.0])).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return values[terms["rows"], terms["terms"]].detach()[:, 0], found


def training(packed: bool) -> Callable[[Subject], str]:
    """Values and gradients of a batch of our making against those of every sequence alone."""

    def check(subject: Subject) -> str:
        model = subject.own.train()  # no dropout: tiny configurations have none
        try:
            return compare(model)
        finally:
            model.eval()

    def compare(model: ValueModel) -> str:
        item = _tree()
        kept = np.ones(len(item.tree), dtype=bool)
        nodes = node_examples(item, kept, True)
        alone = [model(torch.from_numpy(e.input_ids)[None]).values[0] for e in nodes]
        rows = torch.nn.utils.rnn.pad_sequence(alone, batch_first=True)
        values, gradients = _gradients(model, rows, nodes)
        if packed:
            windows = require_packable(model.backbone, "train it with packing: nodes")
            examples = [tree_example(item, kept, True)]
            inputs = packed_inputs(examples, windows, torch.float32)
        else:
            examples, inputs = nodes, plain_inputs(nodes)
        own, own_gradients = _gradients(model, model(**inputs).values, examples)
        order, own_order = _order(nodes), _order(examples)
        error = difference(own[own_order], values[order]) / max(1.0, float(values.std()))
        hold(error, "values")
        if own_gradients.keys() != gradients.keys():
            raise Wrong(f"other parameters have gradients: {sorted(own_gradients.keys() ^ gradients.keys())[:3]}")
        largest = max(float(g.abs().max()) for g in gradients.values())
        worst = max(difference(own_gradients[name], g) for name, g in gradients.items()) / largest
        hold(worst, "gradients (of the largest)")
        return f"values off by {error:.1g}, gradients by {worst:.1g}"

    return check


def _order(examples: Any) -> Tensor:
    """Terms of both forms in one order: by target, then by place in the text."""
    targets = np.concatenate([e.targets[:, 0] for e in examples])
    places = np.concatenate([e.position_ids[e.terms] for e in examples])
    return torch.from_numpy(np.lexsort((places, targets)))
