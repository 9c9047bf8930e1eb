"""The whole path on a tiny model: collect, label, train a head and a model, steer with them, measure, write cards."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

import text_rewards
from chat_model import chat_model
from mavis_logits.values.words import Words
from mavis_training import collect as collect_module
from mavis_training import evaluate as evaluate_module
from mavis_training.base.likelihoods import log_likelihoods
from mavis_training.base.prompts import encode_prompts
from mavis_training.cards import CardConfig, write_card
from mavis_training.collect import CollectConfig, collect
from mavis_training.evaluate import EvaluateConfig, evaluate
from mavis_training.label import LabelConfig, label
from mavis_training.train_head import TrainHeadConfig, train_head
from mavis_training.train_model import LoraSettings, TrainModelConfig, train_model

REWARDS = {"low": "text_rewards:low", "high": "text_rewards:high"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with prompts, labelled trees, a head for both objectives, and a value model for `low`."""
    folder = tmp_path_factory.mktemp("runs")
    base, tokenizer = chat_model()
    rows = [{"id": f"p{i}", "prompt": f"w{i % 40} w{i * 7 % 40}", "kind": "test"} for i in range(60)]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    store = str(folder / "trees")
    sampling = {"max_new_tokens": 10, "layers": 2, "root_children": 3, "children": 2}
    collect(CollectConfig(str(folder / "prompts.jsonl"), store, **sampling, device="cpu"), base, tokenizer)
    label(LabelConfig(store, REWARDS), tokenizer=tokenizer)
    head = TrainHeadConfig(
        store, ["low", "high"], str(folder / "head"), width=32, dropout=0.0, epochs=4, batch_size=64,
        learning_rate=0.01, warmup_steps=5, validation_share=0.2, device="cpu",
    )  # fmt: skip
    train_head(head, base)
    model = TrainModelConfig(
        store, ["low"], str(folder / "model"), num_layers=1, lora=LoraSettings(0), targets="tokens", epochs=2,
        batch_size=8, learning_rate=0.01, warmup_steps=0, validation_share=0.2, device="cpu",
    )  # fmt: skip
    train_model(model, base)
    return folder


@pytest.fixture
def evaluation(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate_module, "load_chat_model", lambda *a: chat_model())
    monkeypatch.setattr(collect_module, "load_chat_model", lambda *a: chat_model())
    return EvaluateConfig(
        prompts=str(runs / "prompts.jsonl"),
        output=str(tmp_path / "results" / "steering.json"),
        completions=str(tmp_path / "completions"),
        value_functions=str(runs / "head"),
        rewards=REWARDS,
        settings={
            "unsteered": {},
            "top": {"beta": 0.0, "weights": {"low": 1.0}},
            "low": {"beta": 8.0, "weights": {"low": 1.0}},
            "high": {"beta": 8.0, "weights": {"high": 1.0}},
        },
        limit=30,
        seeds=[0, 1],
        max_new_tokens=10,
        batch_size=20,
        device="cpu",
    )


def test_steering_raises_the_reward_it_was_trained_on(evaluation):
    settings = evaluate(evaluation)["settings"]
    for objective in ("low", "high"):
        assert settings[objective][objective]["gain_sd"] > 0.5
        assert settings[objective]["kl"] > settings["top"]["kl"] > 0
    assert settings["unsteered"]["kl"] == 0
    assert settings["unsteered"]["low"]["gain_sd"] == 0
    assert settings["low"]["completions"] == 60
    assert 0 < settings["low"]["distinct_2"] <= 1
    table = Path(evaluation.output).with_suffix(".md").read_text()
    assert all(f"| {name} |" in table for name in evaluation.settings)


def test_finished_settings_are_not_run_again(evaluation, monkeypatch):
    first = evaluate(evaluation)
    monkeypatch.setattr(evaluate_module, "load_chat_model", lambda *a: pytest.fail("nothing is left to generate"))
    assert evaluate(evaluation)["settings"] == first["settings"]
    changed = dict(evaluation.settings) | {"low": {"beta": 1.0, "weights": {"low": 1.0}}}
    with pytest.raises(ValueError, match="completions of other settings"):
        evaluate(dataclasses.replace(evaluation, settings=changed))


def test_a_setting_may_have_its_own_value_functions_and_perplexity_is_the_bases(evaluation, runs):
    settings = {
        "unsteered": {},
        "head": {"beta": 6.0, "weights": {"low": 1.0}},
        "model": {"beta": 6.0, "weights": {"low": 1.0}, "value_functions": str(runs / "model")},
    }
    changed = dataclasses.replace(evaluation, settings=settings, perplexity=True, seeds=[0])
    measured = evaluate(changed)["settings"]
    assert measured["model"]["low"]["gain_sd"] > 0.5
    assert all(row["perplexity"] > 1 for row in measured.values())
    assert measured["model"]["distinct_1"] <= measured["model"]["distinct_3"]
    base, tokenizer = chat_model()
    done = json.loads((Path(evaluation.completions) / "model.likelihood.json").read_text())
    text = json.loads((Path(evaluation.completions) / "model.json").read_text())["texts"][1]
    rows = [json.loads(line) for line in (runs / "prompts.jsonl").read_text().splitlines()[:2]]
    prompt = encode_prompts(rows, tokenizer, 999)[1]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    total = 0.0
    for t, token in enumerate(ids):
        logits = base(torch.tensor([prompt + ids[:t]])).logits[0, -1]
        total += float(torch.log_softmax(logits, dim=-1)[token].detach())
    assert done["log_likelihood"][1] == pytest.approx(total, abs=1e-3)
    assert measured["model"]["perplexity"] == pytest.approx(
        math.exp(-sum(done["log_likelihood"]) / sum(done["tokens"]))
    )


def test_an_instruction_is_measured_like_a_value_function(evaluation):
    base, tokenizer = chat_model()
    words = {"objectives": {"said": "w3 w5"}, "weights": {"said": 1.0}, "normalize": "none"}
    prompted = words | {"beta": 1.0, "top_k": base.config.vocab_size}
    settings = {
        "unsteered": {},
        "prompted": prompted,
        "beyond": prompted | {"beta": 3.0, "strategy": "sampling"},
        "both": prompted | {"weights": {"said": 1.0, "low": 30.0}},
    }
    changed = dataclasses.replace(evaluation, settings=settings, seeds=[0])
    measured = evaluate(changed)["settings"]
    assert measured["both"]["low"]["gain_sd"] > measured["prompted"]["low"]["gain_sd"]
    assert measured["beyond"]["kl"] > measured["prompted"]["kl"]
    alone = dataclasses.replace(
        changed, value_functions=None, settings={"unsteered": {}, "prompted": prompted}, fresh=True
    )
    assert evaluate(alone)["settings"]["prompted"]["low"] == measured["prompted"]["low"]
    # beta 1 over all tokens is the base model under the instruction: its likelihood over the plain one is the log-ratio
    done = json.loads((Path(evaluation.completions) / "prompted.json").read_text())
    rows = [json.loads(line) for line in Path(evaluation.prompts).read_text().splitlines()[:30]]
    plain = encode_prompts(rows, tokenizer, 999)
    told = [Words({"said": "w3 w5"}, tokenizer).places(prompt)[0].applied(prompt) for prompt in plain]
    ends = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in done["texts"]]
    whole = [i for i, ids in enumerate(ends) if len(ids) == done["lengths"][i]]  # no end of text was cut off
    assert whole
    for i in whole:
        ratio = log_likelihoods(base, [told[i]], [ends[i]])[0] - log_likelihoods(base, [plain[i]], [ends[i]])[0]
        assert done["log_ratios"][i] == pytest.approx(ratio, abs=1e-3)


def test_search_is_measured_by_value_and_by_reward(evaluation):
    mixed = {"beta": 4.0, "weights": {"low": 1.0, "high": 0.5}}
    search = mixed | {"num_return_sequences": 3}
    settings = {
        "unsteered": {},
        "processor": mixed,
        "sampling": mixed | {"strategy": "sampling"},
        "beams": search | {"strategy": "beam_search", "num_beams": 3, "interval": 20},
        "best of 3": search | {"strategy": "best_of_n", "num_samples": 3},
    }
    changed = dataclasses.replace(
        evaluation, settings=settings, combined={"low": 1.0, "high": 0.5}, seeds=[0],
        contrasts=[["beams", "best of 3"], ["best of 3, best by reward", "best of 3"]],
    )  # fmt: skip
    results = evaluate(changed)
    measured = results["settings"]
    assert list(measured) == [
        "unsteered", "processor", "sampling", "beams", "beams, best by reward", "best of 3", "best of 3, best by reward"
    ]  # fmt: skip
    assert measured["sampling"]["kl"] > 0
    assert measured["beams"]["kl"] is None
    for name, row in measured.items():
        assert row["completions"] == 30
        assert row["combined"]["reward"] == pytest.approx(row["low"]["reward"] + row["high"]["reward"] / 2)
        assert row["setting"] == settings[name.removesuffix(", best by reward")]
    same, better = results["contrasts"]
    assert same["combined"] == {"gain_sd": 0.0, "gain_sd_error": 0.0}  # ten tokens, no pruning: the same draws
    assert better["combined"]["gain_sd"] > 0
    table = Path(changed.output).with_suffix(".md").read_text()
    assert "| beams | best of 3 | +0.00 ± 0.00 |" in table
    assert "Combined: 1 low + 0.5 high." in table
    assert "| n/a |" in table


def test_rewards_are_kept_beside_the_completions(evaluation, monkeypatch):
    first = evaluate(evaluation)
    monkeypatch.setattr(evaluate_module, "load_reward", lambda *a: pytest.fail("every reward is known"))
    assert evaluate(evaluation)["settings"] == first["settings"]
    monkeypatch.undo()
    scored = []

    def load(spec, device):
        def reward(prompts, completions):
            scored.append((spec, len(completions)))
            return [float(len(text)) for text in completions]

        return reward

    monkeypatch.setattr(evaluate_module, "load_reward", load)
    monkeypatch.setattr(text_rewards, "third", text_rewards.high, raising=False)
    evaluate(dataclasses.replace(evaluation, rewards=REWARDS | {"third": "text_rewards:third"}))
    assert scored == [("text_rewards:third", 60)] * 4
    path = Path(evaluation.completions) / "top.json"
    content = json.loads(path.read_text())
    content["texts"][0] = "w1"
    path.write_text(json.dumps(content))
    scored.clear()
    evaluate(evaluation)
    assert scored == [(spec, 60) for spec in REWARDS.values()]  # other texts, other rewards


def test_value_models_steer_and_cards_are_written(evaluation, runs):
    settings = {name: evaluation.settings[name] for name in ("unsteered", "low")}
    changed = dataclasses.replace(evaluation, value_functions={"low": str(runs / "model")}, settings=settings)
    assert evaluate(changed)["settings"]["low"]["low"]["gain_sd"] > 0.3
    text = write_card(CardConfig(str(runs / "model"), evaluation=changed.output)).read_text()
    assert "| low |" in text
    assert "training_trees" not in text
    assert {path.name for path in (runs / "model").iterdir()} >= {"model.safetensors", "metrics.json", "README.md"}
    assert not (runs / "model" / "checkpoints").exists()


def test_bad_input(evaluation):
    with pytest.raises(ValueError, match="unknown setting 'bta'"):
        dataclasses.replace(evaluation, settings={"unsteered": {}, "x": {"bta": 1}})
    for setting, message in (
        ({"strategy": "beams"}, "unknown strategy 'beams': expected one of sampling, beam_search, best_of_n"),
        (
            {"strategy": "beam_search", "num_beam": 2},
            "'beam_search' has no setting 'num_beam': did you mean 'num_beams'",
        ),
        ({"strategy": "best_of_n", "reward_functions": "x"}, "has no setting 'reward_functions'"),
        ({"objectives": "Be funny."}, "objectives are instructions in words by name.*got 'Be funny.'"),
        ({"objectives": {"funny": " "}}, "objectives are instructions in words by name"),
        ({"num_return_sequences": 2, "beta": 1.0}, "num_return_sequences=2 needs a strategy"),
        ({"num_beams": 2}, "unknown setting 'num_beams'"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(evaluation, settings={"unsteered": {}, "x": setting})
    for more, message in (
        ({"combined": {"lower": 1.0}}, r"combined weighs \['lower'\], but there are rewards for"),
        ({"contrasts": [["low", "lower"]]}, "a contrast is a pair of settings among"),
        ({"contrasts": [["low"]]}, r"a pair of settings among .* got \['low'\]"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(evaluation, **more)
    none = {"unsteered": {}, "x": {"strategy": "beam_search", "num_beams": 0}}
    with pytest.raises(ValueError, match="num_beams must be a whole number of at least 1, got 0"):
        evaluate(dataclasses.replace(evaluation, settings=none))
    with pytest.raises(ValueError, match="an empty one"):
        dataclasses.replace(evaluation, settings={"x": {"beta": 1.0}})
    with pytest.raises(ValueError, match="funny"):
        evaluate(
            dataclasses.replace(evaluation, settings={"unsteered": {}, "x": {"beta": 1.0, "weights": {"funny": 1.0}}})
        )
    with pytest.raises(ValueError, match="cannot be imported"):
        evaluate(dataclasses.replace(evaluation, rewards={"low": "text_rewards:nothing"}))
