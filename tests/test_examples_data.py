"""The prompts that are shipped: nothing that is learned from is held out."""

from __future__ import annotations

import json
import re
from pathlib import Path

DATA = Path(__file__).resolve().parents[1] / "examples" / "data"
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


def test_the_trees_are_of_all_training_prompts() -> None:
    assert prompts("prompts_trees") > prompts("prompts_train") | prompts("prompts_more")
