"""What one visitor has had answered, and how that is shown: the plot's rows, the list, the words of the status line."""

from __future__ import annotations

from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING

from .settings import Choice, Settings

if TYPE_CHECKING:
    from .engine import Answer

MOST = 50  # entries that are kept


@dataclass(frozen=True)
class Entry:
    """An answer that has ended.

    Attributes:
        choice, prompt, settings: what it was asked by.
        steered, unsteered: the texts as parts of the page.
        text: of the steered answer.
        kl: of the steered answer, in nats.
        values: of the steered answer, as `Answer.values`.
        unsteered_values: of the unsteered one.
        told: the status line.
    """

    choice: Choice
    prompt: str
    settings: Settings
    steered: str
    unsteered: str
    text: str
    kl: float
    values: dict[str, float]
    unsteered_values: dict[str, float]
    told: str

    def row(self) -> list[str]:
        """In the list."""
        return [_short(self.prompt), self.settings.summary(), f"{self.kl:.1f}", _short(self.text, 80)]


@dataclass
class Session:
    """One visitor's answers, the latest last. It is a value: `with_entry` makes another."""

    entries: list[Entry] = field(default_factory=list)

    def with_entry(self, entry: Entry) -> Session:
        """This session with one more answer."""
        return Session([*self.entries, entry][-MOST:])

    def points(self) -> list[Point]:
        """What the plot shows: of each answer, every objective whose value is known."""
        return [
            Point(
                number, name, entry.kl, entry.unsteered_values.get(name), value, bool(entry.settings.weights.get(name))
            )
            for number, entry in enumerate(self.entries, 1)
            for name, value in entry.values.items()
        ]


@dataclass(frozen=True)
class Point:
    """One objective of one answer.

    Attributes:
        number: of the answer, from 1.
        objective: its name.
        kl: of the steered answer, in nats.
        before, after: value of the unsteered answer, if known, and of the steered one, in standard deviations.
        asked: whether the objective had a weight.
    """

    number: int
    objective: str
    kl: float
    before: float | None
    after: float
    asked: bool

    @property
    def what(self) -> str:
        """In words."""
        come = "" if self.before is None else f" from {self.before:+.2f} unsteered"
        return f"{self.after:+.2f}{come}, at {self.kl:.1f} nats"


def status(kind: str, text: str) -> str:
    """The status line; `kind` is "ready", "busy", "done", "stopped" or "failed"."""
    return f'<div class="status {kind}" role="status" aria-live="polite">{escape(text)}</div>'


def progress(unsteered: Answer, steered: Answer) -> str:
    """How far two answers are, or how they ended."""
    most = steered.settings.max_new_tokens
    both = (unsteered, steered)
    failed = next((answer for answer in both if answer.state == "failed"), None)
    if failed is not None:
        return status("failed", failed.error)
    if any(answer.state == "writing" for answer in both):
        return status(
            "busy", f"Writing: {len(steered.ids)} of {most} tokens steered, {len(unsteered.ids)} unsteered. Esc stops."
        )
    counted = f"{len(steered.ids)} tokens, {steered.kl:.1f} nats from the unsteered model"
    if any(answer.state == "stopped" for answer in both):
        return status("stopped", f"Stopped: {counted}.")
    why = "" if steered.settings.steers else " Nothing steers: every slider, or the budget, is 0."
    return status("done", f"Done: {counted}, {max(answer.seconds for answer in both):.1f} s.{why}")


def plain(answer: Answer) -> str:
    """An unsteered answer as a part of the page."""
    return f'<div class="text" dir="auto">{escape(answer.text)}{_cursor(answer)}</div>'


def coloured(answer: Answer) -> str:
    """A steered answer as a part of the page: with cards once it is written."""
    tokens = answer.written.html(answer.engine.objectives, cards=answer.state != "writing")
    return f'<div class="text" dir="auto">{tokens}{_cursor(answer)}</div>'


def _cursor(answer: Answer) -> str:
    return '<span class="cursor" aria-hidden="true"></span>' if answer.state == "writing" else ""


def _short(text: str, most: int = 40) -> str:
    line = " ".join(text.split())
    return line if len(line) <= most else line[: most - 1] + "…"
