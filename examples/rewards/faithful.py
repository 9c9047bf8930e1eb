"""Faithfulness of a summary to its document: what of it can be found there."""

from __future__ import annotations

import re
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from mavis_training.rewards.load import packaged_folder

ENCODER = "sentence-transformers/all-MiniLM-L6-v2"
MAX_LENGTH = 384  # tokens of a document
_BATCH = 32


def faithful(prompts: list[str], completions: list[str], **columns: object) -> list[float]:
    """Mean of two shares, from 0 to 1: of the summary's pairs of neighbouring words that the document has too, and, by
    the embeddings of a sentence encoder, of how near each token of the summary is to the nearest of the document
    (BERTScore's precision). An empty summary has 0.

    A prompt is a request with the document below it, after a blank line.
    """
    documents = [document_of(prompt) for prompt in prompts]
    texts = list(zip(documents, completions, _nearness(documents, completions), strict=True))
    return [(_found(document, own) + near) / 2 if own.split() else 0.0 for document, own, near in texts]


def document_of(prompt: str) -> str:
    """What is below the first blank line.

    Raises:
        ValueError: there is nothing.
    """
    _, _, document = prompt.partition("\n\n")
    if not document.strip():
        raise ValueError(f"expected a request, a blank line and the document to be summarised, got {prompt[:80]!r}")
    return document


def _bigrams(text: str) -> list[tuple[str, str]]:
    words = re.findall(r"\w+", text.lower())
    return list(pairwise(words)) or [(word, "") for word in words]


def _found(document: str, summary: str) -> float:
    there, own = set(_bigrams(document)), _bigrams(summary)
    return sum(pair in there for pair in own) / max(1, len(own))


@cache
def _encoder() -> tuple[object, object]:
    folder = packaged_folder(ENCODER)
    return AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


@torch.inference_mode()
def _embedded(texts: list[str]) -> list[Tensor]:
    """Unit vectors [tokens, d] of each text, without the tokens that begin and end it."""
    model, tokenizer = _encoder()
    found: list[Tensor] = [torch.empty(0)] * len(texts)
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # less padding
    for start in range(0, len(order), _BATCH):
        rows = order[start : start + _BATCH]
        batch = tokenizer(  # type: ignore[operator]
            [texts[i] for i in rows], truncation=True, max_length=MAX_LENGTH, padding=True, return_tensors="pt"
        )
        states = torch.nn.functional.normalize(model(**batch).last_hidden_state, dim=-1)  # type: ignore[operator]
        for row, own, mask in zip(rows, states, batch["attention_mask"], strict=True):
            found[row] = own[1 : int(mask.sum()) - 1]
    return found


def _nearness(documents: list[str], summaries: list[str]) -> list[float]:
    """For each summary, the mean over its tokens of the cosine to the nearest token of the document."""
    every = list(dict.fromkeys(documents))
    of_document = dict(zip(every, _embedded(every), strict=True))
    own = _embedded(summaries)
    near = []
    for document, summary in zip(documents, own, strict=True):
        there = of_document[document]
        near.append(float((summary @ there.T).amax(dim=1).mean()) if len(summary) and len(there) else 0.0)
    return near
