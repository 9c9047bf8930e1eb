"""What scores that a processor is given tell, and what it gives back for tokens that are no candidates."""

from __future__ import annotations

import torch
from torch import Tensor

# Scores of tokens that are no candidates: none is left of their probability, but their order. Ends of text come behind
# the -1e9 of beams that do not exist, lest generate's beam search take one for a sequence.
_FAR, _FARTHER, _SPREAD = 2.0**23, 1e10, 2.0**10


def tied_first(reference: Tensor) -> Tensor:
    """[R, 1] bool, whether the first of the candidates [R, k] are equally likely: only then may it be a probe."""
    return reference[:, :1] == reference[:, :2][:, -1:]


def is_probe(scores: Tensor) -> bool:
    """Whether the scores are all the same: prompt lookup asks in this way what is forbidden. Waits for the device."""
    least, most = scores[0].aminmax()
    return bool((least == most) & (least > -torch.inf))


def far_scores(scores: Tensor, best: Tensor, eos: Tensor, temperature: float) -> Tensor:
    """[R, V] float32 scores of tokens that are no candidates: no probability, but the order of the reference.

    Args:
        scores: [R, V] the reference's.
        best: [R, 1] the highest of them.
        eos: [n] tokens that come behind all others.
        temperature: of the reference.
    """
    spread = _SPREAD / temperature
    far = torch.add(-_FAR - best.float() * spread, scores.float(), alpha=spread)
    return far.index_add_(1, eos, far.new_full((len(far), len(eos)), -_FARTHER))
