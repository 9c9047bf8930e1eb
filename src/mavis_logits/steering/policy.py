"""Algorithm 2: which tokens a step chooses among, and how their values tilt the reference."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..core.config import MavisConfig
from ..core.tilting import AS_THEY_ARE, combine, expectation, kl_divergence, normalize, solve_beta, tilt
from .step import Choice, Step, Unscored

_FEW = 2048  # scores that `torch.topk` sorts through at once as fast as any


@dataclass(frozen=True)
class Requests:
    """Which request each of R rows belongs to, for weights and beta that are given per request.

    Attributes:
        of: [R] number of each row's request; None if the rows are the requests, each repeated for its beams or samples.
        count: how many requests there are, where settings may be given for fewer: each of them then is for as many
            requests in a row. None if they are given for every one.
    """

    of: Tensor | None = None
    count: int | None = None

    def spread(self, setting: Tensor, shared_dims: int, rows: int, name: str) -> Tensor:
        """`setting` row by row; as it is if all rows share it.

        Args:
            setting: [...] shared by all, or [N, ...] for N requests.
            shared_dims: dimensions of one that all rows share.
            rows: R.
            name: of the setting, for the message.

        Raises:
            ValueError: N settings do not go into the requests.
        """
        if setting.ndim == shared_dims:
            return setting
        count = self.count or (rows if self.of is None else len(setting))
        if count % len(setting):
            raise ValueError(f"{name} are given for {len(setting)} requests, but the batch has {count} rows")
        repeats = count // len(setting)
        every = setting if repeats == 1 else setting.repeat_interleave(repeats, dim=0)
        return every if self.of is None else every[self.of]


def likeliest(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of every row of `scores` [R, V], the largest first: as `torch.topk`, values and indices [R, k].

    They lie in the k parts of the row that have the largest maxima, and of these parts again in k: one pass over the
    whole vocabulary will do, several times as fast as `torch.topk`. Of n parts each has every n-th token, which vector
    units compare at once.
    """
    rows, vocabulary = scores.shape
    # Tokens of a part: of V / size maxima the best are found, and then of k * size scores, of which fewer are sorted.
    size = 2 ** round(math.log2(1.5 * math.sqrt(max(vocabulary / k, 1))))
    if vocabulary <= _FEW or k * size > vocabulary // 2:  # else every turn leaves about half at most
        values, indices = scores.topk(k, dim=1)
        return values, indices
    count = vocabulary // size
    end = count * size
    parts = scores[:, :end].unflatten(1, (size, count)).amax(dim=1).topk(k, dim=1, sorted=False).indices
    places = (parts[:, None] + torch.arange(0, end, count, device=scores.device)[:, None]).flatten(1)
    if end < vocabulary:
        rest = torch.arange(end, vocabulary, device=scores.device).expand(rows, -1)
        places = torch.cat([places, rest], dim=1)
    values, chosen = likeliest(scores.gather(1, places), k)
    return values, places.gather(1, chosen)


ROWS = Requests()  # the rows are the requests


@dataclass(frozen=True)
class Policy:
    """pi_MAVIS, given the values: settings and weights, and the arithmetic of a step. It holds no model and no state.

    Attributes:
        config: the settings; `weights` and `beta` below count in place of its own.
        weights: lambda, float32 [M] or [R, M].
        beta: strength of the tilt, float32 [] or [R].
        scale: units of the objectives' values, [M], for `normalize="standard"`; None for 1.
        log_prob_weight: what a nat of log pi_ref counts for beside the values, [M] or [R, M], in their units; None
            for 0.

    Raises:
        ValueError: beta is negative, not finite, or no number or vector.
    """

    config: MavisConfig
    weights: Tensor
    beta: Tensor
    scale: Tensor | None = None
    log_prob_weight: Tensor | None = None

    def __post_init__(self) -> None:
        if self.beta.ndim > 1 or not torch.isfinite(self.beta).all() or (self.beta < 0).any():
            given = self.beta.tolist()
            raise ValueError(f"beta must be a finite number of at least 0, or one a row [R], got {given!r}")

    def step(
        self,
        scores: Tensor,
        read: Callable[[Choice, Tensor], Tensor],
        requests: Requests = ROWS,
        all_values: bool = False,
    ) -> Step:
        """One step of Algorithm 2.

        Args:
            scores: [R, V] next-token scores of the reference, logits or log-probabilities; -inf for banned tokens.
            read: the values V_m(s + a_i) [R, k, M] of a choice's candidates; of those that its second argument
                [R, k] does not name, they mean nothing.
            requests: of the R rows.
            all_values: ask for the value of a row's lone candidate too, which cannot change the distribution.
        """
        choice = self.choose(scores)  # y <- top-k tokens under pi_ref(. | s)
        kept = choice.mask if all_values else self.worth_scoring(choice)
        values = read(choice, kept)  # V_m(s + a_i)
        if kept is not choice.mask:  # a tilt looks at the values of all that take part
            values = values.masked_fill(~kept[..., None], 0.0)
        return self.tilt(choice, values, requests)

    def choose(self, scores: Tensor) -> Choice:
        """The candidates of a step: the k likeliest tokens, of these only those within `candidate_min_p` of the best.

        Args:
            scores: [R, V] next-token scores, logits or log-probabilities; -inf for banned tokens.
        """
        config, scores = self.config, scores.float()
        if config.reference_temperature != 1.0:
            scores = scores / config.reference_temperature
        if config.top_k is None:
            candidates = torch.arange(scores.shape[1], device=scores.device).expand_as(scores)
            own, best = scores, scores.amax(dim=-1, keepdim=True)
        else:
            own, candidates = likeliest(scores, min(config.top_k, scores.shape[1]))
            best = own[:, :1]
        offsets = scores - best  # first of all: scores may be large
        cut = config.top_k is not None or config.candidate_min_p is not None
        keeps = cut and config.keeps_unscored
        odds = offsets.exp() if keeps else offsets.exp_()  # a softmax takes longer, and so does memory of one's own
        reference = own - best
        if config.candidate_min_p is not None:  # a NaN stays, so that it is noticed
            reference.masked_fill_(reference < math.log(config.candidate_min_p), -torch.inf)
        if keeps:
            share = odds.gather(1, candidates)
            left = share.masked_fill(reference > -torch.inf, 0.0)
            # Not all less the candidates' share, of which rounding would leave nothing where these are nearly all.
            others = odds.scatter_(1, candidates, left).sum(dim=1, keepdim=True)
            log_best = -((share - left).sum(dim=1, keepdim=True) + others).log_()
            # -inf times 0 is left out; what is NaN makes log_best one, too.
            mean = odds.mul_(offsets).nansum(dim=1) / others[:, 0] if self.sharpens else None
            log_prob = None if mean is None else mean.nan_to_num_() + log_best[:, 0]
            unscored = Unscored(offsets, log_best, (others.log_() + log_best)[:, 0], log_prob)
        else:
            log_best, unscored = -odds.sum(dim=1, keepdim=True).log_(), None
        # Where all tokens are forbidden there is no NaN, which would speak of damage.
        nothing = best == -torch.inf
        reference = reference.add_(log_best).masked_fill_(nothing, -torch.inf)
        return Choice(candidates, reference, nothing[:, 0], unscored)

    def worth_scoring(self, choice: Choice) -> Tensor:
        """[R, k] bool, the candidates whose values can matter: those that take part, unless the row has but one.

        Every normalisation takes a lone candidate's value to 0, so that the step needs no value at all; values as they
        are still weigh it against tokens that keep their score.
        """
        mask = choice.mask
        config = self.config
        if config.candidate_min_p is None or (config.unscored == "keep" and config.normalize in AS_THEY_ARE):
            return mask
        return mask & (mask.sum(dim=-1, keepdim=True) > 1)

    def tilt(self, choice: Choice, values: Tensor, requests: Requests = ROWS) -> Step:
        """Algorithm 2 from the values on: combine, normalise, tilt.

        Args:
            choice: of R rows.
            values: [R, k, M], finite; those of candidates that take no part mean nothing.
            requests: of the R rows.
        """
        config, mask, absent = self.config, choice.mask, ~choice.mask
        beta = self.beta_of(values, requests)
        weights, reference = self.weights_of(values, requests), choice.reference
        combined = combine(values, weights).masked_fill_(absent, 0.0)
        nat = self._nat(weights, requests)
        likely = None if nat is None else (nat * reference).masked_fill_(absent, 0.0)
        # Where values are stretched by step, log pi_ref is part of what is stretched.
        stretched = config.normalize in ("minmax", "gap")
        whole = combined if likely is None or not stretched else combined + likely
        policy = normalize(whole, mask, config.normalize, config.gap_floor)
        if config.unscored == "expected":
            policy = (policy - expectation(policy, reference)).masked_fill_(absent, 0.0)
        rest = policy.new_zeros(len(policy), 1)  # the value of all that take no part
        if likely is not None and not stretched:
            policy = policy + likely
            if nat is not None and choice.unscored is not None and choice.unscored.log_prob is not None:
                rest = rest + nat * choice.unscored.log_prob[:, None]
        if choice.unscored is not None:
            # All that take no part are one more candidate: they stay in proportion to each other.
            reference = torch.cat([reference, choice.unscored.rest[:, None]], dim=1)
            policy = torch.cat([policy, rest], dim=1)
        if config.kl_budget is not None:
            beta = solve_beta(reference, policy, config.kl_budget)
        scores = tilt(reference, policy, beta)
        tilted = torch.log_softmax(scores, dim=-1)
        kl = kl_divergence(tilted, reference, normalized=True, empty=choice.empty)
        # What the best was divided by, all were: the sum of their probabilities.
        divisor = tilted.amax(dim=-1) - scores.amax(dim=-1)
        others = divisor + beta * rest[:, 0] if config.keeps_unscored else torch.full_like(kl, -torch.inf)
        return Step(
            choice.candidates, choice.reference, choice.empty, values, combined, tilted[:, : mask.shape[1]], beta, kl,
            others, choice.unscored, whole=config.top_k is None,
        )  # fmt: skip

    @cached_property
    def sharpens(self) -> bool:
        """Whether log pi_ref counts beside the values."""
        return self.log_prob_weight is not None and bool((self.weights * self.log_prob_weight.to(self.weights)).any())

    def _nat(self, weights: Tensor, requests: Requests) -> Tensor | None:
        """[1 or R, 1] what a nat of log pi_ref counts for, under `weights_of` some rows; None for nothing."""
        if self.log_prob_weight is None or not self.sharpens:
            return None
        own = requests.spread(self.log_prob_weight.to(weights), 1, len(weights), "log_prob_weight")
        return (weights * own).sum(dim=-1).reshape(-1, 1)

    @cached_property
    def is_reference(self) -> bool:
        """Whether nothing is tilted: what is left of the reference has the probabilities that it had."""
        plain = self.config.kl_budget is None and self.config.reference_temperature == 1.0
        return plain and not bool(self.beta.any())

    @property
    def by_request(self) -> dict[str, Tensor]:
        """Of weights and beta those that are given per request, [N, ...]."""
        found = {"weights": self.weights} if self.weights.ndim > 1 else {}
        return found | ({"beta": self.beta} if self.beta.ndim > 0 else {})

    @cached_property
    def _of_values(self) -> Tensor:
        """What values in reward units are multiplied by."""
        if self.config.normalize != "standard" or self.scale is None:
            return self.weights
        return self.weights / self.scale.to(self.weights.device)

    def weights_of(self, rows: Tensor, requests: Requests = ROWS) -> Tensor:
        """lambda [M] or [R, M], for and on the device of `rows` [R, ...]; over the units of values if "standard"."""
        return requests.spread(self._of_values.to(rows.device, non_blocking=True), 1, len(rows), "weights")

    def beta_of(self, rows: Tensor, requests: Requests = ROWS) -> Tensor:
        """beta [] or [R], for and on the device of `rows` [R, ...]."""
        return requests.spread(self.beta.to(rows.device, non_blocking=True), 0, len(rows), "beta")
