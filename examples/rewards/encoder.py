"""The sentence encoder that rewards of summaries read with, and the document in a prompt."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from mavis_training.rewards.load import packaged_folder

ENCODER = "sentence-transformers/all-MiniLM-L6-v2"
MAX_LENGTH = 384  # tokens of a text
_BATCH = 32


def document_of(prompt: str) -> str:
    """What is below the first blank line of a request.

    Raises:
        ValueError: there is nothing.
    """
    _, _, document = prompt.partition("\n\n")
    if not document.strip():
        raise ValueError(f"expected a request, a blank line and the document to be summarised, got {prompt[:80]!r}")
    return document


@cache
def _encoder() -> tuple[Any, Any]:
    folder = packaged_folder(ENCODER)
    return AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


@torch.inference_mode()
def token_vectors(texts: list[str]) -> list[Tensor]:
    """Unit vectors [tokens, d] of each text, without the marks that begin and end it; [0, d] of an empty one."""
    model, tokenizer = _encoder()
    found: list[Tensor] = [torch.empty(0)] * len(texts)
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # less padding
    for start in range(0, len(order), _BATCH):
        rows = order[start : start + _BATCH]
        batch = tokenizer(
            [texts[i] for i in rows], truncation=True, max_length=MAX_LENGTH, padding=True, return_tensors="pt"
        )
        states = torch.nn.functional.normalize(model(**batch).last_hidden_state, dim=-1)
        for row, own, mask in zip(rows, states, batch["attention_mask"], strict=True):
            found[row] = own[1 : int(mask.sum()) - 1]
    return found


def of_each(documents: list[str]) -> list[Tensor]:
    """`token_vectors`, of texts that recur only once."""
    every = list(dict.fromkeys(documents))
    vectors = dict(zip(every, token_vectors(every), strict=True))
    return [vectors[document] for document in documents]


def text_vector(tokens: Tensor) -> Tensor:
    """A unit vector [d] for a whole text: the mean of its tokens'; 0 for none."""
    return torch.nn.functional.normalize(tokens.sum(dim=0), dim=-1)
