"""Tiny random tokenizers and models for the tests of `mavis_training`; nothing is downloaded."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, MambaConfig, MambaForCausalLM, PreTrainedTokenizerFast

from mavis_logits.backbone.fingerprint import tokenizer_fingerprint

WORDS = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(47))]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """50 words split at spaces."""
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


TOKENIZER = tokenizer_fingerprint(tiny_tokenizer())


def tiny_llama(layers: int = 2, seed: int = 0, **config) -> LlamaForCausalLM:
    """A Llama of width 16 over the words of `tiny_tokenizer`."""
    torch.manual_seed(seed)
    settings = {
        "vocab_size": len(WORDS),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": None,
        "initializer_range": 0.3,
    } | config
    model = LlamaForCausalLM(LlamaConfig(**settings)).eval()
    model.generation_config.pad_token_id = 0
    return model


def tiny_mamba() -> MambaForCausalLM:
    """A model with a recurrent state, of one layer, over the same words."""
    return MambaForCausalLM(MambaConfig(vocab_size=len(WORDS), hidden_size=16, state_size=4, num_hidden_layers=1))
