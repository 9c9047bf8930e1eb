from __future__ import annotations

import json
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

from mavis_training.rewards import compute_rewards, load_reward
from tiny_models import tiny_tokenizer


def count_words(prompts, completions):
    return [float(len(text.split())) for text in completions]


def by_rank(prompts, completions, rank, **columns):
    return [float(r) for r in rank]


@pytest.fixture
def classifier():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=1
    )
    return BertForSequenceClassification(config).eval()


@pytest.fixture
def saved(classifier, tmp_path):
    classifier.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def expected(classifier, *texts):
    with torch.inference_mode():
        return [
            classifier(**tiny_tokenizer()(*text, return_tensors="pt")).logits.item()
            for text in zip(*texts, strict=True)
        ]


def test_a_classifier_scores_pairs_in_order(classifier, saved):
    prompts, completions = ["w1 w2", "w3", "w4 w5 w6"], ["w7", "w8 w9 w1 w2", "w3 w3"]
    reward = load_reward(str(saved))
    assert reward(prompts, completions) == pytest.approx(expected(classifier, prompts, completions), abs=1e-5)


def test_reward_config_is_honoured(classifier, saved):
    settings = {"objective": "x", "pair": False, "max_length": 3, "mean": 0.5, "scale": 2.0}
    (saved / "reward_config.json").write_text(json.dumps(settings))
    raw = expected(classifier, ["w7 w8 w9", "w1"])
    reward = load_reward(str(saved))
    assert reward(["w1", "w2"], ["w7 w8 w9 w1", "w1"]) == pytest.approx([(r - 0.5) / 2 for r in raw], abs=1e-5)
    (saved / "reward_config.json").write_text('{"colour": 1}')
    with pytest.raises(ValueError, match="unknown keys"):
        load_reward(str(saved))


def test_an_adapter_is_merged_into_its_base(classifier, saved, tmp_path):
    lora = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"], init_lora_weights=False)
    model = get_peft_model(BertForSequenceClassification.from_pretrained(saved), lora).eval()
    model.peft_config["default"].base_model_name_or_path = str(saved)
    model.save_pretrained(tmp_path / "adapter")
    with torch.inference_mode():
        wanted = model(**tiny_tokenizer()("w1 w2", "w3", return_tensors="pt")).logits.item()
    assert load_reward(str(tmp_path / "adapter"))(["w1 w2"], ["w3"]) == pytest.approx([wanted], abs=1e-5)
    assert wanted != pytest.approx(expected(classifier, ["w1 w2"], ["w3"])[0], abs=1e-4)


def test_a_decoder_classifier_finds_the_last_token(tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=1
    )
    model = LlamaForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path)
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = "right"
    tokenizer.save_pretrained(tmp_path)
    reward = load_reward(str(tmp_path))
    single = [reward(["w1"], [text])[0] for text in ("w3 w4 w5", "w6")]
    assert reward(["w1", "w1"], ["w3 w4 w5", "w6"]) == pytest.approx(single, abs=1e-5)


def test_import_paths():
    assert load_reward("mavis_training.targets:stable_hash")
    for spec in ("mavis_training.nothing:f", "mavis_training.targets:nothing"):
        with pytest.raises(ValueError, match="cannot be imported"):
            load_reward(spec)
    with pytest.raises(ValueError, match="expected a function"):
        load_reward("mavis_training.files:TEMPORARY_SUFFIX")


def test_a_missing_model_is_a_clear_error(tmp_path):
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_reward(str(tmp_path / "nothing"))


def test_columns_go_where_they_are_wanted():
    columns = {"rank": [3, 4], "source": ["a", "b"]}
    assert compute_rewards(count_words, ["a", "b"], ["w", "w w"], columns, "count") == [1.0, 2.0]
    assert compute_rewards(by_rank, ["a", "b"], ["w", "w w"], columns, "rank") == [3.0, 4.0]


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1.0], "returned 1 numbers for 2 completions"),
        ([1.0, math.nan], "is nan for completion 1"),
        ([math.inf, 1.0], "is inf for completion 0"),
        ([None, 1.0], "is None for completion 0"),
    ],
)
def test_bad_rewards_are_refused(returned, message):
    with pytest.raises(ValueError, match=message):
        compute_rewards(lambda prompts, completions: returned, ["a", "b"], ["c", "d"], {}, "broken")


def test_several_labels_are_refused(saved):
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=3
    )
    BertForSequenceClassification(config).save_pretrained(saved)
    with pytest.raises(ValueError, match="has 3"):
        load_reward(str(saved))
