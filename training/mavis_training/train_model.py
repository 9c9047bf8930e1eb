"""Train a value model on labelled trees: equation 6 through `transformers.Trainer`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel, TrainingArguments, set_seed

from mavis_logits.backbone.fingerprint import parameters_fingerprint
from mavis_logits.hub.files import ADAPTER_CONFIG, find_file
from mavis_logits.models import load_chat_model
from mavis_logits.values.value_model import ValueModel

from .base.files import write_json
from .base.kept import model_origin
from .base.record import SHAPELESS, Record, clear_checkpoints
from .base.settings import torch_dtype
from .fitting.batches import TrainingSet
from .fitting.model_config import TrainModelConfig as TrainModelConfig
from .fitting.model_config import lora_config
from .fitting.settings import LoraSettings as LoraSettings
from .fitting.trainer_arguments import training_arguments
from .fitting.value_trainer import Validation, ValueTrainer, resume
from .sampling.reference import require_trees_fit
from .trees.data import (
    LabelledTree,
    data_origin,
    load_trees,
    recipe_of,
    reward_units,
    set_reward_units,
    settings_origin,
    split_by_prompt,
)
from .trees.packing import require_packable
from .trees.targets import kept_nodes
from .trees.tree_store import StoreMetadata, TreeStore


def train_model(config: TrainModelConfig, backbone: PreTrainedModel | None = None) -> ValueModel:
    """Train a value model, save it with `metrics.json` and `train_config.json`, and return it.

    Of the epochs, the one with the smallest validation loss is kept. Killed at any instant, a rerun goes on from the
    last checkpoint (one per epoch); checkpoints are removed at the end. What is finished is not trained again, and what
    was begun under other settings, on other trees or other weights is refused. Started by `accelerate launch` or
    `torchrun`, several processes train together and the first one writes.

    Args:
        config: how to train.
        backbone: a loaded decoder, in place of the one that `config.backbone` names.

    Raises:
        ValueError: no rewards for an objective, no training or validation trees, a backbone that cannot read packed
            trees or is too short for them, an `initial` of something else, another training in `output`, or a training
            that diverges.
        OSError: no store there, or a corrupt shard.
    """
    set_seed(config.seed)
    stores, trees = load_trees(config.store, config.objectives, config.zeta, config.penalty)
    training, validation = split_by_prompt(trees, config.validation_share)
    model = starting_model(config, stores, backbone)
    set_reward_units(model, *reward_units(training))
    if config.packing == "trees":
        require_packable(model.backbone, "set packing to 'nodes'")
    require_trees_fit(trees, model.backbone)
    arguments = training_arguments(config)
    record = Record(config.output, training_origin(config, model, stores, arguments))
    with arguments.main_process_first():
        finished = record.is_finished(arguments.should_save, config.fresh)
    if finished:
        return finished_model(config, backbone)
    every_token = config.targets == "tokens"
    kept = [kept_nodes(item.tree, config.drop_leaves, config.seed) for item in training]
    trainer = ValueTrainer(
        model,
        arguments,
        TrainingSet(training, kept, config.packing, every_token),
        Validation(validation, [validation_nodes(item, config) for item in validation], every_token),
        config.packing,
        config.tokens_per_batch,
    )
    resume(trainer)
    trainer.evaluate(metric_key_prefix="best")
    model.config.recipe["warmup_steps"] = trainer.args.warmup_steps  # as many as were taken
    trained = save_trained(trainer, config, stores, backbone)
    if trainer.is_world_process_zero():
        write_json(Path(config.output) / "train_config.json", model.config.recipe)
        write_json(Path(config.output) / "metrics.json", trainer.metrics | _costs(trainer, len(training)))
        record.write(finished=True)
        clear_checkpoints(config.output)  # done: the folder is ready to be published
    trainer.accelerator.wait_for_everyone()
    return trained


def training_origin(
    config: TrainModelConfig, model: ValueModel, stores: Sequence[TreeStore], arguments: TrainingArguments
) -> dict[str, Any]:
    """Everything that shapes what is learned: settings, the weights at the start, trees with rewards, processes."""
    settings = settings_origin(asdict(config))
    settings["trainer"] = {name: value for name, value in config.trainer.items() if name not in SHAPELESS}
    return settings | {
        "starting_weights": parameters_fingerprint(model),
        "initial": config.initial and model_origin(config.initial),
        "data": data_origin(stores, config.objectives),
        "processes": arguments.world_size,
    }


def finished_model(config: TrainModelConfig, backbone: PreTrainedModel | None) -> ValueModel:
    """The value model that an earlier run of this training saved."""
    dtype = torch_dtype(config.dtype)
    is_adapter = find_file(config.output, ADAPTER_CONFIG, {}) is not None
    if is_adapter and backbone is None:
        backbone = load_chat_model(config.backbone, dtype)[0]
    return ValueModel.from_pretrained(config.output, backbone=backbone if is_adapter else None, dtype=dtype).eval()


def validation_nodes(item: LabelledTree, config: TrainModelConfig) -> NDArray[np.bool_]:
    """Nodes of a held-out tree that count in the validation loss, `[n]`: those that would train, or the inner ones."""
    return kept_nodes(item.tree, config.drop_leaves if config.validation_leaves else 1.0, config.seed)


def save_trained(
    trainer: ValueTrainer, config: TrainModelConfig, stores: Sequence[TreeStore], backbone: PreTrainedModel | None
) -> ValueModel:
    """Write the trained value model and return it; with FSDP or DeepSpeed, put together from all processes' parts."""
    model = cast(ValueModel, trainer.accelerator.unwrap_model(cast(ValueModel, trainer.model)))
    if trainer.is_sharded:
        state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
        model = starting_model(config, stores, backbone)
        model.config.reward_mean, model.config.reward_scale = (
            trainer.value_config.reward_mean,
            trainer.value_config.reward_scale,
        )
        if trainer.is_world_process_zero():
            model.load_state_dict({name: p for name, p in state.items() if name in trainer.trainable}, strict=False)
    model.eval()
    if trainer.is_world_process_zero():
        model.save_pretrained(config.output)
    return model


def _costs(trainer: ValueTrainer, trees: int) -> dict[str, Any]:
    """What training took: trees, optimizer steps, and tokens forwarded to train (with padding, all processes)."""
    state = trainer.state
    return {"training_trees": trees, "steps": state.global_step, "training_tokens": state.num_input_tokens_seen}


def starting_model(
    config: TrainModelConfig, stores: Sequence[TreeStore], backbone: PreTrainedModel | None = None
) -> ValueModel:
    """The value model to train: a new one on a backbone, or the one that `config.initial` names.

    Raises:
        ValueError: `config.initial` has other objectives, another tokenizer, or another shape than is asked for.
        OSError: it, or the backbone, is not there.
    """
    dtype = torch_dtype(config.dtype)
    is_adapter = config.initial is not None and find_file(config.initial, ADAPTER_CONFIG, {}) is not None
    if backbone is None and (config.initial is None or is_adapter):
        backbone = load_chat_model(config.backbone, dtype)[0]
    if config.initial is None:
        assert backbone is not None
        lora = lora_config(config.lora, backbone)
        model = ValueModel.from_backbone(backbone, config.objectives, config.num_layers, lora)
    else:
        # With rank 0 an adapter is folded into the weights, which are then all trained.
        model = ValueModel.from_pretrained(
            config.initial, backbone=backbone if is_adapter else None, merge=config.lora.rank == 0, dtype=dtype
        )
        _check_initial(config, model, stores[-1].metadata)
        if config.lora.rank == 0:
            model.requires_grad_(True)
    if model.lora:
        model.head.float()  # trained as it is, while the backbone may have 16 bits
    newest = stores[-1].metadata
    model.config.tokenizer_fingerprint = newest.tokenizer_fingerprint
    model.config.base_model, model.config.base_revision = newest.model, newest.revision
    model.config.recipe, model.config.iteration = recipe_of(asdict(config), stores), config.iteration
    return model


def _check_initial(config: TrainModelConfig, model: ValueModel, trees: StoreMetadata) -> None:
    """Refuse to go on from a value model of something else."""
    found = model.config
    rank = model.lora.active_peft_config.r if model.lora else 0
    layers = found.backbone_config.num_hidden_layers
    for name, wanted, has in (
        ("objectives", config.objectives, found.objectives),
        ("tokenizer", trees.tokenizer_fingerprint, found.tokenizer_fingerprint or trees.tokenizer_fingerprint),
        ("num_layers", config.num_layers or layers, layers),
        ("lora.rank", config.lora.rank, rank),
    ):
        if wanted != has:
            raise ValueError(
                f"training cannot go on from {config.initial}: its {name} is {has!r}, expected {wanted!r}. "
                "Change the settings to fit, or start anew (initial: null)."
            )
