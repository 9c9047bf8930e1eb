"""Which hidden state stands behind which row of logits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ...backbone.hidden import Layer


@dataclass
class BatchStates:
    """The states of one forward pass, and which of its tokens lead to logits.

    A row is known by its request's slot and its position in that request's text. Whatever an engine does with rows
    between the forward pass and the sampling (chunks, shards, compaction, another order), they are found by these.

    Attributes:
        hidden: [T, d] by layer, of all tokens of the pass; None for what enters the output embedding.
        tokens: [L] which of them lead to logits.
        slots, positions: [L] of these; None where rows are in the order of `tokens`.
    """

    hidden: Mapping[Layer, Tensor]
    tokens: Tensor
    slots: Tensor | None = None
    positions: Tensor | None = None

    def of(self, slots: Tensor, positions: Tensor | None, layers: set[Layer]) -> dict[Layer, Tensor]:
        """The states [R, d] by layer behind rows of logits.

        Args:
            slots, positions: [R] of the rows.
            layers: which are wanted.

        Returns:
            NaN for a row that is not in the pass, so that it is noticed without waiting for the device.
        """
        if slots is self.slots or self.slots is None:
            return {layer: self.hidden[layer][self.tokens] for layer in layers}
        assert positions is not None
        keys, order = self._sorted
        wanted = _keys(slots, positions)
        place = torch.searchsorted(keys, wanted).clamp(max=len(keys) - 1)
        found = keys[place] == wanted
        tokens = self.tokens[order[place]]
        return {layer: self.hidden[layer][tokens].masked_fill(~found[:, None], torch.nan) for layer in layers}

    @cached_property
    def _sorted(self) -> tuple[Tensor, Tensor]:
        assert self.slots is not None
        assert self.positions is not None
        keys, order = _keys(self.slots, self.positions).sort()
        return keys, order


def _keys(slots: Tensor, positions: Tensor) -> Tensor:
    return slots.long() << 32 | positions.long()
