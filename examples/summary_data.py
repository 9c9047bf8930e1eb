"""Summaries: prompts with human references, and what a reward for the quality of a summary learns from.

A prompt is one request with the document below it; the reward for faithfulness (`rewards/faithful.py`) finds the
document there again.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from reward_data import CUT_WORDS, Pair, corrupt, first_words, read_records

INSTRUCTION = "Summarize this abstract in one sentence."
_SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")


def summary_prompt(text: str) -> str:
    """The request to summarise a document."""
    return f"{INSTRUCTION}\n\n{text}"


def read_documents(data: Path, split: str, sources: Iterable[str] = ("scitldr", "debian")) -> list[dict]:
    """Records with `id`, `text`, `references` and `source` of the collections `summ_SOURCE_SPLIT.jsonl`; raises as
    `read_records`."""
    return [
        record | {"source": source}
        for source in sources
        for record in read_records(data / f"summ_{source}_{split}.jsonl")
    ]


def sentences(text: str) -> list[str]:
    """Of a document, by its punctuation."""
    return [part.strip() for part in _SENTENCE.split(text) if part.strip()]


def _dotted(text: str, rng: random.Random) -> str:
    """With or without a full stop at its end, so that this tells nothing."""
    bare = text.strip().rstrip(".!?;,: ")
    return f"{bare}." if rng.random() < 0.5 else bare


def summary_pairs(documents: Sequence[dict], rng: random.Random) -> list[Pair]:
    """Preferences for `summary`: a person's summary above a sentence of the document, another document's summary, the
    first words of its own and a degenerate one. Half of the sentences are cut to as many words as some other summary
    has, so that neither length nor a cut tells, and full stops are left to chance."""
    references = [rng.choice(record["references"]) for record in documents]
    lengths = [len(reference.split()) for reference in references]
    others = rng.sample(range(len(documents)), len(documents))
    pairs: list[Pair] = []
    for record, reference, other in zip(documents, references, others, strict=True):
        prompt, parts = summary_prompt(record["text"]), sentences(record["text"])
        cut = max(6, rng.choice(lengths)) if rng.random() < 0.5 else CUT_WORDS
        worse = {"a sentence from within": first_words(rng.choice(parts), cut)}
        worse["the first sentence"] = first_words(parts[0], cut)
        if documents[other]["id"] != record["id"]:
            worse["another document's summary"] = references[other]
        words = reference.split()
        if len(words) >= 10:
            worse["its own first words"] = first_words(reference, round(len(words) * rng.uniform(0.25, 0.6)))
        worse["degenerate"] = corrupt((record["text"], reference), rng)[1]
        for name, text in worse.items():
            better = (prompt, _dotted(reference, rng))
            pairs.append(Pair(better, (prompt, _dotted(text, rng) if text else text), name))
    return pairs
