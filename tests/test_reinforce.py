"""The policy gradient on a head: its estimate is that of an enumerated policy, and it raises a reward."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import reinforce
from chat_model import chat_model
from mavis_logits.values.value_head import ValueHead


def few(prompts: list[str], completions: list[str], **columns: object) -> list[float]:
    return [float(text.count("w1")) for text in completions]


def test_a_completion_is_compared_with_the_others_of_its_prompt() -> None:
    found = reinforce.advantages(np.array([1.0, 2.0, 6.0, 0.0, 0.0, 3.0]), samples=3)
    assert found.tolist() == [-3.0, -1.5, 4.5, -1.5, -1.5, 3.0]


def test_the_surrogates_gradient_is_that_of_the_expected_reward() -> None:
    # One step, three candidates: draw all of them as often as the policy does, and compare with autograd through E R.
    model, _ = chat_model()
    torch.manual_seed(0)
    head = ValueHead.for_model(model, ["a"], width=8).train()
    hidden, candidates = torch.randn(1, head.config.hidden_size), torch.tensor([[5, 6, 7]])
    reference, reward = torch.log_softmax(torch.randn(1, 3), dim=1), torch.tensor([0.3, -1.0, 2.0])
    settings = reinforce.Settings(beta=2.0)
    policy = torch.softmax(reference + 2.0 * head(hidden, candidates)[..., 0], dim=1)[0]
    expected = torch.autograd.grad(-(policy * reward).sum(), head.out.weight)[0]
    count = 3000
    chosen = torch.repeat_interleave(torch.arange(3), (policy.detach() * count).round().long())
    many = len(chosen)
    positions = reinforce.Positions(
        torch.arange(many), hidden.expand(many, -1), candidates.expand(many, -1), reference.expand(many, -1), chosen
    )
    loss, divergence = reinforce.surrogate(head, positions, reward[chosen], torch.ones(1), settings, many)
    found = torch.autograd.grad(loss, head.out.weight)[0]
    torch.testing.assert_close(found, expected, atol=2e-2 * float(expected.abs().max()), rtol=0)
    kl = (policy * (policy.log() - reference[0])).sum()
    assert float(divergence) == pytest.approx(float(kl), rel=1e-3)


def test_it_raises_the_reward_of_a_tiny_model() -> None:
    model, tokenizer = chat_model()
    torch.manual_seed(1)
    head = ValueHead.for_model(model, ["few"], width=32, reward_scale=[1.0])
    rows = [{"id": f"p{i}", "prompt": f"w{i} w{i + 7}"} for i in range(30)]
    settings = reinforce.Settings(
        steps=25, prompts=16, samples=4, beta=5.0, top_k=50, max_new_tokens=10, kl_weight=0.01, learning_rate=3e-3
    )
    history = reinforce.reinforce(head, model, tokenizer, rows, {"few": few}, settings)
    early, late = (np.mean([step["reward"] for step in part]) for part in (history[:5], history[-5:]))
    assert late > early + 0.3
    assert all(step["kl"] >= 0 for step in history)
