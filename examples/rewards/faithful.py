"""Faithfulness of a summary to its document: what of it can be found there."""

from __future__ import annotations

import re
from itertools import pairwise

from encoder import document_of, of_each, token_vectors


def faithful(prompts: list[str], completions: list[str], **columns: object) -> list[float]:
    """Mean of two shares, from 0 to 1: of the summary's pairs of neighbouring words that the document has too, and, by
    the embeddings of a sentence encoder, of how near each token of the summary is to the nearest of the document
    (BERTScore's precision). An empty summary has 0.

    A prompt is a request with the document below it, after a blank line.
    """
    documents = [document_of(prompt) for prompt in prompts]
    found = []
    for document, there, text, own in zip(
        documents, of_each(documents), completions, token_vectors(completions), strict=True
    ):
        near = float((own @ there.T).amax(dim=1).mean()) if len(own) else 0.0
        found.append((_shared(document, text) + near) / 2)
    return found


def _bigrams(text: str) -> list[tuple[str, str]]:
    words = re.findall(r"\w+", text.lower())
    return list(pairwise(words)) or [(word, "") for word in words]


def _shared(document: str, summary: str) -> float:
    there, own = set(_bigrams(document)), _bigrams(summary)
    return sum(pair in there for pair in own) / max(1, len(own))
