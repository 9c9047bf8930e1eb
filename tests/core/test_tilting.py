"""The laws of decoding's arithmetic (Algorithm 2, equation 14), for every precision and for extreme input."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from mavis_logits.core.tilting import MAX_BETA, combine, kl_divergence, normalize, solve_beta, tilt

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
METHODS = ["minmax", "gap", "center", "none"]
INF = math.inf

dtypes = st.sampled_from(DTYPES)
betas = st.one_of(st.floats(0, 20), st.sampled_from([0.0, 1e-3, 5.0, 1e3]))
shapes = st.tuples(st.integers(1, 3), st.integers(1, 6))
ordinary_scores = st.floats(-20, 20, width=32)
any_scores = st.one_of(ordinary_scores, st.sampled_from([-INF, -INF, 1e4, -1e4, 0.0]))
# Few distinct values, so that ties are common.
any_values = st.one_of(st.floats(-10, 10, width=32), st.sampled_from([0.0, 1.0, 1.0, -1e4, 1e4]))
calm_values = st.one_of(st.floats(-10, 10, width=32), st.sampled_from([0.0, 1.0, 1.0]))


def tensors(shape: tuple[int, ...], elements: st.SearchStrategy[float]) -> st.SearchStrategy[Tensor]:
    return hnp.arrays("float64", shape, elements=elements).map(torch.from_numpy)


@st.composite
def problems(
    draw: Any, scores: st.SearchStrategy[float] = any_scores, values: st.SearchStrategy[float] = any_values
) -> tuple[Tensor, Tensor]:
    """Scores [R, k], at least one of a row finite, and values [R, k], in float64."""
    shape = draw(shapes)
    drawn = draw(tensors(shape, scores))
    some = torch.isfinite(drawn).any(dim=-1, keepdim=True)
    return torch.where(some, drawn, torch.zeros(())), draw(tensors(shape, values))


@st.composite
def references(draw: Any, values: st.SearchStrategy[float] = calm_values) -> tuple[Tensor, Tensor]:
    """log pi_ref of k candidates of a larger vocabulary, some of them banned, and normalised values in [0, 1]."""
    scores, raw = draw(problems(st.one_of(st.floats(-8, 8, width=32), st.just(-INF)), values))
    rest = draw(st.floats(-8, 8))  # the score of the tokens that are no candidates
    log_ref = torch.log_softmax(torch.cat([scores, torch.full_like(scores[:, :1], rest)], dim=-1), dim=-1)[:, :-1]
    return log_ref, normalize(raw, torch.isfinite(log_ref), "minmax")


def probabilities(scores: Tensor) -> Tensor:
    return torch.softmax(scores, dim=-1)


def epsilon(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


# ---- combine ----


@st.composite
def objectives(draw: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Values [R, k, M] and two weightings, each [M] or [R, M]."""
    rows, k, m = draw(st.integers(1, 3)), draw(st.integers(1, 5)), draw(st.integers(1, 4))
    shape = draw(st.sampled_from([(m,), (rows, m)]))
    weights = st.one_of(st.just(0.0), st.floats(-3, 3, width=16))
    values = draw(tensors((rows, k, m), st.floats(-10, 10, width=16)))
    return values, draw(tensors(shape, weights)), draw(tensors(shape, weights))


@given(objectives(), st.floats(-3, 3))
def test_combining_is_linear_in_lambda(problem: tuple[Tensor, Tensor, Tensor], factor: float) -> None:
    values, first, second = problem
    whole = combine(values, first + factor * second)
    torch.testing.assert_close(whole, combine(values, first) + factor * combine(values, second))


@given(objectives(), dtypes)
def test_combining_is_the_weighted_sum_in_every_precision(
    problem: tuple[Tensor, Tensor, Tensor], dtype: torch.dtype
) -> None:
    values, weights, _ = (x.to(dtype) for x in problem)
    out = combine(values, weights)
    assert out.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert out.shape == values.shape[:2]
    for row in range(len(values)):
        expected = values[row].double() @ (weights if weights.ndim == 1 else weights[row]).double()
        torch.testing.assert_close(out[row].double(), expected, atol=1e-4, rtol=1e-5)


def test_a_zero_weight_takes_an_objective_out() -> None:
    values = torch.tensor([[[1.0, 1e30], [2.0, -1e30]]])
    assert combine(values, torch.tensor([1.0, 0.0])).tolist() == [[1.0, 2.0]]


def test_weights_per_row_reach_their_rows() -> None:
    values = torch.tensor([[[1.0, 2.0]], [[1.0, 2.0]]])
    assert combine(values, torch.tensor([[1.0, 0.0], [0.0, 1.0]])).tolist() == [[1.0], [2.0]]


# ---- normalize ----


@given(problems())
def test_minmax_spreads_every_row_over_the_unit_interval_or_not_at_all(problem: tuple[Tensor, Tensor]) -> None:
    scores, values = problem
    mask = torch.isfinite(scores)
    for row, kept in zip(normalize(values, mask), mask, strict=True):
        out = row[kept]
        assert (out.min(), out.max()) in [(0, 1), (0, 0)]


@given(problems(values=calm_values), st.floats(-100, 100), st.floats(1e-2, 1e2))
def test_minmax_ignores_shift_and_positive_scale(problem: tuple[Tensor, Tensor], shift: float, scale: float) -> None:
    scores, values = problem
    assume(all(row.max() == row.min() or row.max() - row.min() > 1e-3 for row in values))
    mask = torch.isfinite(scores)
    # Row by row over the candidates that take part: their own span is what the law divides by.
    values = torch.where(mask, (values * 100).round() / 100, 1e9)
    torch.testing.assert_close(
        normalize(scale * values + shift, mask), normalize(values, mask), atol=1e-6, rtol=0, check_dtype=False
    )


@given(problems(), st.floats(1e-3, 10))
def test_gap_never_stretches_below_its_floor(problem: tuple[Tensor, Tensor], floor: float) -> None:
    scores, values = problem
    mask = torch.isfinite(scores)
    gap, minmax = normalize(values, mask, "gap", floor), normalize(values, mask, "minmax")
    assert ((gap >= 0) & (gap <= minmax)).all()
    for out, plain, row, kept in zip(gap, minmax, values, mask, strict=True):
        span = row[kept].max() - row[kept].min()
        assert out[kept].max() - out[kept].min() <= span / floor * (1 + 1e-12)
        if span >= floor:
            assert torch.equal(out, plain)


@given(problems())
def test_centered_values_sum_to_zero(problem: tuple[Tensor, Tensor]) -> None:
    scores, values = problem
    out = normalize(values, torch.isfinite(scores), "center")
    assert (out.sum(dim=-1).abs() <= 1e-12 * values.abs().max().clamp(min=1)).all()


@given(problems())
def test_none_leaves_values_as_they_are(problem: tuple[Tensor, Tensor]) -> None:
    scores, values = problem
    mask = torch.isfinite(scores)
    assert torch.equal(normalize(values, mask, "none"), torch.where(mask, values, torch.zeros((), dtype=values.dtype)))


@given(problems(), problems(), st.sampled_from(METHODS))
def test_masked_candidates_take_no_part(problem: tuple[Tensor, Tensor], other: Any, method: Any) -> None:
    scores, values = problem
    mask = torch.isfinite(scores)
    disturbed = torch.where(mask, values, float(other[1].flatten()[0]))
    assert torch.equal(normalize(values, mask, method), normalize(disturbed, mask, method))
    assert not normalize(values, mask, method)[~mask].any()


@pytest.mark.parametrize("method", METHODS)
def test_the_widest_values_stay_finite(method: Any) -> None:
    most = torch.finfo(torch.float32).max
    out = normalize(torch.tensor([[most, -most, 0.0]]), torch.ones(1, 3, dtype=torch.bool), method)
    assert torch.isfinite(out).all()
    if method in ("minmax", "gap"):
        assert out.tolist() == [[1.0, 0.0, 0.5]]


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(ValueError, match=r"normalize must be one of 'minmax', .*'gap', got 'softmax'"):
        normalize(torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool), "softmax")  # type: ignore[arg-type]


# ---- tilt ----


@given(problems(), betas, st.sampled_from(METHODS), dtypes)
def test_never_nan_and_masked_stays_masked(
    problem: tuple[Tensor, Tensor], beta: float, method: Any, dtype: torch.dtype
) -> None:
    scores, values = (x.to(dtype) for x in problem)
    mask = torch.isfinite(scores)
    out = tilt(scores, normalize(values, mask, method), beta)
    assert out.dtype in (torch.float32, torch.float64)
    assert torch.isneginf(out[~mask]).all()
    assert torch.isfinite(out[mask]).all()
    assert torch.isfinite(kl_divergence(out, torch.log_softmax(scores.float(), dim=-1))).all()
    assert not torch.isnan(probabilities(out)).any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_without_any_candidate_is_no_nan_either(dtype: torch.dtype) -> None:
    scores, values = torch.full((1, 3), -INF, dtype=dtype), torch.ones(1, 3, dtype=dtype)
    for method in METHODS:
        out = tilt(scores, normalize(values, torch.isfinite(scores), method), 5.0)  # type: ignore[arg-type]
        assert torch.isneginf(out).all()
    assert kl_divergence(scores, scores).tolist() == [0.0]


@given(problems())
def test_beta_zero_is_the_reference_restricted_to_the_candidates(problem: tuple[Tensor, Tensor]) -> None:
    scores, values = problem
    assert torch.equal(tilt(scores, values, 0.0), scores)


@given(problems(), betas, st.sampled_from(METHODS), st.randoms())
def test_permuting_candidates_permutes_the_result(
    problem: tuple[Tensor, Tensor], beta: float, method: Any, random: Any
) -> None:
    scores, values = problem
    order = random.sample(range(scores.shape[1]), scores.shape[1])
    mask = torch.isfinite(scores)
    whole = tilt(scores, normalize(values, mask, method), beta)[:, order]
    permuted = tilt(scores[:, order], normalize(values[:, order], mask[:, order], method), beta)
    torch.testing.assert_close(permuted, whole)


@given(problems(scores=ordinary_scores), betas)
def test_log_ratio_of_neighbours_moves_by_at_most_beta(problem: tuple[Tensor, Tensor], beta: float) -> None:
    scores, values = problem
    moved = tilt(scores, normalize(values, torch.isfinite(scores)), beta) - scores
    assert (moved[:, :, None] - moved[:, None]).abs().max() <= beta + 1e-12 * (beta + 20)


@given(problems(), st.lists(betas, min_size=3, max_size=3))
def test_beta_per_row_is_each_rows_own(problem: tuple[Tensor, Tensor], each: list[float]) -> None:
    scores, values = problem
    given_betas = torch.tensor(each[: len(scores)], dtype=torch.float64)
    together = tilt(scores, values, given_betas)
    for row, beta in enumerate(given_betas):
        assert torch.equal(together[row], tilt(scores[row : row + 1], values[row : row + 1], beta)[0])


@given(references(), betas, betas)
def test_expected_value_and_divergence_never_fall_as_beta_grows(
    problem: tuple[Tensor, Tensor], one: float, other: float
) -> None:
    log_ref, values = problem
    low, high = (tilt(log_ref, values, beta) for beta in sorted((one, other)))
    expected = [(probabilities(tilted) * values).sum(dim=-1) for tilted in (low, high)]
    assert (expected[0] <= expected[1] + 1e-12).all()
    assert (kl_divergence(low, log_ref) <= kl_divergence(high, log_ref) + 1e-12).all()


@given(references(), st.floats(1e-2, 20), st.data())
def test_no_distribution_on_the_candidates_has_more_value_less_divergence(
    problem: tuple[Tensor, Tensor], beta: float, data: st.DataObject
) -> None:
    log_ref, values = problem

    def objective(log_policy: Tensor) -> Tensor:
        return (probabilities(log_policy) * values).sum(dim=-1) - kl_divergence(log_policy, log_ref) / beta

    best = objective(tilt(log_ref, values, beta))
    rival = data.draw(tensors(tuple(log_ref.shape), st.one_of(st.floats(-8, 8), st.just(-INF))))
    rival = torch.where(torch.isfinite(log_ref) & torch.isfinite(rival).any(dim=-1, keepdim=True), rival, log_ref)
    assume(torch.isfinite(rival).any(dim=-1).all())
    assert (objective(rival) <= best + 1e-9).all()
    nearby = tilt(log_ref, values, beta) + 1e-2 * data.draw(tensors(tuple(log_ref.shape), st.floats(-1, 1)))
    assert (objective(nearby) <= best + 1e-9).all()


@given(problems(values=st.floats(0, 1)), st.floats(0, 20), dtypes)
def test_half_precision_agrees_with_float64_to_its_own(
    problem: tuple[Tensor, Tensor], beta: float, dtype: torch.dtype
) -> None:
    scores, values = problem
    exact, rounded = tilt(scores, values, beta), tilt(scores.to(dtype), values.to(dtype), beta).double()
    finite = torch.isfinite(exact)
    assert torch.equal(finite, torch.isfinite(rounded))
    eps = max(epsilon(dtype), epsilon(torch.float32) if dtype != torch.float64 else 0)
    allowed = 2 * eps * (scores.abs() + beta * (values.abs() + 1) + 1)
    assert ((exact - rounded).abs() <= allowed)[finite].all()


@given(problems(values=calm_values), st.sampled_from(METHODS), dtypes)
def test_normalising_in_half_precision_agrees_to_its_own(
    problem: tuple[Tensor, Tensor], method: Any, dtype: torch.dtype
) -> None:
    scores, values = problem
    mask = torch.isfinite(scores)
    exact, rounded = (normalize(x, mask, method, 0.5).double() for x in (values, values.to(dtype)))
    error = max(epsilon(dtype), epsilon(torch.float32)) * 10  # of a value of up to 10
    for row, kept in enumerate(mask):
        span = float(values[row][kept].max() - values[row][kept].min())
        divisor = {"minmax": span, "gap": max(span, 0.5)}.get(method, 1.0)
        assume(method != "minmax" or span > 8 * error)
        assert ((exact[row] - rounded[row]).abs() <= 4 * error / divisor).all()


# ---- divergence ----


@given(references())
def test_divergence_of_a_policy_from_itself_is_the_price_of_the_cut(problem: tuple[Tensor, Tensor]) -> None:
    log_ref, _ = problem
    cut = -torch.logsumexp(log_ref, dim=-1)
    torch.testing.assert_close(kl_divergence(log_ref, log_ref), cut)
    torch.testing.assert_close(kl_divergence(log_ref + 3.0, log_ref), cut)
    assert (cut >= -1e-12).all()


def test_divergence_by_hand() -> None:
    tilted, reference = torch.tensor([[3.0, 1.0]]).log(), torch.tensor([[0.5, 0.25]]).log()
    by_hand = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.25)
    assert float(kl_divergence(tilted, reference)) == pytest.approx(by_hand)
    assert float(kl_divergence(torch.tensor([[0.0, -INF]]), reference)) == pytest.approx(math.log(2))


# ---- solve_beta ----


@given(references(), st.floats(1e-3, 5), dtypes)
def test_the_solved_beta_spends_its_budget_or_is_at_an_end(
    problem: tuple[Tensor, Tensor], budget: float, dtype: torch.dtype
) -> None:
    log_ref, values = (x.to(dtype) for x in problem)
    beta = solve_beta(log_ref, values, budget)
    assert beta.dtype == torch.float32
    assert beta.shape == (len(log_ref),)
    assert ((beta >= 0) & (beta <= MAX_BETA)).all()
    log_ref, values = log_ref.double(), values.double()
    spent = kl_divergence(tilt(log_ref, values, beta.double()), log_ref)
    cut, most = (kl_divergence(tilt(log_ref, values, end), log_ref) for end in (0.0, MAX_BETA))
    for row in range(len(beta)):
        if cut[row] > budget:
            assert beta[row] == 0
        elif most[row] <= budget:
            assert beta[row] == MAX_BETA
        else:
            assert float(spent[row]) == pytest.approx(budget, abs=1e-5)


def test_each_row_has_a_budget_of_its_own() -> None:
    log_ref = torch.log_softmax(torch.zeros(3, 4), dim=-1)
    values = torch.tensor([[0.0, 0.2, 0.7, 1.0]]).expand(3, 4)
    budgets = torch.tensor([0.1, 0.3, 0.6])
    spent = kl_divergence(tilt(log_ref, values, solve_beta(log_ref, values, budgets)), log_ref)
    torch.testing.assert_close(spent, budgets, atol=1e-5, rtol=0)


def test_a_single_candidate_has_nothing_to_tilt() -> None:
    log_ref, values = torch.tensor([[math.log(0.5)]]), torch.tensor([[7.0]])
    assert normalize(values, torch.isfinite(log_ref)).tolist() == [[0.0]]
    assert solve_beta(log_ref, torch.zeros(1, 1), 0.1).tolist() == [0.0]  # the cut alone costs 0.69 nats
    assert solve_beta(log_ref, torch.zeros(1, 1), 0.7).tolist() == [MAX_BETA]
