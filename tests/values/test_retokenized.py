"""A value model of another tokenizer: what it reads is the text, and what it says is what reading from scratch says."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch

from byte_models import byte_llama, byte_tokenizer
from mavis_logits import MavisBestOfN, MavisLogitsProcessor, MavisSampling, ValueModel
from mavis_logits.backbone.fingerprint import tokenizer_fingerprint
from mavis_logits.scoring.retokenized import RetokenizedScorer
from mavis_logits.scoring.rows import RowTracker
from mavis_logits.testing import _next, recompute_all, recompute_retokenized
from mavis_logits.values.retokenized import Retokenized
from processor_checks import Recorder, slow_policy
from tiny import make_base, make_head, make_value_model

BASE = byte_tokenizer(
    [("e", "r"), ("t", "h")], {"pad_token": "<pad>", "eos_token": "<|end|>", "bos_token": "<s>", "turn": "<|turn|>"}
)
OWN = byte_tokenizer(
    [("h", "e"), ("t", "he"), ("Ġ", "the"), ("a", "t")],
    {"bos_token": "<begin>", "eos_token": "<eos>", "pad_token": "<fill>"}, begins=True, shift=7,
)  # fmt: skip
SAME_TURNS = byte_tokenizer([("i", "n")], {"eos_token": "<stop>", "turn": "<|turn|>", "pad_token": "<pad>"}, shift=3)


def value_function(tokenizer: Any = OWN, **more: Any) -> Retokenized:
    model = ValueModel.from_backbone(
        byte_llama(len(tokenizer), seed=1, **more), ["a", "b"], tokenizer_fingerprint=tokenizer_fingerprint(tokenizer)
    )
    with torch.no_grad():
        model.head.weight.normal_(std=0.5)
    return Retokenized(model, tokenizer, BASE)


@pytest.mark.parametrize(
    ("text", "own", "expected"),
    [
        ("at the end", OWN, "<begin>at the end"),
        ("<s>at the end", OWN, "<begin>at the end"),
        ("<pad><pad>at", OWN, "<begin>at"),
        ("at<|end|>", OWN, "<begin>at<eos>"),
        ("<|turn|>the<|turn|>at", OWN, "<begin><|turn|>the<|turn|>at"),  # as letters
        ("<|turn|>in", SAME_TURNS, "<|turn|>in"),  # as the token of its own
        ("in<|end|>", SAME_TURNS, "in<stop>"),
    ],
)
def test_texts_are_the_same_in_other_tokens(text: str, own: Any, expected: str) -> None:
    found = value_function(own).translated(BASE(text, add_special_tokens=False)["input_ids"])
    assert found == own(expected, add_special_tokens=False)["input_ids"]
    assert own.decode(found) == expected


def test_a_part_of_a_character_counts_once_it_is_whole() -> None:
    function, ids = value_function(), BASE("the é", add_special_tokens=False)["input_ids"]
    whole = OWN("the é")["input_ids"]
    assert function.translated(ids) == whole
    assert function.translated(ids[:-1]) == OWN("the ")["input_ids"]


@pytest.mark.parametrize("own", [OWN, SAME_TURNS], ids=["own", "same turns"])
def test_the_scorer_agrees_with_reading_from_scratch(own: Any) -> None:
    function = value_function(own)
    scorer, tracker, rng = RetokenizedScorer(function), RowTracker(), np.random.default_rng(0)
    sequences = [rng.integers(4, len(BASE), size=n) for n in (5, 1, 9)]
    for step in range(8):
        candidates = np.stack([rng.choice(len(BASE), size=4, replace=False) for _ in sequences])
        candidates[0, 0] = BASE.eos_token_id
        given = torch.from_numpy(candidates)
        values = scorer.score(tracker.plan(sequences), given)
        for row, sequence in enumerate(sequences):
            expected = recompute_retokenized(function, sequence, given[row])
            torch.testing.assert_close(values[row], expected, atol=1e-4, rtol=1e-4)
        tracker.update(sequences, candidates)
        sequences = _next(sequences, candidates, rng, len(BASE), step)


def test_a_step_reads_few_tokens_of_a_long_text() -> None:
    function = value_function()
    scorer, fed = RetokenizedScorer(function), []
    function.backbone.register_forward_pre_hook(
        lambda _, args, kwargs: fed.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    tracker, row = RowTracker(), np.array(BASE("the end of the other thing at hand")["input_ids"])
    for _ in range(3):
        candidates = np.array([[10, 20, 30]])
        scorer.score(tracker.plan([row]), torch.from_numpy(candidates))
        tracker.update([row], candidates)
        row = np.append(row, 20)
    assert fed[0] > 60
    assert all(count <= 24 for count in fed[1:]), fed


def prompts() -> dict[str, Any]:
    inputs = BASE(["at the", "other than"], return_tensors="pt", padding=True, return_token_type_ids=False)
    return {**inputs, "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}


@pytest.mark.parametrize("mixed", [False, True])
def test_processor_and_sampling_are_algorithm_2(mixed: bool) -> None:
    base = byte_llama(len(BASE), seed=0)
    function = value_function()
    given: Any = {"a": make_head(base, "a"), "b": function} if mixed else function
    settings: dict[str, Any] = {"weights": {"a": 0.7, "b": 0.3}, "beta": 3.0, "top_k": 6, "model": base}
    mavis = MavisLogitsProcessor(given, tokenizer=BASE, **settings)
    recorder = Recorder(mavis)
    found = base.generate(**prompts(), logits_processor=[recorder])
    for ids, scores, out in recorder.calls:
        for row in range(len(ids)):
            text = ids[row][int((ids[row] != 0).int().argmax()) :]
            expected = slow_policy(mavis, base, text, scores[row])
            torch.testing.assert_close(out[row].double().exp(), expected, atol=1e-4, rtol=1e-3)
    strategy = MavisSampling(given, tokenizer=BASE, **settings)
    assert torch.equal(base.generate(**prompts(), custom_generate=strategy), found)
    assert not torch.equal(base.generate(**prompts()), found)
    search = MavisBestOfN(given, num_samples=2, **settings)
    assert torch.isfinite(
        base.generate(**prompts() | {"do_sample": True}, custom_generate=search, return_dict_in_generate=True).values
    ).all()
    assert recompute_all(mavis.functions, base, text, torch.tensor([5, 6])).shape == (2, 2)


def test_another_tokenizer_is_refused_with_this_way_out() -> None:
    base, function = byte_llama(len(BASE), seed=0), value_function()
    with pytest.raises(ValueError, match=r"tokens of another tokenizer.*retokenized\.Retokenized\(value_model"):
        MavisLogitsProcessor(function.model, model=base, tokenizer=BASE)
    with pytest.raises(ValueError, match="tokens of another tokenizer"):  # made for BASE
        MavisLogitsProcessor(function, model=base, tokenizer=OWN)
    with pytest.raises(ValueError, match="tokens of another tokenizer"):  # not its own
        Retokenized(function.model, SAME_TURNS, BASE)
    with pytest.raises(ValueError, match="expected a ValueModel, got ValueHead"):
        Retokenized(make_head(make_base(), "a"), OWN, BASE)  # type: ignore[arg-type]


def test_what_cannot_be_read_is_told() -> None:
    base = byte_llama(len(BASE), seed=0)
    short = value_function(max_position_embeddings=12)
    mavis = MavisLogitsProcessor(short, top_k=4, model=base)
    long = BASE(["the other thing at hand"], return_tensors="pt", return_token_type_ids=False)
    with pytest.raises(ValueError, match=r"longer than the 12 that the value model for \['a', 'b'\] can read"):
        base.generate(**long, max_new_tokens=3, logits_processor=[mavis])
    with pytest.raises(ValueError, match="nothing is left of the text"):
        value_function(SAME_TURNS).translated([0, 0])


def test_it_is_copied_pickled_and_mixed_like_any_other() -> None:
    base, function = byte_llama(len(BASE), seed=0), value_function()
    settings: dict[str, Any] = {"beta": 3.0, "top_k": 6, "model": base}
    expected = base.generate(**prompts(), logits_processor=[MavisLogitsProcessor(function, **settings)])
    for twin in (copy.deepcopy(function), pickle.loads(pickle.dumps(function))):
        found = base.generate(**prompts(), logits_processor=[MavisLogitsProcessor(twin, **settings)])
        assert torch.equal(found, expected)
    assert make_value_model("a").config.tokenizer_fingerprint is None  # and one of no recorded tokenizer can be wrapped
    assert Retokenized(make_value_model("a"), OWN, BASE).config.objectives == ["a"]
