"""How to train a value model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from peft import LoraConfig
from transformers import PreTrainedModel, TrainingArguments

from mavis_logits.backbone import Backbone
from mavis_logits.core.known import meant

from ..trees.targets import Penalty
from .settings import LoraSettings, ValueTrainerSettings

# Arguments of Trainer that every training has a setting for.
SHARED_SETTINGS = {
    "num_train_epochs": "epochs",
    "per_device_train_batch_size": "batch_size",
    "per_device_eval_batch_size": "batch_size",
    "gradient_accumulation_steps": "gradient_accumulation",
    "learning_rate": "learning_rate",
    "weight_decay": "weight_decay",
    "warmup_steps": "warmup_steps",
    "seed": "seed",
    "bf16": "bf16",
}
# Those that `trainer` must not name: the setting to use instead, or None if they are not to be changed at all.
_OWN_SETTINGS: dict[str, str | None] = {
    **SHARED_SETTINGS,
    "output_dir": "output",
    "optim": "optimizer",
    "max_grad_norm": "max_grad_norm",
    "use_cpu": "device",
    "label_names": None,
    "prediction_loss_only": None,
    "remove_unused_columns": None,
}


@dataclass(frozen=True)
class TrainModelConfig(ValueTrainerSettings):
    """How to train a value model. Defaults are section F.4's for iteration 0.

    Attributes:
        store: folder of the labelled tree store, or several, which are trained on together.
        objectives: rewards to predict, one output each.
        output: folder for the value model, its metrics and its checkpoints.
        initial: folder or Hub id of the value model to go on from, the previous iteration's in Algorithm 1; None for a
            new one. Its adapter is trained further if it has one; with `lora.rank` 0, all its weights.
        zeta: KL penalty multiplier of equation 6.
        penalty: "completion": zeta penalises all of a completion, as in equation 6; "continuation": what follows the
            sequence only, as in Theorem 1.
        drop_leaves: share of the leaves left out (balancing).
        targets: "nodes": the last token of each node regresses its value, as in the paper; "tokens": every token of a
            node does.
        packing: "trees": a tree is one sequence; "nodes": a node is (slower, for backbones with a recurrent state).
        validation_leaves: whether leaves count in the validation loss, as many as in training; section F.5 also leaves
            them out.
        iteration: of Algorithm 1, recorded with the model.
    """

    store: str | list[str]
    objectives: list[str]
    output: str
    initial: str | None = None
    zeta: float = 0.0
    penalty: Penalty = "completion"
    drop_leaves: float = 0.5
    targets: Literal["nodes", "tokens"] = "nodes"
    packing: Literal["trees", "nodes"] = "trees"
    validation_leaves: bool = True
    iteration: int = 0

    def __post_init__(self) -> None:
        for name, choices in (("targets", ("nodes", "tokens")), ("packing", ("trees", "nodes"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {getattr(self, name)!r}.")
        if not self.objectives:
            raise ValueError("objectives is empty: name at least one that the store has been labelled for.")
        if self.tokens_per_batch is not None and self.tokens_per_batch < 1:
            raise ValueError(f"tokens_per_batch must be at least 1, or null, got {self.tokens_per_batch}.")
        check_trainer_arguments(self.trainer)


def lora_config(settings: LoraSettings, model: PreTrainedModel) -> LoraConfig | None:
    """PEFT's form of the settings, for `model`; None to train all weights.

    Raises:
        ValueError: the model has no such first layer.
    """
    if settings.rank == 0:
        return None
    below = None
    if settings.first_layer:
        layers = Backbone.of(model).layers
        if not 0 < settings.first_layer < len(layers):
            raise ValueError(f"lora.first_layer must be from 0 to {len(layers) - 1}, got {settings.first_layer}.")
        place = next(name for name, module in model.named_modules() if module is layers).rpartition(".")[2]
        below = rf"(.*\.)?{place}\.({'|'.join(map(str, range(settings.first_layer)))})\..*"
    return LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=settings.target_modules,
        exclude_modules=below,
    )


def check_trainer_arguments(given: Mapping[str, Any]) -> None:
    """Raise `ValueError` for a name that `transformers.TrainingArguments` does not have, or that is set elsewhere."""
    known = {field.name for field in fields(TrainingArguments) if field.init}
    for name in given:
        if name not in known:
            hint = meant(name, known, "see the documentation of transformers for its arguments")
            raise ValueError(f"trainer has the argument {name!r}, which transformers.TrainingArguments has not: {hint}")
        if name in _OWN_SETTINGS:
            own = _OWN_SETTINGS[name]
            advice = f"use the setting {own!r} beside trainer." if own else "this trainer needs its own: leave it out."
            raise ValueError(f"trainer has the argument {name!r}, which is not set there: {advice}")
