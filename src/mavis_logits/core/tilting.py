"""The arithmetic of MAVIS decoding (Algorithm 2): pure functions of tensors, in float32 or wider.

    v_i = sum_m lambda_m V_m(s + a_i)            combine
    v   <- NORMALIZE(v)                          normalize     (equation 14)
    w_i = pi_ref(a_i | s) exp(beta v_i)          tilt

Shapes: R rows (sequences being decoded), k candidates, M objectives. A candidate whose reference score is -inf (banned
by an earlier processor, or there are fewer than k finite tokens) is *masked*: it takes no part in any minimum, maximum
or mean, and comes out at -inf. Nothing here ever returns NaN for finite values and weights.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

Normalization = Literal["minmax", "none", "standard", "center", "gap"]

AS_THEY_ARE = ("none", "standard")  # of these: combined values count without regard to the other candidates'
DEFAULT_GAP_FLOOR = 0.5
MAX_BETA = 1e4
_NEWTON_STEPS = 25


def combine(values: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum of the objectives' values: v_i = sum_m lambda_m V_m(s + a_i) (Algorithm 2).

    Args:
        values: [R, k, M], in reward units.
        weights: lambda, [M] or one vector a row, [R, M].

    Returns:
        [R, k].
    """
    values, weights = _wide(values), _wide(weights)
    if weights.ndim == 1:
        weights = weights[None]
    dtype = torch.promote_types(values.dtype, weights.dtype)
    return (values.to(dtype) * weights[:, None].to(dtype)).sum(dim=-1)


def normalize(
    values: Tensor, mask: Tensor, method: Normalization = "minmax", floor: float = DEFAULT_GAP_FLOOR
) -> Tensor:
    """Rescale each row of combined values, so that beta alone decides how far they spread the candidates (section F.5).

    Args:
        values: [R, k].
        mask: [R, k] bool, True for candidates that take part; the others come out as 0.
        method: `"minmax"`: equation 14, (v - min) / (max - min), zeros if all are equal;
            `"gap"`: the same, but the divisor never falls below `floor`, so that noise between near-equal values is not
            stretched to [0, 1];
            `"center"`: v minus its mean over the row; `"none"`: v itself; `"standard"`: v itself, whose objectives have
            been divided by their units before they were combined (`Policy.weights_of`).
        floor: in units of `values`, for `"gap"`.

    Returns:
        [R, k].

    Raises:
        ValueError: an unknown method.
    """
    values, absent = _wide(values), ~mask
    if method in AS_THEY_ARE:
        return values.masked_fill(absent, 0.0)
    if method == "center":
        kept = values.masked_fill(absent, 0.0)
        mean = (kept / mask.sum(dim=-1, keepdim=True).clamp(min=1)).sum(dim=-1, keepdim=True)
        return (kept - mean).masked_fill_(absent, 0.0)
    if method not in ("minmax", "gap"):
        raise ValueError(f"normalize must be one of {', '.join(map(repr, get_args(Normalization)))}, got {method!r}")
    # Halved first, so that the difference of two huge values stays finite.
    halves = values / 2
    low = halves.masked_fill(absent, torch.inf).amin(dim=-1, keepdim=True)
    span = halves.masked_fill(absent, -torch.inf).amax(dim=-1, keepdim=True) - low
    divisor = span if method == "minmax" else span.clamp(min=floor / 2)
    return ((halves - low) / divisor).masked_fill_(absent | (span <= 0), 0.0)


def expectation(values: Tensor, scores: Tensor) -> Tensor:
    """What the reference expects of the candidates: sum_i pi_ref(a_i | s) v_i / sum_i pi_ref(a_i | s), [R, 1].

    It is the value of the state (Bellman's equation), as far as the candidates tell.

    Args:
        values: [R, k], finite.
        scores: [R, k] log pi_ref of the candidates, up to a constant a row; -inf for those that take no part.
    """
    share = torch.softmax(_wide(scores), dim=-1)
    return (share * _wide(values)).sum(dim=-1, keepdim=True)


def tilt(scores: Tensor, values: Tensor, beta: Tensor | float) -> Tensor:
    """Tilt the reference: log pi_ref(a_i | s) + beta v_i, up to a constant a row (Algorithm 2).

    Args:
        scores: [R, k] log-probabilities or logits of the candidates; -inf stays -inf.
        values: [R, k], finite.
        beta: one number, or one a row, [R].

    Returns:
        [R, k] unnormalised log-probabilities.
    """
    scores, values = _wide(scores), _wide(values)
    dtype = torch.promote_types(scores.dtype, values.dtype)
    beta = torch.as_tensor(beta, dtype=dtype, device=scores.device)
    limit = torch.finfo(dtype).max / 4
    return scores.to(dtype) + (beta.reshape(-1, 1) * values.to(dtype)).clamp(-limit, limit)


def kl_divergence(tilted: Tensor, reference: Tensor, normalized: bool = False, empty: Tensor | None = None) -> Tensor:
    """KL divergence of one step's policy from the reference, in nats: sum_i pi(a_i) log(pi(a_i) / pi_ref(a_i)).

    Summed along a trajectory its expectation is that of equation 7.

    Args:
        tilted: [R, k] scores of the policy, up to a constant a row; it gives no probability to anything else.
        reference: [R, k] log pi_ref of the same tokens, normalised over the whole vocabulary.
        normalized: `tilted` is log pi already.
        empty: [R] bool, rows of no tokens, whose divergence is 0, if that is known.

    Returns:
        [R], at least 0 (up to rounding).
    """
    reference = _wide(reference)
    log_policy = _wide(tilted) if normalized else torch.log_softmax(_wide(tilted), dim=-1)
    policy = log_policy.exp()
    # A token without probability contributes nothing, also where both logarithms are -inf. A NaN stays one.
    divergence = (log_policy - reference).mul_(policy).masked_fill_(policy == 0, 0.0).sum(dim=-1)
    return divergence.masked_fill_((reference == -torch.inf).all(dim=-1) if empty is None else empty, 0.0)


def solve_beta(scores: Tensor, values: Tensor, kl: Tensor | float, max_beta: float = MAX_BETA) -> Tensor:
    """The beta at which the tilted step diverges from the reference by `kl` nats.

    The divergence grows monotonically with beta: from -log of the candidates' total probability at beta = 0 (the price
    of the cut, which no beta lowers) to -log pi_ref of the best candidate.

    Args:
        scores: [R, k] log pi_ref of the candidates, normalised over the whole vocabulary.
        values: [R, k] normalised values.
        kl: the budget in nats, one number or [R].
        max_beta: returned where the budget is out of reach.

    Returns:
        [R], between 0 and `max_beta`; 0 where the cut alone exceeds the budget.
    """
    scores, values = scores.double(), values.double()
    budget = torch.as_tensor(kl, dtype=torch.float64, device=scores.device).expand(len(scores))
    present = torch.isfinite(scores)
    low = torch.zeros_like(budget)
    high = torch.full_like(budget, max_beta)
    spent_at_most = kl_divergence(tilt(scores, values, high), scores)
    beta = torch.ones_like(budget).clamp(max=max_beta)
    best, miss = beta, torch.full_like(budget, torch.inf)
    for _ in range(_NEWTON_STEPS):
        log_policy = torch.log_softmax(tilt(scores, values, beta), dim=-1)
        policy = log_policy.exp()
        spent = torch.where(present, policy * (log_policy - scores), 0.0).sum(dim=-1)
        mean = (policy * values).sum(dim=-1, keepdim=True)
        slope = beta * (policy * (values - mean) ** 2).sum(dim=-1)  # d KL / d beta
        closer = (spent - budget).abs() < miss
        best, miss = torch.where(closer, beta, best), torch.where(closer, (spent - budget).abs(), miss)
        within = spent <= budget
        low, high = torch.where(within, beta, low), torch.where(within, high, beta)
        newton = beta - (spent - budget) / slope
        between = torch.where(low > 0, (low * high).sqrt(), high * 1e-2)
        beta = torch.where((newton > low) & (newton < high), newton, between)
    best = torch.where(spent_at_most <= budget, max_beta, best)
    cut = kl_divergence(scores, scores)
    return torch.where(cut > budget, 0.0, best).float()


def _wide(x: Tensor) -> Tensor:
    """Float32 at least: half precision holds neither a log-probability of -20 to 1e-2 nor a sum of many."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()
