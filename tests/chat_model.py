"""A tiny random chat model for the tests of what a user types."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from mavis_logits.values.value_head import ValueHead
from tiny_models import tiny_llama, tiny_tokenizer

TEMPLATE = "w1 {% for m in messages %}{{ m.content }} {% endfor %}{% if add_generation_prompt %}w2{% endif %}"


def chat_model() -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """A model and its tokenizer: prompts of the words w0, w1, ... between w1 and w2; token ids are 3 more."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tiny_llama(), tokenizer


def save_random_adapter(folder: Path, seed: int, rank: int = 2, std: float = 0.3) -> None:
    """An adapter of the chat model that does something, in `folder`."""
    torch.manual_seed(seed)
    adapter = get_peft_model(chat_model()[0], LoraConfig(r=rank, lora_alpha=8, target_modules="all-linear"))
    for parameter in adapter.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=std)
    adapter.save_pretrained(folder)


def save_chat_and_head(folder: Path) -> None:
    """The chat model in `folder / "chat"`, and a head of it that says something of "ones" and "twos" in "head"."""
    model, tokenizer = chat_model()
    model.save_pretrained(folder / "chat")
    tokenizer.save_pretrained(folder / "chat")
    torch.manual_seed(0)
    head = ValueHead.for_model(model, ["ones", "twos"], width=16)
    torch.nn.init.normal_(head.out.weight)
    head.save_pretrained(folder / "head")
