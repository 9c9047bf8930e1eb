"""Questions in, answers out: the two ends of `generate` for a chat model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from transformers import BatchEncoding, PreTrainedTokenizerBase


def chat_inputs(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> BatchEncoding:
    """Return `input_ids` and `attention_mask` [R, T], left-padded, that put each prompt as one user turn.

    Raises:
        ValueError: A prompt is empty.
    """
    empty = [index for index, prompt in enumerate(prompts) if not prompt.strip()]
    if empty or not prompts:
        raise ValueError(f"Prompt {empty[0] if empty else 0} is empty. Give each prompt at least one word.")
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    encoded = tokenizer.apply_chat_template(
        chats,
        add_generation_prompt=True,
        padding=True,
        return_tensors="pt",
        return_dict=True,
        tokenizer_kwargs={"padding_side": "left"},
    )
    return cast(BatchEncoding, encoded)


def answers(tokenizer: PreTrainedTokenizerBase, output: torch.Tensor, prompt_length: int) -> list[str]:
    """Return the texts of what `generate` added to prompts of `prompt_length` tokens; `output` is [R, T + new]."""
    texts = tokenizer.batch_decode(output[:, prompt_length:], skip_special_tokens=True)
    return [text.strip() for text in texts]
