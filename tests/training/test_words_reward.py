"""A reward in words against the value function in words: their sums along a completion are the same."""

from __future__ import annotations

import pytest
import torch

from chat_model import chat_model
from mavis_logits.core.chat import encode_prompt
from mavis_logits.testing import recompute_words
from mavis_logits.values.words import Words
from mavis_training.fit.config import FitConfig
from mavis_training.rewards.load import describe_spec, load_reward, reward_digest, split_spec
from mavis_training.rewards.words import WordsReward

JOKE = "w5 w6"


@pytest.fixture(scope="module")
def chat():
    return chat_model()


def test_it_is_the_sum_of_the_values_along_the_completion(chat):
    model, tokenizer = chat
    prompts = ["w7 w8 w9", "w1", "w20 w21"]
    completions = [[12, 13, 40, 1], [30], [9, 9, 9]]
    texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
    found = WordsReward(JOKE, model, tokenizer)(prompts, texts, completion_ids=completions)
    words = Words({"joke": JOKE}, tokenizer, model)
    for prompt, completion, value in zip(prompts, completions, found, strict=True):
        ids = encode_prompt(prompt, tokenizer)
        steps = [
            recompute_words(words, model, ids + completion[:t], torch.tensor([token]))
            for t, token in enumerate(completion)
        ]
        assert value == pytest.approx(float(torch.cat(steps).sum()), abs=1e-4)


def test_texts_without_ids_and_conversations_are_read_too(chat):
    reward = WordsReward(JOKE, *chat)
    turns = [
        {"role": "user", "content": "w3"},
        {"role": "assistant", "content": "w4"},
        {"role": "user", "content": "w1"},
    ]
    plain, longer = reward(["w1", "w1"], ["w12 w13"] * 2, conversation=[None, turns])
    assert plain != longer
    ids = chat[1]("w12 w13")["input_ids"]
    assert reward(["w1"], ["w12 w13"], completion_ids=[ids]) == [pytest.approx(plain, abs=1e-4)]
    assert reward(["w1"], [""], completion_ids=[[]]) == [0.0]


def test_it_is_named_with_the_model_that_reads_it(chat, tmp_path):
    for part in chat:
        part.save_pretrained(tmp_path / "chat")
    spec = {"words": JOKE, "model": str(tmp_path / "chat")}
    assert load_reward(spec)(["w1"], ["w12"]) == pytest.approx(WordsReward(JOKE, *chat)(["w1"], ["w12"]))
    assert describe_spec(spec) != describe_spec(spec | {"words": "w7"})
    assert reward_digest(spec) == reward_digest(spec | {"words": "w7"})  # that of the model; the words are in the spec
    fit = FitConfig(prompts="prompts.txt", rewards={"joke": f"words:{JOKE}"}, output="out", model=spec["model"])
    assert fit.rewards == {"joke": spec}
    with pytest.raises(ValueError, match="give a mapping of words and model"):
        split_spec(f"words:{JOKE}")
    with pytest.raises(ValueError, match="needs words, an instruction, and model"):
        split_spec({"words": " ", "model": "x"})
    with pytest.raises(ValueError, match="no 'label'"):
        split_spec({"words": "w1", "model": "x", "label": 1})
