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


def check_given(input_ids: Tensor, scores: Tensor, attached: bool) -> None:
    """Raise `ValueError` if these are not the tokens so far [R, T] beside scores [R, V].

    Args:
        input_ids, scores: what a processor was given.
        attached: whether it has the base model's states, and can do without a prompt.
    """
    if not isinstance(input_ids, Tensor) or input_ids.ndim != 2 or scores.ndim != 2 or len(input_ids) != len(scores):
        raise ValueError(
            "MavisLogitsProcessor needs the tokens so far, [rows, length], beside scores [rows, vocabulary]; got "
            f"{getattr(input_ids, 'shape', None)} and {tuple(scores.shape)}. Continuous batching gives processors "
            "no history: use generate, or generate_batch without this processor."
        )
    if input_ids.is_floating_point() or not scores.is_floating_point():
        raise ValueError(
            f"expected whole-number token ids and floating-point scores, got {input_ids.dtype} and {scores.dtype}"
        )
    if input_ids.shape[1] == 0 and not attached:
        raise ValueError(
            "the prompt is empty: give generate at least one token to go on from. A prompt in inputs_embeds can be "
            "steered by value heads alone"
        )
