"""`mavis sft`: supervised fine-tuning of the reference model through TRL's `SFTTrainer` (section F.2, table 4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

from datasets import Dataset
from tqdm.auto import tqdm
from transformers import (
    EarlyStoppingCallback,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from trl import SFTConfig as TrlConfig
from trl import SFTTrainer

from mavis_logits.backbone import Backbone
from mavis_logits.backbone.fingerprint import parameters_fingerprint
from mavis_logits.core.chat import ChatTemplate, encode_prompt
from mavis_logits.models import DEFAULT_MODEL, load_chat_model
from mavis_logits.values.adapters import folded

from .base.files import write_json
from .base.kept import digest
from .base.prompts import read_prompts
from .base.record import Record, clear_checkpoints
from .base.settings import torch_dtype
from .fitting.model_config import lora_config
from .fitting.settings import LoraSettings, TrainerSettings
from .fitting.soundness import require_finite, require_precision
from .fitting.trainer_arguments import common_arguments
from .fitting.value_trainer import resume
from .trees.targets import is_validation


@dataclass(frozen=True)
class SftConfig(TrainerSettings):
    """How to fine-tune the reference model. Defaults are table 4's.

    Attributes:
        data: JSON-lines files with `id`, `prompt` and `completion`, as `mavis prompts` writes them with completions.
        output: folder for the model, which `model:` of the other commands then names.
        model: base model, by Hub id or folder, or "smollm2".
        chat_template: as in collecting: "auto" puts a prompt as one user turn of the tokenizer's chat template, or as
            raw text if it has none; "none" always as raw text.
        max_length: tokens of prompt and completion together; longer examples are left out.
        lora: adapter settings; rank 0 trains all weights.
        merge: save the model with the adapter merged into it; false saves the adapter alone, which loads, too.
        stop_at_step: stop here and keep this step's weights, the learning rate decaying as if for all epochs.
        eval_steps: optimizer steps between validations; None for once an epoch.
        patience: stop after this many validations in a row without a smaller loss; the best weights are kept. None:
            no such stop, and the last weights are kept.
        gradient_checkpointing: less memory for more time.
        report_to: loggers, as in `transformers.TrainingArguments`.
    """

    data: list[str]
    output: str
    model: str = DEFAULT_MODEL
    chat_template: ChatTemplate = "auto"
    max_length: int = 1024
    lora: LoraSettings = field(default_factory=lambda: LoraSettings(rank=64, alpha=128, dropout=0.05))
    merge: bool = True
    learning_rate: float = field(default=1.4e-4, kw_only=True)
    weight_decay: float = field(default=0.01, kw_only=True)
    warmup_steps: int = field(default=0, kw_only=True)
    stop_at_step: int | None = None
    eval_steps: int | None = None
    patience: int | None = None
    validation_share: float = field(default=0.05, kw_only=True)
    gradient_checkpointing: bool = False
    report_to: str | list[str] = "none"

    def __post_init__(self) -> None:
        if not self.data:
            raise ValueError("data is empty: give files of prompts and completions, as `mavis prompts` writes them")
        for name in ("max_length", "batch_size", "gradient_accumulation", "stop_at_step", "eval_steps", "patience"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not 0 < self.validation_share < 1:
            raise ValueError(f"validation_share must be between 0 and 1, got {self.validation_share}")
        torch_dtype(self.dtype)


def sft(
    config: SftConfig, model: PreTrainedModel | None = None, tokenizer: PreTrainedTokenizerBase | None = None
) -> PreTrainedModel:
    """Fine-tune a model on completions, save it with `metrics.json` and `sft_config.json`, and return it.

    Only the completion and the token that ends it count in the loss. Killed at any instant, a rerun goes on from the
    last checkpoint; of other settings, data or weights it is refused, and what is finished is not done again.

    Args:
        config: how to train.
        model: the base model, if it is loaded already (then `tokenizer` too).
        tokenizer: its tokenizer.

    Raises:
        ValueError: rows without a completion, no example left to train on or to validate with, another training in
            `output`, weights of 16 bits to be trained as they are, or a training that diverges.
        OSError: a file that cannot be read.
    """
    rows = read_pairs(config.data)
    set_seed(config.seed)
    if model is None or tokenizer is None:
        model, tokenizer = load_chat_model(config.model, torch_dtype(config.dtype))
    training, validation, too_long = examples(rows, tokenizer, config)
    origin = _origin(config, model, [training, validation])
    trainer = SFTTrainer(
        model=model,
        args=training_arguments(config),
        train_dataset=Dataset.from_list(training),
        eval_dataset=Dataset.from_list(validation),
        processing_class=tokenizer,
        peft_config=lora_config(config.lora, model),
        callbacks=_callbacks(config),
    )
    record = Record(config.output, origin | {"processes": trainer.args.world_size})
    with trainer.args.main_process_first():
        finished = record.is_finished(trainer.args.should_save, config.fresh)
    if finished:
        return load_chat_model(config.output, torch_dtype(config.dtype))[0]
    if not config.lora.rank:
        require_precision(model, trainer.args)
    resume(trainer)
    metrics: dict[str, Any] = {
        "training_examples": len(training),
        "validation_examples": len(validation),
        "longer_than_max_length": too_long,
        "steps": trainer.state.global_step,
        "validation_loss": trainer.evaluate()["eval_loss"],
        "log": trainer.state.log_history,
    }
    require_finite({"validation_loss": metrics["validation_loss"]}, "validation")
    tuned = cast(PreTrainedModel, trainer.accelerator.unwrap_model(trainer.model)).eval()
    if trainer.is_world_process_zero():
        tuned = _save(tuned, tokenizer, config)
        write_json(Path(config.output) / "sft_config.json", asdict(config))
        write_json(Path(config.output) / "metrics.json", metrics)
        record.write(finished=True)
        clear_checkpoints(config.output)
    return tuned


def _origin(config: SftConfig, model: PreTrainedModel, data: list[Any]) -> dict[str, Any]:
    """Everything that shapes what is learned: settings, the weights at the start, the tokens of the examples."""
    aside = ("data", "output", "model", "device", "report_to", "fresh")
    settings = {name: value for name, value in asdict(config).items() if name not in aside}
    return settings | {"starting_weights": parameters_fingerprint(model), "data": digest(data)}


def read_pairs(files: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of all files, each with an `id`, a `prompt` and a `completion`.

    Raises:
        OSError: a file that cannot be read.
        ValueError: a row that is not as said.
    """
    rows = [row | {"file": file} for file in files for row in read_prompts(file)]
    for row in rows:
        completion = row.get("completion")
        if not isinstance(completion, str) or not completion.strip():
            raise ValueError(
                f"{row['file']}: the row {row['id']!r} has no completion; `mavis prompts --completions true` writes one"
            )
    return rows


def examples(
    rows: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, config: SftConfig
) -> tuple[list[dict[str, list[int]]], list[dict[str, list[int]]], int]:
    """Examples for training and for validation, and how many were longer than `max_length`.

    Raises:
        ValueError: one of the two is empty.
    """
    split: dict[bool, list[dict[str, list[int]]]] = {False: [], True: []}
    too_long = 0
    for row in rows:
        example = encode_pair(row, tokenizer, config.chat_template)
        if len(example["input_ids"]) > config.max_length:
            too_long += 1
        else:
            split[is_validation(row["prompt"], config.validation_share, config.seed)].append(example)
    if not split[False] or not split[True]:
        raise ValueError(
            f"of {len(rows)} examples, {too_long} have more than {config.max_length} tokens; {len(split[False])} are "
            f"left for training and {len(split[True])} for validation, and each needs one: give more data, a larger "
            "max_length or another validation_share"
        )
    return split[False], split[True], too_long


def encode_pair(
    row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, chat_template: ChatTemplate
) -> dict[str, list[int]]:
    """`input_ids` of a prompt and its completion, and `completion_mask`, 1 where the loss counts.

    The prompt's tokens are exactly those that `mavis collect` puts before its samples.
    """
    prompt = row.get("conversation") or row["prompt"]
    head = encode_prompt(prompt, tokenizer, chat_template)
    tail = None
    if tokenizer.chat_template is not None and chat_template != "none":
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        turns.append({"role": "assistant", "content": row["completion"]})
        whole = cast(Any, tokenizer.apply_chat_template(turns, return_dict=True))["input_ids"]
        if whole[: len(head)] == head:  # some templates write a past turn otherwise than one that is being written
            tail = whole[len(head) :]
    if tail is None:
        tail = cast(Any, tokenizer(row["completion"], add_special_tokens=False))["input_ids"]
    if tokenizer.eos_token_id not in tail:
        tail = [*tail, tokenizer.eos_token_id]
    return {"input_ids": head + tail, "completion_mask": [0] * len(head) + [1] * len(tail)}


def training_arguments(config: SftConfig) -> TrlConfig:
    """Arguments of `SFTTrainer`."""
    arguments = common_arguments(config) | {
        "max_length": None,  # too long ones are left out already
        "completion_only_loss": True,
        "save_total_limit": 2,
        "load_best_model_at_end": config.patience is not None,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": False,
        "report_to": config.report_to,
        "gradient_checkpointing": config.gradient_checkpointing,
    }
    if config.eval_steps is not None:
        arguments |= {"eval_strategy": "steps", "save_strategy": "steps"}
        arguments |= {"eval_steps": config.eval_steps, "save_steps": config.eval_steps}
    return TrlConfig(**arguments)


class StopAtStep(TrainerCallback):
    """Ends training after a number of optimizer steps, leaving the schedule of the learning rate as it is."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Stop at the step."""
        control.should_training_stop = control.should_training_stop or state.global_step >= self.step
        return control


def _callbacks(config: SftConfig) -> list[TrainerCallback]:
    stop = [] if config.stop_at_step is None else [StopAtStep(config.stop_at_step)]
    early = [] if config.patience is None else [EarlyStoppingCallback(config.patience)]
    return [*stop, *early]


def _save(tuned: Any, tokenizer: PreTrainedTokenizerBase, config: SftConfig) -> PreTrainedModel:
    """Write the model, merged if asked for, and its tokenizer; returns what was written."""
    if config.lora.rank and config.merge:
        try:
            tuned = folded(tuned, Backbone.of(tuned).vocabulary)
        except ValueError as error:  # after the training: nothing may be lost
            tqdm.write(f"{config.output}: saved as an adapter, since {error}")
    tuned.save_pretrained(config.output)
    tokenizer.save_pretrained(config.output)
    return cast(PreTrainedModel, tuned)
