"""Grammars of other libraries in front of ours: the text keeps to them, and what is valued is what they allow."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel

from mavis_logits import MavisBeamSearch, MavisBestOfN, MavisLogitsProcessor, MavisSampling
from processor_checks import BETA, WEIGHTS, K, Recorder, assert_algorithm_2
from strategy_checks import letter_tokenizer
from tiny import EOS, PAD, VOCABULARY, make_value_model

PATTERN = "(yes|no)[0-9]{3}"
Constraint = dict[str, Any]  # arguments of generate


def tokenizer() -> Any:
    own = letter_tokenizer()
    own.eos_token = "<eos>"
    return own


def transformers_own(base: PreTrainedModel) -> Constraint:
    """A function of the text so far, as transformers takes it: what may come next of every answer there is."""
    own = tokenizer()
    every = [list(f"{word}{number:03}") for word in ("yes", "no") for number in range(1000)]
    ids = {(*own.convert_tokens_to_ids(answer), EOS) for answer in every}
    prefixes: dict[tuple[int, ...], set[int]] = {}
    for answer in ids:
        for end in range(len(answer)):
            prefixes.setdefault(answer[:end], set()).add(answer[end])

    def allowed(row: int, text: Tensor) -> list[int]:
        return sorted(prefixes.get(tuple(text[2:].tolist()), {PAD}))

    return {"prefix_allowed_tokens_fn": allowed}


def xgrammar(base: PreTrainedModel) -> Constraint:
    xgr = pytest.importorskip("xgrammar")
    from xgrammar.contrib.hf import LogitsProcessor as Grammar

    info = xgr.TokenizerInfo.from_huggingface(tokenizer(), vocab_size=VOCABULARY, stop_token_ids=EOS)
    return {"logits_processor": [Grammar(xgr.GrammarCompiler(info).compile_regex(PATTERN))]}


def outlines(base: PreTrainedModel) -> Constraint:
    library = pytest.importorskip("outlines")
    from outlines.backends import get_regex_logits_processor

    model = library.from_transformers(base, tokenizer())
    return {"logits_processor": [get_regex_logits_processor("outlines_core", model, PATTERN)]}


def lm_format_enforcer(base: PreTrainedModel) -> Constraint:
    """By its core: release 0.11.3's own function for transformers imports what release 5 of that has not."""
    library = pytest.importorskip("lmformatenforcer")
    own = tokenizer()
    letters = [(i, own.decode([i]), False) for i in range(3, VOCABULARY)]
    data = library.TokenEnforcerTokenizerData(letters, own.decode, EOS, False, VOCABULARY)
    enforcer = library.TokenEnforcer(data, library.RegexParser(PATTERN))

    def allowed(row: int, text: Tensor) -> list[int]:
        return enforcer.get_allowed_tokens(text.tolist()).allowed_tokens or [PAD]

    return {"prefix_allowed_tokens_fn": allowed}


LIBRARIES: list[Callable[[PreTrainedModel], Constraint]] = [transformers_own, xgrammar, outlines, lm_format_enforcer]
IDS = [library.__name__ for library in LIBRARIES]


def call(**more: Any) -> dict[str, Any]:
    ids = torch.tensor([tokenizer().convert_tokens_to_ids(list(prompt)) for prompt in ("ab", "xy", "Q?")])
    return {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 9, "pad_token_id": PAD,
        "eos_token_id": EOS, "do_sample": True, "top_k": 0, **more,
    }  # fmt: skip


def answers(output: Tensor) -> list[str]:
    return ["".join(tokenizer().convert_ids_to_tokens([t for t in row[2:].tolist() if t > 2])) for row in output]


@pytest.mark.parametrize("library", LIBRARIES, ids=IDS)
def test_a_grammar_in_front_is_kept_to_and_what_it_allows_is_tilted_as_algorithm_2_says(
    library: Callable[[PreTrainedModel], Constraint], base: PreTrainedModel
) -> None:
    mavis = MavisLogitsProcessor(make_value_model("a", "b"), WEIGHTS, BETA, model=base, top_k=K)
    recorder, constraint = Recorder(mavis), library(base)
    processors = [*constraint.pop("logits_processor", []), recorder]
    torch.manual_seed(0)
    output = base.generate(**call(**constraint), logits_processor=processors)
    assert all(re.fullmatch(PATTERN, answer) for answer in answers(output)), answers(output)
    # Every step but those with one choice, or in ended rows, moves the scores, and as it should.
    assert_algorithm_2(recorder, base)
    plain = library(base)
    torch.manual_seed(0)
    assert not torch.equal(base.generate(**call(**plain)), output), "steering changes what is written"


@pytest.mark.parametrize("library", LIBRARIES, ids=IDS)
def test_strategies_put_it_in_front_by_themselves(
    library: Callable[[PreTrainedModel], Constraint], base: PreTrainedModel
) -> None:
    values = make_value_model("a", "b")
    sampling = MavisSampling(values, WEIGHTS, BETA, model=base, top_k=K)
    mavis = MavisLogitsProcessor(values, WEIGHTS, BETA, model=base, top_k=K)
    constraint = library(base)
    processors = [*constraint.pop("logits_processor", []), mavis]
    expected = base.generate(**call(**constraint, do_sample=False, top_k=None), logits_processor=processors)
    found = base.generate(**call(**library(base), do_sample=False, top_k=None), custom_generate=sampling)
    width = min(found.shape[1], expected.shape[1])
    assert torch.equal(found[:, :width], expected[:, :width])
    assert answers(found) == answers(expected)


@pytest.mark.parametrize("kind", [MavisBeamSearch, MavisBestOfN])
def test_searches_keep_to_a_function_of_the_text(kind: type, base: PreTrainedModel) -> None:
    """Grammars with a state of every row are refused by them, by name (`test_generate_processors`)."""
    number = {MavisBeamSearch: {"num_beams": 3}, MavisBestOfN: {"num_samples": 3}}[kind]
    search = kind(make_value_model("a", "b"), WEIGHTS, BETA, model=base, top_k=K, **number)
    output = base.generate(**call(**transformers_own(base)), custom_generate=search)
    assert all(re.fullmatch(PATTERN, answer) for answer in answers(output)), answers(output)


class Only(LogitsProcessor):
    """A grammar that allows `tokens` [R, n]."""

    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores + torch.full_like(scores, -torch.inf).scatter(1, self.tokens, 0.0)


def test_behind_ours_it_is_kept_to_as_well_but_nothing_that_it_allows_has_been_valued(base: PreTrainedModel) -> None:
    """Why it must come first: behind, the choice among what is allowed is the reference's, whatever the values."""
    given = call(max_new_tokens=1, return_dict_in_generate=True, output_scores=True)
    allowed = base(given["input_ids"]).logits[:, -1].argsort(dim=1)[:, 1:3]  # the least likely of all but one
    odds = {}
    for in_front in (True, False):
        for beta in (0.0, 6.0):
            mavis = MavisLogitsProcessor(make_value_model("a", "b"), WEIGHTS, beta, model=base, top_k=K)
            processors = [Only(allowed), mavis] if in_front else [mavis, Only(allowed)]
            scores = base.generate(**given, logits_processor=processors).scores[0].gather(1, allowed)
            assert torch.isfinite(scores).all()
            odds[in_front, beta] = scores[:, 0] - scores[:, 1]
    torch.testing.assert_close((odds[True, 6.0] - odds[True, 0.0]).abs(), torch.full((3,), 6.0))  # min-max of two
    assert torch.equal(odds[False, 6.0], odds[False, 0.0])
