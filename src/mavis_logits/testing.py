"""The obvious, slow way to compute what this package computes fast, and checks that hold any scorer to it.

For tests: `recompute_values` re-forwards every candidate from scratch, `algorithm_2` is the paper's pseudocode on top
of it, and `check_scorer` verifies the laws of a value scorer (cached equals uncached, batch equals single, reordered
rows equal fresh rows), also one of your own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from .backbone import Backbone
from .scoring.rows import RowTracker, Tokens
from .scoring.scorer import ValueScorer
from .values.ensemble import ValueFunctions
from .values.retokenized import Retokenized
from .values.value_head import ValueHead
from .values.value_model import ValueModel
from .values.words import Words


@torch.no_grad()
def recompute_values(model: ValueModel, sequence: Sequence[int] | Tokens, candidates: Tensor) -> Tensor:
    """V_m(s + a) of every candidate a by a forward pass of its own, without cache or padding.

    Args:
        model: the value model.
        sequence: s, without padding.
        candidates: [k].

    Returns:
        float32 [k, M].
    """
    prefix = torch.as_tensor(np.asarray(sequence), dtype=torch.long, device=model.device)
    return torch.stack([model(torch.cat([prefix, token[None]])[None]).values[0, -1] for token in candidates])


@torch.no_grad()
def recompute_head_values(
    head: ValueHead, base: PreTrainedModel, sequence: Sequence[int] | Tokens, candidates: Tensor
) -> Tensor:
    """Q(s, a) of every candidate under a value head, the base model reading s from scratch; float32 [k, M]."""
    caught: list[Tensor] = []
    hook = Backbone.of(base).catch(head.config.layer, caught.append)
    try:
        ids = torch.as_tensor(np.asarray(sequence), dtype=torch.long, device=base.device)[None]
        base(ids)
    finally:
        hook.remove()
    states = caught[0] if caught[0].ndim == 3 else caught[0][:, None]
    return torch.cat([head(states[:, -1], token[None, None])[0] for token in candidates])


@torch.no_grad()
def recompute_words(
    words: Words, base: PreTrainedModel, sequence: Sequence[int] | Tokens, candidates: Tensor
) -> Tensor:
    """What each instruction, or a tuned policy, makes likelier, everything being read from scratch; float32 [k, M]."""

    def log_probs(model: PreTrainedModel, ids: Sequence[int]) -> Tensor:
        logits = model(torch.tensor([ids], device=model.device)).logits[0, -1].float()
        return torch.log_softmax(logits, dim=-1)[candidates]

    text = [int(token) for token in sequence]
    plain, reader = log_probs(base, text), words.backbone
    return torch.stack([log_probs(reader, place.applied(text)) - plain for place in words.places(text)], dim=1)


@torch.no_grad()
def recompute_retokenized(function: Retokenized, sequence: Sequence[int] | Tokens, candidates: Tensor) -> Tensor:
    """V_m(s + a) of every candidate, its text translated and read from scratch; float32 [k, M]."""
    prefix, model = [int(token) for token in sequence], function.model
    texts = [function.translated([*prefix, token]) for token in candidates.tolist()]
    return torch.stack([model(torch.tensor([ids], device=model.device)).values[0, -1] for ids in texts])


def recompute_all(
    functions: ValueFunctions, base: PreTrainedModel, sequence: Sequence[int] | Tokens, candidates: Tensor
) -> Tensor:
    """Values of every candidate for all objectives of a processor's or strategy's `functions`; float32 [k, M]."""
    columns = []
    for _, function, output in functions.outputs:
        if isinstance(function, ValueHead):
            columns.append(recompute_head_values(function, base, sequence, candidates)[:, output])
        elif isinstance(function, Retokenized):
            columns.append(recompute_retokenized(function, sequence, candidates)[:, output])
        elif isinstance(function, Words):
            columns.append(recompute_words(function, base, sequence, candidates)[:, output])
        else:
            assert isinstance(function, ValueModel), "value models run as one have no slow twin: use fuse=False"
            columns.append(recompute_values(function, sequence, candidates)[:, output])
    return torch.stack(columns, dim=1)


def algorithm_2(log_ref: Tensor, value: Callable[[int], float], k: int, beta: float) -> Tensor:
    """One step of Algorithm 2 as the paper states it, in float64.

    Args:
        log_ref: [V] log pi_ref of the next token.
        value: combined value v_i of a token.
        k: candidates.
        beta: strength of the tilt.

    Returns:
        [V] pi_MAVIS.
    """
    order = [int(i) for i in log_ref.argsort(descending=True)[:k] if torch.isfinite(log_ref[i])]
    values = [value(token) for token in order]
    low, high = min(values), max(values)
    normalised = [(v - low) / (high - low) if high > low else 0.0 for v in values]
    policy = torch.zeros(len(log_ref), dtype=torch.float64)
    for token, v in zip(order, normalised, strict=True):
        policy[token] = log_ref[token].double().exp() * float(np.exp(beta * v))
    return policy / policy.sum()


def check_scorer(
    scorer: ValueScorer,
    vocabulary: int,
    seed: int = 0,
    steps: int = 6,
    tolerance: float = 1e-4,
    models: Sequence[ValueModel] | None = None,
) -> None:
    """Hold a scorer to its laws on random sequences: new, grown, reordered, cropped and leaving rows.

    `models` are those that the scorer's model fuses; None if it is a `ValueModel` itself.

    Raises:
        AssertionError: values differ from `recompute_values` by more than `tolerance` (in reward units).
    """
    if models is None:
        assert isinstance(scorer.model, ValueModel), "name the models that are fused"
        models = [scorer.model]
    rng = np.random.default_rng(seed)
    tracker = RowTracker()
    sequences = [rng.integers(1, vocabulary, size=n) for n in (5, 2, 9)]
    for step in range(steps):
        candidates = np.stack([rng.choice(vocabulary, size=4, replace=False) for _ in sequences])
        given = torch.from_numpy(candidates).to(scorer.model.device)
        values = scorer.score(tracker.plan(sequences), given)
        for row, sequence in enumerate(sequences):
            expected = torch.cat([recompute_values(model, sequence, given[row]) for model in models], dim=1)
            error = float((values[row] - expected).abs().max())
            if not error <= tolerance:
                raise AssertionError(
                    f"step {step}, row {row} of {len(sequences)} (length {len(sequence)}): values differ from "
                    f"re-forwarding by {error:.2g}, allowed {tolerance:.2g}"
                )
        tracker.update(sequences, candidates)
        sequences = _next(sequences, candidates, rng, vocabulary, step)


def _next(
    sequences: list[np.ndarray], candidates: np.ndarray, rng: np.random.Generator, vocabulary: int, step: int
) -> list[np.ndarray]:
    """The rows of the next call: all go on, by a candidate or another token; some are reordered, cropped or leave."""
    chosen = [int(rng.choice(c)) if rng.random() < 0.7 else int(rng.integers(vocabulary)) for c in candidates]
    grown = [np.append(s, token) for s, token in zip(sequences, chosen, strict=True)]
    if step % 3 == 1:  # beams: the first row twice, order changed
        grown = [np.append(sequences[0], candidates[0][1]), *grown[::-1]][: len(grown)]
    if step % 4 == 2:  # rejected draft tokens, and others in their place
        grown[0] = np.append(grown[0][:-3], rng.integers(vocabulary, size=2))
    if step % 5 == 3 and len(grown) > 1:  # a row has ended
        grown = grown[1:]
    return grown
