"""The trade-off of the answers so far as a picture: values over divergence, a line for each objective and answer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from .session import Session

PALETTE = (
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9", "#7a5cbe", "#8c564b", "#17a2a2", "#c62828",
    "#7f7f7f", "#6b8e23",
)  # fmt: skip
_WIDTH, _HEIGHT = 460, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 40, 12, 12, 40
_NOTHING = 1e-9  # what is less is shown as 0, and no axis is stretched to show it


def picture(session: Session) -> str:
    """The plot as a part of the page: from the unsteered answer (0 nats) to the steered one, the latest answer boldest.

    Objectives that were asked for have thick lines. Each end says by its title what it is.
    """
    points = session.points()
    if not points:
        return '<p class="empty">Answers show here: what steering gained, over how far it went.</p>'
    names = list(dict.fromkeys(point.objective for point in points))
    colours = {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(names)}
    across = _Axis(0.0, max(1.0, *(point.kl for point in points)), _LEFT, _WIDTH - _RIGHT)
    ends = [value for point in points for value in (point.before, point.after) if value is not None]
    up = _Axis(min(0.0, *ends), max(0.0, *ends), _HEIGHT - _BOTTOM, _TOP)
    latest = max(point.number for point in points)
    parts = []
    for tick in up.ticks:
        at = f"{up(tick):.1f}"
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{at}" y2="{at}"/>')
        parts.append(_text(_LEFT - 6, up(tick) + 4, _number(tick), "end"))
    parts += [_text(across(tick), _HEIGHT - _BOTTOM + 16, _number(tick)) for tick in across.ticks]
    for point in points:
        kind = ("asked " if point.asked else "") + ("latest" if point.number == latest else "")
        told = escape(f"answer {point.number}, {point.objective}: {point.what}")
        parts.append(f'<g class="{kind.strip()}" style="--c:{colours[point.objective]}"><title>{told}</title>')
        x, y = across(point.kl), up(point.after)
        if point.before is not None:
            start, y0 = across(0), up(point.before)
            parts.append(f'<line x1="{start:.1f}" y1="{y0:.1f}" x2="{x:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<circle cx="{start:.1f}" cy="{y0:.1f}" r="2"/>')
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4"/></g>')
    parts.append(_text((_LEFT + _WIDTH) / 2, _HEIGHT - 6, "nats from the unsteered model"))
    legend = "".join(f'<span><i style="background:{colours[name]}"></i>{escape(name)}</span>' for name in names)
    return (f'<svg class="trade" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="values of the answers over '
            f'their divergence">{"".join(parts)}</svg><div class="keys">{legend}</div>')  # fmt: skip


class _Axis:
    """From numbers to places, with ticks at round numbers."""

    def __init__(self, low: float, high: float, begin: float, end: float) -> None:
        step = _round_step((high - low if high - low > _NOTHING else 1.0) / 4)
        first, last = math.floor(low / step), math.ceil(high / step - 1e-9)
        self.ticks: Sequence[float] = [i * step for i in range(first, max(last, first + 1) + 1)]
        self._low, self._begin = self.ticks[0], begin
        self._unit = (end - begin) / (self.ticks[-1] - self.ticks[0])

    def __call__(self, number: float) -> float:
        return self._begin + (number - self._low) * self._unit


def _round_step(least: float) -> float:
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least * (1 - 1e-9))


def _text(x: float, y: float, text: str, anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{text}</text>'


def _number(number: float) -> str:
    return f"{number:g}".replace("-", "−") if abs(number) > _NOTHING else "0"
