"""Methods that another run has measured under the same protocol, beside those of this one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from ..base.files import read_json
from .analysis import Points
from .config import UNSTEERED, ParetoConfig

_SAME = (
    "prompts", "limit", "seeds", "max_new_tokens", "temperature", "top_p", "model", "chat_template", "dtype", "rewards",
)  # fmt: skip
_NEAR = 1e-6  # the unsteered model's own answers, written again


def read_beside(path: str, config: ParetoConfig) -> dict[str, Any]:
    """Another run's results, if they can be compared with those of this one.

    Args:
        path: as `mavis pareto` writes them.
        config: of this run.

    Raises:
        ValueError: another protocol, or a method that both have measured.
        OSError: there is no such file.
    """
    found = read_json(Path(path))
    if not isinstance(found, Mapping) or not {"config", "cells", UNSTEERED} <= found.keys():
        raise ValueError(f"{path} holds no results of mavis pareto")
    pairs = {name: (found["config"].get(name), getattr(config, name)) for name in _SAME}
    pairs["objectives"] = (found["config"].get("objectives"), list(config.traded))
    for name, (theirs, ours) in pairs.items():
        if theirs != ours:
            raise ValueError(f"{path} was measured with {name} {theirs!r}, this run has {ours!r}: they do not compare")
    cells = found["cells"]
    twice = {cell["method"] for cell in cells.values()} & set(config.methods)
    if twice:
        raise ValueError(f"{path} and this run both measure {', '.join(sorted(twice))}: rename one of them")
    old = next((name for name, cell in cells.items() if "by_prompt" not in cell), None)
    if old is not None:
        raise ValueError(f"{path} does not say what {old!r} gains prompt by prompt: run it again with this version")
    if found["config"].get("judge") != (config.judge and asdict(config.judge)):  # another's verdicts stay out
        cells = {name: {key: cell[key] for key in cell if key != "win_rate"} for name, cell in cells.items()}
    return dict(found) | {"cells": cells}


def require_same_model(path: str, found: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raise `ValueError` if the unsteered model is not the same in both.

    Args:
        path: of the other run's results.
        found, own: what `UNSTEERED` has in them, by reward.
    """
    for name in (name for name, reward in own.items() if isinstance(reward, Mapping) and "reward" in reward):
        theirs, ours = found[name]["reward"], own[name]["reward"]
        if abs(theirs - ours) > _NEAR:
            raise ValueError(
                f"the unsteered model has {name} {theirs:.4f} in {path} and {ours:.4f} here: another machine, other "
                "versions or another reward; run both in one place"
            )


def points_of(cells: Sequence[Mapping[str, Any]], config: ParetoConfig) -> Points:
    """What a method reached, from its cells."""
    return Points(
        np.array([[cell["by_prompt"][name] for name in config.traded] for cell in cells]).swapaxes(1, 2),
        np.array([[cell["weights"][name] for name in config.traded] for cell in cells]),
        np.array([np.nan if cell["kl"] is None else cell["kl"] for cell in cells]),
    )
