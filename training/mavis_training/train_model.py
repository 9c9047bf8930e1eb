"""Train a value model on labelled trees: equation 6 through `transformers.Trainer`."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel, Trainer, TrainingArguments, set_seed
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint

from mavis_logits.demo.smollm2 import load_chat_model
from mavis_logits.loading import find_file
from mavis_logits.value_model import ADAPTER_CONFIG, ValueModel

from .data import LabelledTree, load_trees, recipe_of, reward_units, split_by_prompt
from .files import read_json, write_json
from .metrics import Prediction, validation_metrics
from .packing import (
    Example,
    node_examples,
    pack,
    packed_inputs,
    plain_inputs,
    require_packable,
    term_inputs,
    tree_example,
)
from .targets import kept_nodes
from .tree_store import StoreMetadata, TreeStore

TRAINABLE_WEIGHTS = "trainable.safetensors"


@dataclass(frozen=True)
class LoraSettings:
    """LoRA as in section F.4.

    Attributes:
        rank: of the adapter; 0 trains all weights of the backbone instead.
        alpha: scale, in multiples of 1 / rank.
        dropout: on what enters the adapter.
        target_modules: names of linear layers, or "all-linear".
    """

    rank: int = 128
    alpha: int = 256
    dropout: float = 0.2
    target_modules: str | list[str] = "all-linear"


@dataclass(frozen=True)
class TrainModelConfig:
    """How to train a value model. Defaults are section F.4's for iteration 0.

    Attributes:
        store: folder of the labelled tree store, or several, which are trained on together.
        objectives: rewards to predict, one output each.
        output: folder for the value model, its metrics and its checkpoints.
        initial: folder or Hub id of the value model to go on from, the previous iteration's in Algorithm 1; None for a
            new one. Its adapter is trained further if it has one; with `lora.rank` 0, all its weights.
        backbone: Hub id or folder of a decoder, or "smollm2"; its tokens must be those of the trees.
        num_layers: keep only the first layers of the backbone.
        lora: adapter settings.
        zeta: KL penalty multiplier of equation 6.
        drop_leaves: share of the leaves left out (balancing).
        targets: "nodes": the last token of each node regresses its value, as in the paper; "tokens": every token of a
            node does.
        packing: "trees": a tree is one sequence; "nodes": a node is (slower, for backbones with a recurrent state).
        epochs: passes over the training trees.
        batch_size: sequences (of `packing`'s kind) per forward.
        gradient_accumulation: forwards per optimizer step.
        learning_rate: at its peak; decays linearly to 0.
        weight_decay: of the optimizer.
        warmup_steps: optimizer steps of linear warmup.
        optimizer: any of `transformers.TrainingArguments.optim`.
        max_grad_norm: gradients are clipped to this norm.
        validation_share: of the prompts, held out.
        seed: of initialisation, order, dropout and balancing.
        dtype: of the weights.
        bf16: compute in bfloat16 under autocast.
        device: "cpu", or None for the best there is.
        iteration: of Algorithm 1, recorded with the model.
    """

    store: str | list[str]
    objectives: list[str]
    output: str
    initial: str | None = None
    backbone: str = "smollm2"
    num_layers: int | None = None
    lora: LoraSettings = field(default_factory=LoraSettings)
    zeta: float = 0.0
    drop_leaves: float = 0.5
    targets: Literal["nodes", "tokens"] = "nodes"
    packing: Literal["trees", "nodes"] = "trees"
    epochs: float = 1.0
    batch_size: int = 1
    gradient_accumulation: int = 1
    learning_rate: float = 2e-5
    weight_decay: float = 0.002
    warmup_steps: int = 100
    optimizer: str = "adafactor"
    max_grad_norm: float = 1.0
    validation_share: float = 0.1
    seed: int = 0
    dtype: str = "float32"
    bf16: bool = False
    device: str | None = None
    iteration: int = 0

    def __post_init__(self) -> None:
        for name, choices in (("targets", ("nodes", "tokens")), ("packing", ("trees", "nodes"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {getattr(self, name)!r}.")
        if not self.objectives:
            raise ValueError("objectives is empty: name at least one that the store has been labelled for.")


def train_model(config: TrainModelConfig, backbone: PreTrainedModel | None = None) -> ValueModel:
    """Train a value model, save it with `metrics.json` and `train_config.json`, and return it.

    Of the epochs, the one with the smallest validation loss is kept. Killed at any instant, a rerun goes on from the
    last checkpoint (one per epoch); checkpoints are removed at the end.

    Args:
        config: how to train.
        backbone: a loaded decoder, in place of the one that `config.backbone` names.

    Raises:
        ValueError: no rewards for an objective, no training or validation trees, a backbone that cannot read packed
            trees, or an `initial` of something else.
        OSError: no store there, or a corrupt shard.
    """
    set_seed(config.seed)
    stores, trees = load_trees(config.store, config.objectives, config.zeta)
    training, validation = split_by_prompt(trees, config.validation_share)
    mean, scale = reward_units(training)
    model = starting_model(config, stores, backbone)
    set_reward_units(model, mean.tolist(), scale.tolist())
    if config.packing == "trees":
        require_packable(model.config.backbone_config)
    trainer = ValueTrainer(
        model=model,
        args=training_arguments(config),
        train_dataset=ExampleDataset(training, config),
        eval_dataset=ExampleDataset(validation, config),
        data_collator=Collator(model, config.packing),
    )
    trainer.train(resume_from_checkpoint=last_whole_checkpoint(Path(str(trainer.args.output_dir))))
    model.eval()
    metrics = validation_metrics(predict(model, validation, config.packing), config.objectives)
    metrics["training_trees"] = len(training)
    output = Path(config.output)
    model.save_pretrained(output)
    write_json(output / "train_config.json", model.config.recipe)
    write_json(output / "metrics.json", metrics)
    shutil.rmtree(trainer.args.output_dir)  # type: ignore[arg-type]  # done: the folder is ready to be published
    return model


def starting_model(
    config: TrainModelConfig, stores: Sequence[TreeStore], backbone: PreTrainedModel | None = None
) -> ValueModel:
    """The value model to train: a new one on a backbone, or the one that `config.initial` names.

    Raises:
        ValueError: `config.initial` has other objectives, another tokenizer, or another shape than is asked for.
        OSError: it, or the backbone, is not there.
    """
    dtype = getattr(torch, config.dtype)
    is_adapter = config.initial is not None and find_file(config.initial, ADAPTER_CONFIG, {}) is not None
    if backbone is None and (config.initial is None or is_adapter):
        backbone = load_chat_model(config.backbone, dtype)[0]
    if config.initial is None:
        assert backbone is not None
        model = ValueModel.from_backbone(backbone, config.objectives, config.num_layers, lora_config(config.lora))
    else:
        # With rank 0 an adapter is folded into the weights, which are then all trained.
        model = ValueModel.from_pretrained(
            config.initial, backbone=backbone if is_adapter else None, merge=config.lora.rank == 0, dtype=dtype
        )
        _check_initial(config, model, stores[-1].metadata)
        if config.lora.rank == 0:
            model.requires_grad_(True)
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


def set_reward_units(model: ValueModel, mean: Sequence[float], scale: Sequence[float]) -> None:
    """Standardise by another mean and scale `[M]` each, changing the head so that it says the same values as before.

    A head still at zero keeps saying the mean, now the new one.
    """
    old_mean, old_scale = model.config.reward_units(model.device)
    new_mean, new_scale = (torch.tensor(x, dtype=torch.float32, device=model.device) for x in (mean, scale))
    weight, bias = model.head.weight, model.head.bias
    if weight.any() or bias.any():
        with torch.no_grad():
            weight.copy_(weight.float() * (old_scale / new_scale)[:, None])
            bias.copy_((old_mean + old_scale * bias.float() - new_mean) / new_scale)
    model.config.reward_mean, model.config.reward_scale = list(mean), list(scale)


def lora_config(settings: LoraSettings) -> LoraConfig | None:
    """PEFT's form of the settings; None to train all weights."""
    if settings.rank == 0:
        return None
    return LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=settings.target_modules,
    )


def training_arguments(config: TrainModelConfig) -> TrainingArguments:
    """Arguments of `Trainer`; checkpoints lie under `<output>/checkpoints`."""
    folder = Path(config.output) / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    return TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=config.epochs,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        warmup_steps=config.warmup_steps,
        lr_scheduler_type="linear",
        optim=config.optimizer,
        max_grad_norm=config.max_grad_norm,
        train_sampling_strategy="group_by_length",
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=1,
        load_best_model_at_end=True,
        logging_steps=10,
        report_to="none",
        include_num_input_tokens_seen="all",
        bf16=config.bf16,
        use_cpu=config.device == "cpu",
        seed=config.seed,
        label_names=["targets"],
        prediction_loss_only=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )


def last_whole_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that `Trainer` finished writing; unfinished ones, of a killed run, are removed."""
    while (newest := get_last_checkpoint(str(folder))) is not None:
        try:
            read_json(Path(newest) / TRAINER_STATE_NAME)  # written last
        except (OSError, ValueError):
            shutil.rmtree(newest)
        else:
            return newest
    return None


def value_loss(values: Tensor, inputs: dict[str, Tensor], scale: Tensor) -> Tensor:
    """Equation 6 in standardised units, averaged over the terms of a batch and the objectives.

    Args:
        values: `[B, T, M]`, in reward units.
        inputs: `rows` and `terms` `[K]`, `targets` `[K, M]`.
        scale: `[M]`, standard deviation of the rewards.
    """
    predicted = values[inputs["rows"], inputs["terms"]]
    return ((predicted - inputs["targets"]) / scale).square().mean()


class ExampleDataset(torch.utils.data.Dataset[dict[str, Any]]):
    """Training sequences of labelled trees; masks are built when a sequence is asked for."""

    def __init__(self, trees: Sequence[LabelledTree], config: TrainModelConfig) -> None:
        self.trees, self.every_token = list(trees), config.targets == "tokens"
        self.kept = [kept_nodes(item.tree, config.drop_leaves, config.seed) for item in self.trees]
        self.plain: list[Example] | None = None
        if config.packing == "nodes":
            pairs = zip(self.trees, self.kept, strict=True)
            self.plain = [
                e for item, kept in pairs for e in node_examples(item.tree, item.targets, kept, self.every_token)
            ]

    def __len__(self) -> int:
        return len(self.plain if self.plain is not None else self.trees)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One example under "example"; "input_ids" is what `Trainer` groups by length."""
        if self.plain is not None:
            example = self.plain[index]
        else:
            item = self.trees[index]
            example = tree_example(item.tree, item.targets, self.kept[index], self.every_token)
        return {"example": example, "input_ids": example.input_ids}


class Collator:
    """Batches of examples as inputs of a value model, with their terms."""

    def __init__(self, model: ValueModel, packing: str) -> None:
        self.config, self.dtype, self.packing = model.config.backbone_config, model.dtype, packing
        self.pad_token_id = model.config.pad_token_id or 0

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Inputs and terms of a batch."""
        examples = [item["example"] for item in items]
        if self.packing == "trees":
            return packed_inputs(examples, self.config, self.dtype, self.pad_token_id) | term_inputs(examples)
        return plain_inputs(examples, self.pad_token_id) | term_inputs(examples)


class ValueTrainer(Trainer):
    """`Trainer` with the loss of equation 6; checkpoints hold the trainable weights only."""

    @property
    def value_model(self) -> ValueModel:
        """The model in training, unwrapped."""
        return cast(ValueModel, self.model)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """`value_loss` of a batch."""
        terms = {name: inputs[name] for name in ("rows", "terms", "targets")}
        rest = {name: value for name, value in inputs.items() if name not in terms}
        output = model(**rest)
        scale = torch.tensor(self.value_model.config.reward_scale, device=output.values.device)
        loss = value_loss(output.values, terms, scale)
        return (loss, {"values": output.values}) if return_outputs else loss

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        weights = {n: p.detach().cpu().contiguous() for n, p in self.value_model.named_parameters() if p.requires_grad}
        save_file(weights, folder / TRAINABLE_WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        weights = load_file(Path(resume_from_checkpoint) / TRAINABLE_WEIGHTS)
        unexpected = (model or self.value_model).load_state_dict(weights, strict=False).unexpected_keys
        if unexpected:
            raise ValueError(
                f"{resume_from_checkpoint} is of another model (it has {unexpected[0]}): give another output folder."
            )

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(str(self.state.best_model_checkpoint))


@torch.inference_mode()
def predict(model: ValueModel, trees: Sequence[LabelledTree], packing: str) -> list[Prediction]:
    """What `model` says after every token of held-out trees."""
    predictions = []
    for item in tqdm(trees, desc="validate", unit="tree"):
        values, prompt_value = _values_of(model, item, packing)
        predictions.append(Prediction(item.tree, item.targets, item.rewards, values, prompt_value))
    return predictions


def _values_of(model: ValueModel, item: LabelledTree, packing: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Values after each new token `[N, M]`, in packed order, and of the prompt `[M]`."""
    layout = pack(item.tree)
    if packing == "trees":
        inputs = packed_inputs([layout], model.config.backbone_config, model.dtype)
        inputs = {k: _to(v, model.device) for k, v in inputs.items()}
        values = model(**inputs).values[0].double().cpu().numpy()
        return values[layout.new], values[layout.last[-1]]
    values = np.empty((len(layout), len(model.config.objectives)))
    for leaf in item.tree.leaves():
        path = item.tree.path(leaf)
        where = np.flatnonzero(np.isin(layout.node, [-1, *path]))
        tokens = torch.from_numpy(layout.input_ids[where])[None].to(model.device)
        values[where] = model(tokens).values[0].double().cpu().numpy()
    return values[layout.new], values[layout.last[-1]]


def _to(value: Any, device: torch.device) -> Any:
    """A tensor, or a dictionary of tensors, on `device`."""
    return {k: v.to(device) for k, v in value.items()} if isinstance(value, dict) else value.to(device)
