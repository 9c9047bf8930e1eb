"""Prompts to padded inputs and back."""

from __future__ import annotations

import pytest
import torch

from chat_model import chat_model
from mavis_logits.core.chat import answers, chat_inputs, encode_prompt


def test_prompts_are_user_turns_padded_on_the_left() -> None:
    _, tokenizer = chat_model()
    tokenizer.padding_side = "right"
    inputs = chat_inputs(tokenizer, ["w5 w6 w7", "w5"])
    assert inputs["input_ids"].tolist() == [[4, 8, 9, 10, 5], [0, 0, 4, 8, 5]]
    assert inputs["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]]


def test_answers_are_what_was_added() -> None:
    _, tokenizer = chat_model()
    output = torch.tensor([[4, 8, 5, 8, 9, 1], [4, 8, 5, 10, 1, 0]])
    assert answers(tokenizer, output, prompt_length=3) == ["w5 w6", "w7"]


@pytest.mark.parametrize(("prompts", "which"), [([], 0), ([""], 0), (["w5", " \n"], 1)])
def test_an_empty_prompt_is_refused(prompts: list[str], which: int) -> None:
    _, tokenizer = chat_model()
    with pytest.raises(ValueError, match=f"Prompt {which} is empty"):
        chat_inputs(tokenizer, prompts)


def test_a_prompt_is_a_turn_or_raw_text_or_a_conversation() -> None:
    _, tokenizer = chat_model()
    assert encode_prompt("w5 w6", tokenizer) == [4, 8, 9, 5]
    assert encode_prompt("w5 w6", tokenizer, "none") == [8, 9]
    turns = [
        {"role": "user", "content": "w5"},
        {"role": "assistant", "content": "w6"},
        {"role": "user", "content": "w7"},
    ]
    assert encode_prompt(turns, tokenizer) == [4, 8, 9, 10, 5]
    with pytest.raises(ValueError, match="several turns needs a chat template"):
        encode_prompt(turns, tokenizer, "none")
    tokenizer.chat_template = None
    assert encode_prompt("w5 w6", tokenizer) == [8, 9]
    assert chat_inputs(tokenizer, ["w5 w6", "w7"])["input_ids"].tolist() == [[8, 9], [0, 10]]
    with pytest.raises(ValueError, match="several turns needs a chat template"):
        encode_prompt(turns, tokenizer)
