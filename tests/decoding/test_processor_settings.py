"""What each setting of the processor does, what it records, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor

from mavis_logits import MavisLogitsProcessor
from processor_checks import BETA, WEIGHTS, K, Recorder, assert_algorithm_2, steer, strip
from tiny import EOS, PAD, VOCABULARY, make_base, make_head, make_value_model


def test_weights_per_request_reach_their_samples(base: Any, prompts: dict[str, Tensor]) -> None:
    mavis = steer("model", base).inner
    mavis.weights = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]])
    together = base.generate(**prompts, do_sample=False, max_new_tokens=6, logits_processor=[mavis])
    for row, weights in enumerate([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]]):
        mavis.weights = weights
        alone = base.generate(
            strip(prompts["input_ids"][row])[None], do_sample=False, max_new_tokens=6, logits_processor=[mavis]
        )
        assert torch.equal(strip(together[row])[: alone.shape[1]], alone[0])


def test_value_models_without_weight_rest_until_they_have_some(base: Any, prompts: dict[str, Tensor]) -> None:
    models = {"a": make_value_model("a", seed=3), "b": make_value_model("b", seed=4)}
    mavis = MavisLogitsProcessor(models, [1.0, 0.0], BETA, top_k=K, pad_token_id=PAD, eos_token_id=EOS, trace=True)
    calls = dict.fromkeys(models, 0)
    for name, model in models.items():
        model.backbone.register_forward_hook(lambda *_, name=name: calls.update({name: calls[name] + 1}))
    recorder = Recorder(mavis)
    base.generate(**prompts, do_sample=False, max_new_tokens=4, suppress_tokens=[EOS], logits_processor=[recorder])
    assert calls == {"a": 4, "b": 0}
    assert mavis.trace is not None
    assert mavis.trace[0].values[..., 1].isnan().all()

    class Switch(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            mavis.weights = WEIGHTS if input_ids.shape[1] % 2 else {"b": 1.0}
            out = mavis(input_ids, scores)
            if input_ids.shape[1] % 2:
                recorder.calls.append((input_ids.clone(), scores.clone(), out.clone()))
            return out

    recorder.calls.clear()
    base.generate(**prompts, do_sample=True, max_new_tokens=8, suppress_tokens=[EOS], logits_processor=[Switch()])
    assert_algorithm_2(recorder, base, steered=9)


def test_a_strength_that_is_asked_for_comes_before_a_budget_that_is_recommended() -> None:
    value_model = make_value_model("a")
    value_model.config.settings = {"kl_budget": 0.25, "normalize": "none"}
    assert MavisLogitsProcessor(value_model).config.kl_budget == 0.25
    stronger = MavisLogitsProcessor(value_model, beta=3.0)
    assert stronger.config.kl_budget is None
    assert stronger.beta == 3.0


def test_kl_budget_is_spent_exactly(base: Any, prompts: dict[str, Tensor]) -> None:
    mavis = MavisLogitsProcessor(make_value_model("a"), top_k=VOCABULARY, kl_budget=0.25, trace=True, pad_token_id=PAD)
    base.generate(**prompts, do_sample=True, max_new_tokens=5, suppress_tokens=[EOS], logits_processor=[mavis])
    assert mavis.trace is not None
    for step in mavis.trace:
        torch.testing.assert_close(step.kl, torch.full((3,), 0.25), atol=1e-3, rtol=0)


def test_unscored_keep_leaves_other_tokens_their_score(base: Any, prompts: dict[str, Tensor]) -> None:
    mavis = MavisLogitsProcessor(
        make_value_model("a"), beta=2.0, top_k=4, normalize="center", unscored="keep", pad_token_id=PAD
    )
    scores = torch.randn(3, VOCABULARY)
    out = mavis(prompts["input_ids"], scores)
    others = torch.ones_like(scores, dtype=torch.bool).scatter(1, scores.topk(4).indices, False)
    shift = (out - torch.log_softmax(scores, -1))[others].reshape(3, -1)
    torch.testing.assert_close(shift, shift[:, :1].expand_as(shift))
    assert torch.isfinite(out).all()


def test_reference_temperature_divides_the_reference_only(base: Any, prompts: dict[str, Tensor]) -> None:
    value_model = make_value_model("a")
    scores = torch.randn(3, VOCABULARY)
    hot = MavisLogitsProcessor(value_model, beta=2.0, top_k=5, reference_temperature=2.0, pad_token_id=PAD)
    plain = MavisLogitsProcessor(value_model, beta=2.0, top_k=5, pad_token_id=PAD)
    torch.testing.assert_close(hot(prompts["input_ids"], scores), plain(prompts["input_ids"], scores / 2))


def test_masked_candidates_take_no_part(base: Any, prompts: dict[str, Tensor]) -> None:
    mavis = steer("model", base).inner
    scores = torch.full((3, VOCABULARY), -torch.inf)
    scores[:, 7:10] = torch.randn(3, 3)
    out = mavis(prompts["input_ids"], scores)
    assert torch.isfinite(out[:, 7:10]).all()
    assert torch.isneginf(out[:, :7]).all()
    torch.testing.assert_close(out.exp().sum(-1), torch.ones(3))


def test_trace_and_stats_agree_with_equation_7(base: Any, prompts: dict[str, Tensor]) -> None:
    recorder = steer("model", base, trace=True)
    torch.manual_seed(0)
    width = prompts["input_ids"].shape[1]
    out = base.generate(**prompts, do_sample=True, max_new_tokens=6, logits_processor=[recorder])
    trace = recorder.inner.trace
    assert trace is not None
    ratios = trace.log_ratios(out[:, width:])
    for row in range(3):
        for t, (_, scores, tilted) in enumerate(recorder.calls):
            token = out[row, width + t]
            if t and out[row, width + t - 1] in (EOS, PAD):
                break
            expected = torch.log_softmax(tilted[row], -1)[token] - torch.log_softmax(scores[row], -1)[token]
            torch.testing.assert_close(ratios[row, t], expected, atol=1e-5, rtol=1e-4)
    assert torch.equal(trace[0].taken, out[:, width])
    assert recorder.inner.stats.kl == pytest.approx(sum(float(step.kl.sum()) for step in trace.steps), rel=1e-4)
    base.generate(**prompts, do_sample=True, max_new_tokens=3, logits_processor=[recorder])
    assert len(recorder.inner.trace) == 3


def test_half_precision_base_and_value_models(prompts: dict[str, Tensor]) -> None:
    base = make_base().to(torch.bfloat16)
    mavis = MavisLogitsProcessor(
        {"a": make_value_model("a").to(torch.bfloat16), "b": make_head(base, "b").to(torch.bfloat16)},
        model=base,
        top_k=K,
        pad_token_id=PAD,
    )
    out = base.generate(**prompts, do_sample=True, max_new_tokens=5, logits_processor=[mavis])
    assert out.shape == (3, 10)


def test_nan_scores_and_wrong_dtypes_are_refused(prompts: dict[str, Tensor]) -> None:
    mavis = MavisLogitsProcessor(make_value_model("a"), pad_token_id=PAD)
    with pytest.raises(ValueError, match="scores hold NaN"):
        mavis(prompts["input_ids"], torch.full((3, VOCABULARY), torch.nan))
    with pytest.raises(ValueError, match="whole-number token ids and floating-point scores"):
        mavis(prompts["input_ids"].float(), torch.randn(3, VOCABULARY))
    with pytest.raises(ValueError, match="whole-number token ids and floating-point scores"):
        mavis(prompts["input_ids"], torch.ones(3, VOCABULARY, dtype=torch.long))


def test_another_model_generating_is_noticed(base: Any) -> None:
    mavis = MavisLogitsProcessor(make_head(base, "a"), model=base, pad_token_id=PAD)
    other = make_base(seed=5)
    with pytest.warns(UserWarning, match="is another model generating"):
        other.generate(torch.tensor([[5, 6]]), max_new_tokens=70, eos_token_id=-1, logits_processor=[mavis])
