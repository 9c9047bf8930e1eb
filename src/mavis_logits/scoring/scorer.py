"""Values of k candidate tokens under a value model, each step at the cost of k query tokens.

`RaggedScorer` feeds the candidates as k queries of one forward that see their row's committed tokens and themselves,
and when one of them is chosen moves its keys and values into place: the chosen token is never computed again.
`RepeatedStateScorer` is for backbones whose state is not addressed by token (Mamba): it repeats the state k times.
`PlainScorer` reads everything from scratch. Which one is right is told by `Backbone.reading`, and all agree with
re-forwarding every candidate (`mavis_logits.testing.recompute_values`).
"""

from __future__ import annotations

import copy
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache

from ..backbone import Backbone
from ..backbone.attention import holding
from ..backbone.cache import RaggedCache
from ..values.fused import FusedValueModel
from ..values.value_model import ValueModel
from .rows import Plan, Tokens

WantedReading = Literal["auto", "packed", "repeated"]
Scored = ValueModel | FusedValueModel


class ValueScorer(ABC):
    """Rows of tokens that a value model has read, and values of candidates after them.

    Attributes:
        lengths: tokens read, row by row.
    """

    def __init__(self, model: Scored) -> None:
        self.model = model
        self.lengths: list[int] = []

    def score(self, plan: Plan, candidates: Tensor, kept: Tensor | None = None) -> Tensor:
        """Values [R, k, M] (float32, reward units) of `candidates` [R, k] after the sequences of `plan`.

        Args:
            plan: how the rows read so far become the sequences to score.
            candidates: [R, k].
            kept: [R, k] bool, the candidates that matter, None for all; the values of others mean nothing.
        """
        device = candidates.device
        self.follow(plan, device)
        counts = [len(tokens) - have for tokens, have in zip(plan.sequences, self.lengths, strict=True)]
        new = np.zeros((len(counts), max(counts)), dtype=np.int64)
        for row, tokens, count in zip(new, plan.sequences, counts, strict=True):
            row[new.shape[1] - count :] = tokens[len(tokens) - count :]
        return self.read(torch.from_numpy(new).to(device), counts, candidates, kept)

    def follow(self, plan: Plan, device: torch.device, grow: bool = True) -> None:
        """Make the rows those of `plan`, as far as they have been read.

        Args:
            plan: of rows which these are, or have been left behind by.
            device: of the model.
            grow: whether the plan's candidates are those of the last `read`.
        """
        if plan.source is None or not self.lengths:
            self.begin(len(plan.sequences))
            return
        if not plan.in_place:
            self.select(_there(plan.source, device))
        grown = plan.chosen >= 0
        if grow and grown.any():
            rows = None if grown.all() else _there(np.flatnonzero(grown), device)
            self.commit(_there(plan.chosen[grown], device), rows)
        self.crop([min(have, length) for have, length in zip(self.lengths, plan.kept + grown, strict=True)])

    @abstractmethod
    def begin(self, count: int) -> None:
        """Forget all rows and begin `count` empty ones."""

    @abstractmethod
    def select(self, rows: Tensor) -> None:
        """Keep `rows` [R'], in that order; a row named twice is copied."""

    @abstractmethod
    def crop(self, lengths: Sequence[int]) -> None:
        """Forget all but the first `lengths[r]` tokens of every row."""

    @abstractmethod
    def commit(self, chosen: Tensor, rows: Tensor | None = None) -> None:
        """Make candidate number `chosen[i]` of the last `read` the next token of row `rows[i]` (None: of every row)."""

    @abstractmethod
    def read(self, tokens: Tensor, counts: Sequence[int], candidates: Tensor, kept: Tensor | None = None) -> Tensor:
        """Read the last `counts[r]` of each row's `tokens` [R, p]; then values [R, k, M] of `candidates` [R, k].

        `kept` [R, k] tells the candidates that matter; a row without tokens and with at most one of them may be left
        out of the forward pass only if it has none: what is kept is always scored.
        """

    @abstractmethod
    def reset(self) -> None:
        """Forget all rows and free their memory."""


def make_scorer(model: Scored, compile: bool = False, reading: WantedReading = "auto") -> ValueScorer:
    """The fastest scorer that is right for `model`'s backbone (`Backbone.reading`).

    Args:
        model: a value model, or several fused into one.
        compile: run steps as a compiled graph (`RaggedScorer`).
        reading: "auto": the fastest; "packed": insist on it; "repeated": repeat the state of every row, as a check.

    Raises:
        ValueError: what is asked for is not right for this backbone; the reason is told.
    """
    backbone = Backbone.of(model.backbone)
    kind, reason = backbone.reading
    if reading == "packed" and kind != "packed":
        raise ValueError(f"reading='packed', but the {backbone.name} for {model.config.objectives} is {kind}: {reason}")
    if backbone.reading.ragged and reading != "repeated":
        ragged = RaggedScorer(model, packed=kind == "packed", compile=compile)
        if backbone.stable_length is None or isinstance(model, FusedValueModel):
            return ragged
        return LengthLimitedScorer(ragged, PlainScorer(model), backbone.stable_length)
    if compile:
        raise ValueError(
            f"compile=True needs a backbone with a token-addressed cache, which {backbone.name} has not ({reason}): "
            "leave it out"
        )
    if isinstance(model, FusedValueModel):
        raise ValueError(
            f"the adapters for {model.config.objectives} cannot be scored in one forward: {backbone.name} keeps no "
            f"token-addressed cache ({reason}). Load them with fuse=False"
        )
    if kind == "plain":
        warnings.warn(
            f"the value model for {model.config.objectives} reads every candidate from scratch, which is slow: "
            f"{backbone.name} cannot be read faster ({reason}). A backbone with ordinary attention can.",
            stacklevel=2,
        )
        return PlainScorer(model)
    return RepeatedStateScorer(model)


class RaggedScorer(ValueScorer):
    """For decoders whose state is keys and values: one forward a step over a `RaggedCache`.

    Args:
        model: the value model, or several fused into one.
        packed: run `ragged_attention`, which leaves void queries out.
        compile: compile the forward of a step, on a GPU into a CUDA graph. Shapes then are few: queries see the whole
            capacity, which doubles as it fills up, and none is left out. A prompt is read without. It pays where a
            step's time goes into launching kernels, and where batches keep their size.
    """

    def __init__(self, model: Scored, packed: bool = False, compile: bool = False) -> None:
        super().__init__(model)
        self.packed = packed and not compile
        mode = "reduce-overhead" if model.device.type == "cuda" else None
        self._compiled = torch.compile(model.forward, mode=mode) if compile else None
        self._cache: RaggedCache | None = None
        self._windows = Backbone.of(model.backbone).windows

    @property
    def cache(self) -> RaggedCache:
        """Keys and values of the rows."""
        assert self._cache is not None, "begin() comes first"
        return self._cache

    def reset(self) -> None:
        self._cache, self.lengths = None, []

    def begin(self, count: int) -> None:
        static = self._compiled is not None
        self._cache = RaggedCache(count, self.model.device, copies=self.model.copies, static=static)
        self.lengths = [0] * count

    def select(self, rows: Tensor) -> None:
        self.cache.select(rows)
        self.lengths = [self.lengths[row] for row in rows.tolist()]
        self.cache.longest = max(self.lengths)

    def crop(self, lengths: Sequence[int]) -> None:
        if list(lengths) != self.lengths:
            self.lengths = list(lengths)
            self.cache.crop(torch.tensor(self.lengths, device=self.cache.lengths.device), max(self.lengths))

    def commit(self, chosen: Tensor, rows: Tensor | None = None) -> None:
        self.cache.commit(chosen, rows)
        for row in range(len(self.lengths)) if rows is None else rows.tolist():
            self.lengths[row] += 1
        self.cache.longest = max(self.lengths)

    @torch.no_grad()
    def read(self, tokens: Tensor, counts: Sequence[int], candidates: Tensor, kept: Tensor | None = None) -> Tensor:
        cache, most = self.cache, tokens.shape[1]
        new = torch.tensor(counts, device=tokens.device) if most else torch.zeros_like(cache.lengths)
        try:
            feed = cache.prepare(tokens, new, candidates, kept=kept, pack=self.packed)
            inputs = feed.inputs(self._windows, self.model.dtype)
            forward = self.model if self._compiled is None or most > 1 or not cache.layers else self._compiled
            with holding(self.model.backbone) if self.packed else nullcontext():
                values = forward(**inputs, past_key_values=cache, use_cache=True).values
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not isinstance(error, torch.OutOfMemoryError) and "memory" not in str(error):
                raise
            raise _out_of_memory(cache, self.model) from error
        if most:
            cache.advance(new, most)
            self.lengths = [have + more for have, more in zip(self.lengths, counts, strict=True)]
            cache.longest = max(self.lengths)
        assert values is not None
        return self.model.join(feed.columns(values, most))


@dataclass
class _State:
    """One row of a `RepeatedStateScorer`: the tokens read, the state after them, and after each candidate too."""

    tokens: Tensor
    state: Cache | None = None
    candidates: Tensor | None = None
    branches: Cache | None = None


class RepeatedStateScorer(ValueScorer):
    """For any decoder with a cache, recurrent ones too: row by row, the state repeated for every candidate."""

    model: ValueModel

    def reset(self) -> None:
        self.begin(0)

    def begin(self, count: int) -> None:
        empty = torch.empty(0, dtype=torch.long, device=self.model.device)
        self._rows = [_State(empty) for _ in range(count)]
        self.lengths = [0] * count

    def select(self, rows: Tensor) -> None:
        taken: set[int] = set()
        selected = []
        for row in rows.tolist():
            selected.append(copy.deepcopy(self._rows[row]) if row in taken else self._rows[row])
            taken.add(row)
        self._rows = selected
        self.lengths = [len(row.tokens) for row in self._rows]

    def crop(self, lengths: Sequence[int]) -> None:
        for row, length in zip(self._rows, lengths, strict=True):
            if length < len(row.tokens):  # a state cannot be cropped, only begun anew
                row.tokens, row.state, row.branches = row.tokens[:length], None, None
        self.lengths = list(lengths)

    def commit(self, chosen: Tensor, rows: Tensor | None = None) -> None:
        numbers = range(len(self._rows)) if rows is None else rows.tolist()
        for number, index in zip(numbers, chosen, strict=True):
            row = self._rows[number]
            assert row.branches is not None
            assert row.candidates is not None
            row.branches.reorder_cache(index[None])
            row.state, row.branches = row.branches, None
            row.tokens = torch.cat([row.tokens, row.candidates[index][None]])
            self.lengths[number] += 1

    @torch.no_grad()
    def read(self, tokens: Tensor, counts: Sequence[int], candidates: Tensor, kept: Tensor | None = None) -> Tensor:
        values = []
        for row, new, count, own in zip(self._rows, tokens, counts, candidates, strict=True):
            self._take(row, new[len(new) - count :])
            branch = copy.deepcopy(row.state)
            assert branch is not None
            branch.reorder_cache(torch.zeros(len(own), dtype=torch.long, device=own.device))
            values.append(self.model(own[:, None], past_key_values=branch, use_cache=True).values[:, -1])
            row.candidates, row.branches = own, branch
        self.lengths = [len(row.tokens) for row in self._rows]
        return torch.stack(values)

    def _take(self, row: _State, new: Tensor) -> None:
        """Read `new` tokens: a whole prompt at once, later tokens one by one, as recurrent layers expect them."""
        row.tokens = torch.cat([row.tokens, new])
        if row.state is None:
            row.state = DynamicCache(config=Backbone.of(self.model.backbone).config)
            self.model(row.tokens[None], past_key_values=row.state, use_cache=True)
            return
        for token in new:
            self.model(token[None, None], past_key_values=row.state, use_cache=True)


class PlainScorer(ValueScorer):
    """For any decoder: every candidate is read from scratch, after its whole row."""

    model: ValueModel

    def reset(self) -> None:
        self.begin(0)

    def begin(self, count: int) -> None:
        empty = torch.empty(0, dtype=torch.long, device=self.model.device)
        self._rows, self.lengths = [empty] * count, [0] * count
        self._candidates: Tensor | None = None

    def select(self, rows: Tensor) -> None:
        self._rows = [self._rows[row] for row in rows.tolist()]
        self.lengths = [len(row) for row in self._rows]
        if self._candidates is not None:
            self._candidates = self._candidates[rows]

    def crop(self, lengths: Sequence[int]) -> None:
        self._rows = [row[:length] for row, length in zip(self._rows, lengths, strict=True)]
        self.lengths = list(lengths)

    def commit(self, chosen: Tensor, rows: Tensor | None = None) -> None:
        assert self._candidates is not None
        numbers = range(len(self._rows)) if rows is None else rows.tolist()
        for number, index in zip(numbers, chosen, strict=True):
            self._rows[number] = torch.cat([self._rows[number], self._candidates[number, index][None]])
            self.lengths[number] += 1

    def note(self, tokens: Tensor, counts: Sequence[int], candidates: Tensor) -> None:
        """Take the tokens and candidates of `read` down, without reading."""
        self._rows = [
            torch.cat([row, new[len(new) - count :]])
            for row, new, count in zip(self._rows, tokens, counts, strict=True)
        ]
        self.lengths = [len(row) for row in self._rows]
        self._candidates = candidates

    @torch.no_grad()
    def read(self, tokens: Tensor, counts: Sequence[int], candidates: Tensor, kept: Tensor | None = None) -> Tensor:
        self.note(tokens, counts, candidates)
        values = []
        for row, own in zip(self._rows, candidates, strict=True):
            sequences = torch.cat([row.expand(len(own), -1), own[:, None]], dim=1)
            values.append(self.model(sequences, use_cache=False).values[:, -1])
        return torch.stack(values)


class LengthLimitedScorer(ValueScorer):
    """For decoders whose cached keys are off from some length on (LongRoPE, dynamic NTK): from there, from scratch.

    Args:
        fast: right for sequences of up to `limit` tokens.
        slow: right for all.
        limit: in tokens, the candidate included.
    """

    def __init__(self, fast: ValueScorer, slow: PlainScorer, limit: int) -> None:
        super().__init__(fast.model)
        self.fast, self.slow, self.limit = fast, slow, limit
        self._short = True

    @property
    def lengths(self) -> list[int]:  # type: ignore[override]
        """Tokens read, row by row."""
        return self.slow.lengths

    @lengths.setter
    def lengths(self, _: list[int]) -> None:
        """Those of the scorers inside count."""

    def reset(self) -> None:
        self._short = True
        self.fast.reset()
        self.slow.reset()

    def begin(self, count: int) -> None:
        self._short = True
        self.fast.begin(count)
        self.slow.begin(count)

    def select(self, rows: Tensor) -> None:
        self.slow.select(rows)
        if self._short:
            self.fast.select(rows)

    def crop(self, lengths: Sequence[int]) -> None:
        self.slow.crop(lengths)
        if self._short:
            self.fast.crop(lengths)

    def commit(self, chosen: Tensor, rows: Tensor | None = None) -> None:
        self.slow.commit(chosen, rows)
        if self._short:
            self.fast.commit(chosen, rows)

    def read(self, tokens: Tensor, counts: Sequence[int], candidates: Tensor, kept: Tensor | None = None) -> Tensor:
        longest = max(have + more for have, more in zip(self.slow.lengths, counts, strict=True)) + 1
        if self._short and longest > self.limit:
            self._short = False
            self.fast.reset()
        if not self._short:
            return self.slow.read(tokens, counts, candidates, kept)
        self.slow.note(tokens, counts, candidates)
        return self.fast.read(tokens, counts, candidates, kept)


def _there(numbers: Tokens, device: torch.device) -> Tensor:
    """A small array of the host's on `device`, without waiting for it."""
    return torch.from_numpy(numbers).to(device, non_blocking=True)


def _out_of_memory(cache: RaggedCache, model: Scored) -> MemoryError:
    return MemoryError(
        f"no memory left for the value model's cache: {len(cache.lengths)} rows x {cache.capacity} slots x "
        f"{len(Backbone.of(model.backbone).layers)} layers, {cache.nbytes() / 2**20:.0f} MiB in {model.dtype}. "
        "Use fewer rows a batch, shorter prompts or load the value model in bfloat16."
    )
