"""Every argument of `generate` works with processor and strategies as slow twins say, or is refused by its name."""

from __future__ import annotations

import inspect
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from generate_table import CALL, ENDS, FIELDS, GENERATE, MORE, PROMPTS, REFUSED, UNREAD, WORKS, Row, page
from mavis_logits import MavisBeamSearch, MavisBestOfN, MavisLogitsProcessor, MavisSampling
from mavis_logits.decoding.strategies.arguments import HONOURED
from mavis_logits.decoding.strategies.arguments import REFUSED as NAMED
from mavis_logits.decoding.strategies.sampling import sample_index
from mavis_logits.testing import recompute_head_values
from tiny import PAD, make_base, make_head, make_value_model

K, BETA = 6, 3.0
WEIGHTS = {"a": 0.7, "b": 0.3}
EVERY = FIELDS + CALL + MORE


class Slow(LogitsProcessor):
    """Algorithm 2 as an obvious twin: every row's text is read from scratch, without padding or cache."""

    def __init__(self, base: PreTrainedModel, prompts: Tensor) -> None:
        self.base, self.prompts = base, prompts
        self.head, self.model = functions(base)["value_functions"].values()

    def tilted(self, row: Tensor, prompt: int, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Candidates [k] after a row, the likeliest first, and log pi [k]."""
        text = row[int((self.prompts[prompt] == PAD).sum()) :]
        top = torch.log_softmax(scores.float(), dim=-1).topk(min(K, len(scores)))
        reference, candidates = top.values, top.indices
        texts = torch.cat([text.expand(len(candidates), -1), candidates[:, None]], dim=1)
        with torch.no_grad():
            model = self.model(texts).values[:, -1, 0]
        head = recompute_head_values(self.head, self.base, text, candidates)[:, 0]
        combined = WEIGHTS["a"] * head + WEIGHTS["b"] * model
        own = combined[torch.isfinite(reference)]
        spread = (own.max() - own.min()).clamp(min=1e-9)
        return candidates, torch.log_softmax(reference + BETA * (combined - own.min()) / spread, dim=-1)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if (scores == scores[0, 0]).all():  # prompt lookup asks which tokens are forbidden
            return scores
        result = torch.full_like(scores, -torch.inf)
        for number, row in enumerate(input_ids):
            prompt = number * len(self.prompts) // len(input_ids)
            candidates, log_probs = self.tilted(row, prompt, scores[number])
            result[number, candidates] = log_probs
        return result


class SlowSampling(Slow):
    """The same as a `custom_generate`: all rows stay, the base model reads every text from scratch."""

    @torch.no_grad()
    def __call__(  # type: ignore[override]
        self, model: Any, input_ids: Tensor, logits_processor: Any, stopping_criteria: Any, generation_config: Any,
        **_: Any,
    ) -> Tensor:  # fmt: skip
        config, ids = generation_config, input_ids
        unfinished = torch.ones(len(ids), dtype=torch.bool)
        prompts = [n * len(self.prompts) // len(ids) for n in range(len(ids))]
        while unfinished.any():
            starts = [int((self.prompts[prompt] == PAD).sum()) for prompt in prompts]
            logits = torch.cat([model(row[None, start:]).logits[:, -1] for row, start in zip(ids, starts, strict=True)])
            scores = logits_processor(ids, logits.float())
            steps = [self.tilted(row, prompts[i], scores[i]) for i, row in enumerate(ids) if unfinished[i]]
            log_probs = torch.stack([own for _, own in steps])
            drawn = sample_index(log_probs) if config.do_sample else log_probs.argmax(dim=1)
            tokens = torch.full((len(ids),), int(config._pad_token_tensor))
            tokens[unfinished] = torch.stack([own for own, _ in steps]).gather(1, drawn[:, None])[:, 0]
            ids = torch.cat([ids, tokens[:, None]], dim=1)
            unfinished &= ~stopping_criteria(ids, None)
        return ids


def arguments(row: Row, strategy: bool) -> tuple[dict[str, Any], Tensor]:
    """Those of a call with the case of a row, and the prompts."""
    given = dict((row.strategies if strategy and row.strategies is not None else row.case)())
    ids = given.get("input_ids", PROMPTS[:1] if row.one else PROMPTS)
    ids = PROMPTS if ids is None else ids
    call = {"do_sample": False, "max_new_tokens": 4, "pad_token_id": PAD, "eos_token_id": ENDS, "input_ids": ids}
    call["attention_mask"] = (ids != PAD).long()
    call |= given
    if "generation_config" in given:
        call = {name: call[name] for name in ("generation_config", "input_ids", "attention_mask")}
    return {name: value for name, value in call.items() if value is not None}, ids


@cache
def shared_base() -> PreTrainedModel:
    """For tests that leave it as it is."""
    return make_base()


@cache
def functions(base: PreTrainedModel) -> dict[str, Any]:
    both = {"a": make_head(base, "a"), "b": make_value_model("b")}
    return {"value_functions": both, "weights": WEIGHTS, "beta": BETA}


def run(base: PreTrainedModel, call: dict[str, Any], **more: Any) -> Tensor:
    """`generate`, after seeding; processors of the case stand in front."""
    torch.manual_seed(0)
    steering = more.pop("logits_processor", [])
    every = LogitsProcessorList([*call.get("logits_processor", []), *steering])
    output = base.generate(**{**call, "logits_processor": every}, **more)
    return output if isinstance(output, Tensor) else output.sequences


def strategy(base: PreTrainedModel, kind: type = MavisSampling, **settings: Any) -> Any:
    return kind(**functions(base), model=base, top_k=K, pad_token_id=PAD, **settings)


def test_the_page_is_that_of_the_table() -> None:
    assert (Path(__file__).parents[2] / "docs" / "generate.md").read_text() == page()


def test_no_argument_of_this_release_is_unknown() -> None:
    fields = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    assert fields <= {row.name for row in FIELDS}
    assert fields <= HONOURED | set(NAMED)
    parameters = set(inspect.signature(GenerationMixin.generate).parameters) - {"self", "kwargs"}
    assert parameters <= {row.name for row in CALL}


def test_the_code_refuses_what_the_table_says() -> None:
    assert set(NAMED) == {row.name for row in FIELDS if row.sampling == REFUSED}
    assert set(HONOURED) == {row.name for row in FIELDS if row.sampling != REFUSED}


def here(rows: list[Row]) -> list[Row]:
    """Those of the installed release, with something to try."""
    known = {*vars(GenerationConfig()), *inspect.signature(GenerationMixin.generate).parameters}
    return [row for row in rows if row in MORE or row.name in known]


@pytest.mark.parametrize("row", here(EVERY), ids=lambda row: row.name)
def test_processor(row: Row) -> None:
    base = shared_base()
    call, ids = arguments(row, strategy=False)
    if row.processor == GENERATE:
        for steering in ([], [MavisLogitsProcessor(**functions(base), model=base, top_k=K)]):
            with pytest.raises((ValueError, NotImplementedError, TypeError, AttributeError)):
                run(base, call, logits_processor=steering)
        return
    mavis = MavisLogitsProcessor(**functions(base), model=base, top_k=K)
    if row.processor == REFUSED:
        with pytest.raises(ValueError, match=row.says.get("processor", row.name)):
            run(base, call, logits_processor=[mavis])
        return
    assert row.processor in (WORKS, UNREAD)
    steered = run(base, call, logits_processor=[mavis])
    assert mavis.stats.steps
    call, _ = arguments(row, strategy=False)  # caches, criteria and streamers are used up
    assert torch.equal(steered, run(base, call, logits_processor=[Slow(base, ids)]))
    if row.processor == UNREAD:
        call, ids = arguments(Row("", WORKS, WORKS, WORKS, one=row.one), strategy=False)
        assert torch.equal(steered, run(base, call, logits_processor=[Slow(base, ids)]))


@pytest.mark.parametrize("row", here(EVERY), ids=lambda row: row.name)
def test_sampling(row: Row) -> None:
    base = shared_base()
    call, ids = arguments(row, strategy=True)
    if row.sampling == GENERATE:  # whatever decodes
        for decoding in (strategy(base), SlowSampling(base, ids)):
            with pytest.raises(ValueError, match="tokenizer"):
                run(base, call, custom_generate=decoding)
        return
    if row.sampling == REFUSED:
        with pytest.raises(ValueError, match=row.says.get("sampling", row.name)):
            run(base, call, custom_generate=strategy(base))
        return
    assert row.sampling in (WORKS, UNREAD)
    steered = run(base, call, custom_generate=strategy(base))
    call, _ = arguments(row, strategy=True)
    assert torch.equal(steered, run(base, call, custom_generate=SlowSampling(base, ids)))


@pytest.mark.parametrize("row", here(EVERY), ids=lambda row: row.name)
def test_searches(row: Row) -> None:
    base = shared_base()
    call, _ = arguments(row, strategy=True)
    if row.searches == GENERATE:
        with pytest.raises(ValueError, match="tokenizer"):
            run(base, call, custom_generate=strategy(base, MavisBeamSearch))
        return
    if row.searches == REFUSED:
        with pytest.raises(ValueError, match=row.says.get("searches", row.name)):
            run(base, call, custom_generate=strategy(base, MavisBeamSearch))
        return
    # One sample of each prompt is what MavisSampling writes.
    call |= {"num_return_sequences": 1} if "num_return_sequences" in call else {}
    alone = run(base, call, custom_generate=strategy(base))
    call = arguments(row, strategy=True)[0] | ({"num_return_sequences": 1} if "num_return_sequences" in call else {})
    assert torch.equal(run(base, call, custom_generate=strategy(base, MavisBestOfN, num_samples=1)), alone)


def test_a_field_that_a_newer_release_adds_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    base, (call, _) = make_base(), arguments(FIELDS[0], strategy=True)
    monkeypatch.setattr("mavis_logits.decoding.strategies.arguments.HONOURED", HONOURED - {"repetition_penalty"})
    assert torch.equal(run(base, call, custom_generate=strategy(base)), run(base, call, custom_generate=strategy(base)))
    with pytest.raises(ValueError, match=r"does not know repetition_penalty=1\.5"):
        run(base, call, custom_generate=strategy(base), repetition_penalty=1.5)


def test_what_a_model_comes_with_is_no_reason_to_refuse_it() -> None:
    base, (call, _) = make_base(), arguments(FIELDS[0], strategy=True)
    plain = run(base, call, custom_generate=strategy(base))
    base.generation_config.update(cache_implementation="static", length_penalty=2.0, early_stopping=True)
    assert torch.equal(run(base, call, custom_generate=strategy(base)), plain)
    with pytest.raises(ValueError, match=r"length_penalty=0\.5"):
        run(base, call, custom_generate=strategy(base), length_penalty=0.5)
