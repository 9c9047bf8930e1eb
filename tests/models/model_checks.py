"""Every check on one model type, and what is said of one that fails."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import model_base_checks as base
import model_value_checks as value
from model_twins import Nothing, Subject, Wrong


@dataclass
class Cell:
    """What came of one check: "exact", "refused", "wrong", "crash", or "-" where there is nothing to try."""

    verdict: str
    detail: str = ""


@dataclass
class Row:
    """All cells of one type."""

    name: str
    model_class: str = ""
    readings: dict[str, tuple[str, str]] | None = field(default_factory=dict)
    cells: dict[str, Cell] = field(default_factory=dict)


CHECKS: dict[str, Callable[[Subject], Any]] = {
    "plain": base.plain,
    "processor": base.processor("model"),
    "processor_head": base.processor("output"),
    "processor_inner": base.processor("inner"),
    "sampling": base.sampling("model"),
    "sampling_head": base.sampling("output"),
    "sampling_inner": base.sampling("inner"),
    "beta_zero": base.beta_zero("model"),
    "beta_zero_head": base.beta_zero("output"),
    "beta_zero_sampling": base.beta_zero_sampling,
    "value": value.value,
    "value_sampling": value.value_sampling,
    "states": value.same_states,
    "reload": value.reload,
    "truncated": value.truncated,
    "lora": value.lora,
    "packed": value.training(True),
    "nodes": value.training(False),
}


def sweep(name: str, only: set[str] | None = None) -> Row:
    """Try everything on one type."""
    row = Row(name)
    built = _try(lambda: Subject(name))
    row.cells["built"] = built[0]
    subject = built[1]
    if subject is None:
        return row
    row.model_class = type(subject.model).__name__
    row.cells["readings"], row.readings = _try(subject.readings)
    for check, run in CHECKS.items():
        if only is None or check in only:
            torch.manual_seed(0)
            row.cells[check] = _try(lambda run=run: run(subject))[0]
    return row


def _try(run: Callable[[], Any]) -> tuple[Cell, Any]:
    try:
        result = run()
    except Nothing as nothing:
        return Cell("-", str(nothing)), None
    except Wrong as wrong:
        return Cell("wrong", str(wrong)), None
    except Exception as error:
        return _broken(error), None
    return Cell("exact", result if isinstance(result, str) else ""), result


def _broken(error: Exception) -> Cell:
    """A ValueError of ours is a refusal; anything else is a crash, told with its last frames."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = (
        f"{os.sep}mavis_logits{os.sep}" in frames[-1].filename
        or f"{os.sep}mavis_training{os.sep}" in frames[-1].filename
    )
    text = " ".join(str(error).split())[:400]
    if ours and isinstance(error, ValueError):
        return Cell("refused", text)
    where = "; ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames[-3:])
    return Cell("crash", f"{type(error).__name__}: {text} ({where})")
