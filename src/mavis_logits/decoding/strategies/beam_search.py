"""Beam search by combined value (section 4.4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Unpack

from torch import Tensor

from ...steering.signatures import StrategyOptions
from ...values.function import ValueFunction
from .search import MavisSearch, whole_number


class MavisBeamSearch(MavisSearch):
    """Writes `num_beams` sequences a prompt; continuations of good ones take the place of poor ones (section 4.4).

    Beams are sampled from the tilted distribution (with `do_sample=False` its mode is taken), so that the text stays
    one that the policy would write. At every `interval`-th token each beam draws `expand` different tokens instead of
    one, and of all these continuations of a prompt the `num_beams` best by combined value go on. What is drawn was
    valued anyway, so that a search runs the models as often as `num_beams` samples do, whatever `interval` and
    `expand` are; pruning only copies cached keys and values. Beams that have ended compete with their final value. No
    two beams are the same as long as there are enough different ones.

    One beam with `expand=1` is `MavisSampling`; an `interval` beyond the last token is `MavisBestOfN`.

    Args:
        num_beams: N, sequences kept of every prompt.
        interval: tokens from one pruning to the next. At 1, every token's errors of the value functions are selected
            for: with SmolLM2 that raised the reward less than 8 did (docs/results).
        expand: tokens that a beam draws where it prunes, so that a good one can take the place of `expand - 1` others.
            With 1 nothing is pruned.
        args, kwargs: as for `MavisStrategy`.

    `generate` returns `num_return_sequences` sequences a prompt, the most valuable first; with
    `return_dict_in_generate` their `values` [R, M], and `sequences_scores` [R], which are combined values.

    Raises:
        ValueError: a number below 1, more tokens to draw than there are candidates; and as for `MavisSearch`.
    """

    distinct = True

    def __init__(
        self,
        value_functions: ValueFunction | Sequence[ValueFunction] | Mapping[str, ValueFunction] | None = None,
        weights: Mapping[str, float] | Sequence[float] | Tensor | None = None,
        beta: float | Tensor | None = None,
        *,
        num_beams: int = 5,
        interval: int = 8,
        expand: int | None = None,
        **kwargs: Unpack[StrategyOptions],
    ) -> None:
        super().__init__(value_functions, weights, beta, **kwargs)
        self.num_beams, self.interval = whole_number("num_beams", num_beams), whole_number("interval", interval)
        top_k = self.config.top_k
        self.expand = whole_number("expand", min(2, top_k or 2) if expand is None else expand)
        if top_k is not None and self.expand > top_k:
            raise ValueError(
                f"expand={expand} tokens are to be drawn among top_k={top_k} candidates: lower expand or raise top_k"
            )

    @property
    def size(self) -> int:
        return self.num_beams

    @property
    def kept(self) -> int:
        return self.num_beams

    def plan(self, step: int, size: int) -> tuple[int, int]:
        return self.expand if step % self.interval == 0 else 1, size
