"""Quality of a one-sentence summary: how much it reads like one that a person wrote of this document."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from encoder import document_of, of_each, text_vector, token_vectors
from safetensors.torch import load_file
from torch import Tensor

WEIGHTS = Path(__file__).with_name("summary.safetensors")


def features(prompts: list[str], completions: list[str]) -> Tensor:
    """[R, 3 d]: vectors of the texts, means of their last three tokens' (whether they are whole), and products with
    the documents' (what they are about)."""
    documents = of_each([document_of(prompt) for prompt in prompts])
    rows = []
    for there, own in zip(documents, token_vectors(completions), strict=True):
        if not len(own):
            own = torch.zeros(1, there.shape[1])
        text = text_vector(own)
        rows.append(torch.cat([text, own[-3:].mean(dim=0), text * text_vector(there) * there.shape[1] ** 0.5]))
    return torch.stack(rows)


@cache
def _weights() -> dict[str, Tensor]:
    return load_file(WEIGHTS)


def summary(prompts: list[str], completions: list[str], **columns: object) -> list[float]:
    """Logit of a Bradley-Terry model on a frozen sentence encoder, learnt by `examples/train_summary_reward.py`: a
    person's summary above a sentence of the document, another document's summary, the first words of its own, and
    degenerate text.

    A prompt is a request with the document below it, after a blank line.
    """
    own = _weights()
    hidden = torch.tanh(features(prompts, completions) @ own["hidden"].T + own["bias"])
    return [float(value) for value in hidden @ own["out"]]
