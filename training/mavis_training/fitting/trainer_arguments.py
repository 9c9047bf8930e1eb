"""Settings of a training as arguments of `transformers.Trainer`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from ..base.record import CHECKPOINTS
from .model_config import SHARED_SETTINGS, TrainModelConfig


def common_arguments(config: Any) -> dict[str, Any]:
    """Arguments of `Trainer` that every training has; checkpoints lie under `<output>/checkpoints`, once an epoch.

    Args:
        config: of `mavis train-model`, `distil` or `sft`.
    """
    folder = Path(config.output) / CHECKPOINTS
    folder.mkdir(parents=True, exist_ok=True)
    return {name: getattr(config, setting) for name, setting in SHARED_SETTINGS.items()} | {
        "output_dir": str(folder),
        "use_cpu": config.device == "cpu",
        "lr_scheduler_type": "linear",
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "logging_steps": 10,
        "dataloader_pin_memory": False,
    }


def training_arguments(config: TrainModelConfig) -> TrainingArguments:
    """Arguments of `ValueTrainer`; `config.trainer` overrides the defaults."""
    arguments = common_arguments(config) | {
        "optim": config.optimizer,
        "max_grad_norm": config.max_grad_norm,
        "label_names": ["targets"],
        "prediction_loss_only": True,
        "remove_unused_columns": False,
        "train_sampling_strategy": "group_by_length",
        "save_total_limit": 1,
        "load_best_model_at_end": True,
        "report_to": "none",
        "logging_nan_inf_filter": False,  # else a loss that is NaN would be logged as 0
        "include_num_input_tokens_seen": "all",
        "ddp_find_unused_parameters": False,
    }
    return TrainingArguments(**(arguments | config.trainer))
