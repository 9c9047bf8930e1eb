"""What a visitor of the page sets, and which language model and value functions are chosen."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# Smallest and largest of each setting on the page.
WEIGHT = (-1.0, 1.0)
KL = (0.0, 40.0)
TEMPERATURE = (0.05, 2.0)
LENGTH = (1, 512)
SEED = (0, 2**31 - 1)
LONGEST_PROMPT = 4000  # characters

# Names under which objectives are known, for a button each. The first that is there counts.
PRESETS = {
    "funnier": ("humour", "humor", "funny", "joke"),
    "safer": ("harmless", "harmlessness", "safe", "safety"),
    "shorter": ("concise", "short", "brief", "conciseness"),
}
PRESET_KL = 12.0


@dataclass(frozen=True)
class Settings:
    """Of one answer.

    Attributes:
        weights: lambda, by objective; 0 or absent: it has no say.
        kl: budget of an answer of full length, in nats, shared evenly among its tokens; 0 is no steering.
        temperature: of the reference.
        max_new_tokens: length at most.
        seed: of the sampling.

    Raises:
        ValueError: one of them is out of range.
    """

    weights: Mapping[str, float]
    kl: float
    temperature: float
    max_new_tokens: int
    seed: int

    def __post_init__(self) -> None:
        for name, weight in self.weights.items():
            _check(f"the weight of {name}", weight, *WEIGHT)
        _check("the KL budget", self.kl, *KL)
        _check("the temperature", self.temperature, *TEMPERATURE)
        _check("the length", self.max_new_tokens, *LENGTH, whole=True)
        _check("the seed", self.seed, *SEED, whole=True)

    @property
    def steers(self) -> bool:
        """Whether anything is tilted at all."""
        return self.kl > 0 and any(self.weights.values())

    @property
    def said(self) -> dict[str, float]:
        """The weights that are not 0."""
        return {name: weight for name, weight in self.weights.items() if weight}

    def summary(self) -> str:
        """In a line."""
        shares = ", ".join(f"{name} {weight:+g}" for name, weight in self.said.items())
        return f"{shares} within {self.kl:g} nats" if self.steers else "unsteered"


def _check(name: str, given: object, low: float, high: float, whole: bool = False) -> None:
    number = isinstance(given, int | float) and not isinstance(given, bool) and math.isfinite(given)
    if not number or not low <= given <= high or (whole and given != int(given)):  # type: ignore[operator, call-overload]
        kind = "a whole number" if whole else "a number"
        raise ValueError(f"{name} must be {kind} between {low:g} and {high:g}, got {given!r}")


@dataclass(frozen=True)
class Choice:
    """A language model and what steers it, by the names that `mavis generate` takes.

    Attributes:
        model: as after `--model`.
        values: as after `--values`; empty for the value heads that are shipped, unless there are words.
        words: as after `--words`.
        top_k: as after `--top-k`.
    """

    model: str
    values: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    top_k: int | None = None

    def arguments(self) -> argparse.Namespace:
        """For `commands.generate.steering`, which the page gives weights and strength later."""
        return argparse.Namespace(
            model=self.model, values=list(self.values) or None, words=list(self.words) or None, top_k=self.top_k,
            beta=None, kl=None, max_new_tokens=None,
        )  # fmt: skip


def presets(objectives: Sequence[str]) -> dict[str, str]:
    """The buttons that there can be with these objectives, and the objective that each sets."""
    found = {}
    for button, names in PRESETS.items():
        objective = next((name for name in names if name in objectives), None)
        if objective is not None:
            found[button] = objective
    return found


def check_prompt(prompt: str) -> str:
    """The prompt without space around it.

    Raises:
        ValueError: nothing to answer, or too long.
    """
    prompt = (prompt or "").strip()
    if not prompt:
        raise ValueError("there is no question yet: write one first")
    if len(prompt) > LONGEST_PROMPT:
        raise ValueError(f"the question has {len(prompt)} characters; at most {LONGEST_PROMPT} are read")
    return prompt
