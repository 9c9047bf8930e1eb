"""Trainings that cannot work: refused, or told and mended."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import TrainingArguments

from .metrics import flatten


def fitting_warmup(wanted: int, steps: int, name: str | None = None) -> int:
    """Steps of warmup for a run of `steps`: as many as are wanted unless these are more than half of it; then a tenth.

    Else the learning rate of a small run would never come near what was set. With a `name`, of the run, it is told.
    """
    if 2 * wanted <= steps:
        return wanted
    fitting = steps // 10
    if name is not None:
        tqdm.write(f"{name}: warmup_steps {wanted} are too many for a run of {steps} steps: {fitting} instead")
    return fitting


def require_finite(metrics: Mapping[str, Any], name: str) -> None:
    """Raise `ValueError` if a number in (nested) metrics is NaN or infinite: the training has diverged."""
    for key, value in flatten(metrics).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(
                f"{name}: {key} is {value}; the training has diverged and nothing of it was saved. Lower learning_rate "
                "or raise warmup_steps, and check the rewards for extreme values."
            )


def require_precision(model: nn.Module, arguments: TrainingArguments) -> None:
    """Refuse to train weights of 16 bits as they are: an update of less than 1/256 of a weight would be lost.

    Raises:
        ValueError: some are; the message says what to set.
    """
    if arguments.deepspeed is not None:  # which keeps master weights of its own
        return
    half = {str(p.dtype) for p in model.parameters() if p.requires_grad and p.dtype in (torch.bfloat16, torch.float16)}
    if half:
        kind = half.pop().removeprefix("torch.")
        raise ValueError(
            f"the weights that are trained are {kind}, which rounds away updates of learning_rate "
            f"{arguments.learning_rate:g}: set dtype: float32 and bf16: true, which computes in bfloat16 and keeps the "
            "weights in float32, or train an adapter (lora.rank above 0)."
        )
