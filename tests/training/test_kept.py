"""Kept work is used again only where everything that it depends on is the same: for every setting there is."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from chat_model import chat_model
from judging import longer, served
from mavis_logits.values.value_head import ValueHead
from mavis_training import evaluate as evaluating
from mavis_training.base import kept
from mavis_training.collect import CollectConfig, collect
from mavis_training.evaluate import EvaluateConfig, evaluate
from mavis_training.fitting.trainer_arguments import training_arguments
from mavis_training.measure.win_rate import JudgeSettings
from mavis_training.train_head import TrainHeadConfig, train_head
from mavis_training.train_head import training_origin as head_origin
from mavis_training.train_model import LoraSettings, TrainModelConfig, starting_model, train_model, training_origin
from mavis_training.trees.data import open_stores
from random_trees import make_store, random_tree, share_of_low
from tiny_models import tiny_llama
from trainings import assert_same_values, killed_after, watched

EVALUATED = {
    "prompts": None, "output": None, "completions": None, "value_functions": None,
    "rewards": {"low": "text_rewards:high"}, "settings": {"unsteered": {}, "low": {"beta": 1.0}},
    "combined": {"low": 2.0}, "contrasts": [["low", "unsteered"]], "perplexity": True, "limit": 3, "seeds": [1],
    "judge": longer,
    "max_new_tokens": 5, "temperature": 0.5, "top_p": 0.5,
    "model": None, "chat_template": "none", "dtype": "bfloat16", "batch_size": 2, "device": "cpu",
    "fresh": True,
}  # fmt: skip
MODEL_SETTINGS = {
    "objectives": ["high"], "num_layers": 1, "lora": LoraSettings(2), "zeta": 0.1, "penalty": "continuation",
    "drop_leaves": 0.1, "targets": "tokens", "packing": "nodes", "epochs": 3.0, "batch_size": 3, "tokens_per_batch": 99,
    "gradient_accumulation": 2, "learning_rate": 1e-9, "weight_decay": 0.5, "warmup_steps": 3, "optimizer": "sgd",
    "max_grad_norm": 0.1, "validation_share": 0.4, "validation_leaves": False, "seed": 9, "dtype": "bfloat16",
    "bf16": True, "iteration": 4, "trainer": {"adam_beta1": 0.5},
}  # fmt: skip
HEAD_SETTINGS = {
    "teachers": {"low": "org/other"}, "tokens": 7, "reward_share": 0.5, "rank": 5, "trees": 9, "answers": 3,
    "objectives": ["high"], "layer": "output", "width": 9, "num_layers": 2, "dropout": 0.1, "bootstrap": 0.1,
    "rule": "gain", "anchor": 0.7, "actions": 6, "sharpen": False,
    "zeta": 0.1, "penalty": "continuation", "drop_leaves": 0.1, "epochs": 9, "patience": 9, "batch_size": 9,
    "learning_rate": 0.1, "weight_decay": 0.1, "warmup_steps": 9, "validation_share": 0.4, "seed": 9,
    "dtype": "bfloat16", "iteration": 9,
}  # fmt: skip


@pytest.fixture
def evaluation(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluating, "load_chat_model", lambda name, dtype: _loaded(name, dtype))
    rows = [{"id": f"p{i}", "prompt": f"w{i} w{i + 7}"} for i in range(4)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "model").mkdir()
    save_head(tmp_path / "head", 0)
    return EvaluateConfig(
        str(tmp_path / "prompts.jsonl"), str(tmp_path / "result.json"), str(tmp_path / "kept"),
        {"low": "text_rewards:low"}, {"unsteered": {}, "low": {"beta": 9.0, "top_k": 9}}, seeds=[0], max_new_tokens=4,
        value_functions=str(tmp_path / "head"),
        batch_size=4, model=str(tmp_path / "model"), device="cpu",
    )  # fmt: skip


def _loaded(name, dtype):
    model, tokenizer = chat_model()
    if Path(name, "other.json").exists():
        torch.manual_seed(9)
        model.lm_head.weight.data.normal_()
    return model.to(dtype), tokenizer


def save_head(folder, seed):
    torch.manual_seed(seed)
    head = ValueHead.for_model(chat_model()[0], ["low"], 8, 1, 0.0)
    torch.nn.init.normal_(head.out.weight)
    head.save_pretrained(folder)


def is_refused_or_as_from_scratch(config):
    """Whether an evaluation, with what is kept, is refused or finds what it would find without."""
    try:
        found = evaluate(config)
    except ValueError as error:
        return "fresh: true" in str(error)
    anew = evaluate(dataclasses.replace(config, completions=config.completions + "-new"))
    return found["settings"] == anew["settings"]


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(EvaluateConfig)])
def test_no_setting_of_an_evaluation_leaves_it_stale(evaluation, name):
    evaluate(evaluation)
    value = EVALUATED[name]  # a new setting needs a line there
    if value is None:  # a place: what lies there changes
        folder = Path(evaluation.completions).parent
        if name == "prompts":
            Path(evaluation.prompts).write_text(Path(evaluation.prompts).read_text().replace("w1 ", "w9 "))
        elif name == "output":
            evaluation = dataclasses.replace(evaluation, output=str(folder / "elsewhere.json"))
        elif name == "value_functions":
            save_head(folder / "head", 1)
        elif name == "model":
            (folder / "model" / "other.json").write_text("{}")
            evaluation = dataclasses.replace(evaluation, settings={"unsteered": {}})  # the head is of the first model
        assert is_refused_or_as_from_scratch(evaluation)
        return
    if name == "judge":
        pytest.importorskip("openai")
        with served(value) as (url, _):
            assert is_refused_or_as_from_scratch(dataclasses.replace(evaluation, judge=JudgeSettings("umpire", url)))
        return
    assert is_refused_or_as_from_scratch(dataclasses.replace(evaluation, **{name: value}))


def test_what_is_kept_is_taken_and_said_and_fresh_replaces_it(evaluation, monkeypatch, capsys):
    first = evaluate(evaluation)
    monkeypatch.setattr(evaluating, "load_chat_model", lambda *a: pytest.fail("nothing is left to generate"))
    assert evaluate(evaluation)["settings"] == first["settings"]
    assert "under the same settings: unsteered, low" in capsys.readouterr().out
    monkeypatch.undo()
    monkeypatch.setattr(evaluating, "load_chat_model", _loaded)
    other = dataclasses.replace(evaluation, seeds=[3], max_new_tokens=6)
    with pytest.raises(ValueError, match=r"seeds was \[0\], is now \[3\]; max_new_tokens was 4, is now 6") as refused:
        evaluate(other)
    assert "another folder for completions" in str(refused.value)
    fresh = evaluate(dataclasses.replace(other, fresh=True))
    assert fresh["settings"] == evaluate(other)["settings"]
    assert fresh["settings"] != first["settings"]


def test_a_setting_of_two_names_is_written_and_judged_once(evaluation, monkeypatch):
    settings = evaluation.settings | {"again": evaluation.settings["low"], "other": {"beta": 3.0, "top_k": 9}}
    written = []
    complete_all = evaluating.complete_all

    def counted(*arguments, **rest):
        written.append(arguments[5])
        return complete_all(*arguments, **rest)

    monkeypatch.setattr(evaluating, "complete_all", counted)
    found = evaluate(dataclasses.replace(evaluation, settings=settings))["settings"]
    assert written == [{}, settings["low"], settings["other"]]
    assert found["again"] == found["low"]
    assert found["other"] != found["low"]
    kept = [Path(evaluation.completions) / f"{name}.rewards.json" for name in ("low", "again")]
    assert kept[0].read_bytes() == kept[1].read_bytes()


def test_an_edited_reward_judges_again(evaluation, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    config = dataclasses.replace(evaluation, rewards={"low": "edited_for_test:f"}, settings={"unsteered": {}})
    for value in (1.0, 2.0):
        (tmp_path / "edited_for_test.py").write_text(
            f"def f(prompts, completions):\n    return [{value}] * len(prompts)\n"
        )
        monkeypatch.delitem(__import__("sys").modules, "edited_for_test", raising=False)
        __import__("importlib").invalidate_caches()
        monkeypatch.setattr("sys.dont_write_bytecode", True)
        assert evaluate(config)["settings"]["unsteered"]["low"]["reward"] == value


def test_completions_of_an_older_version_are_refused(evaluation):
    evaluate(evaluation)
    path = Path(evaluation.completions) / "low.json"
    content = json.loads(path.read_text())
    del content["origin"]
    path.write_text(json.dumps(content | {"setting": evaluation.settings["low"]}))
    with pytest.raises(ValueError, match="an older version kept it"):
        evaluate(evaluation)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    rewards = {"low": lambda tree: share_of_low(tree), "high": lambda tree: 1 - share_of_low(tree)}
    return make_store(tmp_path_factory.mktemp("trees"), [random_tree(i) for i in range(24)], rewards)


@pytest.fixture
def training(store, tmp_path):
    return TrainModelConfig(
        str(store.folder), ["low"], str(tmp_path / "value"), lora=LoraSettings(rank=0), learning_rate=0.01,
        warmup_steps=0, epochs=2, batch_size=8, validation_share=0.25, device="cpu",
    )  # fmt: skip


def test_every_setting_of_a_training_is_in_its_origin(training, store):
    stores = open_stores(training.store)
    model = starting_model(training, stores, tiny_llama())

    def origin(config):
        return training_origin(config, model, stores, training_arguments(config))

    for field in dataclasses.fields(TrainModelConfig):
        if field.name in ("store", "output", "device", "fresh", "initial", "backbone"):
            continue  # places; what lies there is in it by content
        changed = dataclasses.replace(training, **{field.name: MODEL_SETTINGS[field.name]})
        assert kept.differences(kept.as_json(origin(training)), kept.as_json(origin(changed))), field.name
    assert origin(training) == origin(dataclasses.replace(training, trainer={"report_to": "none"}))
    other = starting_model(training, stores, tiny_llama(seed=3))
    assert training_origin(training, other, stores, training_arguments(training)) != origin(training)


def test_every_setting_of_a_heads_training_is_in_its_origin(store, tmp_path):
    config = TrainHeadConfig(str(store.folder), ["low"], str(tmp_path / "head"), device="cpu")
    base, stores = tiny_llama(), open_stores(config.store)
    head = ValueHead.for_model(base, ["low"], 8, 1, 0.0)
    first = head_origin(config, head, base, stores)
    for field in dataclasses.fields(TrainHeadConfig):
        if field.name not in ("store", "output", "device", "fresh", "initial", "model", "states"):
            start = config
            if field.name in ("anchor", "actions"):  # nothing to a head that no rule is applied to
                start = dataclasses.replace(config, rule="pairs")
            if field.name in ("tokens", "reward_share"):  # nothing to one that nobody teaches
                start = dataclasses.replace(config, teachers={"low": "org/policy"})
            changed = dataclasses.replace(start, **{field.name: HEAD_SETTINGS[field.name]})
            assert head_origin(changed, head, base, stores) != head_origin(start, head, base, stores), field.name
    assert head_origin(config, head, tiny_llama(seed=3), stores) != first


def test_an_interrupted_training_refuses_other_settings_and_goes_on_with_the_same(training):
    with killed_after(epoch=1):
        train_model(training, tiny_llama())
    other = dataclasses.replace(training, learning_rate=1e-9, seed=1)
    with pytest.raises(ValueError, match=r"seed was 0, is now 1; learning_rate was 0\.01, is now 1e-09") as refused:
        train_model(other, tiny_llama())
    assert "fresh: true" in str(refused.value)
    assert "another folder for output" in str(refused.value)
    with pytest.raises(ValueError, match="starting_weights was"):
        train_model(training, tiny_llama(seed=5))
    with watched("training_step") as steps:
        train_model(dataclasses.replace(other, fresh=True), tiny_llama())
    assert len(steps) >= 4  # from the start
    assert json.loads(Path(training.output, "train_config.json").read_text())["learning_rate"] == 1e-9


def test_a_finished_training_is_said_to_be_and_not_done_again(training, capsys):
    first = train_model(training, tiny_llama())
    with watched("training_step") as steps:
        again = train_model(training, tiny_llama())
    assert not steps
    assert "finished before" in capsys.readouterr().out
    assert_same_values(first, again)
    with pytest.raises(ValueError, match=r"holds the result of another training: epochs was 2, is now 1"):
        train_model(dataclasses.replace(training, epochs=1), tiny_llama())
    anew = train_model(dataclasses.replace(training, epochs=1, fresh=True), tiny_llama())
    assert anew.config.recipe["epochs"] == 1
    assert "fresh" not in anew.config.recipe


def test_new_rewards_are_another_training(training, tmp_path):
    trees = [random_tree(i) for i in range(24)]
    for factor in (1, 2):
        make_store(tmp_path / f"trees-{factor}", trees, {"low": lambda tree, f=factor: f * share_of_low(tree)})
    train_model(dataclasses.replace(training, store=str(tmp_path / "trees-1")), tiny_llama())
    with pytest.raises(ValueError, match="data was"):
        train_model(dataclasses.replace(training, store=str(tmp_path / "trees-2")), tiny_llama())


def test_a_finished_head_is_not_trained_again_and_one_of_other_settings_is_replaced(tmp_path, store, capsys):
    trees, base = random_trees_of(tmp_path), tiny_llama()
    config = TrainHeadConfig(
        str(trees), ["low"], str(tmp_path / "head"), width=8, epochs=1, bootstrap=0.0, validation_share=0.25,
        device="cpu",
    )  # fmt: skip
    first = train_head(config, base)
    again = train_head(config, base)
    assert "finished before" in capsys.readouterr().out
    torch.testing.assert_close(first.out.weight, again.out.weight)
    wider = train_head(dataclasses.replace(config, width=16), base)
    assert wider.config.width == 16
    assert "replaces the result of another training: width was 8, is now 16" in capsys.readouterr().out
    train_head(dataclasses.replace(config, width=16, fresh=True), base)
    assert "finished before" not in capsys.readouterr().out


def random_trees_of(folder):
    return make_store(folder / "trees", [random_tree(i) for i in range(24)], {"low": share_of_low}).folder


def test_large_files_of_weights_are_told_apart_by_every_tensor(tmp_path, monkeypatch):
    monkeypatch.setattr(kept, "_READ_WHOLE", 10)
    tensors = {name: torch.zeros(4000) for name in "ab"}
    found = set()
    for changed in (None, "a", "b"):
        now = {name: tensor + 1e-3 * (name == changed) for name, tensor in tensors.items()}
        save_file(now, tmp_path / "model.safetensors")
        found.add(kept.file_digest(tmp_path / "model.safetensors"))
        assert kept.file_digest(tmp_path / "model.safetensors") in found
    assert len(found) == 3


def test_what_lies_beside_a_model_is_no_part_of_it_but_its_adapters_base_is(tmp_path):
    for name in ("base", "model"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    (tmp_path / "model" / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": str(tmp_path / "base")})
    )
    first = kept.model_origin(str(tmp_path / "model"))
    (tmp_path / "model" / "metrics.json").write_text("{}")
    (tmp_path / "model" / "checkpoints").mkdir()
    (tmp_path / "model" / "checkpoints" / "x.json").write_text("{}")
    assert kept.model_origin(str(tmp_path / "model")) == first
    (tmp_path / "base" / "config.json").write_text('{"other": 1}')
    assert kept.model_origin(str(tmp_path / "model")) != first


@pytest.mark.parametrize("edit", [{"prompt": "w5 w6"}, {"kind": "b"}, {"more": 1}])
def test_trees_of_edited_prompts_are_refused(tmp_path, edit):
    rows = [{"id": f"p{i}", "prompt": f"w{i} w9", "kind": "a"} for i in range(3)]
    path, base = tmp_path / "prompts.jsonl", chat_model()
    config = CollectConfig(
        str(path),
        str(tmp_path / "trees"),
        max_new_tokens=3,
        layers=1,
        root_children=1,
        prompts_per_shard=2,
        device="cpu",
    )

    def collected(*rows):
        path.write_text("\n".join(map(json.dumps, rows)))
        return len(collect(config, *base))

    assert collected(*rows[:2]) == 2
    with pytest.raises(ValueError, match=r"trees of 1 prompts .*: p1\. Undo the edit, give edited prompts new ids"):
        collected(rows[0], rows[1] | edit, rows[2])
    assert collected(*rows) == 3  # the edit undone
    assert collected(rows[0], rows[1] | edit | {"id": "new"}) == 4  # a new id
