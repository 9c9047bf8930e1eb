"""Rewards by TRL's convention, tried with its owner: ours in TRL's trainers, TRL's in our commands."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForSequenceClassification
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from mavis_logits.core.rewards import compute_rewards
from mavis_training.label import label_trees
from mavis_training.rewards.classifier import ClassifierReward, ClassifierSettings
from mavis_training.rewards.load import load_reward
from random_trees import random_tree
from tiny_models import WORDS, tiny_llama, tiny_tokenizer

TURNS = "{% for m in messages %}w{{ m.role | length }} {{ m.content }} {% endfor %}"
CHAT = TURNS + "{% if add_generation_prompt %}w9{% endif %}"
PROMPTS = ["w1 w2", "w3", "w4 w5 w6", "w7"]


def classifier(**config: Any) -> LlamaForSequenceClassification:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    settings = {"vocab_size": len(WORDS), "pad_token_id": 0, "num_labels": 1, "initializer_range": 0.5} | shape | config
    return LlamaForSequenceClassification(LlamaConfig(**settings)).eval()


def turn(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


@pytest.mark.parametrize("conversational", [False, True], ids=["texts", "conversations"])
@pytest.mark.parametrize(
    ("trainer_class", "config_class"), [(GRPOTrainer, GRPOConfig), (RLOOTrainer, RLOOConfig)], ids=["grpo", "rloo"]
)
def test_rewards_of_this_package_work_in_the_trainers_that_call_them(
    tmp_path: Path, trainer_class: Any, config_class: Any, conversational: bool
) -> None:
    tokenizer = tiny_tokenizer()
    if conversational:
        tokenizer.chat_template = CHAT
    classifier().save_pretrained(tmp_path / "judge")
    tokenizer.save_pretrained(tmp_path / "judge")
    rewards = [
        load_reward(str(tmp_path / "judge")),
        ClassifierReward(
            classifier(num_labels=2), tokenizer, ClassifierSettings(label=1, template="{rank} {completion}")
        ),
    ]
    calls: list[tuple[Any, ...]] = []

    def record(prompts: Any, completions: Any, rank: Any, **rest: Any) -> list[float]:
        calls.append((prompts, completions, rank))
        return [0.0] * len(completions)

    rows = [{"prompt": [turn("user", p)] if conversational else p, "rank": f"w{i}"} for i, p in enumerate(PROMPTS)]
    config = config_class(
        str(tmp_path / "run"), max_steps=1, per_device_train_batch_size=4, num_generations=2, max_completion_length=4,
        logging_steps=1, report_to="none", use_cpu=True, save_strategy="no", disable_tqdm=True, beta=0.0,
    )  # fmt: skip
    trainer = trainer_class(
        model=tiny_llama(), reward_funcs=[*rewards, record], args=config, train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    ((prompts, completions, rank),) = calls
    assert isinstance(prompts[0], list) is conversational
    logged = trainer.state.log_history[0]
    for name, reward in (("judge", rewards[0]), ("ClassifierReward[1]", rewards[1])):
        alone = [reward([p], [c], rank=[r])[0] for p, c, r in zip(prompts, completions, rank, strict=True)]
        assert logged[f"rewards/{name}/mean"] == pytest.approx(np.mean(alone), abs=1e-4)
        assert np.std(alone) > 0


def test_a_conversation_is_read_by_the_template_as_a_whole() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT
    reward = ClassifierReward(classifier(), tokenizer)
    prompt = [turn("system", "w20"), turn("user", "w1"), turn("assistant", "w2"), turn("user", "w3")]
    with torch.inference_mode():
        text = "w6 w20 w4 w1 w9 w2 w4 w3 w9 w5"
        wanted = reward.model(**tokenizer(text, return_tensors="pt")).logits.item()
    assert reward([prompt], [[turn("assistant", "w5")]]) == pytest.approx([wanted], abs=1e-5)
    assert reward(["w3"], ["w5"]) == reward([[turn("user", "w3")]], [[turn("assistant", "w5")]])


def test_without_a_template_the_last_words_of_both_are_read() -> None:
    reward = ClassifierReward(classifier(), tiny_tokenizer())
    prompt = [turn("user", "w9"), turn("assistant", "w8"), turn("user", [{"type": "text", "text": "w1 w2"}])]
    answer = [turn("assistant", "w3"), turn("tool", "w30"), turn("assistant", "w4")]
    assert reward([prompt], [answer]) == reward(["w1 w2"], ["w3\nw4"])
    assert reward([prompt], [[turn("assistant", None)]]) == reward(["w1 w2"], [""])


def test_what_is_no_column_is_not_looked_at_and_what_the_template_names_is_checked() -> None:
    reward = ClassifierReward(classifier(), tiny_tokenizer(), ClassifierSettings(template="{post} {completion}"))
    plain = reward(["w1", "w2"], ["w3", "w4 w5"], post=["w6", "w7"])
    odd = {"trainer_state": object(), "log_extra": print, "environments": [], "scores": np.ones((7, 2))}
    assert reward(["w1", "w2"], ["w3", "w4 w5"], post=np.array(["w6", "w7"]), **odd) == plain
    for post, message in (
        (["w6"], "a list of as many in 'post', got list of 1"),
        (object(), "got object"),
        ("w6", "str"),
    ):
        with pytest.raises(ValueError, match=message):
            reward(["w1", "w2"], ["w3", "w4"], post=post)


def test_a_tokenizer_that_the_policy_uses_too_stays_as_it_is() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token, tokenizer.padding_side, tokenizer.truncation_side = None, "left", "left"
    ClassifierReward(classifier(), tokenizer)(["w1", "w2 w3"], ["w4", "w5"])
    assert (tokenizer.pad_token, tokenizer.padding_side, tokenizer.truncation_side) == (None, "left", "left")


@pytest.mark.parametrize("of_tokenizer", [None, "<eos>", "<pad>"])
@pytest.mark.parametrize("of_model", [None, 0, 2])
def test_a_reward_does_not_depend_on_what_it_is_batched_with(of_model: int | None, of_tokenizer: str | None) -> None:
    """Whichever padding tokens a decoder classifier and its tokenizer name, and whether they agree."""
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = of_tokenizer
    reward = ClassifierReward(classifier(pad_token_id=of_model), tokenizer)
    alone = [reward(["w1"], [text])[0] for text in ("w3 w4 w5", "w6")]
    assert reward(["w1", "w1"], ["w3 w4 w5", "w6"]) == pytest.approx(alone, abs=1e-5)


def test_without_any_token_to_pad_with_the_way_out_is_named() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"set tokenizer\.pad_token"):
        ClassifierReward(classifier(pad_token_id=None), tokenizer)
    tokenizer.pad_token = "w40"
    assert len(ClassifierReward(classifier(pad_token_id=None), tokenizer)(["w1", "w2"], ["w3", "w4 w5"])) == 2


def test_a_reward_can_be_copied_and_sent_to_another_process() -> None:
    """TRL's asynchronous trainers pickle reward functions, `datasets.map` hashes them."""
    reward = ClassifierReward(classifier(), tiny_tokenizer(), name="judge")
    wanted = reward(PROMPTS, ["w8"] * 4)
    for again in (copy.deepcopy(reward), pickle.loads(pickle.dumps(reward))):
        assert (again(PROMPTS, ["w8"] * 4), again.__name__) == (wanted, "judge")


def overlong(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    """As TRL's `get_soft_overlong_punishment`, by token ids alone."""
    return [float(len(ids)) for ids in completion_ids]


def logs(completions: list[str], log_extra: Any, log_metric: Any) -> list[float]:
    log_extra("length", [len(text) for text in completions])
    log_metric("mean", 0.5)
    return [1.0] * len(completions)


def test_functions_written_for_trl_label_trees() -> None:
    trl_rewards = pytest.importorskip("trl.rewards")
    trees = [random_tree(seed) for seed in range(2)]
    lengths = [[len(tree.completion(leaf)) for leaf in tree.leaves()] for tree in trees]
    found = label_trees(trees, overlong, "length", tiny_tokenizer())
    assert [list(rewards) for rewards in found] == lengths
    longest = max(map(max, lengths))
    punish = trl_rewards.get_soft_overlong_punishment(max_completion_len=longest, soft_punish_cache=longest - 1)
    punished = label_trees(trees, punish, "short", tiny_tokenizer())
    assert [list(rewards) for rewards in punished] == [
        [0.0 if n <= 1 else (1 - n) / (longest - 1) for n in row] for row in lengths
    ]
    assert compute_rewards(logs, ["a"], ["b"], {}, "logs") == [1.0]


def test_what_only_a_trainer_knows_is_asked_for_by_name() -> None:
    def by_step(completions: list[str], trainer_state: Any) -> list[float]:
        return [trainer_state.global_step] * len(completions)

    with pytest.raises(ValueError, match=r"'by_step' needs \['trainer_state'\]"):
        compute_rewards(by_step, ["a"], ["b"], {}, "by_step")
