"""What strategies ask of a `Session`: rows that become other sequences are as if they had been written that way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from mavis_logits import MavisBeamSearch, MavisBestOfN, MavisBlockwise, MavisSampling, ValueHead
from mavis_logits.decoding.strategies.session import Session
from mavis_logits.testing import recompute_head_values, recompute_values
from strategy_checks import ENDS, Damage
from tiny import PAD, VOCABULARY, make_base, make_head, make_value_model

CANDIDATES = torch.arange(20, 24)


class WidthBias(LogitsProcessor):
    """Adds what it is shown to the scores: the width of the ids, and their sum."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores + input_ids.shape[1] + 0.01 * input_ids.sum(dim=1, keepdim=True)


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [
        ("llama", "llama"),
        ("llama", "head"),
        ("llama", "inner head"),
        ("gpt2", "gemma2"),
        ("gemma3", "gpt2"),
        ("mistral", "mamba"),
    ],
)
def test_replaced_rows_are_as_if_written_so(architecture: str, kind: str, prompts: dict[str, Tensor]) -> None:
    """Any sequence after any other, of any length: distributions and values equal those of a forward from scratch."""
    base = make_base(architecture)
    if kind in ("head", "inner head"):
        value: Any = make_head(base, "a", "b", layer=1 if kind == "inner head" else None)
    else:
        value = make_value_model("a", "b", architecture=kind)
    mavis = MavisSampling(value, model=base, top_k=5)
    ids, mask = prompts["input_ids"], prompts["attention_mask"]
    starts = [row[keep.bool()].tolist() for row, keep in zip(ids, mask, strict=True)]
    padding = [ids.shape[1] - len(row) for row in starts]
    generator = torch.Generator().manual_seed(0)
    before = [[20]] * 3
    with torch.no_grad(), Session(mavis, base, ids, mask, LogitsProcessorList([WidthBias()])) as session:
        session.score()
        for step in range(6):
            written = torch.randint(3, VOCABULARY, (3, 6), generator=generator).tolist()
            written = [row[: (step + r) % 4 + 1] for r, row in enumerate(written)]
            if step % 2:  # they share a token with what was there
                written = [[previous[0], *row] for previous, row in zip(before, written, strict=True)]
            sequences = [start + row for start, row in zip(starts, written, strict=True)]
            session.replace(sequences, PAD)
            scores, values = session.reference(), session.values(CANDIDATES.expand(3, -1))
            for r, sequence in enumerate(sequences):
                shown = torch.tensor([[PAD] * padding[r] + sequence])
                logits = base(torch.tensor([sequence])).logits[:, -1]
                torch.testing.assert_close(scores[r], WidthBias()(shown, logits)[0], atol=1e-3, rtol=1e-3)
                if isinstance(value, ValueHead):
                    expected = recompute_head_values(value, base, sequence, CANDIDATES)
                else:
                    expected = recompute_values(value, sequence, CANDIDATES)
                torch.testing.assert_close(values[r], expected, atol=1e-3, rtol=1e-3)
            before = written


def test_rows_left_over_are_shown_at_their_own_width(base: Any, prompts: dict[str, Tensor]) -> None:
    mavis = MavisSampling(make_value_model("a"), top_k=5)
    with Session(mavis, base, prompts["input_ids"], prompts["attention_mask"]) as session:
        session.replace([[5, 6, 7, 8, 9, 20, 21, 22], [10, 11, 23], [12, 13, 14, 15, 24]], PAD)
        assert [(rows, ids.shape[1]) for rows, ids in session.by_width()] == [([1, 2], 6), ([0], 8)]
        session.select(torch.tensor([1, 2]))
        ((rows, ids),) = session.by_width()
        assert rows == [0, 1]
        assert ids.tolist() == [[PAD, PAD, PAD, 10, 11, 23], [PAD, 12, 13, 14, 15, 24]]


def test_weights_per_prompt_hold_for_all_its_sequences(base: Any, prompts: dict[str, Tensor]) -> None:
    """Given per prompt, for each returned sequence, or one by one: the same text."""
    value = make_value_model("a", "b")
    weights, beta = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]]), torch.tensor([1.0, 2.0, 3.0])
    texts = []
    for repeats in (1, 2):
        mavis = MavisSampling(value, weights.repeat_interleave(repeats, 0), beta.repeat_interleave(repeats, 0), top_k=5)
        torch.manual_seed(0)
        texts.append(
            base.generate(**prompts, do_sample=True, num_return_sequences=2, max_new_tokens=6, custom_generate=mavis)
        )
    assert torch.equal(*texts)
    mavis.weights = weights[:2]
    with pytest.raises(ValueError, match="weights are given for 2 requests, but the batch has 3 rows"):
        base.generate(**prompts, max_new_tokens=6, custom_generate=mavis)


@pytest.mark.parametrize("returned", [1, 2])
@pytest.mark.parametrize("strategy", [MavisSampling, MavisBestOfN, MavisBlockwise])
def test_the_repetition_penalty_is_that_of_each_row(
    strategy: Any, returned: int, base: Any, prompts: dict[str, Tensor]
) -> None:
    """It knows the padding of every row of the batch, of which rows leave and others multiply."""
    settings = {"repetition_penalty": 1.5, "eos_token_id": ENDS, "max_new_tokens": 15}
    texts = []
    for ids, mask in zip(prompts["input_ids"], prompts["attention_mask"], strict=True):
        prompt = ids[mask.bool()][None]
        texts += [base.generate(prompt, do_sample=False, **settings)[0, prompt.shape[1] :].tolist()] * returned
    assert len(set(map(len, texts))) > 1
    settings |= {"do_sample": True, "top_k": 1, "num_return_sequences": returned}  # only the likeliest can be sampled
    output = base.generate(**prompts, custom_generate=strategy(make_value_model("a"), top_k=5), **settings)
    for text, row in zip(texts, output[:, prompts["input_ids"].shape[1] :].tolist(), strict=True):
        assert row[: len(text)] == text
        assert set(row[len(text) :]) <= {PAD}


@pytest.mark.parametrize("strategy", [MavisSampling, MavisBestOfN, MavisBeamSearch, MavisBlockwise])
@pytest.mark.parametrize("kind", ["model", "head"])
def test_damaged_models_are_told(kind: str, strategy: Any, base: Any, prompts: dict[str, Tensor]) -> None:
    value = make_value_model("a") if kind == "model" else make_head(base, "a")
    settings: dict[str, Any] = {"do_sample": True, "max_new_tokens": 4, "custom_generate": strategy(value, top_k=5)}
    with pytest.raises(ValueError, match="the base model's scores hold NaN"):
        base.generate(**prompts, logits_processor=[Damage()], **settings)
    with torch.no_grad():
        for parameter in value.parameters():
            parameter.fill_(torch.nan)
    with pytest.raises(ValueError, match="the value function for 'a' gave nan"):
        base.generate(**prompts, **settings)
