"""N sequences a prompt, written side by side: drawing their next tokens, ranking and dropping them."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor
from transformers import StoppingCriteriaList

from ...core.tilting import combine
from .sampling import draw
from .session import Session


@dataclass(frozen=True)
class Drawn:
    """e different tokens after each of R rows, in the order of the draw.

    Attributes:
        tokens: [R, e].
        places: [R, e] their numbers among the candidates whose values were computed last.
        values: [R, e, M] of the sequences that go on with them.
        scores: [R, e] combined values; -inf for tokens without probability, where a row has fewer than e others.
    """

    tokens: Tensor
    places: Tensor
    values: Tensor
    scores: Tensor


def draw_distinct(session: Session, count: int, sample: bool) -> Drawn:
    """Draw different tokens after every row of `session`, with their values.

    Args:
        session: R rows.
        count: e; fewer are drawn if there are fewer candidates.
        sample: draw from the tilted distribution, without replacement; False: take the likeliest.

    Raises:
        ValueError: the base model or a value function gave a NaN.
    """
    steering = session.steering
    step = session.score(need_values=True)
    steering.check_step(step)
    policy = step.tilted if step.everything is None else step.everything
    if count == 1:  # as `MavisSampling` draws
        places, tokens = (x[:, None] for x in draw(step, sample))
        possible = torch.ones_like(tokens, dtype=torch.bool)
    else:
        count = min(count, policy.shape[1])
        places = torch.multinomial(policy.exp(), count) if sample else policy.topk(count, dim=1).indices
        possible = policy.gather(1, places) > -torch.inf
        tokens = places if step.everything is not None else step.candidates.gather(1, places)
    if steering.config.keeps_unscored:  # what was drawn need not be a candidate, and then has no value yet
        values = session.values(tokens)
        scores = combine(values, steering.policy.weights_of(values, session.of_requests))
        places = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    else:
        values = step.values.gather(1, places[..., None].expand(-1, -1, step.values.shape[2]))
        scores = step.combined.gather(1, places)
    return Drawn(tokens, places, values, scores.masked_fill(~possible, -torch.inf))


@dataclass(frozen=True)
class Ways:
    """Ways for the sequences to go on, C for each of P prompts: a token after each, or an ended one as it is.

    Attributes:
        parents: [P, C] the sequence that goes on, as a row of `Beams`.
        tokens: [P, C] its next token; padding if it has ended.
        places: [P, C] as in `Drawn`.
        values: [P, C, M].
        scores: [P, C] combined values; -inf for what is no way on.
        first: [P, C] the first of a prompt's ways that makes the same sequence, counted through all prompts.
    """

    parents: Tensor
    tokens: Tensor
    places: Tensor
    values: Tensor
    scores: Tensor
    first: Tensor

    def best(self, count: int, distinct: bool) -> Ways:
        """The `count` best of every prompt, best first; with `distinct` copies come after all others."""
        order = ranking(self.scores, self.first, distinct)[:, :count]
        taken = {}
        for field in fields(self):
            x = getattr(self, field.name)
            taken[field.name] = (
                x.gather(1, order) if x.ndim == 2 else x.gather(1, order[..., None].expand(-1, -1, x.shape[2]))
            )
        return Ways(**taken)


def ranking(scores: Tensor, first: Tensor, distinct: bool) -> Tensor:
    """[P, C] every prompt's columns, the highest of `scores` [P, C] first; `first` and `distinct` as in `Ways`."""
    order = scores.argsort(dim=1, descending=True, stable=True)
    if not distinct:
        return order
    copies = first != torch.arange(first.numel(), device=first.device).view_as(first)
    last = copies.int() + 2 * torch.isneginf(scores)  # no way on at all comes last
    return order.gather(1, last.gather(1, order).argsort(dim=1, stable=True))


def first_alike(keys: Tensor) -> Tensor:
    """[P, C] where in its row of `keys` [P, C] each key occurs first, counted through all rows."""
    where = (keys[:, :, None] == keys[:, None]).int().argmax(dim=2)
    return where + torch.arange(len(keys), device=keys.device)[:, None] * keys.shape[1]


class Beams:
    """N sequences for each of P prompts; `session` holds those that go on, the others have ended.

    Args:
        session: the P prompts.
        size: N; all begin as the bare prompt, which the base model reads once.
        criteria: what ends a sequence.
        pad: token that fills up ended sequences.

    Attributes:
        written: [P * N, T] prompts and what was written, the N sequences of a prompt one after another.
        values: [P * N, M] values of the sequences as they stand, in reward units.
        scores: [P * N] the same, combined.
        lengths: [P * N] columns of `written` that are not filled up.
        alike: [P, N] the first of a prompt's sequences that is the same, counted through all prompts.
    """

    def __init__(self, session: Session, size: int, criteria: StoppingCriteriaList, pad: int) -> None:
        self._session, self._prompts, self._criteria, self._pad = session, len(session), criteria, pad
        session.reference()
        device = session.input_ids.device
        session.select(torch.arange(self._prompts, device=device).repeat_interleave(size))
        rows = len(session)
        self.written = session.input_ids
        self._prompt_end = self.written.shape[1]
        self.values = torch.zeros(rows, len(session.steering.objectives), device=device, dtype=torch.float32)
        self.scores = torch.zeros(rows, device=device, dtype=torch.float32)
        self.lengths = torch.full((rows,), self.written.shape[1], device=device)
        self.alike = first_alike(torch.zeros(self._prompts, size, dtype=torch.long, device=device))
        self._ended = torch.zeros(rows, dtype=torch.bool, device=device)
        self._going = torch.arange(rows, device=device)  # rows of `written` that the session holds, in its order

    @property
    def size(self) -> int:
        """N."""
        return self.alike.shape[1]

    @property
    def finished(self) -> bool:
        """Whether all sequences have ended."""
        return not len(self._going)

    def completions(self) -> list[list[int]]:
        """The P * N completions as token ids, without what fills them up."""
        rows = zip(self.written.tolist(), self.lengths.tolist(), strict=True)
        return [row[self._prompt_end : length] for row, length in rows]

    def ways(self, drawn: Drawn) -> Ways:
        """All ways on, given those drawn after the rows of the session: N * e for each prompt."""
        rows, count = len(self.written), drawn.tokens.shape[1]
        tokens = self.written.new_full((rows, count), self._pad)
        places = torch.zeros_like(tokens)
        values = self.values[:, None].repeat(1, count, 1)
        scores = self.scores.new_full((rows, count), -torch.inf)
        scores[:, 0] = self.scores
        tokens[self._going], places[self._going] = drawn.tokens, drawn.places
        values[self._going], scores[self._going] = drawn.values, drawn.scores
        parents = torch.arange(rows, device=tokens.device)[:, None].expand_as(tokens)
        # Two make the same sequence if what they go on from is the same, and the token too.
        keys = (self.alike.reshape(-1, 1) << 32) + tokens
        first = first_alike(keys.view(self._prompts, -1))
        shape = (self._prompts, -1)
        return Ways(
            parents.reshape(shape), tokens.view(shape), places.view(shape),
            values.view(self._prompts, first.shape[1], -1), scores.view(shape), first,
        )  # fmt: skip

    def go(self, ways: Ways) -> None:
        """Write on: every one of `ways` becomes a sequence, in their order. Those that end leave the session."""
        parents, tokens = ways.parents.reshape(-1), ways.tokens.reshape(-1)
        place = torch.zeros_like(self.lengths)
        place[self._going] = torch.arange(len(self._going), device=place.device)
        self.written = torch.cat([self.written[parents], tokens[:, None]], dim=1)
        ended, self.lengths = self._ended[parents], self.lengths[parents]
        self.lengths = torch.where(ended, self.lengths, self.written.shape[1])
        self.values, self.scores = ways.values.flatten(0, 1), ways.scores.reshape(-1)
        self.alike = first_alike(ways.first)
        self._ended = ended | self._criteria(self.written, None).to(ended.device)  # type: ignore[arg-type]
        self._going = torch.nonzero(~self._ended)[:, 0]
        if self.finished:
            return
        sources = place[parents[self._going]]
        if sources.tolist() != list(range(len(self._session))):
            self._session.select(sources)
        self._session.append(tokens[self._going], ways.places.reshape(-1)[self._going])
