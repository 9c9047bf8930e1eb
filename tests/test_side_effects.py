"""`benchmarks/side_effects.py`: what counts as a right answer, and prompts put in other ways."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import side_effects

QUESTIONS = Path(__file__).parents[1] / side_effects.QUESTIONS


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        ("The capital is Paris.", "Paris", 1.0),
        ("It is 1,945.", "1945", 1.0),
        ("There are seven.", "7|seven", 1.0),
        ("There are 17.", "7|seven", 0.0),
        ("Parisian life", "Paris", 0.0),
        ("", "Au", 0.0),
        ("Gold is Au", "Au", 1.0),
    ],
)
def test_an_answer_is_right_where_it_stands_as_a_word(text, answer, right) -> None:
    assert side_effects.correct(["q"], [text], answer=[answer]) == [right]


def test_every_question_is_answered_by_its_answer_and_stands_once() -> None:
    rows = [json.loads(line) for line in QUESTIONS.read_text().splitlines()]
    assert len({row["prompt"] for row in rows}) == len(rows) == 120
    assert len({row["id"] for row in rows}) == len(rows)
    first = [row["answer"].split("|")[0] for row in rows]
    wanted = [row["answer"] for row in rows]
    assert side_effects.correct([], first, answer=wanted) == [1.0] * len(rows)
    assert sum(side_effects.correct([], ["I do not know."] * len(rows), answer=wanted)) == 0


@given(st.text(alphabet="abcdefg XYZ,.", max_size=60))
def test_typing_errors_keep_all_letters(text) -> None:
    made = side_effects.typos(text)
    assert sorted(made) == sorted(text)
    assert made == side_effects.typos(text)
    assert [len(word) for word in made.split(" ")] == [len(word) for word in text.split(" ")]


@given(st.text(min_size=1, max_size=40))
def test_every_variant_ends_with_the_user_and_says_the_prompt(text) -> None:
    for name, make in side_effects.VARIANTS.items():
        turns = make(text).get("conversation")
        if turns is None:
            continue
        assert turns[-1]["role"] == "user"
        said = turns[-1]["content"]
        if name == "JSON":
            assert json.loads(said)["question"] == text
        elif name not in ("capitals", "typing errors"):
            assert text in said
