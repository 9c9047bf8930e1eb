"""One step of Algorithm 2 as plain records: what it chooses among, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Unscored:
    """The tokens that take no part in a step and keep a probability.

    Attributes:
        offsets: [R, V] scores of all tokens less the highest of them.
        log_best: [R, 1] log pi_ref of that one.
        rest: [R] log pi_ref of all tokens together that take no part.
        log_prob: [R] what log pi_ref of one of them is in expectation; None where it does not count.
    """

    offsets: Tensor
    log_best: Tensor
    rest: Tensor
    log_prob: Tensor | None = None

    def log_probs(self, others: Tensor) -> Tensor:
        """[R, V] log pi of all tokens as if none took part, new.

        Args:
            others: [R] log(pi / pi_ref) of those that take none.
        """
        return self.offsets + (self.log_best + others[:, None])


@dataclass(frozen=True)
class Choice:
    """What a step chooses among, before any value is known (Algorithm 2, line 2).

    Attributes:
        candidates: [R, k] token ids, the likeliest first (in order of their ids if they are the whole vocabulary).
        reference: [R, k] log pi_ref, normalised over the whole vocabulary; -inf for those that take no part.
        empty: [R] bool, rows after which nothing is allowed.
        unscored: those that take no part, where they keep a probability; else None.
    """

    candidates: Tensor
    reference: Tensor
    empty: Tensor
    unscored: Unscored | None

    @cached_property
    def mask(self) -> Tensor:
        """[R, k] bool, candidates that take part."""
        return self.reference > -torch.inf


@dataclass(frozen=True)
class Step:
    """One step of R rows over k candidates and M objectives.

    Attributes:
        candidates, reference, empty: as in `Choice`.
        values: [R, k, M] in reward units; of candidates that take no part they mean nothing.
        combined: [R, k] sum over m of lambda_m V_m, not normalised; 0 for candidates that take no part.
        tilted: [R, k] log pi, the distribution to sample from.
        beta: [] or [R].
        kl: [R] exact divergence of pi from the reference over the whole vocabulary, in nats.
        others: [R] log(pi / pi_ref) of every token that takes no part, -inf where these have no probability.
        unscored: as in `Choice`.
        whole: the candidates are the whole vocabulary, in order.
    """

    candidates: Tensor
    reference: Tensor
    empty: Tensor
    values: Tensor
    combined: Tensor
    tilted: Tensor
    beta: Tensor
    kl: Tensor
    others: Tensor
    unscored: Unscored | None = None
    whole: bool = False

    @property
    def broken(self) -> Tensor:
        """[R] bool, rows in which the base model or a value function gave a NaN or infinity, or nothing is allowed."""
        # Of anything that is not finite this sum is NaN.
        unsound = self.kl + (self.combined - self.combined).sum(dim=1)
        return self.empty | torch.isnan(unsound)

    @cached_property
    def everything(self) -> Tensor | None:
        """[R, V] log pi of all tokens, in order; None where only candidates have probability."""
        if self.unscored is None:
            return self.tilted if self.whole else None
        every = self.unscored.log_probs(self.others)
        own = torch.where(self.reference > -torch.inf, self.tilted, every.gather(1, self.candidates))
        return every.scatter_(1, self.candidates, own)

    def log_probs(self, vocabulary: int) -> Tensor:
        """[R, V] log pi of all tokens, -inf for those without probability."""
        if self.everything is not None:
            return self.everything
        nothing = self.tilted.new_full((len(self.tilted), vocabulary), -torch.inf)
        return nothing.scatter(1, self.candidates, self.tilted)


def check_scores(reference: Tensor, live: Tensor | None = None) -> None:
    """Raise `ValueError` if the reference's log-probabilities [R, k] hold NaN or allow nothing.

    Args:
        reference: as in `Choice`.
        live: [R] rows that matter; None for all.
    """
    best = reference.amax(dim=1)  # NaN if there is one
    best = best if live is None else best.masked_fill(~live, 0.0)
    if torch.isfinite(best).all():
        return
    if torch.isnan(best).any():
        raise ValueError("the base model's scores hold NaN: it overflows in its dtype, or its weights are damaged")
    row = int((~torch.isfinite(best)).int().argmax())
    raise ValueError(
        f"every token is forbidden after row {row} of the batch: the constraints (logits processors, bad words, "
        "prefix_allowed_tokens_fn) in front of the value functions leave none to choose from"
    )


@dataclass(frozen=True)
class TraceStep:
    """One step of R rows over k candidates and M objectives.

    Attributes:
        length: tokens per row before the step, padding included.
        live: [R] bool, rows that were steered.
        candidates: [R, k] token ids.
        reference: [R, k] log pi_ref, normalised over the whole vocabulary.
        tilted: [R, k] log-probability after the tilt.
        values: [R, k, M] in reward units; NaN for value models that were not run, having weight 0.
        beta: [R].
        kl: [R] exact divergence of the step, in nats.
        taken: [R] the token that followed, -1 if not known.
        others: [R] log(pi / pi_ref) of every token that is no candidate, -inf where these have no probability.

    The divergence, and the tilted probabilities of the candidates kept, are those of the step over all its candidates.
    """

    length: int
    live: Tensor
    candidates: Tensor
    reference: Tensor
    tilted: Tensor
    values: Tensor
    beta: Tensor
    kl: Tensor
    taken: Tensor
    others: Tensor | None = None

    def narrow(self, count: int) -> TraceStep:
        """This step with at most `count` candidates a row.

        Kept are the token taken and, by turns, those likeliest before and after the tilt: at least the first
        `(count - 1) // 2` of either. They stay in their order.
        """
        if self.candidates.shape[1] <= count:
            return self
        urgency = torch.zeros_like(self.reference)
        places = torch.arange(count, 0, -1, dtype=urgency.dtype, device=urgency.device).expand(len(urgency), count)
        for scores in (self.reference, self.tilted):
            urgency.scatter_reduce_(1, scores.topk(count, dim=1).indices, places, "amax")
        urgency.masked_fill_(self.candidates == self.taken[:, None], torch.inf)
        kept = urgency.topk(count, dim=1).indices.sort(dim=1).values
        return replace(
            self,
            candidates=self.candidates.gather(1, kept),
            reference=self.reference.gather(1, kept),
            tilted=self.tilted.gather(1, kept),
            values=self.values.gather(1, kept[..., None].expand(-1, -1, self.values.shape[-1])),
        )
