"""What is measured where no reward is given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def words(prompts: Sequence[Any], completions: Sequence[str], **columns: Any) -> list[float]:
    """How many words an answer has."""
    return [float(len(text.split())) for text in completions]
