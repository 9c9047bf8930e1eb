"""Settings that several trainings share, in groups that their configurations are made of."""

# No `from __future__ import annotations`: older releases of jsonargparse look the types of inherited fields up in the
# module of the class that inherits them, where their names need not be.
from dataclasses import dataclass, field
from typing import Any

from mavis_logits.models import DEFAULT_MODEL


@dataclass(frozen=True)
class LoraSettings:
    """LoRA as in section F.4.

    Attributes:
        rank: of the adapter; 0 trains all weights of the backbone instead.
        alpha: scale, in multiples of 1 / rank.
        dropout: on what enters the adapter.
        target_modules: names of linear layers, or "all-linear".
        first_layer: adapt this layer of the model (from 0) and those above it; the layers below are not learned, which
            spares their share of the backward pass.
    """

    rank: int = 128
    alpha: int = 256
    dropout: float = 0.2
    target_modules: str | list[str] = "all-linear"
    first_layer: int = 0


@dataclass(frozen=True, kw_only=True)
class FittingSettings:
    """What every training has.

    Attributes:
        weight_decay: of the optimizer.
        warmup_steps: optimizer steps of linear warmup; a tenth of the run where these are more than half of it.
        validation_share: of the prompts, held out.
        seed: of initialisation, order, dropout and balancing.
        dtype: of the weights.
        device: "cpu", or None for the best there is.
        fresh: begin anew, in place of what `output` holds of another or an interrupted training.
    """

    weight_decay: float = 0.002
    warmup_steps: int = 100
    validation_share: float = 0.1
    seed: int = 0
    dtype: str = "float32"
    device: str | None = None
    fresh: bool = False


@dataclass(frozen=True, kw_only=True)
class TrainerSettings(FittingSettings):
    """What a training by `transformers.Trainer` has besides.

    Attributes:
        epochs: passes over the training data.
        batch_size: sequences per forward and device.
        gradient_accumulation: forwards per optimizer step, over all of which the loss is one average.
        learning_rate: at its peak; decays linearly to 0.
        bf16: compute in bfloat16 under autocast.
    """

    epochs: float = 1.0
    batch_size: int = 1
    gradient_accumulation: int = 1
    learning_rate: float = 2e-5
    bf16: bool = False


@dataclass(frozen=True, kw_only=True)
class ValueTrainerSettings(TrainerSettings):
    """What the training of a value model has besides, whatever it learns from.

    Attributes:
        backbone: of a new value model: Hub id or folder of a decoder, or "smollm2"; its tokens must be those of the
            trees.
        num_layers: keep only the first layers of the backbone.
        lora: adapter settings.
        tokens_per_batch: in place of `batch_size`: as many sequences of similar length as fit into so many tokens,
            padding included; a longer one is alone.
        optimizer: any of `transformers.TrainingArguments.optim`.
        max_grad_norm: gradients are clipped to this norm.
        trainer: further arguments of `transformers.TrainingArguments` by name, such as `gradient_checkpointing`,
            `deepspeed`, `fsdp`, `report_to`, `eval_steps`; they override what is set here.
    """

    backbone: str = DEFAULT_MODEL
    num_layers: int | None = None
    lora: LoraSettings = field(default_factory=LoraSettings)
    tokens_per_batch: int | None = None
    optimizer: str = "adafactor"
    max_grad_norm: float = 1.0
    trainer: dict[str, Any] = field(default_factory=dict)
