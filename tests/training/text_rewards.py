"""Reward functions for the tests, named there as `text_rewards:low` and `text_rewards:high`."""

from __future__ import annotations

from typing import Any


def low(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """Share of words w0 to w22."""
    shares = []
    for completion in completions:
        words = [word for word in completion.split() if word.startswith("w")]
        shares.append(sum(int(word[1:]) < 23 for word in words) / max(1, len(words)))
    return shares


def high(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """Share of the other words."""
    return [1 - share for share in low(prompts, completions)]
