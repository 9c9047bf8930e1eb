"""Where an answer is steered: spans by their marks, and scores that stay as they were outside, bit for bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LogitsProcessor

from chat_model import chat_model
from mavis_logits import MavisLogitsProcessor, MavisSampling
from mavis_logits.steering.regions import CODE, JSON, THINKING, Regions, Span, _open
from mavis_logits.values.value_head import ValueHead
from mavis_logits.values.value_model import ValueModel

W = Span("w5", "w6")


@pytest.mark.parametrize(
    ("before", "text", "span", "inside"),
    [
        ("", "a <think> b", THINKING, True),
        ("", "a <think> b </think>", THINKING, False),
        ("", "a <think> b </think> c <think>", THINKING, True),
        ("assistant\n<think>", "b", THINKING, True),
        ("assistant\n<think>", "b </think> c", THINKING, False),
        ("<think> said the user", "b", THINKING, False),
        ("", "```py\nx\n``", CODE, True),
        ("", "```py\nx\n```", CODE, False),
        ("", "</think> a", THINKING, False),
        ("", '{"a": {"b": 1}', JSON, True),
        ("", '{"a": {"b": 1}}', JSON, False),
        ("", "{} {", JSON, True),
        ("", "}{", JSON, True),
    ],
)
def test_a_span_is_open_from_its_mark_to_the_one_that_closes_it(before, text, span, inside) -> None:
    assert _open(before, text, span) is inside


@given(st.text(alphabet="{}a", max_size=30))
def test_brackets_are_counted(text) -> None:
    depth = 0
    for letter in text:
        depth = max(0, depth + {"{": 1, "}": -1, "a": 0}[letter])
    assert _open("", text, JSON) is (depth > 0)


@given(st.lists(st.sampled_from(["<think>", "</think>", "x"]), max_size=12))
def test_what_is_inside_is_what_reading_on_tells(parts) -> None:
    inside = False
    for part in parts:
        inside = part == "<think>" or (inside and part != "</think>")
    assert _open("", "".join(parts), THINKING) is inside


class Kept(LogitsProcessor):
    """Keeps every step's scores and ids."""

    def __init__(self) -> None:
        self.steps: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __call__(self, input_ids, scores):
        self.steps.append((input_ids.clone(), scores.clone()))
        return scores


def value(kind: str):
    torch.manual_seed(0)
    model, _ = chat_model()
    if kind == "head":
        made = ValueHead.for_model(model, ["a"], width=16)
        torch.nn.init.normal_(made.out.weight)
    else:
        made = ValueModel.from_backbone(chat_model()[0], ["a"])
        torch.nn.init.normal_(made.head.weight)
    return made


def steps(kind: str, regions, requests: int = 3, tokenizer=None, **how):
    """Scores before and after steering of every step, and the length of the prompts."""
    model, own = chat_model()
    tokenizer = tokenizer or own
    mavis = MavisLogitsProcessor(
        {"a": value(kind)}, model=model, tokenizer=tokenizer, beta=4.0, top_k=20, regions=regions
    )
    prompts = ["w3 w4", "w7 w8 w9 w10", "w11"][:requests]
    encoded = [
        tokenizer.apply_chat_template([{"role": "user", "content": p}], add_generation_prompt=True) for p in prompts
    ]
    batch = tokenizer.pad({"input_ids": [e["input_ids"] for e in encoded]}, return_tensors="pt", padding_side="left")
    before, after = Kept(), Kept()
    torch.manual_seed(how.pop("seed", 0))
    model.generate(
        **batch, logits_processor=[before, mavis, after], max_new_tokens=40, pad_token_id=tokenizer.pad_token_id,
        **({"do_sample": True, "top_k": 0} | how),
    )  # fmt: skip
    return before.steps, after.steps, batch["input_ids"].shape[1], tokenizer, mavis


@pytest.mark.parametrize("how", [{}, {"do_sample": False, "num_beams": 3}])
@pytest.mark.parametrize("kind", ["head", "model"])
def test_outside_not_a_bit_changes_and_inside_it_is_as_if_there_were_no_regions(kind, how) -> None:
    """Spans of words that the model happens to write; steered steps against a processor that sees the text anew."""
    regions = Regions(skip=[Span("w5", "w1"), Span("w20", "w2")])
    before, after, start, tokenizer, _ = steps(kind, regions, **how)
    twin = MavisLogitsProcessor({"a": value("model")}, tokenizer=tokenizer, beta=4.0, top_k=20)
    seen = set()
    for (ids, plain), (_, shown) in zip(before, after, strict=True):
        for row in range(len(ids)):
            new = ids[row, start:].tolist()
            if tokenizer.eos_token_id in new:
                continue
            inside = regions.steers(ids[row, :start].tolist(), new, tokenizer)
            seen.add(inside)
            if not inside:
                assert torch.equal(plain[row], shown[row])
            elif kind == "model":
                twin.reset()
                text = ids[row][(ids[row] != tokenizer.pad_token_id).nonzero()[0, 0] :]
                torch.testing.assert_close(twin(text[None], plain[row : row + 1])[0], shown[row], atol=2e-4, rtol=1e-4)
            else:
                assert not torch.equal(plain[row], shown[row])
    assert seen == {True, False}


def test_each_request_has_its_own() -> None:
    every = [None, Regions(first=3), Regions(most=2)]
    before, after, start, tokenizer, _ = steps("head", every, num_return_sequences=2)
    for (ids, plain), (_, shown) in zip(before, after, strict=True):
        count = ids.shape[1] - start
        for row in range(6):
            if tokenizer.eos_token_id in ids[row, start:].tolist():
                continue
            wanted = [True, count >= 3, count < 2][row // 2]
            assert torch.equal(plain[row], shown[row]) is not wanted


def test_only_within_some_marks_and_where_a_prompt_opens_one() -> None:
    _, tokenizer = chat_model()

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    only = Regions(only=[W])
    assert not only.steers(ids("w1"), ids("w3 w4"), tokenizer)
    assert only.steers(ids("w1"), ids("w3 w5 w4"), tokenizer)
    assert not only.steers(ids("w1"), ids("w3 w5 w4 w6 w7"), tokenizer)
    assert only.steers(ids("w1 w5"), ids("w3"), tokenizer)
    both = Regions(skip=[W], first=1, most=4)
    assert [both.steers(ids("w1"), ids(" ".join(["w3"] * n)), tokenizer) for n in range(6)] == [
        False, True, True, True, False, False,
    ]  # fmt: skip


def test_a_trace_counts_nothing_outside() -> None:
    model, tokenizer = chat_model()
    mavis = MavisLogitsProcessor(
        value("head"), model=model, tokenizer=tokenizer, beta=4.0, trace=True, regions=Regions(first=4)
    )
    batch = tokenizer(["w3 w4 w5"], return_tensors="pt")
    torch.manual_seed(0)
    output = model.generate(
        **batch, do_sample=True, max_new_tokens=9, min_new_tokens=9, logits_processor=[mavis],
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    new = output[:, batch["input_ids"].shape[1] :]
    ratios = mavis.trace.log_ratios(new)[0]
    assert (ratios[:4] == 0).all()
    assert (ratios[4:] != 0).any()
    assert [float(step.kl) for step in mavis.trace][:4] == [0.0] * 4


def test_what_cannot_be_is_refused() -> None:
    model, tokenizer = chat_model()
    with pytest.raises(ValueError, match="regions look for marks"):
        MavisLogitsProcessor(value("head"), model=model, regions=Regions(skip=[W]))
    MavisLogitsProcessor(value("head"), model=model, regions=Regions(first=2))  # which needs no tokenizer
    with pytest.raises(ValueError, match="must be Regions"):
        MavisLogitsProcessor(value("head"), model=model, tokenizer=tokenizer, regions="thinking")
    with pytest.raises(ValueError, match="steers whole answers"):
        MavisSampling(value("head"), model=model, tokenizer=tokenizer, regions=Regions(first=2))
    with pytest.raises(ValueError, match="list of Span"):
        Regions(skip=W)
    with pytest.raises(ValueError, match="numbers of tokens"):
        Regions(first=-1)
    with pytest.raises(ValueError, match="at either end"):
        Span("", "x")
    with pytest.raises(ValueError, match="regions are given for 2 requests"):
        steps("head", [Regions(first=1)] * 2)
