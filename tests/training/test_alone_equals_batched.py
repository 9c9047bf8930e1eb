"""A law: what a text is worth does not depend on the batch that it is read in."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from mavis_training.rewards.classifier import ClassifierReward, ClassifierSettings
from tiny_models import WORDS, tiny_tokenizer

PROMPTS = ["w1", "w2 w3 w4", "w5", "w6 w7"]
COMPLETIONS = ["w8 w9 w10 w11 w12", "w13", "w14 w15", "w16 w17 w18"]
SHAPE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def llama(**ids):
    return LlamaForSequenceClassification(
        LlamaConfig(vocab_size=len(WORDS), intermediate_size=32, num_labels=1, initializer_range=0.3, **SHAPE, **ids)
    )


CLASSIFIERS = {
    "decoder": lambda: llama(pad_token_id=0),
    "decoder without a padding token": lambda: llama(pad_token_id=None),
    "decoder whose padding is its end": lambda: llama(pad_token_id=1, eos_token_id=1),
    "decoder whose padding is of another vocabulary": lambda: llama(pad_token_id=None, eos_token_id=1),
    "gpt2": lambda: GPT2ForSequenceClassification(
        GPT2Config(vocab_size=len(WORDS), n_embd=16, n_layer=2, n_head=2, num_labels=1, initializer_range=0.3,
                   bos_token_id=1, eos_token_id=1)
    ),
    "encoder": lambda: BertForSequenceClassification(
        BertConfig(vocab_size=len(WORDS), intermediate_size=32, num_labels=1, initializer_range=0.3, **SHAPE)
    ),
}  # fmt: skip


@pytest.mark.parametrize("padding", ["own", "none", "end", "left"])
@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_a_classifier_scores_every_text_alone_as_in_a_batch(kind, padding):
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    if padding == "none":
        tokenizer.pad_token = None
    elif padding == "end":
        tokenizer.pad_token = tokenizer.eos_token
    elif padding == "left":
        tokenizer.padding_side = "left"
    reward = ClassifierReward(CLASSIFIERS[kind](), tokenizer, ClassifierSettings())
    alone = [reward([p], [c])[0] for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    assert torch.tensor(alone).std() > 1e-3
    assert reward(PROMPTS, COMPLETIONS) == pytest.approx(alone, abs=1e-5)
    assert reward(PROMPTS[::-1], COMPLETIONS[::-1]) == pytest.approx(alone[::-1], abs=1e-5)
