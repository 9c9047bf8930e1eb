"""Numbers of what a policy wrote: means with errors over prompts, gains, diversity; and how they are spelled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .completions import Completions

Rewards = dict[str, NDArray[np.float64]]


def taken(done: Completions, rewards: Rewards, which: NDArray[np.int_]) -> tuple[Completions, Rewards]:
    """Of the n completions of every prompt, number `which` [S * P], with its rewards."""
    rows = np.arange(len(done.prompt_ids)) * done.returned + which
    ratios = None if done.log_ratios is None else [done.log_ratios[row] for row in rows]
    kept = Completions(done.prompt_ids, [done.texts[row] for row in rows], [done.lengths[row] for row in rows], ratios)
    return kept, {name: values[rows] for name, values in rewards.items()}


def gains(rewards: Rewards, against: Rewards, plain: Rewards, prompts: int) -> dict[str, Any]:
    """By objective, how much higher the rewards are, in standard deviations of the unsteered ones; None where these do
    not vary."""
    gains: dict[str, Any] = {}
    for name, values in rewards.items():
        deviation = plain[name].std()
        gain, error = mean_and_error((values - against[name]) / deviation, prompts) if deviation > 0 else (None, None)
        gains[name] = {"gain_sd": gain, "gain_sd_error": error}
    return gains


def summarise(done: Completions, rewards: Rewards, plain: Rewards, prompts: int) -> dict[str, Any]:
    """Means with standard errors over prompts; gains in standard deviations of the unsteered reward."""
    summary: dict[str, Any] = {"completions": len(done.texts)}
    found = gains(rewards, plain, plain, prompts)
    for objective, values in rewards.items():
        mean, error = mean_and_error(values, prompts)
        summary[objective] = {"reward": mean, "error": error} | found[objective]
    kl, kl_error = (None, None) if done.log_ratios is None else mean_and_error(np.asarray(done.log_ratios), prompts)
    return summary | {
        "kl": kl,
        "kl_error": kl_error,
        "tokens": float(np.mean(done.lengths)),
        **{f"distinct_{n}": distinct(done.texts, n) for n in (1, 2, 3)},
    }


def distinct(texts: Sequence[str], n: int) -> float:
    """Share of different ones among all runs of n words within a text."""
    words = [text.split() for text in texts]
    runs = [tuple(text[i : i + n]) for text in words for i in range(len(text) - n + 1)]
    return len(set(runs)) / max(1, len(runs))


def mean_and_error(values: NDArray[np.float64], prompts: int) -> tuple[float, float | None]:
    """Mean of [seeds * prompts] values, and its standard error with the prompt as the unit of sampling; of one prompt
    none is known."""
    by_prompt = np.asarray(values, dtype=np.float64).reshape(-1, prompts).mean(axis=0)
    error = float(by_prompt.std(ddof=1) / np.sqrt(prompts)) if prompts > 1 else None
    return float(by_prompt.mean()), error


def with_error(value: float | None, error: float | None, form: str = ".2f") -> str:
    """A number with its standard error, as far as the two are known."""
    if value is None:
        return "n/a"
    return f"{value:{form}}" + (f" ± {error:{form.lstrip('+')}}" if error is not None else "")


def reward_cell(measured: Mapping[str, Any]) -> str:
    """A mean reward with its error and, in brackets, the gain; "constant" where rewards that do not vary have none."""
    gain = "constant" if measured["gain_sd"] is None else f"{measured['gain_sd']:+.2f}"
    return f"{with_error(measured['reward'], measured['error'])} ({gain})"
