"""How the prompts and the time of a fit are shared out. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..base.prompts import same_prompt_key

# Of the budget, for trees and what takes as long as there are trees: what remains goes into training heads and value
# models, choosing settings, measuring and loading.
TREES_SHARE = 0.6
FEWEST_TREES = 24  # of which some are held out from training
FEWEST_PROMPTS = 40
_MOST_CHOSEN_ON, _MOST_MEASURED_ON = 48, 100
Row = dict[str, Any]


@dataclass(frozen=True)
class Split:
    """Prompt rows by what they are for.

    Attributes:
        trees: to sample from.
        choosing: to choose settings on.
        measuring: for the numbers of the report.
    """

    trees: list[Row]
    choosing: list[Row]
    measuring: list[Row]


def split(rows: Sequence[Row], held_out: Sequence[Row] | None, seed: int) -> Split:
    """Share prompts out: a sixth of them, or those that are `held_out`, to choose settings and to measure on.

    Args:
        rows: prompts, in any order; repeats of one count once.
        held_out: prompts that are not to be trained on; None to take some of `rows`.
        seed: of the choice.

    Raises:
        ValueError: too few prompts, or some are both.
    """
    rows, held_out = _once(rows), None if held_out is None else _once(held_out)
    if held_out is not None:
        known = {_text(row): row["id"] for row in held_out}
        both = [row["id"] for row in rows if _text(row) in known]
        if both:
            raise ValueError(
                f"{len(both)} of the prompts are also held out (such as {', '.join(map(str, both[:3]))}): what is "
                "measured on prompts that were trained on means nothing. Take them out of one of the two files."
            )
    fewest = FEWEST_PROMPTS if held_out is None else FEWEST_TREES
    if len(rows) < fewest or (held_out is not None and len(held_out) < 16):
        raise ValueError(
            f"{len(rows)} different prompts{'' if held_out is None else f' and {len(held_out)} held out'} are too few: "
            f"give at least {fewest}{'' if held_out is None else ' and 16'}; some hundreds make a value function that "
            "is worth using"
        )
    order = np.random.default_rng(seed).permutation(len(rows))
    shuffled = [rows[i] for i in order]
    if held_out is None:
        count = min(max(16, len(rows) // 6), _MOST_CHOSEN_ON + _MOST_MEASURED_ON)
        held_out, shuffled = shuffled[:count], shuffled[count:]
    chosen_on = min(_MOST_CHOSEN_ON, len(held_out) // 3)
    return Split(shuffled, list(held_out[:chosen_on]), list(held_out[chosen_on : chosen_on + _MOST_MEASURED_ON]))


def trees_within(budget: float, spent: float, cost: float, prompts: int, most: int | None) -> int:
    """How many trees there is time for.

    Args:
        budget: of the whole fit, in seconds.
        spent: of it so far.
        cost: of sampling and labelling one tree, and of tuning policies on it, in seconds.
        prompts: that there are.
        most: trees that are wanted at most.

    Raises:
        ValueError: not even the fewest that anything can be learned from.
    """
    count = int((TREES_SHARE * budget - spent) / cost)
    if count < FEWEST_TREES:
        needed = (spent + FEWEST_TREES * cost) / TREES_SHARE
        raise ValueError(
            f"the budget is too small: a tree takes {cost:.1f} seconds here, and {FEWEST_TREES} are the fewest that "
            f"anything can be learned from. Give at least {math.ceil(needed / 60)}m, fewer max_new_tokens, or a "
            "machine with a GPU; what has been sampled is kept"
        )
    return min(count, prompts, prompts if most is None else most)


def answers_within(left: float, cost: float) -> int:
    """How many answers to every prompt there is time to measure, 1 to 3.

    Args:
        left: of the budget, in seconds.
        cost: of one answer to every prompt under every setting, by those of the model left alone, in seconds.
    """
    steered = 1.5  # times as long as the model left alone takes, rewards included
    return min(3, max(1, int(left / max(1e-6, steered * cost))))


def _once(rows: Sequence[Row]) -> list[Row]:
    found: dict[str, Row] = {}
    for row in rows:
        found.setdefault(_text(row), row)
    return list(found.values())


def _text(row: Row) -> str:
    return same_prompt_key(row["prompt"], row.get("conversation"))
