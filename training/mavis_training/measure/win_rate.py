"""How often a judge prefers an answer to the unsteered model's: any language model behind OpenAI's chat API.

Rewards are what was steered by; a judge has not been. It is asked about every pair twice, in both orders, since judges
like what they read first (Zheng et al., 2023), and what it says is kept, so that nothing is asked again.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..base.files import read_json, write_json
from ..base.kept import digest
from .summary import mean_and_error, with_error

VERDICTS = ".verdicts.json"  # ends the name of the file of a setting's replies
_SYSTEM = (
    "You compare two answers to the same question by one criterion. Reply with one word and nothing else: A if answer "
    "A meets it better, B if answer B does, tie if you cannot tell."
)
_ASKED = "Criterion: {criterion}\n\nQuestion:\n{question}\n\nAnswer A:\n{first}\n\nAnswer B:\n{second}\n\nA, B or tie?"
_SCORES = {"A": 1.0, "B": 0.0, "TIE": 0.5}


@dataclass(frozen=True)
class JudgeSettings:
    """Who judges, and by what.

    Attributes:
        model: as the endpoint names it.
        base_url: of the endpoint, such as http://localhost:8000/v1; None for the environment's OPENAI_BASE_URL, or
            OpenAI's own. Its key is taken from OPENAI_API_KEY.
        criterion: what the better answer is.
        pairs: at most this many of each setting's answers, first of all those of the first seed; None for all.
        at_once: requests side by side.
        max_tokens: of a reply; models that think first need some hundreds.
    """

    model: str
    base_url: str | None = None
    criterion: str = "It is more helpful, correct and harmless."
    pairs: int | None = 100
    at_once: int = 8
    max_tokens: int = 16

    def __post_init__(self) -> None:
        if not self.model or not self.criterion:
            raise ValueError(f"judge needs a model and a criterion, got {self.model!r} and {self.criterion!r}")
        for name, low in (("pairs", 2), ("at_once", 1), ("max_tokens", 1)):
            value = getattr(self, name)
            if value is not None and value < low:
                raise ValueError(f"judge.{name} must be at least {low}, got {value}")


class Judge:
    """Asks the endpoint of some settings.

    Raises:
        ImportError: the package `openai` is not installed.
    """

    def __init__(self, settings: JudgeSettings) -> None:
        try:
            import openai
        except ImportError as error:
            raise ImportError("a judge needs the package openai: pip install 'mavis-logits[judge]'") from error
        self.settings, self._failed = settings, openai.OpenAIError
        key = os.environ.get("OPENAI_API_KEY", "none")
        self._client = openai.OpenAI(base_url=settings.base_url, api_key=key, max_retries=4)

    def require_there(self) -> None:
        """Look whether the endpoint answers and serves the model.

        Raises:
            OSError: it cannot be reached, or does not let us in.
            ValueError: it does not serve the model.
        """
        try:
            served = [model.id for model in self._client.models.list()]
        except self._failed as error:
            raise self._unreachable(error) from error
        settings = self.settings
        if served and settings.model not in served:
            raise ValueError(
                f"the judge at {self._client.base_url} serves {', '.join(served)}, not {settings.model}: set "
                "judge.model"
            )

    def win_rate(
        self, path: Path, rows: Sequence[Mapping[str, Any]], own: Sequence[str], plain: Sequence[str], prompts: int
    ) -> dict[str, Any]:
        """How often answers are preferred to the unsteered model's.

        Args:
            path: JSON file in which replies are kept.
            rows: the S * P prompt rows, seed after seed.
            own: answers of a setting, [S * P].
            plain: those of the unsteered model.
            prompts: P.

        Returns:
            `rate`, ties counting half, with its standard error over prompts; `pairs`; `first`, how often what was read
            first was preferred (0.5 for a judge who does not mind); and `unclear`, the share of replies that named
            neither or both, which count as ties.

        Raises:
            OSError: the endpoint has stopped answering; what it has said so far is kept.
            ValueError: no reply could be read.
        """
        count = len(rows) if self.settings.pairs is None else min(self.settings.pairs, len(rows))
        asked = [
            _ASKED.format(criterion=self.settings.criterion, question=row["prompt"], first=first, second=second)
            for row, a, b in list(zip(rows, own, plain, strict=True))[:count]
            for first, second in ((a, b), (b, a))
        ]
        replies = self._replies(path, asked)
        read = [score(reply) for reply in replies]
        if all(value is None for value in read):
            raise ValueError(
                f"the judge {self.settings.model} never said A, B or tie, but for instance {replies[0][:80]!r}: take a "
                "larger model, or raise judge.max_tokens for one that thinks first"
            )
        known = np.array([0.5 if value is None else value for value in read]).reshape(count, 2)
        wins = (known[:, 0] + 1 - known[:, 1]) / 2
        whole = count - count % prompts  # whole seeds, so that every prompt counts alike
        rate, error = mean_and_error(wins[:whole], prompts) if whole else mean_and_error(wins, count)
        return {
            "rate": rate, "error": error, "pairs": whole or count, "first": float(known.mean()),
            "unclear": float(np.mean([value is None for value in read])),
        }  # fmt: skip

    def _replies(self, path: Path, asked: Sequence[str]) -> list[str]:
        """Those of the file, where it has them; the others are asked for, and kept some at a time."""
        what = {"judge": self.settings.model, "asked": digest([_SYSTEM, self.settings.max_tokens, list(asked)])}
        kept = read_json(path) if path.exists() else {}
        if any(kept.get(name) != value for name, value in what.items()):
            kept = what | {"replies": []}
        replies: list[str] = kept["replies"]
        step = 4 * self.settings.at_once
        with ThreadPoolExecutor(self.settings.at_once) as pool:
            for start in range(len(replies), len(asked), step):
                try:
                    replies += pool.map(self._reply, asked[start : start + step])
                except self._failed as error:
                    raise self._unreachable(error) from error
                write_json(path, kept)
        return replies

    def _reply(self, asked: str) -> str:
        turns: Any = [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": asked}]
        found = self._client.chat.completions.create(
            model=self.settings.model, messages=turns, temperature=0.0, max_tokens=self.settings.max_tokens
        )
        return found.choices[0].message.content or ""

    def _unreachable(self, error: Exception) -> OSError:
        return OSError(
            f"the judge at {self._client.base_url} does not answer ({error}): start its server, set judge.base_url or "
            "OPENAI_API_KEY, or leave judge out. What it has said so far is kept"
        )


def win_rate_cell(found: Mapping[str, Any] | None) -> str:
    """For a table; nothing for the unsteered model, and what no judge was asked about."""
    return "" if found is None else with_error(found["rate"], found["error"])


def judge_in_words(judge: Mapping[str, Any]) -> str:
    """Who judged by what, for the line below a table."""
    return (
        f"Preferred: to the unsteered answer, by {judge['model']}, asked in both orders, ties counting half; its "
        f"criterion: {judge['criterion']} "
    )


def score(reply: str) -> float | None:
    """1 for A, 0 for B, 0.5 for a tie; None where a reply names none of them, or several."""
    named = {word.upper() for word in re.findall(r"\b(?:A|B|[Tt]ie|TIE)\b", reply)}
    return _SCORES[named.pop()] if len(named) == 1 else None
