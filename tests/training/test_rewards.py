from __future__ import annotations

import asyncio
import json
import math
import re

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

from mavis_training.rewards.load import compute_rewards, describe_spec, load_reward
from tiny_models import tiny_llama, tiny_tokenizer


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
    with pytest.raises(ValueError, match=r"reward_config.json of .* has the unknown key 'colour': known are pair"):
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
    assert load_reward("mavis_training.trees.targets:stable_hash")
    for spec in ("mavis_training.nothing:f", "mavis_training.trees.targets:nothing"):
        with pytest.raises(ValueError, match="cannot be imported"):
            load_reward(spec)
    with pytest.raises(ValueError, match="expected a function"):
        load_reward("mavis_training.base.files:TEMPORARY_SUFFIX")


def test_a_missing_model_is_a_clear_error(tmp_path):
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_reward(str(tmp_path / "nothing"))


def test_columns_go_where_they_are_wanted():
    columns = {"rank": [3, 4], "source": ["a", "b"]}
    assert compute_rewards(count_words, ["a", "b"], ["w", "w w"], columns, "count") == [1.0, 2.0]
    assert compute_rewards(by_rank, ["a", "b"], ["w", "w w"], columns, "rank") == [3.0, 4.0]


def test_functions_of_trl_are_called_as_trl_calls_them():
    def without_prompts(completions, **kwargs):
        return torch.tensor([[len(text)] for text in completions]) + len(kwargs["prompts"])

    async def waits(completions, rank, scale=2):
        await asyncio.sleep(0)
        return np.array(rank) * scale

    assert compute_rewards(without_prompts, ["a", "b"], ["w", "w w"], {}, "f") == [3.0, 5.0]
    assert compute_rewards(waits, ["a", "b"], ["w", "w w"], {"rank": [3, 4]}, "f") == [6.0, 8.0]

    async def in_a_notebook():
        return compute_rewards(waits, ["a"], ["w"], {"rank": [1]}, "f")

    assert asyncio.run(in_a_notebook()) == [2.0]


def test_a_missing_column_is_a_clear_error():
    with pytest.raises(ValueError, match=r"'rank' needs \['rank'\], there are \['completions', 'prompts', 'source'\]"):
        compute_rewards(by_rank, ["a"], ["w"], {"source": ["x"]}, "rank")


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1.0], "returned 1 numbers for 2 completions"),
        ([1.0, math.nan], r"gave 1 of 2 completions no finite number: it is nan for completion 1 \(prompt 'q'\)"),
        ([math.inf, -math.inf], r"gave 2 of 2 completions .* it is inf for completion 0 \(prompt 'p'\)"),
        ([None, 1.0], r"it is None for completion 0 \(prompt 'p'\). A function of TRL may return None"),
        (["7", 1.0], "it is 7 for completion 0"),
        (None, "returned NoneType, expected a list of numbers"),
        (1.0, "returned float, expected a list of numbers"),
    ],
)
def test_bad_rewards_are_refused(returned, message):
    with pytest.raises(ValueError, match=message):
        compute_rewards(lambda prompts, completions: returned, ["a", "b"], ["c", "d"], {}, "broken", ["p", "q"])


def many_labels(folder, names, **config):
    """Save a classifier with a label for each of `names`; returns it."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)}, initializer_range=1.0,
    )  # fmt: skip
    model = BertForSequenceClassification(config).eval()
    model.save_pretrained(folder)
    return model


def logits(model, *texts):
    with torch.inference_mode():
        return model(**tiny_tokenizer()(*texts, return_tensors="pt")).logits[0]


def test_one_of_several_labels(saved):
    model = many_labels(saved, ["Hallucinated", "Faithful"])
    wanted = logits(model, "w1 w2", "w3")
    for label in (1, "Faithful"):
        reward = load_reward({"model": str(saved), "label": label})
        assert reward(["w1 w2"], ["w3"]) == pytest.approx([wanted[1].item()], abs=1e-5)
    probability = load_reward({"model": str(saved), "label": 0, "output": "probability"})
    assert probability(["w1 w2"], ["w3"]) == pytest.approx([wanted.softmax(0)[0].item()], abs=1e-5)
    for spec, message in (
        (str(saved), "has 2 labels and no label is given. Set label: to one of 0 ('Hallucinated'), 1 ('Faithful')"),
        ({"model": str(saved), "label": "Funny"}, "the label given is 'Funny'"),
        ({"model": str(saved), "label": 2}, "the label given is 2"),
        ({"model": str(saved), "label": True}, "the label given is True"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            load_reward(spec)


def test_probability_of_a_single_label(classifier, saved):
    (saved / "reward_config.json").write_text('{"pair": false, "mean": 1.0}')
    spec = {"model": str(saved), "output": "probability", "mean": 0.25}  # it goes before the file
    wanted = 1 / (1 + math.exp(-expected(classifier, ["w7 w8"])[0])) - 0.25
    assert load_reward(spec)(["w1"], ["w7 w8"]) == pytest.approx([wanted], abs=1e-6)


def test_templates(saved):
    model = many_labels(saved, ["one"])
    prompts, completions = ["w1 w2", "w9"], ["w3", "w4 w5"]

    def score(template, **settings):
        reward = load_reward({"model": str(saved), "template": template, **settings})
        return reward(prompts, completions, story=["w6", "w7"])

    def wanted(*pairs):
        return pytest.approx([logits(model, *texts).item() for texts in pairs], abs=1e-5)

    assert score("w8 {prompt} w8 {completion}") == wanted(["w8 w1 w2 w8 w3"], ["w8 w9 w8 w4 w5"])
    assert score(["{completion}", "{story}"]) == wanted(["w3", "w6"], ["w4 w5", "w7"])
    assert score("{prompt} {completion}", max_length=2) == wanted(["w2 w3"], ["w4 w5"])  # the completion is kept
    assert score("{completion} {prompt}", max_length=2) == wanted(["w3 w1"], ["w4 w5"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"template": "{prompt}"}, r"must hold \{completion\}.* it has \['prompt'\]"),
        ({"template": "{completion.__class__}"}, "only {prompt} and names of other columns"),
        ({"template": "{completion} {"}, "double the braces"),
        ({"template": ["{completion}"] * 3}, "a list of two"),
        ({"output": "logits"}, "must be 'logit' or 'probability', got 'logits'"),
        ({"scale": 0}, "must not be 0"),
        ({"batch_size": 0}, "batch_size of a reward must be at least 1"),
        ({"lable": 1}, "unknown key 'lable': did you mean 'label'"),
        ({"model": None}, "a reward needs model:"),
        ({"model": "text_rewards:low", "label": 1}, "is a function: it takes no settings such as 'label'"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_loaded(settings, message):
    with pytest.raises(ValueError, match=message):
        load_reward({"model": "nothing/there"} | settings)


def test_a_column_that_the_template_lacks(saved):
    reward = load_reward({"model": str(saved), "template": "{story} {completion}"})
    with pytest.raises(ValueError, match=r"needs the columns \['story'\], the prompts have \['completion', 'prompt'\]"):
        reward(["w1"], ["w2"])


def test_a_model_that_is_no_classifier_is_refused(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no trained classifier: its weights lack score\.weight"):
        load_reward({"model": str(tmp_path), "label": 0})


def test_two_specs_that_mean_the_same_are_described_alike():
    assert describe_spec({"model": "a/b"}) == describe_spec("a/b") == "a/b"
    one, two = {"model": "a/b", "label": 1, "mean": 2.0}, {"mean": 2.0, "model": "a/b", "label": 1}
    assert describe_spec(one) == describe_spec(two) != describe_spec(one | {"label": 0})


def test_a_tokenizer_without_padding(tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=1
    )
    LlamaForSequenceClassification(config).eval().save_pretrained(tmp_path)
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    reward = load_reward(str(tmp_path))
    single = [reward(["w1"], [text])[0] for text in ("w3 w4 w5", "w6")]
    assert reward(["w1", "w1"], ["w3 w4 w5", "w6"]) == pytest.approx(single, abs=1e-5)
