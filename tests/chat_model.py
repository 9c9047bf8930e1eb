"""A tiny random chat model for the tests of what a user types."""

from __future__ import annotations

from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from tiny_models import tiny_llama, tiny_tokenizer

TEMPLATE = "w1 {% for m in messages %}{{ m.content }} {% endfor %}{% if add_generation_prompt %}w2{% endif %}"


def chat_model() -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """A model and its tokenizer: prompts of the words w0, w1, ... between w1 and w2; token ids are 3 more."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tiny_llama(), tokenizer
