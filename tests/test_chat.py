"""Prompts to padded inputs and back."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mavis_logits.demo.chat import answers, chat_inputs

WORDS = ["<pad>", "<end>", "user:", "assistant:", "hello", "you", "there"]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<end>", chat_template=template, padding_side="right"
    )


def test_prompts_are_user_turns_padded_on_the_left(tokenizer: PreTrainedTokenizerFast) -> None:
    inputs = chat_inputs(tokenizer, ["hello you there", "hello"])
    assert inputs["input_ids"].tolist() == [[2, 4, 5, 6, 3], [0, 0, 2, 4, 3]]
    assert inputs["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]]


def test_answers_are_what_was_added(tokenizer: PreTrainedTokenizerFast) -> None:
    output = torch.tensor([[2, 4, 3, 4, 5, 1], [2, 4, 3, 6, 1, 0]])
    assert answers(tokenizer, output, prompt_length=3) == ["hello you", "there"]


@pytest.mark.parametrize(("prompts", "which"), [([], 0), ([""], 0), (["hello", " \n"], 1)])
def test_an_empty_prompt_is_refused(tokenizer: PreTrainedTokenizerFast, prompts: list[str], which: int) -> None:
    with pytest.raises(ValueError, match=f"Prompt {which} is empty"):
        chat_inputs(tokenizer, prompts)
