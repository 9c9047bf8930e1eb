"""Reading values: V_m(s + a) of candidates a after rows of text s, from all value functions at once.

Value heads read the base model's hidden states; value models read the tokens, each with a cache of its own
(`ValueScorer`), in which rows may leave, multiply, change places or go back. The logits processor knows its rows by
their tokens (`RowTracker`), a strategy's session by what it did with them: both keep a `ValueReader` beside.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..backbone import Backbone
from ..backbone.hidden import LOGITS, SOURCE, Layer
from ..backbone.watch import Watch
from ..values.ensemble import ValueFunctions
from ..values.function import ValueFunction
from ..values.retokenized import Retokenized
from ..values.words import Words
from .retokenized import RetokenizedScorer
from .rows import Plan
from .scorer import Scored, ValueScorer, WantedReading, make_scorer
from .words import EncodedWordsScorer, WordsScorer

# [R, d] by layer, None for what enters the output embedding; the logits [R, V] themselves, under `LOGITS`; and under
# `SOURCE` what an encoder has read [R, S], -1 for padding.
States = Mapping[Layer, Tensor]


class _Tried(NamedTuple):
    """What was scored last: after every row, candidates of which one may be the row's next token."""

    candidates: Tensor  # [R, k]
    kept: Tensor | None  # [R, k]; None if all were
    scorers: list[ValueScorer]


class ValueReader:
    """Values of M objectives after R rows of text.

    A value model whose objectives have no weight is not run; when it is again it catches up with the rows. One that is
    no longer what it was when it read them reads them again.

    Args:
        functions: the value functions.
        compile, reading: as for `make_scorer`.
        watch: whether rows outlive a `generate` call, between which value models may change (`refresh`).

    Attributes:
        count: R.
    """

    def __init__(
        self,
        functions: ValueFunctions,
        compile: bool = False,
        reading: WantedReading = "auto",
        watch: bool = False,
    ) -> None:
        self._functions, self._compile, self._reading = functions, compile, reading
        self._scorers: dict[Scored | Words, ValueScorer] = {}
        self._longest: dict[Scored | Words, int | None] = {}
        self._watches: dict[Scored | Words, Watch] | None = {} if watch else None
        self._tried: _Tried | None = None
        self.count = 0

    def begin(self, count: int) -> None:
        """Forget all rows and begin `count` empty ones."""
        self.count, self._tried = count, None
        for scorer in self._scorers.values():
            scorer.begin(count)

    def select(self, rows: Tensor) -> None:
        """Keep `rows` [R'], in that order; a row named twice is copied."""
        self.count = len(rows)
        for scorer in self._scorers.values():
            scorer.select(rows)
        if self._tried is not None:
            candidates, kept, scorers = self._tried
            self._tried = _Tried(candidates[rows], None if kept is None else kept[rows], scorers)

    def crop(self, lengths: Sequence[int]) -> None:
        """Forget all but the first `lengths[r]` tokens of every row."""
        self._tried = None
        for scorer in self._scorers.values():
            scorer.crop([min(have, length) for have, length in zip(scorer.lengths, lengths, strict=True)])

    def grow(self, tokens: Tensor, chosen: Tensor | None = None) -> None:
        """Add a token to every row: one of the candidates scored last costs nothing more, any other is read later.

        Args:
            tokens: [R].
            chosen: [R] which of those candidates they are, if that is known of all: it spares the search for them.
        """
        if self._tried is None:
            return
        candidates, kept, scorers = self._tried
        rows = None
        if chosen is None:
            match = candidates == tokens[:, None]
            chosen = match.int().argmax(dim=1)
            hit = match.any(dim=1)
            if kept is not None:
                hit &= kept.gather(1, chosen[:, None])[:, 0]
            rows = torch.nonzero(hit)[:, 0]
        elif kept is not None:
            rows = torch.nonzero(kept.gather(1, chosen[:, None])[:, 0])[:, 0]
        if rows is not None and len(rows) == self.count:
            rows = None
        if rows is None or len(rows):
            for scorer in scorers:
                scorer.commit(chosen if rows is None else chosen[rows], rows)
        self._tried = None

    def follow(self, plan: Plan, device: torch.device) -> None:
        """Make the rows those of `plan`: what is cached of them stays, what is not is read with the next values."""
        tried = [] if self._tried is None else self._tried.scorers
        self.count, self._tried = len(plan.sequences), None
        for scorer in self._scorers.values():
            scorer.follow(plan, device, grow=scorer in tried)

    def refresh(self, thorough: bool = True) -> None:
        """Look whether value functions have changed since they read the rows.

        Args:
            thorough: look closely, which waits for the device: where a text begins.

        Raises:
            ValueError: value models have changed since they were fused.
        """
        self._functions.refresh(thorough)
        for model, watch in list((self._watches or {}).items()):
            if watch.changed(thorough):
                assert self._watches is not None
                del self._scorers[model], self._watches[model]
                self._tried = None

    def values(
        self,
        input_ids: Tensor | None,
        lengths: Sequence[int],
        states: States,
        candidates: Tensor,
        kept: Tensor | None = None,
        idle: Sequence[bool] | None = None,
        columns: int | None = None,
        whole: bool = False,
    ) -> Tensor:
        """Values [R, k, M] (float32, reward units) of appending each of `candidates` to its row.

        Args:
            input_ids: [R, T] the rows, padded on the left; needed for value models only.
            lengths: tokens of every row without padding.
            states: of the base model after the rows, for value heads and objectives in words.
            candidates: [R, k] token ids.
            kept: [R, k] bool, those whose values are wanted, in front of the others, which mean nothing; None for all.
            idle: [M] the objectives that need no value (`ValueFunctions.idle`).
            columns: most that are kept of any row, if that is known: it spares a wait for the device.
            whole: `candidates` are the whole vocabulary, in order.

        Raises:
            ValueError: a sequence longer than a value model can read.
            MemoryError: no room for a value model's cache.
        """
        functions = self._functions
        parts: dict[ValueFunction, Tensor] = functions.read_heads(states, None if whole else candidates, idle)
        models = functions.busy_models(idle)
        if models:
            assert input_ids is not None
            if columns is None:
                columns = candidates.shape[1] if kept is None else int(kept.sum(dim=1).max())
            scorers = [self._scorer(model) for model in models]
            fed = candidates[:, :columns]
            kept = None if kept is None else kept[:, :columns]
            if columns:
                for model, scorer in zip(models, scorers, strict=True):
                    self._check_context(model, max(lengths) + 1)
                    counts = [length - read for length, read in zip(lengths, scorer.lengths, strict=True)]
                    unread = input_ids[:, input_ids.shape[1] - max(counts) :]
                    if isinstance(scorer, EncodedWordsScorer):
                        scorer.sources = states.get(SOURCE)
                    values = scorer.read(unread, counts, fed, kept)
                    if isinstance(model, Words):  # the advantage over what the base model says without them
                        values -= torch.log_softmax(states[LOGITS].float(), dim=-1).gather(1, fed)[..., None]
                    parts[model] = nn.functional.pad(values, (0, 0, 0, candidates.shape[1] - columns))
                self._tried = _Tried(fed, kept, scorers)
        if not parts:
            return candidates.new_zeros(*candidates.shape, len(functions.objectives), dtype=torch.float32)
        return functions.gather(parts)

    def _scorer(self, model: Scored | Words) -> ValueScorer:
        if model not in self._scorers:
            self._scorers[model] = self._make_scorer(model)
            self._scorers[model].begin(self.count)
            # Those that read other tokens than these know best how many there are.
            own = isinstance(model, Words | Retokenized)
            self._longest[model] = None if own else Backbone.of(model.backbone).longest
            if self._watches is not None:
                self._watches[model] = Watch(model.backbone if isinstance(model, Words) else model)
        return self._scorers[model]

    def _make_scorer(self, model: Scored | Words) -> ValueScorer:
        if isinstance(model, Retokenized):
            return RetokenizedScorer(model, self._compile, self._reading)
        if not isinstance(model, Words):
            return make_scorer(model, self._compile, self._reading)
        encoded = Backbone.of(model.backbone).is_encoder_decoder
        return EncodedWordsScorer(model) if encoded else WordsScorer(model)

    def _check_context(self, model: Scored | Words, length: int) -> None:
        """Raise `ValueError` if the value model cannot read sequences of `length` tokens."""
        limit = self._longest[model]
        if limit is not None and length > limit:
            raise ValueError(
                f"a sequence of {length} tokens is longer than the {limit} that the value model for "
                f"{model.config.objectives} can read: shorten the prompt or max_new_tokens, or use a longer one"
            )
