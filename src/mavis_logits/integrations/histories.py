"""Value models in a server: their caches follow requests that join, leave, are put aside, resumed or draft ahead.

Rows are known by their tokens alone (`scoring.rows.RowTracker`), so that nothing has to be told about what became of a
request: what a cache has of its text is used, whatever else is read.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from ..backbone import Backbone
from ..backbone.hidden import Layer
from ..scoring.reader import ValueReader
from ..scoring.rows import RowTracker, Tokens
from ..values.ensemble import ValueFunctions


class Histories:
    """Values after texts that are given whole at every step, read with caches.

    Args:
        functions: the value functions.
        max_tokens: most tokens that caches may hold, over all rows. Rows for which there is no room are read anew at
            every step, and caches that have not been used for longest go first.
    """

    def __init__(self, functions: ValueFunctions, max_tokens: int) -> None:
        self._functions, self._max_tokens = functions, max_tokens
        self._kept: dict[Hashable, tuple[ValueReader, RowTracker, int]] = {}  # the last used at the end
        limits = [Backbone.of(model.backbone).longest for model in functions.value_models]
        self._longest = min((limit for limit in limits if limit is not None), default=None)

    @property
    def tokens(self) -> int:
        """How many tokens caches have room for now."""
        return sum(size for *_, size in self._kept.values())

    def forget(self) -> None:
        """Drop all caches."""
        self._kept.clear()

    def values(
        self,
        key: Hashable,
        texts: Sequence[Tokens],
        states: Mapping[Layer, Tensor],
        candidates: Tensor,
        idle: Sequence[bool] | None = None,
    ) -> Tensor:
        """Values [R, k, M] of candidates after texts.

        Args:
            key: rows asked for under one key at every step share a cache.
            texts: R, each of at least one token.
            states: of the served model, [R, d] by layer, for value heads.
            candidates: [R, k].
            idle: [M] the objectives that need no value.

        Returns:
            NaN for a text longer than a value model can read.
        """
        readable = [n for n, text in enumerate(texts) if self._longest is None or len(text) < self._longest]
        if len(readable) < len(texts):
            shape = (*candidates.shape, len(self._functions.objectives))
            found = torch.full(shape, torch.nan, device=candidates.device)
            if readable:
                rows = torch.tensor(readable, device=candidates.device)
                own = {layer: state[rows] for layer, state in states.items()}
                found[rows] = self.values(key, [texts[n] for n in readable], own, candidates[rows], idle)
            return found
        width = max(map(len, texts)) + candidates.shape[1] + 1
        fitting = max(1, self._max_tokens // width)
        parts = []
        for start in range(0, len(texts), fitting):
            part = slice(start, start + fitting)
            own = {layer: state[part] for layer, state in states.items()}
            if start == 0:
                reader, tracker = self._reader(key, min(fitting, len(texts)) * width)
            else:
                reader, tracker = self._fresh()
            parts.append(self._read(reader, tracker, texts[part], own, candidates[part], idle))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _read(
        self,
        reader: ValueReader,
        tracker: RowTracker,
        texts: Sequence[Tokens],
        states: Mapping[Layer, Tensor],
        candidates: Tensor,
        idle: Sequence[bool] | None,
    ) -> Tensor:
        plan = tracker.plan(list(texts))
        reader.follow(plan, candidates.device)
        lengths = [len(text) for text in texts]
        rows = np.zeros((len(texts), max(lengths)), dtype=np.int64)
        for row, text in zip(rows, texts, strict=True):
            row[len(row) - len(text) :] = text
        input_ids = torch.from_numpy(rows).to(candidates.device)
        values = reader.values(input_ids, lengths, states, candidates, idle=idle)
        tracker.update(list(texts), candidates.cpu().numpy())
        return values

    def _reader(self, key: Hashable, size: int) -> tuple[ValueReader, RowTracker]:
        """The cache of a key, with room for `size` tokens; others go for it, the least recently used first."""
        reader, tracker, _ = self._kept.pop(key, (*self._fresh(), 0))
        while self._kept and self.tokens + size > self._max_tokens:
            del self._kept[next(iter(self._kept))]
        self._kept[key] = reader, tracker, size
        return reader, tracker

    def _fresh(self) -> tuple[ValueReader, RowTracker]:
        return ValueReader(self._functions), RowTracker()
