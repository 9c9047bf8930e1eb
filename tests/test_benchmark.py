"""The decoding benchmark: its slow twin is Algorithm 2, and its figures are what they say."""

from __future__ import annotations

import pytest
import torch

import decode
from mavis_logits import MavisLogitsProcessor
from tiny import EOS, PAD, make_base, make_head, make_value_model


def test_the_slow_twin_agrees_with_the_library() -> None:
    models = {"a": make_value_model("a"), "b": make_value_model("b", seed=3)}
    steering = {"weights": {"a": 0.3, "b": 0.7}, "beta": 4.0, "top_k": 5, "pad_token_id": PAD}
    ids = torch.tensor([[PAD, PAD, 5, 6], [7, 8, 9, 10]])
    scores = torch.randn(2, 97, generator=torch.Generator().manual_seed(0))
    slow = decode.SlowTwin(models, **steering)(ids, scores)
    fast = MavisLogitsProcessor(models, **steering)(ids, scores)
    torch.testing.assert_close(slow.softmax(-1), fast.softmax(-1), atol=1e-4, rtol=0)


def test_every_round_is_timed_and_compared_within_itself() -> None:
    base = make_base()
    base.config.eos_token_id = EOS
    head = MavisLogitsProcessor(make_head(base, "a"), model=base, top_k=5, pad_token_id=PAD)
    rounds = [{"input_ids": torch.tensor([[5, 6, 7]])} for _ in range(3)]
    plain, steered = decode.measure(base, rounds, {decode.PLAIN: None, "head": head}, new_tokens=3, twin_repeats=1)
    assert (plain.median, plain.low, plain.high, plain.rounds) == (1.0, 1.0, 1.0, 2)
    assert steered.low <= steered.median <= steered.high
    assert head.stats.steps == 2 + 3 + 3


def test_ratios_are_of_the_same_round() -> None:
    seconds = {decode.PLAIN: [1.0, 2.0, 4.0], "x": [2.0, 2.0, 12.0], decode.TWIN: [10.0]}
    ratio = decode.summary("x", seconds, batch=2, new_tokens=6)
    assert (ratio.median, ratio.low, ratio.high) == (2.0, 1.0, 3.0)
    assert ratio.tokens_per_second == pytest.approx(6.0)
    assert decode.summary(decode.TWIN, seconds, 2, 6).rounds == 1
