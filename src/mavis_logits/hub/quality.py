"""What validation says of a value function, in words; one that foresees nothing is not made part of anything."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .cards import METRICS
from .files import read_json

_FORESEES = 0.2  # R2 from which on a reward counts as foreseen: what decides it may come late in an answer
_FEWEST = 8  # held-out trees without which R2 and rankings are chance


def foresight(values: Mapping[str, Any]) -> str:
    """One objective's validation metrics (`mavis_training.fitting.metrics.validation_metrics`) as a judgement."""
    r2, ranking = values["r2"], values["ranking"]
    if r2 <= 0:
        return f"worse than always saying the mean (R2 {r2:.2f}): not worth using"
    accuracy, pairs = ranking["accuracy"], ranking["pairs"]
    told = f"R2 {r2:.2f}; of two next tokens it prefers the better in {accuracy:.0%} of {pairs} pairs"
    if pairs == 0 or accuracy <= 0.5 + 1 / np.sqrt(pairs):  # two standard errors of a coin
        if r2 >= _FORESEES:  # it knows the reward, if not from the token that a branch begins with
            return f"{told}, no more than chance where trees branch: measure what it does before relying on it"
        return f"{told}, no more than chance: steering by it is a gamble; collect more trees"
    words = ((0.7, "good"), (0.6, "fair"), (0.0, "weak, but better than chance"))
    return f"{told}: {next(word for bar, word in words if accuracy >= bar)}"


def is_evidence(metrics: Mapping[str, Any]) -> bool:
    """Whether validation was on enough held-out trees to say anything, good or bad."""
    return bool(metrics.get("trees", _FEWEST) >= _FEWEST)


def weaknesses(metrics: Mapping[str, Any], objectives: Sequence[str]) -> list[str]:
    """The objectives that are foreseen no better than by their mean, each with its R2."""
    found = {name: metrics[name]["r2"] for name in objectives if "r2" in metrics.get(name, {})}
    return [f"{name} (R2 {r2:.2f})" for name, r2 in found.items() if not r2 > 0]


def require_foresight(folder: Path) -> None:
    """Raise `ValueError` if the metrics in a value function's folder say that it foresees an objective not at all.

    Where they are of too few trees to say so, that is a warning.
    """
    if not (folder / METRICS).is_file():
        return
    metrics = read_json(folder / METRICS)
    weak = weaknesses(metrics, read_json(folder / "config.json").get("objectives", ()))
    if weak and not is_evidence(metrics):
        warnings.warn(
            f"{folder} predicts {', '.join(weak)} worse than their mean, but that was seen on {metrics['trees']} "
            f"held-out trees only, too few to say: measure it on {_FEWEST} at least before anybody steers by it.",
            stacklevel=2,
        )
    elif weak:
        raise ValueError(
            f"{folder} predicts {', '.join(weak)} worse than their mean on held-out trees: steering by it is noise. "
            "Train it on more trees, or on a reward that varies within a prompt; to use it as it is, say so with "
            "--allow-weak (allow_weak=True)."
        )
