"""The distribution of one step, whatever is cut, kept or budgeted, against its definition in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from mavis_logits import MavisConfig
from mavis_logits.steering.policy import Policy, Requests, likeliest
from mavis_logits.steering.steering import Steering
from tiny import VOCABULARY, make_base, make_head, make_value_model

HEAD = make_head(make_base(), "a", "b")
NORMALIZATIONS = ["minmax", "gap", "center", "none", "standard"]


def steering(log_prob_weight: list[float] | None = None, **settings: Any) -> Steering:
    head = HEAD
    if log_prob_weight is not None:
        head = make_head(make_base(), "a", "b")
        head.config.log_prob_weight = log_prob_weight
    return Steering(head, {"a": 0.7, "b": 0.3}, model=make_base(), **settings)


def scores_of(seed: int, rows: int = 3, spread: float = 3.0) -> Tensor:
    torch.manual_seed(seed)
    scores = spread * torch.randn(rows, VOCABULARY)
    scores[torch.rand_like(scores) < 0.2] = -torch.inf  # banned by an earlier processor
    return scores


def definition(mavis: Steering, scores: Tensor, values: Tensor) -> Tensor:
    """[V] the policy after one row of scores, by the settings' own words; values [V] are combined ones."""
    config = mavis.config
    log_ref = torch.log_softmax(scores.double() / config.reference_temperature, dim=0)
    order = log_ref.argsort(descending=True, stable=True)
    candidates = [int(i) for i in order[: config.top_k] if torch.isfinite(log_ref[i])]
    if config.candidate_min_p is not None:
        best = float(log_ref.exp().max())
        candidates = [i for i in candidates if float(log_ref[i].exp()) >= config.candidate_min_p * best * (1 - 1e-6)]
    v = values[candidates].double()
    nat = float(mavis.policy.weights @ mavis.functions.log_prob_weights())
    stretched = config.normalize in ("minmax", "gap")
    if stretched:
        v = v + nat * log_ref[candidates]
    low, high = v.min(), v.max()
    if config.normalize == "minmax":
        v = (v - low) / (high - low) if high > low else torch.zeros_like(v)
    elif config.normalize == "gap":
        v = (v - low) / max(float(high - low), config.gap_floor)
    elif config.normalize == "center":
        v = v - v.mean()
    policy = torch.zeros(len(scores), dtype=torch.float64) if config.unscored == "drop" else log_ref.exp()
    if config.unscored == "expected":
        v = v - (log_ref[candidates].softmax(dim=0) * v).sum()
    if not stretched:
        v = v + nat * log_ref[candidates]
        others = policy.index_fill(0, torch.tensor(candidates), 0.0)
        if others.any():  # alike among themselves: by what log pi_ref of one of them is in expectation
            expected = float((others * log_ref.nan_to_num(neginf=0.0)).sum() / others.sum())
            policy = policy * torch.exp(torch.tensor(float(mavis.beta) * nat * expected, dtype=torch.float64))
    policy[candidates] = log_ref[candidates].exp() * torch.exp(float(mavis.beta) * v)
    return policy / policy.sum()


settings = st.fixed_dictionaries(
    {
        "top_k": st.sampled_from([1, 5, 40, VOCABULARY, None]),
        "candidate_min_p": st.sampled_from([None, 0.01, 0.3, 1.0]),
        "normalize": st.sampled_from(NORMALIZATIONS),
        "unscored": st.sampled_from(["drop", "keep", "expected"]),
        "reference_temperature": st.sampled_from([1.0, 0.6]),
        "beta": st.sampled_from([0.0, 3.0]),
        "log_prob_weight": st.sampled_from([None, [0.2, 0.4], [0.3, -0.5], [0.0, 0.0]]),
    }
)


@given(settings, st.integers(0, 10**6))
def test_a_step_is_what_its_settings_say(given_settings: dict[str, Any], seed: int) -> None:
    mavis = steering(**given_settings)
    scores = scores_of(seed)
    choice = mavis.policy.choose(scores)
    everything = torch.randn(len(scores), VOCABULARY)
    values = torch.stack([everything, everything], dim=-1).gather(1, choice.candidates[..., None].expand(-1, -1, 2))
    scored = mavis.policy.worth_scoring(choice)
    step = mavis.policy.tilt(choice, values.masked_fill(~scored[..., None], 0.0))
    policy = step.log_probs(VOCABULARY).double().exp()
    for row in range(len(scores)):
        expected = definition(mavis, scores[row], everything[row])
        torch.testing.assert_close(policy[row], expected, atol=1e-5, rtol=1e-3)
        log_ref = torch.log_softmax(scores[row].double() / mavis.config.reference_temperature, dim=0)
        present = expected > 0
        kl = (expected[present] * (expected[present].log() - log_ref[present])).sum()
        assert float(step.kl[row]) == pytest.approx(float(kl), abs=1e-4)
        kept = torch.isfinite(step.others[row])
        assert bool(kept) == (mavis.config.unscored != "drop")


@given(st.integers(0, 10**6), st.floats(0.0, 2.0), st.sampled_from(["none", "center", "standard"]))
def test_log_pi_ref_alone_is_a_lower_temperature(seed: int, weight: float, normalize: str) -> None:
    mavis = steering([weight, weight], top_k=None, normalize=normalize, beta=0.5)  # the weights sum to 1
    scores = scores_of(seed)
    step = mavis.policy.step(scores, lambda choice, _: torch.zeros(*choice.candidates.shape, 2))
    expected = torch.log_softmax(scores.double() * (1 + 0.5 * weight), dim=1)
    torch.testing.assert_close(step.log_probs(VOCABULARY).double().exp(), expected.exp(), atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("unscored", ["drop", "keep", "expected"])
def test_weights_say_how_far_log_pi_ref_counts_in_each_row(unscored: str) -> None:
    mavis = steering([0.5, 0.0], top_k=7, normalize="none", beta=1.0, unscored=unscored)
    scores = scores_of(3, rows=2)
    values = torch.randn(2, 7, 2)
    mavis.weights = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    both = mavis.policy.step(scores, lambda choice, _: values).log_probs(VOCABULARY)
    for row, weights in enumerate(({"a": 1.0}, {"b": 1.0})):
        mavis.weights = weights
        alone = mavis.policy.step(scores, lambda choice, _: values).log_probs(VOCABULARY)
        torch.testing.assert_close(both[row], alone[row])
    assert not mavis.policy.sharpens  # the last one's does not count: nothing is computed for it


def test_a_budget_counts_what_log_pi_ref_moves() -> None:
    mavis = steering([0.5, 0.1], top_k=20, normalize="standard", unscored="expected", kl_budget=0.3)
    step = mavis.policy.step(scores_of(0, spread=1.0), lambda choice, _: torch.randn(*choice.candidates.shape, 2))
    torch.testing.assert_close(step.kl, torch.full((3,), 0.3), atol=1e-3, rtol=1e-3)


@given(st.integers(0, 10**6), st.sampled_from([3, 40]), st.floats(-5, 5))
def test_expected_values_of_the_others_follow_a_shift_of_all(seed: int, k: int, shift: float) -> None:
    """As adding a number to all values changes nothing: what is not scored is neither favoured nor disfavoured."""
    mavis = steering(top_k=k, normalize="none", unscored="expected", beta=2.0)
    scores = scores_of(seed)
    choice = mavis.policy.choose(scores)
    values = torch.randn(*choice.candidates.shape, 2)
    one, other = (mavis.policy.tilt(choice, v).log_probs(VOCABULARY) for v in (values, values + shift))
    torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    alike = mavis.policy.tilt(choice, torch.full_like(values, shift))
    torch.testing.assert_close(alike.log_probs(VOCABULARY), scores.log_softmax(dim=1), atol=1e-4, rtol=1e-4)
    assert (alike.kl.abs() < 1e-4).all()


def test_what_is_left_beside_near_certain_candidates_is_counted_exactly() -> None:
    """Pushed down from nearly all of the probability, candidates leave it to others that had a millionth of it."""
    mavis = steering(top_k=6, normalize="none", unscored="keep", beta=1.0)
    scores = torch.full((1, VOCABULARY), -15.0)
    scores[0, :6] = torch.arange(6.0)
    step = mavis.policy.step(scores, lambda choice, _: torch.full((*choice.candidates.shape, 2), -12.0))
    expected = definition(mavis, scores[0], torch.full((VOCABULARY,), -12.0))
    log_ref = torch.log_softmax(scores[0].double(), dim=0)
    assert float(step.kl) == pytest.approx(float((expected * (expected.log() - log_ref)).sum()), rel=1e-4)
    torch.testing.assert_close(step.log_probs(VOCABULARY)[0].double().exp(), expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("top_k", [6, 60, None])
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_a_budget_is_spent_over_any_number_of_candidates(top_k: int | None, normalize: str) -> None:
    mavis = steering(top_k=top_k, normalize=normalize, kl_budget=2.0)
    choice = mavis.policy.choose(scores_of(0, rows=5))
    step = mavis.policy.tilt(choice, torch.randn(*choice.candidates.shape, 2))
    cut = -choice.reference.logsumexp(dim=1)  # what no beta lowers
    best = step.combined.masked_fill(~choice.mask, -torch.inf).argmax(dim=1, keepdim=True)
    most = -choice.reference.gather(1, best)[:, 0]  # what no beta exceeds
    torch.testing.assert_close(step.kl, torch.maximum(cut, most.clamp(max=2.0)), atol=1e-3, rtol=1e-3)


@given(st.integers(0, 10**6), st.floats(0.01, 1.0))
def test_a_lone_candidate_needs_no_value(seed: int, share: float) -> None:
    mavis = steering(top_k=15, candidate_min_p=share)
    choice = mavis.policy.choose(scores_of(seed))
    counts = choice.mask.sum(dim=1)
    assert (counts >= 1).all()
    assert torch.equal(mavis.policy.worth_scoring(choice).sum(dim=1), torch.where(counts > 1, counts, 0))


def test_rows_of_one_request_share_its_weights() -> None:
    mavis = steering(top_k=8)
    mavis.weights = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    choice = mavis.policy.choose(scores_of(1, rows=4))
    values = torch.randn(4, 8, 2)
    step = mavis.policy.tilt(choice, values, Requests(torch.tensor([1, 0, 0, 1])))
    mask = choice.mask
    for row, objective in enumerate((1, 0, 0, 1)):
        torch.testing.assert_close(step.combined[row], values[row, :, objective].masked_fill(~mask[row], 0.0))


@given(st.integers(0, 10**6), st.floats(0.01, 100.0), st.floats(0.01, 100.0))
def test_in_standard_units_the_unit_of_a_reward_does_not_matter(seed: int, first: float, second: float) -> None:
    scores, weights, unit = scores_of(seed), torch.tensor([0.7, 0.3]), torch.tensor([first, second])
    config = MavisConfig(normalize="standard", top_k=9)
    plain = Policy(config, weights, torch.tensor(2.0), torch.ones(2))
    other = Policy(config, weights, torch.tensor(2.0), unit)
    choice = plain.choose(scores)
    values = torch.randn(*choice.candidates.shape, 2)
    torch.testing.assert_close(
        other.tilt(choice, values * unit).tilted, plain.tilt(choice, values).tilted, atol=1e-4, rtol=1e-4
    )


def test_standard_units_are_those_of_the_value_functions() -> None:
    head = make_head(make_base(), "a", "b")
    head.config.reward_scale = [4.0, 0.5]
    mavis = Steering(head, {"a": 0.7, "b": 0.3}, model=make_base(), normalize="standard")
    torch.testing.assert_close(mavis.policy.weights_of(torch.zeros(1)), torch.tensor([0.7 / 4.0, 0.3 / 0.5]))
    mavis.weights = {"a": 1.0, "b": 1.0}
    torch.testing.assert_close(mavis.policy.weights_of(torch.zeros(1)), torch.tensor([0.25, 2.0]))
    mavis.config = MavisConfig(normalize="none")
    torch.testing.assert_close(mavis.policy.weights_of(torch.zeros(1)), torch.ones(2))


def test_uncut_steering_is_for_heads_alone() -> None:
    with pytest.raises(ValueError, match="top_k=None scores the whole vocabulary, which only value heads can"):
        Steering(make_value_model("a"), top_k=None)


@pytest.mark.parametrize("share", [0.0, -0.1, 1.1, float("nan"), "much"])
def test_a_share_out_of_range_is_refused(share: Any) -> None:
    with pytest.raises(ValueError, match="candidate_min_p must be above 0 and at most 1"):
        steering(candidate_min_p=share)


@example(0, 0.48, 5000, "spread")  # parts of two tokens, all of which are among the best
@given(
    st.integers(0, 10_000),
    st.one_of(st.integers(1, 9), st.integers(60, 97), st.floats(0.0, 1.0)),  # of the last a share of the vocabulary
    st.sampled_from([97, 128, 1000, 5000, 5121, 60_000]),  # parts of parts in the last
    st.sampled_from(["spread", "ties", "banned", "nan"]),
)
def test_the_likeliest_are_those_of_topk(seed: int, k: int | float, vocabulary: int, kind: str) -> None:
    k = k if isinstance(k, int) else max(1, round(k * vocabulary))
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(3, vocabulary, generator=generator)
    if kind == "ties":
        scores = scores.round()
    if kind == "banned":  # all but a few, in some rows fewer than k
        scores[torch.rand(3, vocabulary, generator=generator) > 0.001] = -torch.inf
    if kind == "nan":
        scores[1, int(torch.randint(vocabulary, (), generator=generator))] = torch.nan
    values, indices = likeliest(scores, k)
    wanted = scores.topk(k, dim=1).values
    torch.testing.assert_close(values, wanted, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(scores.gather(1, indices), wanted, rtol=0, atol=0, equal_nan=True)
    assert all(len(set(row)) == k for row in indices.tolist())
