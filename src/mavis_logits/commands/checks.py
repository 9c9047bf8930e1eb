"""What `mavis verify` looks at, and how it tells it: one block to paste into an issue."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

PROMPTS = (
    "How do I make good tea?",
    "What should I think of when I plan a picnic?",
    "Write two sentences about the sea.",
)


@dataclass(frozen=True)
class Check:
    """What was looked at, whether it is as it should be, and what was found."""

    name: str
    passed: bool
    found: str


def block(heading: Sequence[str], checks: Sequence[Check]) -> str:
    """Lines about what was looked at, and the checks, as a block of Markdown."""
    told = [f"{'ok  ' if check.passed else 'FAIL'} {check.name}: {check.found}" for check in checks]
    return "\n".join(["```", *heading, *told, "```"])
