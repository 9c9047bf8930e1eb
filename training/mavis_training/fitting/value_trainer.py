"""Equation 6 under `transformers.Trainer`: all that Trainer can do is open to value models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from mavis_logits.backbone import Backbone
from mavis_logits.values.value_model import ValueModel

from ..base.record import last_whole_checkpoint
from ..trees.data import LabelledTree
from ..trees.packing import pack, tree_terms
from .batches import Collator, GroupedBatches, Packing, ReadingSet, TrainingSet, collect_values
from .metrics import Prediction, flatten, validation_metrics
from .soundness import fitting_warmup, require_finite, require_precision

TRAINABLE_WEIGHTS = "trainable.safetensors"


def resume(trainer: Trainer) -> None:
    """Train, going on from the newest whole checkpoint."""
    with trainer.args.main_process_first():
        checkpoint = last_whole_checkpoint(Path(str(trainer.args.output_dir)))
    trainer.train(resume_from_checkpoint=checkpoint)


def value_loss(values: Tensor, inputs: dict[str, Tensor], scale: Tensor, terms: Tensor | int | None = None) -> Tensor:
    """Equation 6 in standardised units, averaged over terms and objectives.

    Args:
        values: `[B, T, M]`, in reward units.
        inputs: `rows` and `terms` `[K]`, `targets` `[K, M]`.
        scale: `[M]`, standard deviation of the rewards.
        terms: how many terms the average is over, where this batch is only a part; None for its own K.
    """
    predicted = values[inputs["rows"], inputs["terms"]]
    errors = ((predicted - inputs["targets"]) / scale).square()
    return errors.mean() if terms is None else errors.sum() / (terms * errors.shape[1])


@dataclass
class Validation:
    """Held-out trees and which of their nodes count in the validation loss.

    Attributes:
        trees: with their targets.
        kept: per tree, bool `[n]`.
        every_token: of `tree_terms`.
    """

    trees: Sequence[LabelledTree]
    kept: Sequence[NDArray[np.bool_]]
    every_token: bool

    def loss(self, values: Sequence[NDArray[np.float64]], scale: NDArray[np.float64]) -> float:
        """Mean of equation 6 over all terms and objectives, in standardised units.

        Args:
            values: per tree, `[T, M]`, of every token of its packed sequence.
            scale: `[M]`.
        """
        errors = []
        for item, kept, said in zip(self.trees, self.kept, values, strict=True):
            terms, targets = tree_terms(item, pack(item.tree), kept, self.every_token)
            errors.append(((said[terms] - targets) / scale) ** 2)
        return float(np.concatenate(errors).mean())


class ValueTrainer(Trainer):
    """`Trainer` with the loss of equation 6 and validation by the metrics of `validation_metrics`.

    Every term of an optimizer step weighs the same, in whatever batch and on whatever process it is. Checkpoints hold
    the trainable weights only, unless the model is sharded (FSDP, DeepSpeed), where Trainer writes its own.

    Args:
        model: the value model.
        args: of `training_arguments`.
        training: sequences to train on.
        validation: held-out trees.
        packing: how both are read.
        tokens_per_batch: the most padded tokens of a forward; None for batches of `args`'s number of sequences.

    Attributes:
        metrics: of the last validation, nested as `validation_metrics` returns them, with its loss.

    Raises:
        ValueError: weights that are trained have 16 bits or, later, a training that diverges.
    """

    def __init__(
        self,
        model: ValueModel,
        args: TrainingArguments,
        training: TrainingSet,
        validation: Validation,
        packing: Packing = "trees",
        tokens_per_batch: int | None = None,
    ) -> None:
        self.value_config = model.config
        self.validation, self.tokens_per_batch = validation, tokens_per_batch
        self.trainable = {name for name, p in model.named_parameters() if p.requires_grad}
        self.metrics: dict[str, Any] = {}
        collator = Collator(Backbone.of(model.backbone).windows, model.dtype, packing, model.config.pad_token_id or 0)
        readings = ReadingSet(validation.trees, packing)
        if args.gradient_checkpointing:
            model.enable_input_require_grads()  # a frozen embedding would cut the graph before the first checkpoint
        require_precision(model, args)
        super().__init__(model, args, data_collator=collator, train_dataset=training, eval_dataset=readings)
        self.model_accepts_loss_kwargs = True  # compute_loss divides by all terms of the step by itself

    @property
    def is_sharded(self) -> bool:
        """Whether no process holds all weights."""
        return bool(self.is_fsdp_enabled or self.is_deepspeed_enabled)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The schedule of the learning rate, with a warmup that fits into the run."""
        self.args.warmup_steps = fitting_warmup(
            self.args.get_warmup_steps(num_training_steps),
            num_training_steps,
            "training" if self.args.should_log else None,
        )
        return super().create_scheduler(num_training_steps, optimizer)

    def log(self, logs: dict[str, float], *arguments: Any, **options: Any) -> None:
        """Log, and end a training whose loss is NaN or infinite."""
        super().log(logs, *arguments, **options)
        require_finite({name: value for name, value in logs.items() if name == "loss"}, "training")

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """`value_loss` of a batch; with `num_items_in_batch`, its share of the optimizer step's loss."""
        names = ("rows", "terms", "targets")
        output = model(**{name: value for name, value in inputs.items() if name not in names})
        _, scale = self.value_config.reward_units(output.values.device)
        loss = value_loss(output.values, {name: inputs[name] for name in names}, scale, num_items_in_batch)
        if num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # over which gradients are averaged
        return (loss, {"values": output.values}) if return_outputs else loss

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> Tensor | None:
        """Terms of an optimizer step, over its batches and all processes."""
        if not batch_samples:
            return None
        terms = torch.tensor(sum(len(batch["terms"]) for batch in batch_samples), device=device)
        return self.accelerator.gather(terms).sum()

    def get_train_dataloader(self) -> DataLoader:
        """Batches of sequences of similar length, `batch_size` of them or to the token budget, in random order."""
        by_length = self.args.train_sampling_strategy == "group_by_length"
        if self.tokens_per_batch is None and not by_length:
            return super().get_train_dataloader()
        dataset: Any = self.train_dataset
        sequences = self.args.train_batch_size if self.tokens_per_batch is None else None
        return self._loader(
            dataset, GroupedBatches(dataset.lengths, self.tokens_per_batch, sequences, seed=self.args.seed)
        )

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Readings of the validation trees, shortest first."""
        dataset: Any = self.eval_dataset if not isinstance(eval_dataset, ReadingSet) else eval_dataset
        sequences = self.args.eval_batch_size if self.tokens_per_batch is None else None
        return self._loader(dataset, GroupedBatches(dataset.lengths, self.tokens_per_batch, sequences, seed=None))

    def _loader(self, dataset: Any, batches: GroupedBatches) -> DataLoader:
        collator: Any = self.data_collator
        loader: DataLoader = DataLoader(
            dataset,
            batch_sampler=batches,
            collate_fn=collator.readings if isinstance(dataset, ReadingSet) else collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )
        return self.accelerator.prepare(loader)

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Validation loss and metrics of the held-out trees, with each process reading its share of them."""
        readings: Any = dataloader.dataset
        values = self._read(dataloader, readings.sizes)
        predictions = []
        for item, said in zip(self.validation.trees, values, strict=True):
            prompt = len(item.tree.prompt_tokens)
            predictions.append(Prediction(item, said[prompt:], said[prompt - 1]))
        scale = np.asarray(self.value_config.reward_scale)
        self.metrics = {"loss": self.validation.loss(values, scale)}
        require_finite(self.metrics, "validation")
        self.metrics |= validation_metrics(predictions, self.value_config.objectives)
        require_finite(self.metrics, "validation")
        told = {name: value for name, value in flatten(self.metrics).items() if not isinstance(value, int)}  # no counts
        flat = {f"{metric_key_prefix}_{name}": value for name, value in told.items()}
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=flat, num_samples=len(values))

    @torch.no_grad()
    def _read(self, dataloader: DataLoader, sizes: NDArray[np.int64]) -> list[NDArray[np.float64]]:
        """Values `[T, M]` of every token of every tree's packed sequence, on every process."""
        model = self.model_wrapped if self.is_deepspeed_enabled else self._wrap_model(self.model, training=False)
        was_training = model.training
        model.eval()
        device = self.args.device
        starts = torch.from_numpy(np.cumsum(sizes) - sizes).to(device)
        into = torch.zeros(int(sizes.sum()), len(self.value_config.objectives), device=device)
        count = torch.zeros(len(into), device=device)
        for batch in dataloader:
            batch = self._prepare_inputs(batch)
            inputs = {name: value for name, value in batch.items() if name not in ("trees", "places")}
            with self.compute_loss_context_manager():
                output = model(**inputs)
            collect_values(output.values, batch, starts, into, count)
        model.train(was_training)
        # A tree may have been read by two processes, which comes of batches that do not divide evenly.
        into, count = (self.accelerator.reduce(tensor, "sum") for tensor in (into, count))
        return np.split((into / count[:, None]).double().cpu().numpy(), np.cumsum(sizes)[:-1])

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        if state_dict is None:
            assert self.model is not None
            state_dict = dict(self.model.named_parameters())
        kept = {name: p.detach().cpu().contiguous() for name, p in state_dict.items() if name in self.trainable}
        save_file(kept, folder / TRAINABLE_WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_sharded:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        weights = load_file(Path(resume_from_checkpoint) / TRAINABLE_WEIGHTS)
        target: Any = model or self.model
        unexpected = target.load_state_dict(weights, strict=False).unexpected_keys
        if unexpected or set(weights) != self.trainable:
            different = unexpected or sorted(set(weights) ^ self.trainable)
            raise ValueError(
                f"{resume_from_checkpoint} is of another model (see {different[0]}): give another output folder."
            )
        return None

    def _load_best_model(self) -> None:
        if self.is_sharded:
            super()._load_best_model()
        else:
            self._load_from_checkpoint(str(self.state.best_model_checkpoint))
