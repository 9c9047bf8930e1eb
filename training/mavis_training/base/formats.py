"""Rows of public data sets to prompts, and to pairs of prompt and completion, as section F.1 prepares them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

Row: TypeAlias = Mapping[str, Any]
Style: TypeAlias = Literal["raw", "turn"]

ASSISTANT = "Assistant: "
SUMMARIZE = "### Instruction: Generate a one-sentence summary of this post. ### Input: {text} ### Response: "
_SPEAKER = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


@dataclass(frozen=True)
class Example:
    """What one row of a data set becomes.

    Attributes:
        prompt: what a model is to go on with or to answer; for a conversation, its last user turn.
        conversation: the turns before the completion (`role` and `content` each), if there are several or a system
            prompt; None for a single text.
        completion: what the model is to learn to write, if that was asked for.
        columns: what reward functions may ask for.
    """

    prompt: str
    conversation: list[dict[str, str]] | None = None
    completion: str | None = None
    columns: dict[str, Any] = field(default_factory=dict)


class Dropped(Exception):
    """A row that is left out; the message says why, in words that suit a count of such rows."""


@dataclass(frozen=True)
class Limits:
    """Bounds on a text's characters before the template, and on the prompt's tokens; None: no bound."""

    min_characters: int | None = None
    max_characters: int | None = None
    min_tokens: int | None = None
    max_tokens: int | None = None

    def check_characters(self, text: str) -> None:
        """Raise `Dropped` for a text of too few or too many characters."""
        _check("characters", len(text), self.min_characters, self.max_characters)

    def check_tokens(self, count: int) -> None:
        """Raise `Dropped` for a prompt of too few or too many tokens."""
        _check("tokens", count, self.min_tokens, self.max_tokens)


@dataclass(frozen=True)
class Columns:
    """Where the texts of format "column" stand, and the form that the others take.

    Attributes:
        prompt: column of the prompt: a text, or messages as TRL has them.
        completion: column of the completion: a text, or messages; None to look for no completion.
        template: Python format in which `{text}` is the text; None for the text itself.
        style: of HH-RLHF's prompts.
    """

    prompt: str = "prompt"
    completion: str | None = None
    template: str | None = None
    style: Style = "raw"


@dataclass(frozen=True)
class Format:
    """How rows of one schema are read.

    Attributes:
        prompt: the prompt of a row.
        pair: prompt and completion of a row, for supervised fine-tuning.
        limits: section F.1's, on prompts.
    """

    prompt: Callable[[Row, Columns, Limits], Example]
    pair: Callable[[Row, Columns, Limits], Example]
    limits: Limits = Limits()


def hh_prompt(row: Row, columns: Columns, limits: Limits) -> Example:
    """Anthropic HH-RLHF, first round: the text up to and with the first "Assistant: " (F.1), or its human turn."""
    text = _text(row, "chosen")
    head, found, _ = text.partition(ASSISTANT)
    if not found:
        raise Dropped("no assistant turn")
    limits.check_characters(head)
    if columns.style == "raw":
        return Example(head + found)
    turns = hh_turns(head + found)
    if [turn["role"] for turn in turns] != ["user", "assistant"]:
        raise Dropped("the first round is not one human turn")
    return Example(turns[0]["content"])


def hh_pair(row: Row, columns: Columns, limits: Limits) -> Example:
    """Anthropic HH-RLHF: the final turn of the assistant is what is learned (F.2), all before it the prompt."""
    text = _text(row, "chosen")
    head, found, completion = text.rpartition("\n\n" + ASSISTANT)
    if not found or not completion.strip():
        raise Dropped("no final assistant turn")
    limits.check_characters(head)
    if columns.style == "raw":
        return Example(head + found, completion=completion)
    turns = hh_turns(head)
    if not turns or turns[-1]["role"] != "user":
        raise Dropped("the final assistant turn does not follow a human turn")
    conversation = turns if len(turns) > 1 else None
    return Example(turns[-1]["content"], conversation, completion.strip())


def hh_turns(text: str) -> list[dict[str, str]]:
    """The turns of a text in HH-RLHF's form, as messages."""
    _, *parts = _SPEAKER.split(text)
    return [
        {"role": _ROLES[speaker], "content": content.strip()}
        for speaker, content in zip(parts[::2], parts[1::2], strict=True)
    ]


def summarize_prompt(row: Row, columns: Columns, limits: Limits) -> Example:
    """Summarize-from-Feedback: the post in F.1's template; the post itself is kept as column `post` for rewards."""
    info = row.get("info")
    if not isinstance(info, Mapping):
        raise ValueError(_missing("info", row, "comparisons of openai/summarize_from_feedback have it"))
    post = info.get("post")
    if not post:  # news articles have none
        raise Dropped("no post")
    limits.check_characters(post)
    return Example((columns.template or SUMMARIZE).replace("{text}", post), columns={"post": post})


def summarize_pair(row: Row, columns: Columns, limits: Limits) -> Example:
    """Summarize-from-Feedback: the post in F.1's template, and the summary that was preferred."""
    try:
        completion = row["summaries"][row["choice"]]["text"]
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(_missing("summaries and choice", row, "the set 'comparisons' has them")) from error
    if not completion.strip():
        raise Dropped("empty completion")
    return replace(summarize_prompt(row, columns, limits), completion=completion.strip())


def column_prompt(row: Row, columns: Columns, limits: Limits) -> Example:
    """Any data set with a column of prompts: texts, or conversations, whose last user turn is then the prompt."""
    value = _text(row, columns.prompt, or_messages=True)
    if isinstance(value, str):
        limits.check_characters(value)
        if columns.template is None:
            return Example(value)
        return Example(columns.template.replace("{text}", value), columns={"text": value})
    turns = [{"role": str(turn["role"]), "content": content_text(turn)} for turn in value]
    while turns and turns[-1]["role"] == "assistant":
        turns.pop()
    if not turns or turns[-1]["role"] != "user":
        raise Dropped("no user turn at the end of the conversation")
    limits.check_characters(turns[-1]["content"])
    return Example(turns[-1]["content"], turns if len(turns) > 1 else None)


def column_pair(row: Row, columns: Columns, limits: Limits) -> Example:
    """Any data set with columns of prompts and completions; the last message of a conversation is the completion."""
    if columns.completion is None:
        raise ValueError("completions are asked for: name their column with completion_column")
    value = _text(row, columns.completion, or_messages=True)
    text = value if isinstance(value, str) else content_text(value[-1]) if value else ""
    if not text.strip():
        raise Dropped("empty completion")
    return replace(column_prompt(row, columns, limits), completion=text)


def content_text(turn: Mapping[str, Any]) -> str:
    """What is said in a message; its content may come in parts (`{"type": "text", "text": ...}`), or be None.

    Raises:
        Dropped: it has a part that is no text, such as an image.
    """
    content = turn["content"]
    if isinstance(content, str) or content is None:
        return content or ""
    if not isinstance(content, list) or not all(isinstance(part, Mapping) for part in content):
        raise ValueError(f"a message's content is {type(content).__name__}, expected text or a list of parts")
    if not all(isinstance(part.get("text"), str) for part in content):
        raise Dropped("a message with a part that is no text")
    return "".join(part["text"] for part in content)


FORMATS = {
    "column": Format(column_prompt, column_pair),
    "hh": Format(hh_prompt, hh_pair, Limits(max_tokens=200)),
    "summarize": Format(summarize_prompt, summarize_pair, Limits(101, 1199, 8, 512)),
}


def _text(row: Row, column: str, or_messages: bool = False) -> Any:
    """The text, or the list of messages, in a column of a row."""
    if column not in row:
        raise ValueError(_missing(column, row, "give another format or column"))
    value = row[column]
    if isinstance(value, str) or value is None:
        if not (value or "").strip():
            raise Dropped("empty")
        return value
    messages = isinstance(value, list) and all(isinstance(turn, Mapping) and {"role", "content"} <= turn.keys()
                                               for turn in value)  # fmt: skip
    if not or_messages or not messages:
        expected = "text or messages with 'role' and 'content'" if or_messages else "text"
        raise ValueError(f"column {column!r} holds {type(value).__name__}, expected {expected}")
    return value


def _missing(column: str, row: Row, hint: str) -> str:
    return f"a row has no {column!r}, only {', '.join(sorted(row))}: {hint}"


def _check(unit: str, count: int, least: int | None, most: int | None) -> None:
    if least is not None and count < least:
        raise Dropped(f"fewer than {least} {unit}")
    if most is not None and count > most:
        raise Dropped(f"more than {most} {unit}")
