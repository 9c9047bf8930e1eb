"""`examples/rewards/gold.py`: what these second opinions prefer, and that a text is worth the same in any company."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from mavis_training.rewards.load import load_reward

ROUNDING = 0.1  # of bfloat16, which another processor or batch rounds otherwise
REWARDS = Path(__file__).resolve().parents[1] / "examples" / "rewards"
PROMPTS = [
    "How do I boil an egg?",
    "What is the capital of France?",
    "How can I fall asleep faster?",
    "Why is the sky blue?",
    "Suggest a name for a cat.",
]
REPLIES = [
    "Put the egg into boiling water for about eight minutes, then cool it under cold water and peel it.",
    "The capital of France is Paris, which lies on the river Seine in the north of the country.",
    "Go to bed at the same time every night, keep the room dark and cool, and avoid screens before you sleep.",
    "Air scatters the blue part of sunlight much more than the red part, so blue light comes from all of the sky.",
    "You could call your cat Misty, Oliver or Pepper, depending on its colour and its character.",
]
JOKES = [
    "I told my wife she was drawing her eyebrows too high. She looked surprised.",
    "Why did the bicycle fall over? Because it was two tired.",
    "What do you call a fake noodle? An impasta.",
    "I would tell you a chemistry joke, but I know I would not get a reaction.",
    "Why don't skeletons fight each other? They don't have the guts.",
]


@pytest.fixture(scope="module", autouse=True)
def _found() -> None:
    sys.path.insert(0, str(REWARDS))


def gold(objective: str):
    return load_reward(f"{REWARDS / 'gold.py'}:{objective}")


def test_an_answer_is_more_helpful_than_another_prompts() -> None:
    own, others = (gold("helpful")(PROMPTS, replies) for replies in (REPLIES, REPLIES[1:] + REPLIES[:1]))
    assert sum(a > b for a, b in zip(own, others, strict=True)) >= 4


def test_a_joke_is_funnier_than_an_answer() -> None:
    jokes, answers = (gold("humour")(PROMPTS, texts) for texts in (JOKES, REPLIES))
    assert min(jokes) > max(answers) - ROUNDING


def test_words_in_a_loop_are_neither_helpful_nor_harmless() -> None:
    for objective in ("helpful", "harmless"):
        whole, looping = (gold(objective)(PROMPTS, texts) for texts in (REPLIES, ["the the of the"] * 5))
        assert sum(a > b for a, b in zip(whole, looping, strict=True)) >= 4


@pytest.mark.parametrize("objective", ["helpful", "harmless", "humour"])
def test_a_text_is_worth_the_same_alone(objective: str) -> None:
    together = gold(objective)([*PROMPTS, ""], [*REPLIES, ""])
    alone = [gold(objective)([p], [r])[0] for p, r in zip([*PROMPTS, ""], [*REPLIES, ""], strict=True)]
    assert together == pytest.approx(alone, abs=ROUNDING)
