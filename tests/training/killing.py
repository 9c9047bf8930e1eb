"""Stages of training as processes of their own that can be killed.

They are forked from a server that has imported everything, so that a kill lands in a stage's work, not in its imports.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import collecting
import iterating
from mavis_training.collect import collect
from mavis_training.iterate import IterationConfig, iterate
from mavis_training.label import LabelConfig, label
from mavis_training.train_head import TrainHeadConfig, train_head
from mavis_training.train_model import LoraSettings, TrainModelConfig, train_model

REWARDS = {"low": "text_rewards:low", "high": "text_rewards:high"}
TRAINING: dict[str, Any] = {"validation_share": 0.25, "learning_rate": 0.01, "warmup_steps": 0, "device": "cpu"}


def write_inputs(folder: Path) -> None:
    """A model, prompts to sample from and prompts to validate on."""
    iterating.write_inputs(folder, prompts=16, held_out=8)


def run_collect(inputs: Path, run: Path, **changes: Any) -> None:
    collect(collecting.config(inputs, str(run / "trees"), **changes))


def run_label(inputs: Path, run: Path, rewards: dict[str, str] = REWARDS) -> None:
    label(LabelConfig(str(run / "trees"), rewards, str(inputs / "model")))


def run_train_model(inputs: Path, run: Path, epochs: int = 4) -> None:
    own = {"num_layers": 1, "lora": LoraSettings(0), "targets": "tokens", "epochs": epochs, "batch_size": 4}
    backbone, places = str(inputs / "model"), (str(run / "trees"), ["low"], str(run / "value-model"))
    train_model(TrainModelConfig(*places, backbone=backbone, **own, **TRAINING))


def run_train_head(inputs: Path, run: Path, width: int = 16) -> None:
    own = {"width": width, "dropout": 0.0, "batch_size": 32}
    model, places = str(inputs / "model"), (str(run / "trees"), ["low"], str(run / "value-head"))
    train_head(TrainHeadConfig(*places, model, **own, **TRAINING))


def run_iterate(inputs: Path, run: Path, **changes: Any) -> None:
    iterations = [IterationConfig(), IterationConfig(zeta=0.02)]
    iterate(iterating.make(inputs, run / "iterate", iterations=iterations, collect=collecting.SHAPE | changes))


# Each stage goes on in the folder where the one before it ended.
STAGES: dict[str, Callable[[Path, Path], None]] = {
    "collect": run_collect,
    "label": run_label,
    "train-model": run_train_model,
    "train-head": run_train_head,
    "iterate": run_iterate,
}


OTHERS: dict[str, Callable[[Path, Path], None]] = {
    "collect": partial(run_collect, layers=2),
    "label": partial(run_label, rewards={"low": "text_rewards:high", "high": "text_rewards:low"}),
    "train-model": partial(run_train_model, epochs=3),
    "train-head": partial(run_train_head, width=8),
    "iterate": partial(run_iterate, layers=2),
}


def run_stage(stage: str, inputs: Path, run: Path, log: Path, other: bool = False) -> None:
    """Run a stage; what it prints goes to `log`. With `other`, one of its settings is another one."""
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    (OTHERS if other else STAGES)[stage](inputs, run)


def server() -> multiprocessing.context.ForkServerContext:
    """What starts processes: forks of one that has imported this module and computed nothing yet."""
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["killing", "mavis_logits.values.value_model", "mavis_logits.values.value_head"])
    first = context.Process(target=print)  # waits for these imports, so that no stage's time counts them
    first.start()
    first.join()
    return context
