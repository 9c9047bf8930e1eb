"""Render docs/models.md, "Which models work", from docs/results/models.json: no verdict there is written by hand.

python docs/models_page.py           # write docs/models.md
python docs/models_page.py --check   # exit with 1 if it is not what the results say
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "models.md"
RESULTS = ROOT / "docs" / "results" / "models.json"

# Columns of the table by type, each with its checks and what these are called in it.
COLUMNS: dict[str, dict[str, str]] = {
    "`MavisLogitsProcessor`": {
        "processor": "value model", "processor_head": "head on the output", "processor_inner": "head on an inner layer",
        "beta_zero": "beta 0, value model", "beta_zero_head": "beta 0, head",
    },
    "`MavisSampling`": {
        "sampling": "value model", "sampling_head": "head on the output", "sampling_inner": "head on an inner layer",
        "beta_zero_sampling": "beta 0",
    },
    "value model of it": {"value": "in the processor", "value_sampling": "in sampling", "states": "copied states"},
    "saved and loaded": {"reload": "whole", "truncated": "its first layer", "lora": "LoRA adapter"},
    "training": {"packed": "packed trees", "nodes": "a sequence a node"},
}  # fmt: skip
COUNTED = {f"{column}: {name}": check for column, checks in COLUMNS.items() for check, name in checks.items()}
VERDICTS = ("exact", "refused", "-", "wrong", "crash")
GROUPS = {
    "causal": "Causal language model types",
    "wrapper": "Types with a vision or audio tower, given text",
    "variant": "Variants",
}


def main(argv: Sequence[str]) -> int:
    """Render, or with ``--check`` compare."""
    text = rendered(json.loads(RESULTS.read_text(encoding="utf-8")))
    if "--check" in argv:
        same = PAGE.exists() and PAGE.read_text(encoding="utf-8") == text
        if not same:
            print(
                "docs/models.md differs from docs/results/models.json. Run: python docs/models_page.py", file=sys.stderr
            )
        return int(not same)
    PAGE.write_text(text, encoding="utf-8")
    return 0


def rendered(results: Mapping[str, Any]) -> str:
    """Return the page."""
    rows = results["rows"]
    built = [row for row in rows if row["cells"]["built"]["verdict"] == "exact"]
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    lines = [
        "# Which models work",
        "",
        "Made by `make models`: a tiny random model of every type that transformers knows, its windows shorter than",
        f"the prompts, against slow twins that read everything from scratch. {versions};",
        f"{results['date']}, {results['machine']}, seed {results['seed']}, {results['seconds'] // 60} minutes.",
        "",
        "- **exact**: the same distribution, values, weights or gradients as the slow twin, up to rounding. Where a",
        "  type of transformers itself says something else with a cache than without, or beside padding, the twin is",
        "  `generate`.",
        "- **refused**: an error that says why, before anything is computed.",
        "- **-**: there is nothing to try (transformers gives no hidden states, PEFT refuses the type).",
        "",
        f"{len(built)} of {len(rows)} build tiny. How often each check is exact, of those:",
        "",
        *table(["check", *VERDICTS], [[name, *counts(built, check)] for name, check in COUNTED.items()]),
        "",
        "How models are read, fastest way first. *packed* and *masked*: all rows in one forward pass over a cache",
        "addressed by token. *repeated*: the state after a row, repeated for every candidate. *generate*: as",
        "`generate` itself reads. *plain*: from scratch. `reading=` insists on one; `mavis doctor MODEL` tells what is",
        "true of a model of yours.",
        "",
        *table(["", "packed", "masked", "repeated", "generate", "plain"], [
            ["as a base model", *kinds(built, "base", ("packed", "masked", "repeated", "generate", "plain"))],
            ["as a value model", *kinds(built, "value", ("packed", "masked", "repeated", "generate", "plain"))],
        ]),
        "",
    ]  # fmt: skip
    for group, title in GROUPS.items():
        own = [row for row in rows if row["group"] == group]
        if own:
            head = ["type", "base read", "value model read", *COLUMNS, "what is not exact or not packed, and why"]
            lines += [f"## {title}", "", *table(head, [type_row(row) for row in own]), ""]
    return "\n".join(lines)


def counts(rows: Sequence[Mapping[str, Any]], check: str) -> list[int]:
    """Return how many rows have each verdict."""
    found = [row["cells"][check]["verdict"] for row in rows]
    return [found.count(verdict) for verdict in VERDICTS]


def kinds(rows: Sequence[Mapping[str, Any]], side: str, names: Sequence[str]) -> list[int]:
    """Return how many rows are read in each way."""
    found = [(row["readings"] or {}).get(side, [""])[0] for row in rows]
    return [found.count(name) for name in names]


def type_row(row: Mapping[str, Any]) -> list[str]:
    """Return the cells of a type."""
    cells = row["cells"]
    if cells["built"]["verdict"] != "exact":
        return [f"{row['name']}", *["" for _ in range(2 + len(COLUMNS))], f"not built: {reason(cells['built'])}"]
    readings = row["readings"] or {}
    shown, notes = [], {}
    for column, checks in COLUMNS.items():
        off = {name: cells[check] for check, name in checks.items() if cells[check]["verdict"] != "exact"}
        shown.append("exact" if not off else "; ".join(f"{name} {cell['verdict']}" for name, cell in off.items()))
        for name, cell in off.items():
            notes.setdefault(reason(cell), []).append(f"{column} {name}" if column else name)
    for side, title in (("base", "base"), ("value", "value model")):
        if why := readings.get(side, ["", ""])[1]:
            notes.setdefault(why, []).append(f"{title} read")
    told = "; ".join(f"{', '.join(dict.fromkeys(names))}: {why}" for why, names in notes.items())
    ways = [readings.get(side, [""])[0] for side in ("base", "value")]
    return [row["name"], *ways, *shown, told]


def reason(cell: Mapping[str, Any]) -> str:
    """Return why a cell is what it is."""
    return cell.get("why") or cell["detail"]


def table(head: Sequence[Any], rows: Sequence[Sequence[Any]]) -> list[str]:
    """Return the lines of a Markdown table."""
    lines = [" | ".join(str(cell).replace("|", "\\|") for cell in row) for row in [head, ["---"] * len(head), *rows]]
    return [f"| {line} |" for line in lines]


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
