"""Where an answer is steered: not in its thinking, its code, its tool calls, or only within some marks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TAIL = 32  # tokens of the prompt that are looked at: templates open a span there


@dataclass(frozen=True)
class Span:
    """A part of a text between two marks. What is opened and not yet closed is inside.

    Attributes:
        begin, end: the marks.
        nested: whether `begin` within counts, so that as many `end` close it: brackets, those in quoted text too.
    """

    begin: str
    end: str
    nested: bool = False

    def __post_init__(self) -> None:
        if not self.begin or not self.end:
            raise ValueError(f"a span needs a text at either end, got {self.begin!r} and {self.end!r}")


THINKING = Span("<think>", "</think>")
CODE = Span("```", "```")
TOOL_CALL = Span("<tool_call>", "</tool_call>")
JSON = Span("{", "}", nested=True)


@dataclass(frozen=True)
class Regions:
    """Which tokens of an answer are steered; the others keep the scores that they had, bit for bit.

    Marks are looked for in the text as it is decoded, special tokens included, so that it does not matter how they are
    tokenized. A token that closes a span belongs to it; those that write the mark which opens it are still outside.

    Attributes:
        skip: spans that are left alone, such as `THINKING`, `CODE`, `TOOL_CALL`, `JSON`.
        only: spans that alone are steered; empty for everything.
        first: tokens at the begin of an answer that are left alone.
        most: tokens of an answer after which no more are steered; None for no such bound.

    Raises:
        ValueError: something that is no span, or numbers below 0.
    """

    skip: Sequence[Span] = ()
    only: Sequence[Span] = ()
    first: int = 0
    most: int | None = None

    def __post_init__(self) -> None:
        for name in ("skip", "only"):
            given = getattr(self, name)
            if isinstance(given, Span) or not all(isinstance(span, Span) for span in given):
                raise ValueError(f"{name} must be a list of Span, such as [THINKING, CODE], got {given!r}")
        if self.first < 0 or (self.most is not None and self.most < 0):
            raise ValueError(f"first and most are numbers of tokens, got {self.first} and {self.most}")

    def steers(self, prompt: Sequence[int], answer: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> bool:
        """Whether the token after an answer so far is steered.

        Args:
            prompt: token ids that the answer goes on from; a span that they end by opening is open.
            answer: token ids so far.
            tokenizer: of both.
        """
        if len(answer) < self.first or (self.most is not None and len(answer) >= self.most):
            return False
        if not self.skip and not self.only:
            return True
        before = tokenizer.decode(list(prompt[-_TAIL:])).rstrip()
        text = tokenizer.decode(list(answer))
        if any(_open(before, text, span) for span in self.skip):
            return False
        return not self.only or any(_open(before, text, span) for span in self.only)


def steered_rows(
    regions: Regions | Sequence[Regions | None],
    rows: Sequence[Sequence[int]],
    start: int,
    tokenizer: PreTrainedTokenizerBase | None,
) -> list[bool]:
    """[R] whether the next token of each row lies where its answer is steered.

    Args:
        regions: for all requests alike, or one for each; None among them for everywhere.
        rows: [R, T] prompts and answers so far; of a request as many, one after the other.
        start: where the answers begin.
        tokenizer: needed where there are marks to look for, and not only numbers of tokens.

    Raises:
        ValueError: the rows are not as many for every request.
    """
    every = list(regions) if isinstance(regions, Sequence) else [regions]
    if len(rows) % len(every):
        raise ValueError(f"regions are given for {len(every)} requests, but the batch has {len(rows)} rows")
    repeats, found = len(rows) // len(every), []
    for number, row in enumerate(rows):
        own = every[number // repeats]
        found.append(own is None or own.steers(row[:start], row[start:], tokenizer))  # type: ignore[arg-type]
    return found


def _open(before: str, text: str, span: Span) -> bool:
    """Whether a span is open at the end of a text; the prompt `before` it opens one if it ends with the mark."""
    depth, at = int(before.endswith(span.begin)), 0
    while True:
        begin, end = text.find(span.begin, at), text.find(span.end, at)
        if depth == 0:
            if begin < 0:
                return False
            depth, at = 1, begin + len(span.begin)
        elif end < 0 and (begin < 0 or not span.nested):
            return True
        elif span.nested and begin >= 0 and (end < 0 or begin < end):
            depth, at = depth + 1, begin + len(span.begin)
        else:
            depth, at = depth - 1, end + len(span.end)
