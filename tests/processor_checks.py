"""What a processor did, held against Algorithm 2 as the slow twin computes it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from mavis_logits import MavisLogitsProcessor
from mavis_logits.testing import algorithm_2, recompute_all
from tiny import EOS, PAD, functions

K, BETA = 6, 3.0
WEIGHTS = {"a": 0.7, "b": 0.3}


class Recorder(LogitsProcessor):
    """Stands before and behind a processor, and keeps what went in and came out."""

    def __init__(self, inner: MavisLogitsProcessor) -> None:
        self.inner = inner
        self.calls: list[tuple[Tensor, Tensor, Tensor]] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        out = self.inner(input_ids, scores)
        self.calls.append((input_ids.clone(), scores.clone(), out.clone()))
        return out


def slow_policy(
    mavis: MavisLogitsProcessor, base: Any, sequence: Tensor, scores: Tensor, k: int = K, beta: float = BETA
) -> Tensor:
    """pi_MAVIS [V] after `sequence` (no padding), by re-forwarding everything."""
    log_ref = torch.log_softmax(scores.double(), dim=-1)
    candidates = log_ref.argsort(descending=True)[:k]
    values = recompute_all(mavis.functions, base, sequence, candidates)
    weights = values.new_tensor([WEIGHTS[name] for name in mavis.objectives])
    combined = dict(zip(candidates.tolist(), (values @ weights).tolist(), strict=True))
    return algorithm_2(log_ref, combined.__getitem__, k, beta)


def strip(row: Tensor) -> Tensor:
    return row[int((row != PAD).int().argmax()) :]


def assert_algorithm_2(recorder: Recorder, base: Any, steered: int | None = None) -> None:
    """Every call's result is the slow policy, or (a finished row, a draft) the scores untouched."""
    compared = 0
    for input_ids, scores, out in recorder.calls:
        for row in range(len(input_ids)):
            if torch.equal(out[row], scores[row]):  # closed, a draft of the assistant, or prompt lookup asking
                continue
            expected = slow_policy(recorder.inner, base, strip(input_ids[row]), scores[row])
            torch.testing.assert_close(out[row].double().exp(), expected, atol=1e-4, rtol=1e-3)
            compared += 1
    assert compared >= (len(recorder.calls) // 2 if steered is None else steered)


def steer(kind: str, base: Any, **settings: Any) -> Recorder:
    model = base if kind != "model" else None
    return Recorder(
        MavisLogitsProcessor(
            functions(kind, base), WEIGHTS, BETA, model=model, top_k=K, pad_token_id=PAD, eos_token_id=EOS, **settings
        )
    )
