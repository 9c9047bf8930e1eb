"""transformers' continuous batching: each request is answered as by `generate` with the processor at its settings."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from mavis_logits import MavisLogitsProcessor
from mavis_logits.integrations.asked import Asked
from mavis_logits.integrations.continuous import steered_batching
from mavis_logits.integrations.slots import Slots
from tiny import EOS, PAD, make_base, make_head, make_value_model

NEW = 6
PROMPTS = [[5, 6, 7, 8, 9], [10, 11], [12, 13, 14, 15], [20, 21, 22], [30]]
ASKED: list[dict[str, Any]] = [
    {},
    {"mavis_weights": "kind=1", "mavis_beta": 3.0},
    {"mavis_weights": "short=0.8,kind=-0.2"},
    {},
    {"mavis_weights": [0.5, 0.5], "mavis_top_k": 5},
]


def greedy(base: Any, head: Any, prompt: list[int], asked: dict[str, Any]) -> list[int]:
    weights = {"kind=1": [1.0, 0.0], "short=0.8,kind=-0.2": [-0.2, 0.8]}
    own = asked.get("mavis_weights")
    processors = []
    if asked:
        mavis = MavisLogitsProcessor(
            head, weights.get(own, own) if isinstance(own, str) else own, asked.get("mavis_beta", 2.0), model=base,
            top_k=asked.get("mavis_top_k", 10),
        )  # fmt: skip
        processors = [mavis]
    found = base.generate(
        torch.tensor([prompt]), do_sample=False, max_new_tokens=NEW, logits_processor=processors, pad_token_id=PAD
    )
    return found[0, len(prompt) :].tolist()


@pytest.mark.parametrize("layer", [None, 1], ids=["output", "inner"])
def test_requests_are_answered_as_by_generate(layer: int | None) -> None:
    base = make_base()
    head = make_head(base, "kind", "short", layer=layer)
    torch.nn.init.normal_(head.out.weight)
    expected = [greedy(base, head, prompt, asked) for prompt, asked in zip(PROMPTS, ASKED, strict=True)]
    plain = [greedy(base, head, prompt, {}) for prompt in PROMPTS]
    assert expected[1] != plain[1]
    mavis = MavisLogitsProcessor(head, beta=2.0, top_k=10, model=base)
    config = GenerationConfig(do_sample=False, max_new_tokens=NEW, eos_token_id=EOS, pad_token_id=PAD)
    # Its cache would take nearly all memory that is free.
    small = ContinuousBatchingConfig(use_cuda_graph=False, num_blocks=32, max_batch_tokens=64)
    manager = steered_batching(base, mavis, generation_config=config, continuous_batching_config=small)
    manager.start()
    try:
        names = [
            manager.add_request(prompt, max_new_tokens=NEW, **asked)
            for prompt, asked in zip(PROMPTS, ASKED, strict=True)
        ]
        answers: dict[str, list[int]] = {}
        deadline = time.monotonic() + 900
        while len(answers) < len(names):
            assert time.monotonic() < deadline
            result = manager.get_result(timeout=10)
            if result is None:
                continue
            assert result.error is None, result.error
            if result.is_finished():
                answers[result.request_id] = list(result.generated_tokens)
    finally:
        manager.stop(block=True)
    assert [answers[name] for name in names] == expected


def test_what_log_pi_ref_counts_for_follows_the_temperature_of_each_request(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Asked | None] = []
    monkeypatch.setattr(Slots, "put", lambda self, slot, asked: read.append(asked))
    for sampled, expected in ((True, [0.5, 0.8]), (False, [1.0])):  # without sampling both are one kind of settings
        base = make_base()
        head = make_head(base, "kind", "short")
        config = GenerationConfig(do_sample=sampled, temperature=0.5, eos_token_id=EOS, pad_token_id=PAD)
        steering = steered_batching(base, MavisLogitsProcessor(head, model=base), generation_config=config).mavis
        read.clear()
        for own in ({}, {"temperature": 0.8}):
            steering._number({"mavis_beta": 1.0, **own})
        assert [asked.temperature for asked in read if asked is not None] == expected
        steering.close()


def test_what_cannot_be_is_refused_at_once() -> None:
    base = make_base()
    with pytest.raises(ValueError, match="need what a request has written"):
        steered_batching(base, MavisLogitsProcessor(make_value_model("a"), model=base))
    mavis = MavisLogitsProcessor(make_head(base, "kind"), model=base)
    manager = steered_batching(base, mavis)
    with pytest.raises(ValueError, match="did you mean 'kind'"):
        manager.add_request([5, 6], mavis_weights="kid=1")
    with pytest.raises(ValueError, match="did you mean 'mavis_beta'"):
        manager.add_request([5, 6], mavis_betta=1)
