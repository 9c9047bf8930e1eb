"""Steering the rows of logits of many requests in one batch, each by its own settings: the core of every engine.

A request sits in a *slot* for as long as it is under way; rows of logits name the slots that they belong to, in any
order, and any number of rows a slot (drafts of speculative decoding). Nothing here knows an engine, holds a model or
waits for the device on a path that engines run at every step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..backbone.hidden import Layer
from ..core.config import MavisConfig
from ..steering.policy import Policy, Requests
from ..steering.step import Choice
from ..values.ensemble import ValueFunctions
from .asked import Asked
from .serving import Offer

_UNSTEERED, _REFUSED = -1, -2  # in place of a group


@dataclass(frozen=True)
class Rows:
    """Rows of logits, and whose they are.

    Attributes:
        slots: [R] the slot of every row, on the device of the logits.
        present: [requests] the slots that have rows, on the host.
        one_each: whether row i is the only one of `present[i]`.
    """

    slots: Tensor
    present: list[int]
    one_each: bool


@dataclass(frozen=True)
class Wanted:
    """Rows whose values are wanted.

    Attributes:
        rows: [r] their numbers among the rows of logits; None for all of them.
        choice: what they choose among.
        config: their settings.
        idle: [M] the objectives that none of them weighs, and that need no value.
    """

    rows: Tensor | None
    choice: Choice
    config: MavisConfig
    idle: list[bool]


ReadValues = Callable[[Wanted], Tensor]  # gives V_m(s + a_i) [r, k, M]


@dataclass
class Counters:
    """Totals since the start. Numbers on the device are read only when somebody asks.

    Attributes:
        steps: batches with at least one steered row.
        skipped: batches without.
        rows: rows steered.
        seconds: spent in them, on the host.
    """

    steps: int = 0
    skipped: int = 0
    rows: int = 0
    seconds: float = 0.0
    _kl: Tensor | None = field(default=None, repr=False)
    _ended: Tensor | None = field(default=None, repr=False)

    def add(self, kl: Tensor, ended: Tensor) -> None:
        """Count [r] divergences of steered rows, and [r] whether they could not be steered and were ended."""
        kl_sum, count = kl.masked_fill(ended, 0.0).double().sum(), ended.sum()
        self._kl = kl_sum if self._kl is None else self._kl + kl_sum
        self._ended = count if self._ended is None else self._ended + count

    @property
    def kl(self) -> float:
        """Divergence from the served model so far, in nats, summed over rows. Waits for the device."""
        return 0.0 if self._kl is None else float(self._kl)

    @property
    def ended(self) -> int:
        """Rows whose values were not finite, or whose settings were refused. Waits for the device."""
        return 0 if self._ended is None else int(self._ended)


class Slots:
    """The settings of every request under way, and the steering of their rows.

    Args:
        count: S, how many slots there are.
        functions: the value functions.
        offer: what requests may ask for.
        eos: tokens that end a text: what is left to a row that cannot be steered.

    Attributes:
        counters: totals.
    """

    def __init__(self, count: int, functions: ValueFunctions, offer: Offer, eos: Collection[int]) -> None:
        self.functions, self.offer = functions, offer
        self.counters = Counters()
        self._eos = torch.tensor(sorted(eos), dtype=torch.long)
        self._weights = torch.zeros(count, len(functions.objectives))
        self._beta = torch.zeros(count)
        self._group = [_UNSTEERED] * count
        self._log_prob_weight = torch.zeros_like(self._weights)
        self._configs: list[MavisConfig] = []
        self._policies: dict[int, Policy] = {}

    def put(self, slot: int, asked: Asked | None) -> None:
        """Let a request take a slot, whatever was there before.

        Args:
            slot: 0 to S - 1.
            asked: None for a request that is not steered.
        """
        if asked is None:
            self._group[slot] = _UNSTEERED
            return
        if asked.config not in self._configs:
            self._forget_unused(slot)
            self._configs.append(asked.config)
        self._group[slot] = self._configs.index(asked.config)
        self._weights[slot], self._beta[slot] = asked.weights, asked.beta
        temperature = asked.config.reference_temperature * asked.temperature
        self._log_prob_weight[slot] = self.functions.log_prob_weights(temperature)
        self._policies.clear()

    def refuse(self, slot: int) -> None:
        """Let a request take a slot whose settings are wrong: it ends with its next token."""
        self._group[slot] = _REFUSED

    def is_steered(self, slot: int) -> bool:
        """Whether the rows of a slot will be changed."""
        return self._group[slot] != _UNSTEERED

    @property
    def steered(self) -> int:
        """In how many slots rows will be changed."""
        return sum(map(self.is_steered, range(len(self._group))))

    def move(self, source: int, target: int, swap: bool = False) -> None:
        """A request goes from one slot to another, whose own is gone, or goes the other way."""
        pair = [target, source]
        self._group[target], other = self._group[source], self._group[target]
        self._group[source] = other if swap else _UNSTEERED
        for table in (self._weights, self._beta, self._log_prob_weight):
            table[pair] = table[pair[::-1]].clone()
        self._policies.clear()

    @torch.no_grad()
    def steer(self, logits: Tensor, rows: Rows, read: ReadValues) -> None:
        """Tilt the rows of steered requests (Algorithm 2), in place; no bit of any other row changes.

        Args:
            logits: [R, V] float32; -inf for tokens that are forbidden, which stay so.
            rows: whose they are.
            read: where the values of candidates come from.
        """
        groups = {self._group[slot] for slot in rows.present} - {_UNSTEERED}
        if not groups or not len(logits):
            self.counters.skipped += 1
            return
        started = time.perf_counter()
        for group in sorted(groups):
            chosen, mask = self._rows_of(group, rows, logits.device)
            part = logits if chosen is None else logits[chosen]
            slots = rows.slots if chosen is None else rows.slots[chosen]
            if group == _REFUSED:
                steered = self._ended(part, torch.ones(len(part), dtype=torch.bool, device=part.device))
            else:
                steered = self._tilted(group, part, slots.long(), rows.present, chosen, mask, read)
            if mask is not None:
                steered = torch.where(mask[:, None], steered, part)
            if chosen is None:
                logits.copy_(steered)
            else:
                logits[chosen] = steered
            self.counters.rows += (
                len(part) if mask is None else sum(self._group[slot] == group for slot in rows.present)
            )
        self.counters.steps += 1
        self.counters.seconds += time.perf_counter() - started

    def _rows_of(self, group: int, rows: Rows, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
        """Which rows are a group's: their numbers [r], or None and a mask [R] where only the device knows them."""
        own = [i for i, slot in enumerate(rows.present) if self._group[slot] == group]
        if len(own) == len(rows.present):
            return None, None
        if rows.one_each:
            return torch.tensor(own, device=device), None
        mask = torch.isin(rows.slots, torch.tensor([rows.present[i] for i in own], device=device))
        if device.type == "cpu" or self.functions.models:  # value models need the host in any case
            return torch.nonzero(mask)[:, 0], None
        return None, mask

    def _tilted(
        self,
        group: int,
        logits: Tensor,
        slots: Tensor,
        present: list[int],
        chosen: Tensor | None,
        mask: Tensor | None,
        read: ReadValues,
    ) -> Tensor:
        """[r, V] what the rows of a group become."""
        policy = self._policy(group)
        own = [slot for slot in present if self._group[slot] == group]
        idle = self.functions.idle(self._weights[own])
        requests = Requests(of=slots)

        def values_of(choice: Choice, _: Tensor) -> Tensor:
            values = read(Wanted(chosen, choice, policy.config, idle))
            # What a row does not weigh must not harm it: a NaN times 0 is one.
            return torch.where(policy.weights_of(values, requests)[:, None] != 0, values, 0.0)

        step = policy.step(logits, values_of, requests)
        ours = torch.ones_like(step.broken) if mask is None else mask
        result = step.log_probs(logits.shape[1])
        if logits.device.type == "cpu" and not step.broken.any():  # on a GPU this would wait for it
            self.counters.add(step.kl, torch.zeros_like(step.broken))
            return result
        by_values = torch.isfinite(step.reference.amax(dim=1))  # else the scores of the served model are broken
        result = torch.where(step.broken[:, None], self._ended(logits, by_values), result)
        kl = step.kl.masked_fill(step.broken | ~ours, 0.0)
        self.counters.add(kl, step.broken & by_values & ours)
        return result

    def _ended(self, logits: Tensor, which: Tensor) -> Tensor:
        """`logits` [r, V] whose rows `which` [r] may go on with an end of text only, if that is not forbidden."""
        eos = self._eos.to(logits.device)
        own = logits[:, eos]
        may_end = which & (own > -torch.inf).any(dim=1)
        ended = torch.full_like(logits, -torch.inf).index_copy(1, eos, own)
        return torch.where(may_end[:, None], ended, logits)

    def _policy(self, group: int) -> Policy:
        if group not in self._policies:
            config = self._configs[group]
            self._policies[group] = self.offer.policy(config, self._weights, self._beta, self._log_prob_weight)
        return self._policies[group]

    def _forget_unused(self, slot: int) -> None:
        """Drop settings that no request has any more, all but for `slot`, whose own is about to be replaced."""
        self._group[slot] = _UNSTEERED
        used = sorted({group for group in self._group if group >= 0})
        self._configs = [self._configs[group] for group in used]
        places: Mapping[int, int] = {group: place for place, group in enumerate(used)}
        self._group = [places.get(group, group) for group in self._group]
        self._policies.clear()


def head_values(functions: ValueFunctions, states: Mapping[Layer, Tensor], wanted: Wanted) -> Tensor:
    """Values [r, k, M] of value heads alone, from states [r, d] by layer."""
    candidates = None if wanted.config.top_k is None else wanted.choice.candidates
    return functions.gather(functions.read_heads(states, candidates, wanted.idle))
