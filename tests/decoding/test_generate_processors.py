"""Constraints beside ours: in front, behind, with a state of every row, indexed by row, or allowing nothing."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel, SynthIDTextWatermarkingConfig

from mavis_logits import (
    MavisBeamSearch,
    MavisBestOfN,
    MavisBlockwise,
    MavisLogitsProcessor,
    MavisSampling,
    MavisTreeSearch,
)
from strategy_checks import ENDS
from test_generate_arguments import SlowSampling, functions
from tiny import EOS, PAD, VOCABULARY, make_head, make_value_model

K = 6
PROMPTS = torch.tensor([[5, 6, 7, 8, 9], [PAD, PAD, PAD, 10, 11], [PAD, 12, 13, 14, 15], [20, 21, 22, 23, 24]])
CALL = {
    "input_ids": PROMPTS, "attention_mask": (PROMPTS != PAD).long(), "pad_token_id": PAD, "eos_token_id": ENDS,
    "max_new_tokens": 9, "do_sample": False,
}  # fmt: skip
SEARCHES = {
    "beams": (MavisBeamSearch, {"num_beams": 3}),
    "best of n": (MavisBestOfN, {"num_samples": 3}),
    "pruned": (MavisBestOfN, {"num_samples": 4, "prune": {2: 2}}),
    "blockwise": (MavisBlockwise, {"num_blocks": 2, "block_length": 2}),
    "tree": (MavisTreeSearch, {"num_simulations": 3}),
}


class Forbid(LogitsProcessor):
    """Forbids everything, from the n-th token on."""

    def __init__(self, tokens: int = 0) -> None:
        self.tokens = tokens

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return torch.full_like(scores, -torch.inf) if input_ids.shape[1] >= 5 + self.tokens else scores


class Only(LogitsProcessor):
    """Allows the tokens that are the least likely of all, for each row its own."""

    def __init__(self, allowed: Tensor) -> None:
        self.allowed = allowed

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        mask = torch.full_like(scores, -torch.inf).scatter(1, self.allowed, 0.0)
        return scores + mask


class EverySecond(LogitsProcessor):
    """A state of every row: a token may be written once, as counted from call to call."""

    def __init__(self) -> None:
        self.seen: list[set[int]] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.seen = self.seen or [set() for _ in input_ids]
        assert len(input_ids) == len(self.seen)
        for row, seen in zip(input_ids, self.seen, strict=True):
            seen.add(int(row[-1]) % 7)
        mask = torch.tensor([[token % 7 in seen for token in range(VOCABULARY)] for seen in self.seen])
        return scores.masked_fill(mask & (mask.sum(1, keepdim=True) < VOCABULARY), -torch.inf)


class Columns(LogitsProcessor):
    """Something for every row of the batch that it was made for."""

    def __init__(self, table: Tensor) -> None:
        self.table = table

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores + self.table[: len(scores)]


class SinceBegin(LogitsProcessor):
    """Sets something up when it is first called, and counts its calls, to no effect."""

    def __init__(self) -> None:
        self.begin: int | None = None
        self.calls = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.calls += 1
        self.begin = input_ids.shape[1] if self.begin is None else self.begin
        return scores.index_fill(1, torch.tensor([50 + input_ids.shape[1] - self.begin]), -torch.inf)


def watermark() -> LogitsProcessor:
    config = SynthIDTextWatermarkingConfig(keys=[3, 5, 7, 11], ngram_len=3)
    return config.construct_processor(VOCABULARY, "cpu")  # type: ignore[no-any-return]


def strategy(base: PreTrainedModel, kind: type = MavisSampling, **settings: Any) -> Any:
    return kind(**functions(base), model=base, top_k=K, **settings)


@pytest.mark.parametrize("make", [EverySecond, watermark], ids=["own", "synthid"])
def test_a_state_of_every_row_stays_right_when_rows_have_ended(base: PreTrainedModel, make: Any) -> None:
    output = base.generate(**CALL, logits_processor=[make()], custom_generate=strategy(base))
    assert len({row.tolist().index(PAD, 5) if PAD in row[5:] else len(row) for row in output}) > 1, (
        "rows must end early"
    )
    assert torch.equal(
        output, base.generate(**CALL, logits_processor=[make()], custom_generate=SlowSampling(base, PROMPTS))
    )


@pytest.mark.parametrize("kind", SEARCHES)
def test_searches_refuse_a_state_of_every_row(base: PreTrainedModel, kind: str) -> None:
    search, settings = SEARCHES[kind]
    for make, name in ((EverySecond, "EverySecond"), (watermark, "watermarking_config")):
        with pytest.raises(ValueError, match=rf"{name}.*keeps a state of every row.*{search.__name__}.*MavisSampling"):
            base.generate(
                **CALL | {"do_sample": True},
                logits_processor=[make()],
                custom_generate=strategy(base, search, **settings),
            )


@pytest.mark.parametrize("kind", SEARCHES)
def test_searches_show_rows_under_the_numbers_of_their_prompts(base: PreTrainedModel, kind: str) -> None:
    search, settings = SEARCHES[kind]
    table = torch.full((len(PROMPTS), VOCABULARY), -torch.inf)
    for row in range(len(PROMPTS)):
        table[row, 3 + row :: 4] = 0.0  # disjoint

    def allowed(row: int, ids: Tensor) -> list[int]:
        return list(range(3 + row, VOCABULARY, 4))

    call = CALL | {"do_sample": True, "top_k": 0, "eos_token_id": EOS}
    outputs = []
    for given in ({"logits_processor": [Columns(table)]}, {"prefix_allowed_tokens_fn": allowed}):
        steered = strategy(base, search, **settings)  # makes models, with random weights, when it is first called
        torch.manual_seed(0)
        output = base.generate(**call, **given, custom_generate=steered)
        assert all((row[5:] % 4 == (3 + number) % 4).all() for number, row in enumerate(output))
        outputs.append(output)
    assert torch.equal(*outputs)


def test_what_is_set_up_once_and_what_is_only_noted_is_no_state(base: PreTrainedModel) -> None:
    for kind in ("beams", "best of n"):
        search, settings = SEARCHES[kind]
        processor = SinceBegin()
        output = base.generate(
            **CALL | {"do_sample": True},
            logits_processor=[processor],
            custom_generate=strategy(base, search, **settings),
        )
        assert processor.calls > 3
        for step, column in enumerate(output[:, 5:].unbind(1)):
            assert not (column == 50 + step).any()


def test_several_sequences_of_a_prompt_find_their_entries(base: PreTrainedModel) -> None:
    table = torch.full((2 * len(PROMPTS), VOCABULARY), -torch.inf)
    for row in range(len(PROMPTS)):
        table[2 * row : 2 * row + 2, 3 + row :: 4] = 0.0
    call = CALL | {"do_sample": True, "num_return_sequences": 2, "eos_token_id": EOS, "encoder_repetition_penalty": 1.5}
    for kind in (strategy(base), strategy(base, MavisBestOfN, num_samples=3)):
        output = base.generate(**call, logits_processor=[Columns(table)], custom_generate=kind)
        assert all((row[5:] % 4 == (3 + number // 2) % 4).all() for number, row in enumerate(output))


@pytest.mark.parametrize("sample", [False, True])
@pytest.mark.parametrize("beams", [1, 3])
def test_a_constraint_behind_that_allows_no_candidate_gets_its_likeliest_token(
    base: PreTrainedModel, sample: bool, beams: int
) -> None:
    with torch.no_grad():
        logits = torch.stack([base(row[row != PAD][None]).logits[0, -1] for row in PROMPTS])
    allowed = logits.topk(3, largest=False).indices  # the last is the likeliest of them
    every = allowed.repeat_interleave(beams, dim=0)
    mavis = MavisLogitsProcessor(make_value_model("a"), beta=2.0, top_k=K, model=base)
    output = base.generate(
        **CALL | {"max_new_tokens": 1, "do_sample": sample, "num_beams": beams}, logits_processor=[mavis, Only(every)]
    )
    assert torch.equal(output[:, -1], allowed[:, -1])


def test_tokens_that_are_no_candidates_have_no_probability(base: PreTrainedModel) -> None:
    mavis = MavisLogitsProcessor(make_value_model("a"), beta=2.0, top_k=K, candidate_min_p=0.2, model=base)
    scores = torch.stack([torch.randperm(VOCABULARY) for _ in range(4)]) / 25
    scores[:, 40:50] = -torch.inf
    out = mavis(PROMPTS, scores)
    assert torch.isneginf(out[:, 40:50]).all()
    for temperature in (1.0, 100.0):
        probabilities = torch.softmax(out.double() / temperature, dim=-1)
        assert ((probabilities > 0).sum(1) <= K).all()
    behind = (out < -1e5) & (torch.arange(VOCABULARY) != EOS)
    assert (behind.sum(1) >= VOCABULARY - 10 - K - 1).all()
    order, expected = (x.masked_fill(~behind, -torch.inf).argsort(dim=1, descending=True) for x in (out, scores))
    assert torch.equal(order[:, :20], expected[:, :20])
    assert (out[:, EOS] < -1e9).any(), "an end of text that is no candidate comes last"


@pytest.mark.parametrize("settings", [{}, {"unscored": "keep"}, {"unscored": "expected"}, {"candidate_min_p": 0.1}])
def test_nothing_allowed_is_said_so(base: PreTrainedModel, settings: dict[str, Any]) -> None:
    processor = MavisLogitsProcessor(make_value_model("a"), beta=1.0, top_k=K, model=base, **settings)
    head = MavisLogitsProcessor(make_head(base, "a"), beta=1.0, top_k=None, model=base, **settings)
    for tokens in (0, 2):
        for steering in (
            {"logits_processor": [Forbid(tokens), copy.copy(processor)]},
            {"logits_processor": [Forbid(tokens), head]},
            {"logits_processor": [Forbid(tokens)], "custom_generate": strategy(base, **settings)},
            {
                "logits_processor": [Forbid(tokens)],
                "custom_generate": strategy(base, MavisBlockwise, num_blocks=1, sample_from="reference"),
            },
        ):
            with pytest.raises(ValueError, match="every token is forbidden after row"):
                base.generate(**CALL | {"eos_token_id": None}, **steering)


def test_an_ended_row_may_have_nothing_allowed(base: PreTrainedModel) -> None:
    class EndOfGrammar(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            ended = torch.isin(input_ids[:, 5:], torch.tensor(ENDS)).any(dim=1)
            return scores.masked_fill(ended[:, None], -torch.inf)

    base.generation_config.eos_token_id = ENDS
    mavis = MavisLogitsProcessor(**functions(base), model=base, top_k=K)
    free = base.generate(**CALL, logits_processor=[mavis])
    assert (free[:, 5:] == PAD).any()
    assert torch.equal(base.generate(**CALL, logits_processor=[EndOfGrammar(), mavis]), free)
