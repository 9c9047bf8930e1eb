"""Values of candidates under a value model of another tokenizer: every candidate is a text of its own."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..backbone import Backbone
from ..values.retokenized import Retokenized
from .rows import RowTracker
from .scorer import PlainScorer, ValueScorer, WantedReading, make_scorer


class RetokenizedScorer(PlainScorer):
    """V(s + a) of candidates a, the text s + a being read in the value model's own tokens.

    The texts of all candidates are rows of one cache of the value model, in which each goes on from the row of the last
    step with which it shares the longest beginning: k rows of cache for each row of text, and a few tokens to read for
    each candidate.

    Args:
        model: the value model with both tokenizers.
        compile, reading: as for `make_scorer`.
    """

    model: Retokenized  # type: ignore[assignment]

    def __init__(self, model: Retokenized, compile: bool = False, reading: WantedReading = "auto") -> None:
        ValueScorer.__init__(self, model)  # type: ignore[arg-type]
        self._inner, self._tracker = make_scorer(model.model, compile, reading), RowTracker()
        self._longest = Backbone.of(model.backbone).longest

    def reset(self) -> None:
        super().reset()
        self._inner.reset()
        self._tracker.reset()

    @torch.no_grad()
    def read(self, tokens: Tensor, counts: Sequence[int], candidates: Tensor, kept: Tensor | None = None) -> Tensor:
        self.note(tokens, counts, candidates)
        wanted = torch.ones_like(candidates, dtype=torch.bool) if kept is None else kept
        places = torch.nonzero(wanted)
        rows = [row.tolist() for row in self._rows]
        texts = [
            np.array(self.model.translated([*rows[row], token]))
            for row, token in zip(places[:, 0].tolist(), candidates[wanted].tolist(), strict=True)
        ]
        longest = max(map(len, texts), default=0)
        if self._longest is not None and longest > self._longest:
            raise ValueError(
                f"a sequence of {longest} tokens is longer than the {self._longest} that the value model for "
                f"{self.model.config.objectives} can read: shorten the prompt or max_new_tokens, or use a longer one"
            )
        values = torch.zeros(*candidates.shape, len(self.model.config.objectives), device=candidates.device)
        values[wanted] = self._values(texts, candidates.device)
        return values

    def _values(self, texts: list[np.ndarray], device: torch.device) -> Tensor:
        """Values [n, M] of whole texts in the value model's tokens."""
        found = torch.zeros(len(texts), len(self.model.config.objectives), device=device)
        long = [number for number, text in enumerate(texts) if len(text) > 1]
        for number in set(range(len(texts))) - set(long):  # what begins a text: too short to go on from
            ids = torch.from_numpy(texts[number]).to(device)
            found[number] = self.model.model(ids[None], use_cache=False).values[0, -1]
        if long:
            sequences, last = [texts[n][:-1] for n in long], np.array([[texts[n][-1]] for n in long])
            values = self._inner.score(self._tracker.plan(sequences), torch.from_numpy(last).to(device))
            self._tracker.update(sequences, last)
            found[torch.tensor(long, device=device)] = values[:, 0]
        return found
