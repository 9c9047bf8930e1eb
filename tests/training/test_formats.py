from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mavis_training.base.formats import ASSISTANT, FORMATS, SUMMARIZE, Columns, Dropped, Limits, hh_turns

HH, TLDR, COLUMN = FORMATS["hh"], FORMATS["summarize"], FORMATS["column"]
TALK = "\n\nHuman: How do I bake bread?\n\nAssistant: Mix flour.\n\nHuman: And then?\n\nAssistant: Knead it."
RAW, TURN, NONE = Columns(), Columns(style="turn"), Limits()
words = st.text(st.characters(codec="ascii", exclude_characters=":\n\r"), min_size=1).filter(str.strip)


def tldr(post, choice=1):
    summaries = [{"text": " first \n", "policy": "a"}, {"text": "second", "policy": "b"}]
    return {"info": {"id": "t3", "post": post, "title": "t"}, "summaries": summaries, "choice": choice}


def test_hh_prompts_are_cut_after_the_first_assistant():
    row = {"chosen": TALK, "rejected": "x"}
    assert HH.prompt(row, RAW, NONE).prompt == "\n\nHuman: How do I bake bread?\n\nAssistant: "
    assert HH.prompt(row, TURN, NONE).prompt == "How do I bake bread?"
    assert HH.limits == Limits(max_tokens=200)


def test_hh_pairs_end_with_the_final_turn():
    raw = HH.pair({"chosen": TALK}, RAW, NONE)
    assert raw.prompt + raw.completion == TALK
    assert raw.completion == "Knead it."
    turns = HH.pair({"chosen": TALK}, TURN, NONE)
    assert turns.prompt == "And then?"
    assert [turn["role"] for turn in turns.conversation] == ["user", "assistant", "user"]
    single = HH.pair({"chosen": TALK[: TALK.index("\n\nHuman: And")]}, TURN, NONE)
    assert (single.prompt, single.conversation, single.completion) == ("How do I bake bread?", None, "Mix flour.")


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(words, words), min_size=1, max_size=4))
def test_hh_texts_are_cut_as_F1_and_F2_say(rounds):
    text = "".join(f"\n\nHuman: {question}\n\n{ASSISTANT}{answer}" for question, answer in rounds)
    prompt, pair = HH.prompt({"chosen": text}, RAW, NONE), HH.pair({"chosen": text}, RAW, NONE)
    assert text.startswith(prompt.prompt)
    assert prompt.prompt.count(ASSISTANT) == 1
    assert prompt.prompt.endswith(ASSISTANT)
    assert pair.prompt + pair.completion == text
    assert pair.completion == rounds[-1][1]
    assert [turn["content"] for turn in hh_turns(text)] == [part.strip() for both in rounds for part in both]


@pytest.mark.parametrize(
    ("row", "columns", "reason"),
    [
        ({"chosen": "\n\nHuman: hello"}, RAW, "no assistant turn"),
        ({"chosen": "\n\nHuman: a\n\nHuman: b\n\nAssistant: c"}, TURN, "not one human turn"),
        ({"chosen": None}, RAW, "empty"),
        ({"chosen": " \n"}, RAW, "empty"),
    ],
)
def test_hh_rows_that_are_dropped(row, columns, reason):
    with pytest.raises(Dropped, match=reason):
        HH.prompt(row, columns, NONE)


@pytest.mark.parametrize("text", ["\n\nHuman: hello", "\n\nHuman: hello\n\nAssistant:  \n", "Assistant: hello"])
def test_hh_pairs_without_an_answer_are_dropped(text):
    with pytest.raises(Dropped, match="no final assistant turn"):
        HH.pair({"chosen": text}, RAW, NONE)


def test_an_answer_to_nobody_is_dropped():
    with pytest.raises(Dropped, match="does not follow a human turn"):
        HH.pair({"chosen": "\n\nAssistant: a\n\nAssistant: b"}, TURN, NONE)


@pytest.mark.parametrize(("size", "passes"), [(100, False), (101, True), (1199, True), (1200, False)])
def test_posts_have_101_to_1199_characters(size, passes):
    post = "w" * size
    if passes:
        example = TLDR.prompt(tldr(post), RAW, TLDR.limits)
        assert example.prompt == (
            f"### Instruction: Generate a one-sentence summary of this post. ### Input: {post} ### Response: "
        )
        assert example.columns == {"post": post}
    else:
        with pytest.raises(Dropped, match="characters"):
            TLDR.prompt(tldr(post), RAW, TLDR.limits)


@pytest.mark.parametrize(("count", "passes"), [(7, False), (8, True), (512, True), (513, False)])
def test_summarize_prompts_have_8_to_512_tokens(count, passes):
    if passes:
        TLDR.limits.check_tokens(count)
    else:
        with pytest.raises(Dropped, match="tokens"):
            TLDR.limits.check_tokens(count)


def test_summarize_pairs_have_the_summary_that_was_preferred():
    assert TLDR.pair(tldr("{text} braces"), RAW, NONE).completion == "second"
    example = TLDR.pair(tldr("{text} braces", 0), RAW, NONE)
    assert example.completion == "first"
    assert example.prompt == SUMMARIZE.replace("{text}", "{text} braces")
    with pytest.raises(Dropped, match="no post"):
        TLDR.prompt({"info": {"post": None}}, RAW, NONE)
    with pytest.raises(ValueError, match=r"no 'info', only chosen: comparisons of openai"):
        TLDR.prompt({"chosen": "x"}, RAW, NONE)
    with pytest.raises(ValueError, match="no 'summaries and choice'"):
        TLDR.pair({"info": {"post": "x"}}, RAW, NONE)


def test_columns_of_text_and_of_messages():
    columns = Columns("question", "answer", template="Q: {text} A:")
    example = COLUMN.pair({"question": "why?", "answer": "so"}, columns, NONE)
    assert (example.prompt, example.completion, example.columns) == ("Q: why? A:", "so", {"text": "why?"})
    user, assistant = {"role": "user", "content": "why?"}, {"role": "assistant", "content": "so"}
    alone = COLUMN.pair({"prompt": [user], "completion": [assistant]}, Columns(completion="completion"), NONE)
    assert (alone.prompt, alone.conversation, alone.completion) == ("why?", None, "so")
    system = {"role": "system", "content": "be brief"}
    several = COLUMN.prompt({"messages": [system, user, assistant]}, Columns("messages"), NONE)
    assert several.prompt == "why?"
    assert several.conversation == [system, user]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "x"}, "no 'prompt', only text"),
        ({"prompt": 3}, "holds int, expected text or messages"),
        ({"prompt": [{"role": "user"}]}, "holds list, expected text or messages"),
    ],
)
def test_wrong_columns_are_errors(row, message):
    with pytest.raises(ValueError, match=message):
        COLUMN.prompt(row, RAW, NONE)


def test_rows_of_other_columns_that_are_dropped():
    with pytest.raises(Dropped, match="no user turn"):
        COLUMN.prompt({"prompt": [{"role": "assistant", "content": "x"}]}, RAW, NONE)
    with pytest.raises(Dropped, match="empty completion"):
        COLUMN.pair({"prompt": "x", "completion": []}, Columns(completion="completion"), NONE)
    with pytest.raises(ValueError, match="completion_column"):
        COLUMN.pair({"prompt": "x"}, RAW, NONE)
    with pytest.raises(Dropped, match="more than 3 characters"):
        COLUMN.prompt({"prompt": "word"}, RAW, Limits(max_characters=3))
