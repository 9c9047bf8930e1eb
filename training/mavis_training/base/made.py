"""Where and when a result was measured: what every results file records, and the words of it below a table."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import torch


def made_here() -> dict[str, Any]:
    """Date, machine and versions of a result that is measured now, as a results file begins."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads",
        "versions": {name: version(name) for name in ("torch", "transformers", "mavis-logits")},
    }


def made_in_words(results: Mapping[str, Any]) -> str:
    """The same of a results file, as a sentence's end."""
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    return f"{results['machine']}; {versions}; {results['date']}."
