"""Rewards that are plain functions of the answer: what they ask for, a reader sees at a glance."""

from __future__ import annotations

import re


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_WARM = _words(
    """
    amazing awesome beautiful best bright celebrate charming cheerful comfort comfortable delicious delight
    delightful easy enjoy enjoyable enjoyed excellent excited exciting fantastic favorite friendly fun glad good
    gorgeous great happily happiness happy healthy helpful hope hopeful inspire inspiring joy joyful kind kindness
    laugh love loved lovely loving lucky perfect playful pleasant pleased pleasure positive proud refreshing relax
    safe smile special success successful sweet thank thankful thanks thrilled warm welcome wonderful
    """
)
_COLD = _words(
    """
    afraid angry anxious awful bad boring cruel danger dangerous dead death depressed difficult disappointing
    dislike evil fail failed failure fear hard hate horrible hurt ill kill lonely lose lost mad pain painful poor
    problem problems sad sadly scared sick sorry stupid suffer terrible tired tragic trouble ugly unfortunately
    unhappy upset violence violent war weak worried worry worse worst wrong
    """
)
_CHATTY = re.compile(r"\b(?:i|me|my|we|us|our|you|your|yeah|ok|okay|hey|hi|guys|stuff|gonna|lol)\b|\w'\w|!", re.I)


def positive(prompts: list[str], completions: list[str], **columns: object) -> list[float]:
    """Different warm words, less cold ones, at most four of each, in quarters: from -1 to 1."""
    found = [set(re.findall("[a-z]+", text.lower())) for text in completions]
    return [(min(4, len(words & _WARM)) - min(4, len(words & _COLD))) / 4 for words in found]


def formal(prompts: list[str], completions: list[str], **columns: object) -> list[float]:
    """Different words of eight letters or more, less contractions, persons and exclamations, by all words."""
    rewards = []
    for text in completions:
        words = re.findall(r"[a-z']+", text.lower())
        long = {word for word in words if len(word) >= 8}
        rewards.append((len(long) - len(_CHATTY.findall(text))) / max(8, len(words)))
    return rewards
