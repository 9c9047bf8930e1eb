"""`mavis tune --method on_policy`: its gradient, what it samples from, and that it goes on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import IA3Config, get_peft_model
from safetensors.torch import load_file

from chat_model import chat_model
from mavis_training.fitting.model_config import lora_config
from mavis_training.fitting.paths import path_loss
from mavis_training.fitting.settings import LoraSettings
from mavis_training.rivals.adapters import merged
from mavis_training.trees.tree import Tree
from mavis_training.tuning.config import TuneConfig
from mavis_training.tuning.on_policy import OnPolicyTrainer
from mavis_training.tuning.run import tune

WORDS = ("w1", "w5", "w9", "w13", "w17")
REWARDS = f"""
def ones(prompts, completions, **columns):
    return [sum(word in {WORDS} for word in text.split()) for text in completions]

def short(prompts, completions, **columns):
    return [-len(text.split()) for text in completions]
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Prompts, rewards and a model."""
    folder = tmp_path_factory.mktemp("on_policy")
    (folder / "rewards.py").write_text(REWARDS)
    rows = [{"id": f"p{i}", "prompt": f"w{i} w{2 * i % 30}"} for i in range(40)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model, tokenizer = chat_model()
    model.save_pretrained(folder / "chat")
    tokenizer.save_pretrained(folder / "chat")
    return folder


def config(place: Path, output: Path, **changes) -> TuneConfig:
    given = {
        "weights": {"ones": 1.0}, "model": str(place / "chat"), "device": "cpu",
        "prompts": str(place / "prompts.jsonl"),
        "rewards": {name: f"{place / 'rewards.py'}:{name}" for name in ("ones", "short")}, "steps": 3, "batch_size": 16,
        "generations": 4, "max_new_tokens": 8, "beta": 0.2, "lora": LoraSettings(rank=4, alpha=8, dropout=0.0),
    }  # fmt: skip
    return TuneConfig("on_policy", str(output), **given | changes)


def rewards_said(output: Path) -> list[float]:
    return [row["reward"] for row in json.loads((output / "tuned.json").read_text())["log"] if "reward" in row]


@given(
    eta=st.floats(0.01, 2.0),
    answers=st.lists(st.tuples(st.floats(-5, 5), st.floats(-30, 30)), min_size=2, max_size=8),
)
def test_its_gradient_is_that_of_rloo(eta: float, answers: list[tuple[float, float]]) -> None:
    """With R - eta log pi / pi_ref for the reward, by the formula: the others' mean is the baseline."""
    count = len(answers)
    rewards, ratios = (torch.tensor(x, dtype=torch.float64) for x in zip(*answers, strict=True))
    one = np.arange(count)
    tree = Tree("p", "", one[:1], one, np.full(count, -1), one, np.ones(count), one * 0.0, one * 0.0, one >= 0)
    ratios.requires_grad_(True)
    path_loss(ratios, rewards, tree, eta).backward()
    penalised = (rewards - eta * ratios).detach()
    advantage = penalised - (penalised.sum() - penalised) / (count - 1)
    rloo = -advantage / count  # of - mean advantage log pi, by log pi of each answer
    torch.testing.assert_close(ratios.grad, 2 * eta * (count - 1) / count * rloo, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_it_samples_from_the_policy_and_leaves_the_base_model_as_it_was(dtype: torch.dtype) -> None:
    model = chat_model()[0].to(dtype)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    policy = get_peft_model(model, lora_config(LoraSettings(rank=4, alpha=8, dropout=0.0), model)).eval()
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) * 0.1)
    ids = torch.tensor([[3, 4, 5, 6]])
    wanted = policy(ids).logits
    with policy.disable_adapter():
        assert (policy(ids).logits - wanted).abs().max() > 0.1
    with merged(policy) as plain:
        torch.testing.assert_close(plain(ids).logits, wanted, atol=1e-4 if dtype == torch.float32 else 0.1, rtol=0.02)
    assert torch.equal(policy(ids).logits, wanted)
    for name, weight in policy.get_base_model().named_parameters():
        if "lora" not in name:
            assert torch.equal(weight, before[name.replace(".base_layer", "")])


@torch.no_grad()
def test_what_cannot_be_merged_stays_beside_the_weights() -> None:
    """Another kind than LoRA's."""
    model, ids = chat_model()[0], torch.tensor([[3, 4, 5, 6]])
    policy = get_peft_model(model, IA3Config(target_modules=["down_proj"], feedforward_modules=["down_proj"])).eval()
    for name, parameter in policy.named_parameters():
        if "ia3" in name:
            parameter.mul_(1.3)
    wanted = policy(ids).logits
    with merged(policy) as plain:
        assert torch.equal(plain(ids).logits, wanted)
    assert torch.equal(policy(ids).logits, wanted)


def test_an_interrupted_one_goes_on_to_the_same_policy(place, tmp_path, monkeypatch) -> None:
    given = {"steps": 6, "learning_rate": 1e-2, "trl": {"save_steps": 2, "logging_steps": 1}}
    whole = tune(config(place, tmp_path / "whole", **given))
    step, done = OnPolicyTrainer.training_step, []

    def interrupted(self, *rest, **named):
        done.append(1)
        if len(done) == 4:
            raise KeyboardInterrupt
        return step(self, *rest, **named)

    with monkeypatch.context() as patched:
        patched.setattr(OnPolicyTrainer, "training_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tune(config(place, tmp_path / "cut", **given))
    cut = tune(config(place, tmp_path / "cut", **given))
    assert (cut["rollout_tokens"], cut["steps"]) == (whole["rollout_tokens"], 6)
    assert 6 * 16 < whole["rollout_tokens"] <= 6 * 16 * 8
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "cut"))
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor)


def test_it_goes_on_from_where_a_policy_steers(place, tmp_path) -> None:
    first, further = tmp_path / "first", tmp_path / "further"
    every = {"trl": {"logging_steps": 1}, "learning_rate": 2e-2}
    tune(config(place, first, steps=12, **every))
    said = json.loads((first / "config.json").read_text())
    assert (said["iteration"], said["strength"], said["settings"]["beta"]) == (1, 1.0, 1.0)
    (first / "config.json").write_text(json.dumps(said | {"strength": 2.0}))
    tune(config(place, further, steps=1, initial=str(first), **every | {"learning_rate": 0.0}))
    one, other = (load_file(folder / "adapter_model.safetensors") for folder in (first, further))
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor * (2.0 if "lora_B" in name else 1.0))
    assert json.loads((further / "config.json").read_text())["iteration"] == 2
    assert rewards_said(further)[0] > rewards_said(first)[-1]  # twice the adapter goes further


def test_several_rewards_make_a_policy_for_their_mix(place, tmp_path) -> None:
    """MORLHF: what is said of the reward is the weighted one."""
    tune(config(place, tmp_path, weights={"ones": 0.5, "short": 0.5}, steps=1, trl={"logging_steps": 1}))
    found = rewards_said(tmp_path)
    assert len(found) == 1
    assert -4.0 <= found[0] <= 0.0
    assert json.loads((tmp_path / "config.json").read_text())["objectives"] == ["ones+short"]


def test_prompts_and_rewards_are_needed(place, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"on_policy samples answers itself: give prompts, and rewards for ones"):
        config(place, tmp_path, rewards={})
    with pytest.raises(ValueError, match="nor 0 for paths and on_policy"):
        config(place, tmp_path, beta=0.0)
