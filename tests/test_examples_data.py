"""The prompts that are shipped: nothing that is learned from is held out."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples" / "rewards"))

from encoder import document_of  # noqa: E402

DATA = ROOT / "examples" / "data"
HELD_OUT = ["prompts_test", "prompts_validation", "demo_prompts"]
TRAINING = ["prompts_train", "prompts_more", "prompts_trees", "prompts_everyday"]


def prompts(name: str) -> set[str]:
    """As they count as the same one: lower-cased letters and digits."""
    rows = [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len({row["id"] for row in rows}) == len(rows)
    assert {row["kind"] for row in rows} <= {"helpful", "harmful"}
    assert all(row["license"] and row["source"] for row in rows)
    found = {re.sub(r"[^a-z0-9]", "", row["prompt"].lower()) for row in rows}
    assert len(found) == len(rows)
    return found


def test_no_prompt_is_both_learned_from_and_held_out() -> None:
    held_out = set().union(*map(prompts, HELD_OUT))
    for name in TRAINING:
        assert not prompts(name) & held_out, name


def test_abstracts_to_summarise_are_held_out() -> None:
    files = [DATA / f"summaries_{name}.jsonl" for name in ("validation", "test")]
    rows = [[json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] for file in files]
    assert list(map(len, rows)) == [40, 100]
    every = [row for part in rows for row in part]
    held_out = {re.sub(r"[^a-z0-9]", "", row["prompt"].lower()) for row in every}
    assert len(held_out) == len(every)
    assert not held_out & prompts("prompts_trees")
    assert all(row["completion"].strip() and row["license"] == "Apache-2.0" for row in every)
    assert all(document_of(row["prompt"]) for row in every)


def test_the_trees_are_of_all_training_prompts() -> None:
    assert prompts("prompts_trees") > prompts("prompts_train") | prompts("prompts_more")
