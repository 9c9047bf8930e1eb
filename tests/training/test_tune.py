"""`mavis tune`: adapters by TRL from trees or prompts, on a tiny model, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from chat_model import chat_model
from collecting import collect_here
from mavis_training.collect import CollectConfig, PolicyConfig, collect
from mavis_training.fitting.efficiency import leaf_shares
from mavis_training.fitting.paths import path_loss
from mavis_training.fitting.settings import LoraSettings
from mavis_training.label import LabelConfig, label
from mavis_training.measure.completions import Protocol, complete_all
from mavis_training.rivals.directions import load_direction
from mavis_training.trees.data import load_trees
from mavis_training.tuning.config import TuneConfig
from mavis_training.tuning.examples import best_answers, chosen_trees, paired_trees, preference_pairs
from mavis_training.tuning.paths import TreeTrainer, answer_ratios, pair_loss
from mavis_training.tuning.run import tune

REWARDS = """
def ones(prompts, completions, **columns):
    return [sum(word in ("w1", "w5", "w9", "w13", "w17") for word in text.split()) for text in completions]

def same(prompts, completions, **columns):
    return [1.0] * len(prompts)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Labelled trees of the chat model, its prompts, rewards and the model."""
    folder = tmp_path_factory.mktemp("tune")
    (folder / "rewards.py").write_text(REWARDS)
    collect_here(folder)
    model, tokenizer = chat_model()
    model.save_pretrained(folder / "chat")
    tokenizer.save_pretrained(folder / "chat")
    rewards = {name: f"{folder / 'rewards.py'}:{name}" for name in ("ones", "same")}
    label(LabelConfig(str(folder / "trees"), rewards), tokenizer=tokenizer)
    return folder


def config(place: Path, method: str, output: Path, **changes) -> TuneConfig:
    given = {
        "weights": {"ones": 1.0}, "store": str(place / "trees"), "model": str(place / "chat"), "device": "cpu",
        "lora": LoraSettings(rank=4, alpha=8, dropout=0.0),
    }  # fmt: skip
    if method in ("rloo", "grpo", "on_policy"):
        given |= {"prompts": str(place / "prompts.jsonl"), "rewards": {"ones": f"{place / 'rewards.py'}:ones"}}
        given |= {"steps": 2, "generations": 4, "batch_size": 8, "max_new_tokens": 8}
    return TuneConfig(method, str(output), **given | changes)


def ones(setting: dict) -> float:
    """Mean reward that a setting has on prompts."""
    model, tokenizer = chat_model()
    rows = [{"id": str(i), "prompt": f"w{i} w{i + 1}"} for i in range(30)]
    done = complete_all(model, tokenizer, rows, Protocol([0, 1, 2], 10, 30), None, setting, lambda _: None)
    space = {}
    exec(REWARDS, space)
    return float(np.mean(space["ones"]([""] * len(done.texts), done.texts)))


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("dpo", {"learning_rate": 2e-2, "epochs": 8, "pairs": 4}),
        ("pairs", {"learning_rate": 2e-2, "epochs": 8, "pairs": 4, "batch_size": 4}),
        ("paths", {"learning_rate": 2e-2, "epochs": 8, "batch_size": 4}),
        ("sft", {"learning_rate": 2e-2, "epochs": 20}),
        ("rloo", {"learning_rate": 3e-2, "steps": 25, "batch_size": 64, "beta": 0.01}),
        ("on_policy", {"learning_rate": 2e-2, "steps": 25, "batch_size": 64, "beta": 0.1}),
    ],
)
def test_a_tuned_policy_has_more_of_the_reward(place, tmp_path, method, changes) -> None:
    result = tune(config(place, method, tmp_path / "out", **changes))
    assert result["steps"] > 0
    assert result["cpu_seconds"] > 0
    tuned = ones({"adapters": {str(tmp_path / "out"): 1.0}})
    assert tuned > ones({"temperature": 1.0}) + 0.3


def test_paths_are_measured_on_held_out_trees_and_learned_above_the_first_layer(place, tmp_path) -> None:
    """Against the sums of log-ratios along whole answers, which are computed otherwise."""
    lora = LoraSettings(rank=4, alpha=8, dropout=0.0, first_layer=1)
    given = config(place, "paths", tmp_path, learning_rate=2e-2, epochs=8, batch_size=4, lora=lora, trees=40)
    tune(given)
    names = load_file(tmp_path / "adapter_model.safetensors")
    assert names
    assert not any(".layers.0." in name for name in names)
    assert not (tmp_path / "README.md").exists()
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    held_out = chosen_trees(given.store, given.weights, 40, 0).held_out
    assert metrics["training_trees"] == 40
    assert metrics["trees"] == len(held_out)
    tuned = PeftModel.from_pretrained(chat_model()[0], tmp_path)
    deviation = json.loads((tmp_path / "tuned.json").read_text())["deviations"]["ones"]
    said, rewards = [], []
    for item in held_out:
        with torch.no_grad():
            ratios = given.eta * answer_ratios(tuned, item.tree).double().numpy()
        share = leaf_shares(item.tree)
        own = item.rewards[:, 0] / deviation
        said += list(ratios - share @ ratios)
        rewards += list(own - share @ own)
    found = metrics["ones"]["by_fraction"]["1.0"]
    assert found["correlation"] == pytest.approx(np.corrcoef(said, rewards)[0, 1], abs=5e-3)
    assert found["correlation"] > 0.2
    assert metrics["ones"]["ranking"]["accuracy"] > 0.5


def test_a_few_answers_of_each_tree_are_learnt_from_and_all_are_measured(place, tmp_path) -> None:
    given = config(place, "paths", tmp_path, learning_rate=2e-2, epochs=12, batch_size=4, answers=3)
    result = tune(given)
    every = chosen_trees(given.store, given.weights, None, 0)
    few = chosen_trees(given.store, given.weights, None, 0, answers=3)
    assert result["rollout_tokens"] == few.tokens < every.tokens
    assert result["deviations"] == every.deviations
    assert [len(item.tree.leaves()) for item in few.held_out] == [len(item.tree.leaves()) for item in every.held_out]
    for item, whole in zip(few.training, every.training, strict=True):
        leaves = whole.tree.leaves()
        assert len(item.rewards) == len(item.tree.leaves()) == min(3, len(leaves))
        rewards = {tuple(whole.tree.completion(leaf)): r for leaf, r in zip(leaves, whole.rewards, strict=True)}
        for leaf, reward in zip(item.tree.leaves(), item.rewards, strict=True):
            assert reward == rewards[tuple(item.tree.completion(leaf))]
    assert ones({"adapters": {str(tmp_path): 1.0}}) > ones({"temperature": 1.0}) + 0.3


def test_an_interrupted_tuning_goes_on_to_the_same_adapter(place, tmp_path, monkeypatch) -> None:
    def given(name: str) -> TuneConfig:
        return config(place, "paths", tmp_path / name, learning_rate=1e-2, batch_size=1, trees=40, epochs=1)

    tune(given("whole"))
    calls, loss = [], TreeTrainer.compute_loss

    def interrupted(self, *rest, **named):
        calls.append(1)
        if len(calls) > 30:
            raise KeyboardInterrupt
        return loss(self, *rest, **named)

    with monkeypatch.context() as patched:
        patched.setattr(TreeTrainer, "compute_loss", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tune(given("cut"))
    with pytest.raises(ValueError, match="another training"):
        tune(config(place, "paths", tmp_path / "cut", learning_rate=1e-3, batch_size=1, trees=40))
    tune(given("cut"))
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "cut"))
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor)


def test_a_policy_goes_on_with_trees_that_it_has_sampled(place, tmp_path) -> None:
    """Algorithm 1: units and shape stay, the reference stays the base model, and it has more of the reward."""
    first = tune(config(place, "paths", tmp_path / "first", learning_rate=2e-2, epochs=8, batch_size=4))
    steered, policy = str(tmp_path / "steered"), str(tmp_path / "first")
    settings = {"beta": 2.0, "top_k": 40, "normalize": "none"}
    collect(
        CollectConfig(str(place / "prompts.jsonl"), steered, max_new_tokens=10, layers=2, prompts_per_shard=30,
                      policy=PolicyConfig(policy, settings)), *chat_model(),
    )  # fmt: skip
    label(LabelConfig(steered, {"ones": f"{place / 'rewards.py'}:ones"}), tokenizer=chat_model()[1])
    trained = {"learning_rate": 2e-2, "epochs": 8, "batch_size": 4, "beta": 0.15}
    second = config(place, "paths", tmp_path / "second", initial=policy, store=steered, **trained)
    assert tune(second)["deviations"] == first["deviations"]
    assert json.loads((tmp_path / "second" / "config.json").read_text())["iteration"] == 1
    assert ones({"adapters": {str(tmp_path / "second"): 1.0}}) > ones({"adapters": {policy: 1.0}}) + 0.1
    still = config(place, "paths", tmp_path / "still", initial=policy, learning_rate=0.0, epochs=1)
    tune(still)
    assert json.loads((tmp_path / "still" / "config.json").read_text())["iteration"] == 0
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("first", "still"))
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor)


def test_a_policy_goes_on_in_more_layers(place, tmp_path) -> None:
    above, every = (LoraSettings(rank=4, alpha=8, dropout=0.0, first_layer=layer) for layer in (1, 0))
    tune(config(place, "paths", tmp_path / "above", learning_rate=2e-2, epochs=2, lora=above))
    tune(config(place, "paths", tmp_path / "every", lora=every, initial=str(tmp_path / "above"), learning_rate=0.0))
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("above", "every"))
    assert one.keys() < other.keys()
    for name, tensor in other.items():
        if name in one:
            torch.testing.assert_close(tensor, one[name])
        else:  # where nothing was adapted, nothing is
            assert "lora_A" in name or not tensor.any()
    with pytest.raises(ValueError, match="layers that lora leaves out"):
        tune(config(place, "paths", tmp_path / "out", lora=above, initial=str(tmp_path / "every")))
    lora = LoraSettings(rank=2, alpha=8, dropout=0.0)
    with pytest.raises(ValueError, match="has rank 4 and alpha 8, lora has 2 and 8"):
        tune(config(place, "paths", tmp_path / "out", lora=lora, initial=str(tmp_path / "every")))


def test_a_policy_goes_on_only_with_what_it_was_for(place, tmp_path) -> None:
    with pytest.raises(ValueError, match="initial is for paths and on_policy"):
        config(place, "dpo", tmp_path / "out", initial="policy")
    with pytest.raises(OSError, match=r"has no tuned\.json"):
        tune(config(place, "paths", tmp_path / "out", initial=str(tmp_path)))
    tune(config(place, "paths", tmp_path / "first", epochs=1))
    with pytest.raises(ValueError, match="was tuned for"):
        tune(config(place, "paths", tmp_path / "out", initial=str(tmp_path / "first"), weights={"ones": 0.5}))
    edited = json.loads((tmp_path / "first" / "config.json").read_text()) | {"backbone_fingerprint": "another"}
    (tmp_path / "first" / "config.json").write_text(json.dumps(edited | {"backbone_sketch": None}))
    with pytest.raises(ValueError, match="was tuned on"):
        tune(config(place, "paths", tmp_path / "out", initial=str(tmp_path / "first")))


def test_grpo_runs_and_counts_its_tokens(place, tmp_path) -> None:
    result = tune(config(place, "grpo", tmp_path / "out"))
    assert 2 * 8 <= result["rollout_tokens"] <= 2 * 8 * 8
    assert (tmp_path / "out" / "adapter_config.json").exists()


def test_a_direction_is_the_difference_of_the_two_sides(place, tmp_path) -> None:
    """Against every answer read alone."""
    tune(config(place, "direction", tmp_path / "out", layer=1))
    vector, layer = load_direction(str(tmp_path / "out"))
    assert layer == 1
    model, _ = chat_model()
    sides = {True: [], False: []}
    for item in chosen_trees(str(place / "trees"), {"ones": 1.0}, None, 0).training:
        rewards = item.rewards[:, 0]
        if rewards.std() == 0:
            continue
        for leaf, reward in zip(item.tree.leaves(), rewards, strict=True):
            prompt, own = item.tree.prompt_tokens.tolist(), item.tree.completion(int(leaf)).tolist()
            with torch.no_grad():
                states = model(torch.tensor([prompt + own]), output_hidden_states=True).hidden_states[1]
            sides[bool(reward > rewards.mean())].append(states[0, len(prompt) :].mean(dim=0))
    expected = torch.stack(sides[True]).mean(dim=0) - torch.stack(sides[False]).mean(dim=0)
    torch.testing.assert_close(vector, expected, atol=2e-3, rtol=2e-2)  # states are kept in bfloat16


def test_pairs_and_best_answers_are_those_of_the_rewards(place) -> None:
    trees, held_out, deviations, tokens, _ = chosen_trees(str(place / "trees"), {"ones": 1.0}, 20, 0)
    assert held_out
    assert not {item.tree.prompt_id for item in trees} & {item.tree.prompt_id for item in held_out}
    assert len(trees) == 20
    assert tokens == sum(len(item.tree.tokens) for item in trees)
    by_prompt = {tuple(item.tree.prompt_tokens.tolist()): item for item in trees}
    pairs = preference_pairs(trees, {"ones": 1.0}, deviations, 2)
    assert pairs

    def reward(item, ids):
        leaves = zip(item.tree.leaves(), item.rewards[:, 0], strict=True)
        return max(r for leaf, r in leaves if item.tree.completion(int(leaf)).tolist() == ids)

    for pair in pairs:
        item = by_prompt[tuple(pair["prompt_ids"])]
        assert reward(item, pair["chosen_ids"]) > reward(item, pair["rejected_ids"])
    answers = {(*pair["prompt_ids"], -1, *pair[side]) for pair in pairs for side in ("chosen_ids", "rejected_ids")}
    thinned = paired_trees(trees, {"ones": 1.0}, deviations, 2)
    kept = [
        (one.tree.prompt_tokens.tolist(), one.tree.completion(int(i)).tolist())
        for one in thinned
        for i in one.tree.leaves()
    ]
    assert {(*prompt, -1, *own) for prompt, own in kept} == answers
    for row in best_answers(trees, {"ones": 1.0}, deviations):
        prompt = row["completion_mask"].count(0)
        item = by_prompt[tuple(row["input_ids"][:prompt])]
        assert reward(item, row["input_ids"][prompt:]) == item.rewards[:, 0].max()


def test_what_is_finished_is_not_done_again_and_another_tuning_is_refused(place, tmp_path) -> None:
    first = tune(config(place, "sft", tmp_path / "out"))
    stamp = (tmp_path / "out" / "adapter_model.safetensors").stat().st_mtime_ns
    assert tune(config(place, "sft", tmp_path / "out")) == first
    assert (tmp_path / "out" / "adapter_model.safetensors").stat().st_mtime_ns == stamp
    with pytest.raises(ValueError, match="another training"):
        tune(config(place, "sft", tmp_path / "out", learning_rate=1e-3))


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        ("ppo", {}, "method must be one of"),
        ("dpo", {"weights": {"ones": 0.0}}, "weights must give a share"),
        ("dpo", {"store": None}, "learns from labelled trees"),
        ("rloo", {"rewards": {}}, "give prompts, and rewards for ones"),
        ("sft", {"trees": 1}, "trees must be at least 2"),
        ("paths", {"answers": 1}, "answers must be at least 2"),
        ("dpo", {"beta": -1.0}, "beta must not be negative"),
        ("grpo", {"batch_size": 6}, "batch_size a multiple of it"),
    ],
)
def test_settings_that_are_none_are_refused(place, tmp_path, method, changes, message) -> None:
    with pytest.raises(ValueError, match=message):
        config(place, method, tmp_path, **changes)


def test_rewards_that_never_differ_are_refused(place, tmp_path) -> None:
    for method in ("dpo", "pairs", "direction"):
        with pytest.raises(ValueError, match="answers of different rewards"):
            tune(config(place, method, tmp_path / method, weights={"same": 1.0}, layer=1))


def said(policy, prompt: list[int], own: list[int]) -> float:
    """log pi of an answer, read alone."""
    logits = policy(torch.tensor([prompt + own])).logits[0, len(prompt) - 1 : -1]
    return float(torch.log_softmax(logits, -1).gather(1, torch.tensor(own)[:, None]).sum())


@torch.no_grad()
def changed_model():
    """The chat model with other weights."""
    other = chat_model()[0]
    for parameter in other.parameters():
        parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    return other


@torch.no_grad()
def test_pairs_lose_what_dpo_loses_on_each_answer_read_alone(place) -> None:
    (model, _), other = chat_model(), changed_model()
    trees, _, deviations, _, _ = chosen_trees(str(place / "trees"), {"ones": 1.0}, 8, 0)
    expected = {}
    for pair in preference_pairs(trees, {"ones": 1.0}, deviations, 2):
        prompt = pair["prompt_ids"]
        better, worse = (
            said(other, prompt, own) - said(model, prompt, own) for own in (pair["chosen_ids"], pair["rejected_ids"])
        )
        expected.setdefault(tuple(prompt), []).append(float(np.logaddexp(0.0, -0.3 * (better - worse))))
    thinned = paired_trees(trees, {"ones": 1.0}, deviations, 2)
    assert len(thinned) == len(expected)
    for item in thinned:
        rewards = torch.from_numpy(item.rewards[:, 0])
        loss = float(pair_loss(answer_ratios(other, item.tree), rewards, item.tree, 0.3))
        assert loss == pytest.approx(np.mean(expected[tuple(item.tree.prompt_tokens.tolist())]), abs=1e-3)


@torch.no_grad()
def test_ratios_of_answers_are_those_of_reading_each_alone(place) -> None:
    (model, _), other = chat_model(), changed_model()
    for item in load_trees(str(place / "trees"), ["ones"], 0.0)[1][:5]:
        prompt = item.tree.prompt_tokens.tolist()
        answers = [item.tree.completion(int(leaf)).tolist() for leaf in item.tree.leaves()]
        expected = [said(other, prompt, own) - said(model, prompt, own) for own in answers]
        torch.testing.assert_close(answer_ratios(other, item.tree), torch.tensor(expected), atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(answer_ratios(model, item.tree), torch.zeros(len(answers)), atol=1e-3, rtol=0)


def test_the_loss_of_paths_is_0_for_the_optimum_whatever_its_partition(place) -> None:
    for item in load_trees(str(place / "trees"), ["ones"], 0.0)[1]:
        rewards = torch.from_numpy(item.rewards[:, 0]).float()
        optimal = rewards / 0.4 - 3.7
        assert float(path_loss(optimal, rewards, item.tree, 0.4)) == pytest.approx(0.0, abs=1e-4)
        share = leaf_shares(item.tree)
        spread = float((share * (item.rewards[:, 0] - share @ item.rewards[:, 0]) ** 2).sum())
        assert float(path_loss(torch.zeros_like(rewards), rewards, item.tree, 0.4)) == pytest.approx(spread, abs=1e-4)
