"""Scorers agree with re-forwarding every candidate from scratch, for every architecture, and cost k queries a step."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mavis_logits import ValueModel
from mavis_logits.scoring.rows import RowTracker
from mavis_logits.scoring.scorer import RaggedScorer, RepeatedStateScorer, ValueScorer, make_scorer
from mavis_logits.testing import check_scorer, recompute_values
from mavis_logits.values.fused import FusedValueModel
from tiny import ARCHITECTURES, VOCABULARY, make_adapter, make_value_model

UNCACHED = {"bloom", "mamba"}  # Bloom's attention takes no mask of ours; Mamba's state is not addressed by token
SDPA = set(ARCHITECTURES) - UNCACHED - {"gemma2"}  # transformers runs Gemma 2 with eager attention only


def value_model(architecture: str, attention: str | None = None) -> ValueModel:
    model = make_value_model("a", "b", architecture=architecture)
    if attention is not None:
        model.backbone.set_attn_implementation(attention)
    return model


@pytest.mark.parametrize(
    ("architecture", "attention"),
    [(a, "eager") for a in ARCHITECTURES] + [(a, "sdpa") for a in sorted(SDPA)],
)
def test_every_architecture_keeps_the_laws(architecture: str, attention: str) -> None:
    model = value_model(architecture, attention)
    scorer = make_scorer(model)
    assert isinstance(scorer, RepeatedStateScorer if architecture in UNCACHED else RaggedScorer)
    check_scorer(scorer, VOCABULARY, steps=6)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "mamba"])
@pytest.mark.parametrize("seed", [1, 2])
def test_longer_lives(architecture: str, seed: int) -> None:
    check_scorer(make_scorer(value_model(architecture)), VOCABULARY, seed=seed, steps=12)


def test_the_fallback_is_right_for_attention_too() -> None:
    check_scorer(RepeatedStateScorer(value_model("gemma3")), VOCABULARY, steps=6)


def test_bfloat16_agrees_to_its_own_precision() -> None:
    model = value_model("llama").to(torch.bfloat16)
    scorer = make_scorer(model)
    assert isinstance(scorer, RaggedScorer)
    check_scorer(scorer, VOCABULARY, steps=3, tolerance=0.5)


def steps(scorer: ValueScorer, calls: list[list[list[int]]], candidates: np.ndarray) -> list[Tensor]:
    """Values of every call of a scorer with these sequences, always with the same candidates."""
    tracker, out = RowTracker(), []
    for call in calls:
        sequences = [np.array(row) for row in call]
        out.append(scorer.score(tracker.plan(sequences), torch.from_numpy(candidates[: len(call)])))
        tracker.update(sequences, candidates[: len(call)])
    return out


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "mamba"])
def test_a_row_alone_gets_the_values_it_gets_in_a_batch(architecture: str) -> None:
    model = value_model(architecture)
    candidates = np.array([[3, 4, 5], [3, 4, 5], [3, 4, 5]])
    prompts = [[5, 6, 7, 8, 9, 10], [11], [12, 13]]
    calls = [prompts, [[*p, 4] for p in prompts], [[*p, 4, 20] for p in prompts]]
    together = steps(make_scorer(model), calls, candidates)
    for row in range(len(prompts)):
        alone = steps(make_scorer(model), [[call[row]] for call in calls], candidates)
        for one, all_rows in zip(alone, together, strict=True):
            torch.testing.assert_close(one[0], all_rows[row], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("next_call", "queries"),
    [
        ([[5, 6, 7, 3]], 3),  # a candidate was chosen: nothing but the new candidates
        ([[5, 6, 7, 50]], 4),  # another token: one query more, in the same forward
        ([[5, 6, 7]], 3),  # the same again
        ([[5, 6, 60]], 4),  # a rejected draft token, and another in its place
        ([[5, 6, 7, 4, 50, 51]], 5),  # a second turn that goes on from a candidate
        ([[5, 6, 7, 3], [5, 6, 7, 4]], 3),  # two beams of one
        ([[50, 51]], 5),  # a new prompt
    ],
)
def test_a_step_feeds_what_is_new_and_k_candidates_in_one_forward(next_call: list[list[int]], queries: int) -> None:
    model = value_model("llama")
    scorer, fed = make_scorer(model), []

    def record(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        fed.append(tuple(kwargs["input_ids"].shape))

    hook = model.backbone.register_forward_pre_hook(record, with_kwargs=True)
    candidates = np.array([[3, 4, 5], [3, 4, 5]])
    values = steps(scorer, [[[5, 6, 7]], next_call], candidates)[-1]
    hook.remove()
    assert fed == [(1, 3 + 3), (len(next_call), queries)]
    for row, sequence in enumerate(next_call):
        expected = recompute_values(model, sequence, torch.from_numpy(candidates[row]))
        torch.testing.assert_close(values[row], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("copies", [1, 2])
def test_a_compiled_step_is_one_graph_and_keeps_the_laws(copies: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager", fullgraph=True))
    models = [value_model("llama", "sdpa")]
    if copies == 2:
        models = [make_adapter("a", seed=2), make_adapter("b", seed=3)]
    scorer = make_scorer(FusedValueModel(models) if copies == 2 else models[0], compile=True)
    torch._dynamo.utils.counters.clear()
    check_scorer(scorer, VOCABULARY, steps=8, models=models)
    assert 1 <= torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 8
    torch._dynamo.reset()


def test_compiling_what_has_no_such_cache_is_refused() -> None:
    with pytest.raises(ValueError, match="compile=True needs a backbone with a token-addressed cache, which Mamba"):
        make_scorer(value_model("mamba"), compile=True)


def test_reset_forgets() -> None:
    scorer = make_scorer(value_model("llama"))
    check_scorer(scorer, VOCABULARY, steps=2)
    scorer.reset()
    check_scorer(scorer, VOCABULARY, steps=2)


def test_check_scorer_catches_a_scorer_that_is_wrong() -> None:
    class Wrong(RaggedScorer):
        def score(self, plan: Any, candidates: Tensor) -> Tensor:
            return super().score(plan, candidates) + (0.1 if plan.source is not None else 0.0)

    with pytest.raises(AssertionError, match=r"step 1, row 0 of 3 \(length \d+\): values differ .* by 0.1"):
        check_scorer(Wrong(value_model("llama")), VOCABULARY)


def test_attention_without_4d_masks_repeats_states_and_says_why() -> None:
    model = value_model("llama")
    model.backbone.config._attn_implementation = "flash_attention_2"
    assert isinstance(make_scorer(model), RepeatedStateScorer)
    with pytest.raises(ValueError, match=r'flash_attention_2 takes no 4-D mask \(attn_implementation="sdpa" does\)'):
        make_scorer(model, reading="packed")


def test_running_out_of_memory_says_what_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = make_scorer(value_model("llama"))
    steps(scorer, [[[5, 6, 7]]], np.array([[3, 4]]))

    def full(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(scorer.model.backbone, "forward", full)
    with pytest.raises(MemoryError, match=r"1 rows x 64 slots x 2 layers, 0 MiB in torch.float32. Use fewer rows"):
        steps(scorer, [[[5, 6, 7]]], np.array([[3, 4]]))
