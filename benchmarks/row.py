"""One line of the decode benchmark's results."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from datetime import date
from statistics import median
from typing import Any

from measuring import Measured, Setting


@dataclass(frozen=True)
class Row:
    """One variant under one setting.

    Attributes:
        device: "cpu" or "cuda".
        variant: its name.
        section, batch, top_k, objectives, context, new_tokens, different_lengths, value_dtype, compiled: the `Setting`.
        median, low, high: time of `generate` over plain generate's in the same round, of `rounds` rounds.
        token_ratio: the same for the time per token after the first, median.
        token_seconds: that time.
        tokens_per_second: of the whole batch, prompt included.
        candidates: a row and step, the mean of it with min-p.
        roofline_seconds: least seconds of a step, half-way through decoding (`roofline.py`).
        roofline_ratio: that over plain generate's.
        memory: bytes that a call of `generate` took at most above what was there before, None where not known.
        date: when it was measured.
    """

    device: str
    variant: str
    section: str
    batch: int
    top_k: int
    objectives: int
    context: int
    new_tokens: int
    different_lengths: bool
    value_dtype: str
    compiled: bool
    median: float
    low: float
    high: float
    rounds: int
    token_ratio: float
    token_seconds: float
    tokens_per_second: float
    candidates: float
    roofline_seconds: float
    roofline_ratio: float
    memory: int | None
    date: str

    @property
    def key(self) -> tuple[Any, ...]:
        """What was measured, whatever came out."""
        return (self.device, self.variant, *(getattr(self, field.name) for field in fields(Setting)))

    @property
    def over_roofline(self) -> float:
        """Measured over roofline ratio: 1 where steering comes as near to the device's limits as plain does."""
        return self.token_ratio / self.roofline_ratio


def key(device: str, variant: str, setting: Setting) -> tuple[Any, ...]:
    """The key of the row that this will be."""
    return (device, variant, *asdict(setting).values())


def make_row(
    device: str,
    variant: str,
    setting: Setting,
    measured: Measured,
    candidates: float,
    least: float,
    plain_least: float,
) -> Row:
    """Sum up what was measured of one variant, beside its least seconds of a step and plain generate's."""
    ratios = measured.ratios
    return Row(
        device=device,
        variant=variant,
        **asdict(setting),
        median=median(ratios),
        low=min(ratios),
        high=max(ratios),
        rounds=len(ratios),
        token_ratio=median(measured.token_ratios),
        token_seconds=median(timing.token_seconds for timing in measured.timings),
        tokens_per_second=setting.batch * setting.new_tokens / median(one.seconds for one in measured.timings),
        candidates=candidates,
        roofline_seconds=least,
        roofline_ratio=least / plain_least,
        memory=measured.memory,
        date=date.today().isoformat(),
    )
