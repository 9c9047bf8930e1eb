"""Totals and traces of steering."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mavis_logits import MavisLogitsProcessor
from mavis_logits.core.tilting import combine, normalize
from mavis_logits.steering.trace import KEPT, MavisStats, MavisTrace, TraceStep
from tiny import EOS, PAD, VOCABULARY, make_base, make_head, make_value_model


def step(length: int, rows: int = 2, **changed: Any) -> dict[str, Any]:
    """A step over the candidates 1 to 3, each of whose log-ratios is its number / 10 plus the length."""
    candidates = torch.tensor([[1, 2, 3]]).expand(rows, 3)
    reference = torch.full((rows, 3), -2.0)
    return {
        "length": length,
        "live": torch.ones(rows, dtype=torch.bool),
        "candidates": candidates,
        "reference": reference,
        "tilted": reference + candidates / 10 + length,
        "values": torch.zeros(rows, 3, 1),
        "beta": torch.ones(rows),
        "kl": torch.full((rows,), 0.25),
        "taken": torch.full((rows,), -1),
    } | changed


def make_trace(*steps: dict[str, Any]) -> MavisTrace:
    trace = MavisTrace(["a"], frozenset({EOS}))
    for each in steps:
        trace.add(**each)
    return trace


def test_stats_add_up() -> None:
    stats = MavisStats()
    assert stats.kl == 0.0
    stats.add(3, torch.tensor([0.5, 0.25, 0.0]), 0.5)
    stats.add(2, torch.tensor([0.25, 1.0]), 0.25)
    assert (stats.steps, stats.tokens, stats.seconds, stats.passed_through) == (2, 5, 0.75, 0)
    assert stats.kl == pytest.approx(2.0)


def test_log_ratios_are_those_of_the_tokens_taken() -> None:
    trace = make_trace(step(5), step(6))
    assert len(trace) == 2
    assert [each.length for each in trace] == [5, 6]  # type: ignore[attr-defined]
    ratios = trace.log_ratios(torch.tensor([[2, 3], [3, 2]]))
    torch.testing.assert_close(ratios, torch.tensor([[5.2, 6.3], [5.3, 6.2]]))


def test_nothing_counts_after_the_end_of_a_row() -> None:
    trace = make_trace(step(5), step(6), step(7, live=torch.tensor([False, True])))
    ratios = trace.log_ratios(torch.tensor([[EOS, 0, 0], [2, 3, EOS]]))
    torch.testing.assert_close(ratios, torch.tensor([[5.1, 0.0, 0.0], [5.2, 6.3, 7.1]]))


def test_a_row_that_is_not_live_counts_nothing() -> None:
    trace = make_trace(step(5), step(6, live=torch.tensor([False, True])))
    torch.testing.assert_close(trace.log_ratios(torch.tensor([[2, 9], [2, 2]]))[:, 1], torch.tensor([0.0, 6.2]))


def test_fewer_tokens_than_steps_are_fine() -> None:
    assert make_trace(step(5), step(6)).log_ratios(torch.tensor([[2], [2]])).shape == (2, 1)


@pytest.mark.parametrize(
    ("completions", "message"),
    [
        ([[2, 2, 2], [2, 2, 2]], r"2 rows x 3 tokens, but the trace holds 2 steps of \{2\} rows"),
        ([[2, 2]], r"1 rows x 2 tokens, but the trace holds 2 steps of \{2\} rows"),
        ([[2, 2], [2, 9]], r"token 1 of row 1 \(9\) was none of the 3 candidates that the trace holds"),
    ],
)
def test_completions_of_another_call_are_refused(completions: list[list[int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_trace(step(5), step(6)).log_ratios(torch.tensor(completions))


def test_an_empty_trace_refuses_completions() -> None:
    with pytest.raises(ValueError, match="the trace holds 0 steps"):
        make_trace().log_ratios(torch.tensor([[2]]))


def test_the_token_taken_is_filled_in() -> None:
    trace = make_trace(step(5))
    trace.took(torch.tensor([2, 3]))
    assert trace[0].taken.tolist() == [2, 3]
    trace.took(torch.tensor([7]))  # of another batch: not ours
    assert trace[0].taken.tolist() == [2, 3]
    MavisTrace(["a"]).took(torch.tensor([1]))


def wide_step(length: int, rows: int = 2, k: int = 5000, **changed: Any) -> dict[str, Any]:
    """A step over k candidates with random probabilities before and after the tilt."""
    torch.manual_seed(length)
    wide = {
        "candidates": torch.arange(k).expand(rows, k),
        "reference": torch.randn(rows, k).log_softmax(1),
        "tilted": torch.randn(rows, k).log_softmax(1),
        "values": torch.randn(rows, k, 2),
    }
    return step(length, rows, **wide) | changed


@given(st.integers(1, 40), st.integers(1, 60), st.integers(0, 2**31))
def test_a_narrowed_step_keeps_the_likeliest_and_the_token_taken(count: int, k: int, seed: int) -> None:
    torch.manual_seed(seed)
    taken = torch.randint(-1, k, (3,)) + 100
    taken[taken == 99] = -1
    candidates = torch.stack([torch.randperm(k) + 100 for _ in range(3)])
    wide = TraceStep(**(wide_step(5, rows=3, k=k) | {"candidates": candidates, "taken": taken}))
    narrow = wide.narrow(count)
    for row in range(3):
        kept = [wide.candidates[row].tolist().index(token) for token in narrow.candidates[row].tolist()]
        assert kept == sorted(set(kept))  # in their order, each once
        assert len(kept) == min(k, count)
        assert taken[row] < 0 or int(taken[row]) in narrow.candidates[row].tolist()
        for name in ("reference", "tilted"):
            assert torch.equal(getattr(narrow, name)[row], getattr(wide, name)[row, kept])
            first = getattr(wide, name)[row].topk(min(k, (count - 1) // 2)).indices.tolist()
            assert set(first) <= set(kept)
        assert torch.equal(narrow.values[row], wide.values[row, kept])


def test_a_long_trace_over_a_whole_vocabulary_holds_one_full_step() -> None:
    def held(trace: MavisTrace) -> int:
        tensors = [each for traced in trace.steps for each in vars(traced).values() if isinstance(each, torch.Tensor)]
        return sum({each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}.values())

    one, many = make_trace(wide_step(5)), make_trace(*(wide_step(5 + t) for t in range(10)))
    a_kept_one = 2 * KEPT * (8 + 4 + 4 + 2 * 4) + 100
    assert held(many) <= held(one) + 9 * a_kept_one
    assert len(many) == 10
    assert many[9].reference.shape == (2, 5000)


def test_log_ratios_over_a_whole_vocabulary_are_those_of_the_tokens_taken() -> None:
    steps = [wide_step(5 + t) for t in range(4)]
    completions = torch.stack([each["tilted"].argmin(dim=1) for each in steps], dim=1)  # the least likely of all
    trace = MavisTrace(["a", "b"])
    for t, each in enumerate(steps):
        trace.add(**each)
        if t < 3:
            trace.took(completions[:, t])
    for t, each in enumerate(steps):
        expected = (each["tilted"] - each["reference"]).gather(1, completions[:, t, None])[:, 0]
        assert torch.equal(trace.log_ratios(completions)[:, t], expected)
    completions[0, 1] = steps[1]["candidates"][0, -1]
    with pytest.raises(ValueError, match=f"none of the {KEPT} candidates that the trace holds"):
        trace.log_ratios(completions)


def test_a_banned_candidate_cannot_have_been_taken() -> None:
    banned = torch.full((2, 3), -torch.inf)
    with pytest.raises(ValueError, match="token 0 of row 0 \\(2\\) was none of"):
        make_trace(step(5, reference=banned, tilted=banned)).log_ratios(torch.tensor([[2], [2]]))


def test_steps_of_rejected_drafts_are_replaced() -> None:
    trace = make_trace(step(5), step(6), step(7))
    trace.took(torch.tensor([3, 3]))
    trace.add(**step(7, beta=torch.full((2,), 9.0)))
    assert [each.length for each in trace.steps] == [5, 6, 7]
    assert trace[2].beta.tolist() == [9.0, 9.0]
    trace[1].taken.fill_(3)  # a draft
    trace.add(**step(7))
    assert trace[1].taken.tolist() == [-1, -1]


def test_stats_and_trace_over_a_whole_vocabulary_are_exact(
    prompts: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against Algorithm 2 over all tokens in float64, from the base model's scores and the head's values."""
    monkeypatch.setattr("mavis_logits.steering.trace.KEPT", 8)
    base = make_base()
    head, weights, beta = make_head(base, "a", "b"), torch.tensor([0.3, 0.7]), 4.0
    mavis = MavisLogitsProcessor(
        head, weights, beta, top_k=None, model=base, pad_token_id=PAD, eos_token_id=EOS, trace=True
    )
    width = prompts["input_ids"].shape[1]
    out = base.generate(
        **prompts, do_sample=True, max_new_tokens=5, suppress_tokens=[EOS], logits_processor=[mavis],
        output_hidden_states=True, output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    completions, total = out.sequences[:, width:], 0.0
    assert mavis.trace is not None
    ratios = mavis.trace.log_ratios(completions)
    for t in range(5):
        # generate bans tokens before it calls the processors it was given
        reference = out.logits[t].double().index_fill(1, torch.tensor([EOS]), -torch.inf).log_softmax(1)
        values = head(out.hidden_states[t][-1][:, -1], None).detach().double()
        mask = torch.isfinite(reference)
        policy = (reference + beta * normalize(combine(values, weights), mask)).log_softmax(1)
        gap = torch.where(mask, policy - reference, 0.0)
        torch.testing.assert_close(
            ratios[:, t].double(), gap.gather(1, completions[:, t, None])[:, 0], atol=1e-5, rtol=0
        )
        kl = (policy.exp() * gap).sum(1)
        torch.testing.assert_close(mavis.trace[t].kl.double(), kl, atol=1e-5, rtol=0)
        total += float(kl.sum())
        assert mavis.trace[t].candidates.shape == (3, VOCABULARY if t == 4 else 8)
    assert mavis.stats.kl == pytest.approx(total, abs=1e-4)
    assert (mavis.stats.steps, mavis.stats.tokens) == (5, 15)


@pytest.mark.filterwarnings("ignore")  # transformers' own, about how its assistant is called
def test_log_ratios_after_assisted_decoding_are_those_of_decoding_alone() -> None:
    base, draft = make_base(), make_base()
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    settings = {"top_k": 6, "pad_token_id": PAD, "eos_token_id": EOS, "trace": True}
    assisted, alone = (MavisLogitsProcessor(make_value_model("a"), beta=3.0, **settings) for _ in range(2))
    prompt = torch.tensor([[5, 6, 7, 8]])
    torch.manual_seed(3)
    out = base.generate(
        prompt, do_sample=True, max_new_tokens=12, assistant_model=draft, suppress_tokens=[EOS],
        logits_processor=[assisted],
    )  # fmt: skip
    assert assisted.stats.steps > 12  # the assistant's drafts, too
    with torch.no_grad():
        for end in range(4, 16):
            logits = base(out[:, :end]).logits[:, -1]
            alone(out[:, :end], logits.index_fill(1, torch.tensor([EOS]), -torch.inf))
    assert assisted.trace is not None
    assert alone.trace is not None
    torch.testing.assert_close(
        assisted.trace.log_ratios(out[:, 4:]), alone.trace.log_ratios(out[:, 4:]), atol=1e-4, rtol=0
    )
