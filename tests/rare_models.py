"""Tiny random models of families that are read in other ways than most, beside those of `tiny`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import (
    BartConfig,
    BartForCausalLM,
    BertConfig,
    BertLMHeadModel,
    CLIPVisionConfig,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MptConfig,
    MptForCausalLM,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from tiny import ARCHITECTURES, PAD, VOCABULARY, make_base

SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
IDS = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "bos_token_id": 2, "eos_token_id": 1}
VISION = CLIPVisionConfig(**(SHAPE | {"num_hidden_layers": 3}), image_size=8, patch_size=4)
RARE: dict[str, Callable[[], PreTrainedModel]] = {
    "mpt": lambda: MptForCausalLM(MptConfig(**IDS, d_model=32, n_heads=4, n_layers=2, max_seq_len=256)),
    "gpt_neo": lambda: GPTNeoForCausalLM(
        GPTNeoConfig(**IDS, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]])
    ),
    "openai-gpt": lambda: OpenAIGPTLMHeadModel(
        OpenAIGPTConfig(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=128)
    ),
    "opt": lambda: OPTForCausalLM(OPTConfig(**IDS, **SHAPE, ffn_dim=48, word_embed_proj_dim=32)),
    "bert": lambda: BertLMHeadModel(BertConfig(**IDS, **SHAPE, is_decoder=True)),
    "bart": lambda: BartForCausalLM(
        BartConfig(**IDS, d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=48)
    ),
    "llava": lambda: LlavaForConditionalGeneration(
        LlavaConfig(vision_config=VISION, text_config=LlamaConfig(**IDS, **SHAPE), image_token_index=96)
    ),
    "qwen3_next": lambda: Qwen3NextForCausalLM(
        Qwen3NextConfig(
            **IDS,
            **SHAPE,
            num_key_value_heads=2,
            head_dim=8,
            num_experts=2,
            num_experts_per_tok=1,
            layer_types=["linear_attention", "full_attention"],
            linear_num_value_heads=2,
            linear_num_key_heads=2,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
        )
    ),
}


def make(architecture: str, scale: float = 0.3) -> PreTrainedModel:
    """A model of any family here or in `tiny`, its matrices of standard deviation `scale`."""
    if architecture in ARCHITECTURES:
        return make_base(architecture)
    torch.manual_seed(0)
    model = RARE[architecture]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=scale)
    return model
