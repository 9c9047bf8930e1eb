"""Tiny random models of every architecture that the tests cover."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from mavis_logits import ValueHead, ValueModel
from mavis_logits.values.words import Words
from tiny_models import tiny_tokenizer

VOCABULARY = 97
PAD, EOS = 0, 1
_COMMON = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "bos_token_id": 2, "eos_token_id": EOS}
_SHAPE = _COMMON | {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
ARCHITECTURES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_SHAPE)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**_COMMON, n_layer=2, n_head=4, n_embd=32, n_positions=512)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**_SHAPE)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**_SHAPE, head_dim=8)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**_SHAPE, sliding_window=4)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**_SHAPE, head_dim=8, sliding_window=4)),
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(**_SHAPE, head_dim=8, sliding_window=4, layer_types=["sliding_attention", "full_attention"])
    ),
    "bloom": lambda: BloomForCausalLM(BloomConfig(**_COMMON, n_layer=2, n_head=4, hidden_size=32)),
    "mamba": lambda: MambaForCausalLM(MambaConfig(**_COMMON, hidden_size=32, state_size=4, num_hidden_layers=2)),
}


def make_base(architecture: str = "llama", seed: int = 0) -> PreTrainedModel:
    """A random causal language model with spread-out logits."""
    torch.manual_seed(seed)
    model = ARCHITECTURES[architecture]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    return model


def make_value_model(
    *objectives: str, architecture: str = "llama", seed: int = 1, layers: int | None = None
) -> ValueModel:
    """A random value model, in made-up reward units."""
    base = make_base(architecture, seed)
    count = len(objectives or ("a",))
    model = ValueModel.from_backbone(
        base, objectives or ("a",), layers, reward_mean=[0.5] * count, reward_scale=[2.0] * count
    )
    with torch.no_grad():
        model.head.weight.normal_(std=0.5)
    return model


def make_head(
    base: PreTrainedModel, *objectives: str, seed: int = 2, layer: int | None = None, rank: int | None = None
) -> ValueHead:
    """A random value head for `base`."""
    torch.manual_seed(seed)
    head = ValueHead.for_model(base, objectives or ("a",), width=16, layer=layer, rank=rank).eval()
    if rank is not None:
        torch.nn.init.normal_(head.factors.weight)  # a new head's are 0
    return head


def make_words(base: PreTrainedModel, *objectives: str) -> Words:
    """Objectives in words, each an instruction of another length."""
    instructions = {name: " ".join(f"w{7 * i + j}" for j in range(2 + 3 * i)) for i, name in enumerate(objectives)}
    words = Words(instructions, tiny_tokenizer(), base)
    words.config.settings.clear()  # the paper's settings, as those of the others
    return words


def make_adapter(
    *objectives: str, seed: int, architecture: str = "llama", rank: int = 4, base_seed: int = 1, **lora: Any
) -> ValueModel:
    """A random adapter with a random head, not merged."""
    base = make_base(architecture, base_seed)
    targets = ["c_attn", "c_fc"] if architecture == "gpt2" else ["q_proj", "v_proj", "down_proj"]
    config = LoraConfig(r=rank, lora_alpha=8, target_modules=targets, **lora)
    count = len(objectives)
    model = ValueModel.from_backbone(
        base, objectives, lora=config, reward_mean=[0.5] * count, reward_scale=[float(seed)] * count
    )
    torch.manual_seed(seed)
    with torch.no_grad():
        model.head.weight.normal_(std=0.5)
        for name, parameter in model.backbone.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    return model.eval()


def functions(kind: str, base: PreTrainedModel) -> Any:
    """Value functions for objectives a and b: one "model", one "head", "heads" on two layers, "mixed", or "words"."""
    if kind == "words":
        return make_words(base, "a", "b")
    if kind == "words and head":
        return {"a": make_head(base, "a", layer=1), "b": make_words(base, "b")}
    if kind == "model":
        return make_value_model("a", "b")
    if kind == "head":
        return make_head(base, "a", "b")
    if kind == "heads":
        return {"a": make_head(base, "a"), "b": make_head(base, "b", seed=5, layer=1)}
    return {"a": make_head(base, "a"), "b": make_value_model("b")}
