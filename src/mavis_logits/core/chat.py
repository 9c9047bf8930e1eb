"""Questions in, answers out: the two ends of `generate` for a chat model, or for one that goes on with raw text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, TypeAlias, cast

import torch
from transformers import BatchEncoding, PreTrainedTokenizerBase

Messages: TypeAlias = Sequence[Mapping[str, str]]
ChatTemplate: TypeAlias = Literal["auto", "none"]


def encode_prompt(
    prompt: str | Messages, tokenizer: PreTrainedTokenizerBase, chat_template: ChatTemplate = "auto"
) -> list[int]:
    """Token ids of one prompt as the base model is to read it, up to where its answer begins.

    Args:
        prompt: a text, or the turns of a conversation (`role` and `content` each) that ends with the user's.
        tokenizer: of the base model.
        chat_template: "auto": a text is one user turn of the tokenizer's chat template, or raw text if the tokenizer
            has none; "none": raw text.

    Raises:
        ValueError: a conversation, and no chat template to put it in.
    """
    if not isinstance(prompt, str):
        if tokenizer.chat_template is None or chat_template == "none":
            raise ValueError(
                "a prompt of several turns needs a chat template: give a tokenizer that has one and leave "
                "chat_template at 'auto', or write the prompt as one text"
            )
        messages = [dict(turn) for turn in prompt]
    elif tokenizer.chat_template is None or chat_template == "none":
        return cast(list[int], tokenizer(prompt)["input_ids"])
    else:
        messages = [{"role": "user", "content": prompt}]
    encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    return cast(list[int], cast(BatchEncoding, encoded)["input_ids"])


def chat_inputs(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> BatchEncoding:
    """Return `input_ids` and `attention_mask` [R, T], left-padded, that put each prompt as one user turn.

    Raises:
        ValueError: A prompt is empty.
    """
    empty = [index for index, prompt in enumerate(prompts) if not prompt.strip()]
    if empty or not prompts:
        raise ValueError(f"Prompt {empty[0] if empty else 0} is empty. Give each prompt at least one word.")
    rows = [{"input_ids": encode_prompt(prompt, tokenizer)} for prompt in prompts]
    return tokenizer.pad(rows, padding_side="left", return_tensors="pt")


def answers(tokenizer: PreTrainedTokenizerBase, output: torch.Tensor, prompt_length: int) -> list[str]:
    """Return the texts of what `generate` added to prompts of `prompt_length` tokens; `output` is [R, T + new]."""
    texts = tokenizer.batch_decode(output[:, prompt_length:], skip_special_tokens=True)
    return [text.strip() for text in texts]
