"""The two rewards of summaries, what one of them learns from, and the trees taken for them."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mavis_training.rewards.load import load_reward

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples"))

import reward_model  # noqa: E402
import summary_data  # noqa: E402

REWARDS = ROOT / "examples" / "rewards"
ROWS = [
    json.loads(line)
    for line in (ROOT / "examples" / "data" / "summaries_test.jsonl").read_text(encoding="utf-8").splitlines()[:12]
]
PROMPTS, SUMMARIES = [row["prompt"] for row in ROWS], [row["completion"] for row in ROWS]
LEADS = [summary_data.sentences(prompt.split("\n\n", 1)[1])[0] for prompt in PROMPTS]
words = st.lists(st.text("abcdefgh", min_size=1, max_size=6), min_size=1, max_size=30).map(" ".join)


@pytest.fixture(scope="module")
def rewards() -> dict:
    pytest.importorskip(reward_model.BASE_PACKAGE)
    return {name: load_reward(f"{REWARDS / name}.py:{name}") for name in ("summary", "faithful")}


def test_they_prefer_what_they_are_named_for_and_conflict(rewards: dict) -> None:
    others = [*SUMMARIES[1:], SUMMARIES[0]]
    broken = [" ".join(random.Random(i).sample(s.split(), len(s.split()))) for i, s in enumerate(SUMMARIES)]
    for name, reward in rewards.items():
        own, other, shuffled, lead = (reward(PROMPTS, texts) for texts in (SUMMARIES, others, broken, LEADS))
        assert sum(a > b for a, b in zip(own, other, strict=True)) >= 11
        assert sum(a > b for a, b in zip(own, shuffled, strict=True)) >= 9
        above = sum(a > b for a, b in zip(lead, own, strict=True))
        assert above >= 11 if name == "faithful" else above <= 7


def test_a_copied_sentence_is_faithful_and_nothing_is_not(rewards: dict) -> None:
    copied, nothing = rewards["faithful"](PROMPTS[:3], LEADS[:3]), rewards["faithful"](PROMPTS[:3], ["", " ", "."])
    assert all(0.85 < value <= 1.0 for value in copied)
    assert nothing[:2] == [0.0, 0.0]
    added = rewards["faithful"](PROMPTS[:3], [lead + " Bananas grow on Mars." for lead in LEADS[:3]])
    assert all(after < before for after, before in zip(added, copied, strict=True))


def test_a_batch_is_each_by_itself(rewards: dict) -> None:
    texts = [SUMMARIES[0], "", LEADS[2], "a"]
    for reward in rewards.values():
        together = reward(PROMPTS[:4], texts)
        alone = [reward([prompt], [text])[0] for prompt, text in zip(PROMPTS[:4], texts, strict=True)]
        assert together == pytest.approx(alone, abs=1e-4)


@settings(max_examples=15, deadline=None)
@given(words)
def test_faithfulness_is_a_share(rewards: dict, text: str) -> None:
    (value,) = rewards["faithful"](PROMPTS[:1], [text])
    assert -0.5 <= value <= 1.0 + 1e-6


def test_a_prompt_without_a_document_is_told(rewards: dict) -> None:
    for reward in rewards.values():
        with pytest.raises(ValueError, match=r"expected a request, a blank line and the document .*'Hello'"):
            reward(["Hello"], ["a summary"])


def test_pairs_differ_in_their_kind_and_not_in_their_full_stops() -> None:
    documents = [
        {"id": row["id"], "text": row["prompt"].split("\n\n", 1)[1], "references": [row["completion"]]} for row in ROWS
    ]
    pairs = [pair for seed in range(30) for pair in summary_data.summary_pairs(documents, random.Random(seed))]
    assert pairs == [p for seed in range(30) for p in summary_data.summary_pairs(documents, random.Random(seed))]
    assert {pair.slice for pair in pairs} == {
        "a sentence from within", "the first sentence", "another document's summary", "its own first words",
        "degenerate",
    }  # fmt: skip
    for pair in pairs:
        assert pair.better[0] == pair.worse[0]
        assert pair.better[1].strip(".") != pair.worse[1].strip(".")
    stops = [
        sum(text.endswith(".") for _, text in side) / len(pairs)
        for side in zip(*[(p.better, p.worse) for p in pairs], strict=True)
    ]
    assert abs(stops[0] - 0.5) < 0.06
    assert abs(stops[1] - 0.5) < 0.06
