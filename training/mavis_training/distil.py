"""Distil several value functions into one value model with an output for each objective (appendix E).

The student regresses what its teachers say after every completion token of stored trees. A tree is one sequence, for
teachers and student alike, so that shared prefixes are computed once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel, set_seed

from mavis_logits.backbone.fingerprint import tokenizer_fingerprint
from mavis_logits.core.objectives import log_prob_weight_of
from mavis_logits.models import DEFAULT_MODEL, load_chat_model
from mavis_logits.values.value_model import ValueModel

from .base.files import write_json
from .base.kept import model_origin
from .base.record import Record, clear_checkpoints
from .base.settings import torch_dtype
from .fitting.batches import TrainingSet
from .fitting.metrics import Prediction, correlation, r_squared, sibling_pairs, validation_metrics
from .fitting.model_config import TrainModelConfig
from .fitting.settings import ValueTrainerSettings
from .fitting.teachers import Teacher, check_tokenizer, load_teachers, teacher_values
from .fitting.trainer_arguments import training_arguments
from .fitting.value_trainer import Validation, ValueTrainer, resume
from .train_model import finished_model, save_trained, starting_model, training_origin
from .trees.data import LabelledTree, is_held_out, open_stores, recipe_of, set_reward_units, split_by_prompt
from .trees.packing import Example, pack, require_packable
from .trees.targets import node_targets
from .trees.tree import Tree
from .trees.tree_store import TreeStore


@dataclass(frozen=True)
class DistilConfig(ValueTrainerSettings):
    """How to distil value functions into one.

    Attributes:
        store: folder of a tree store, or several; trees need no rewards, but with them the student is measured against
            these too.
        teachers: by objective, folder or Hub id of a value model or value head; of any size and iteration.
        output: folder for the student, its measurements and its checkpoints.
        model: base model that value heads read and that adapters sit on; null if no teacher needs one.
        keep_values: keep what the teachers say in the stores' folders, for the next run; False computes it again.
        initial: folder or Hub id of a value model of the same objectives to go on from; null for a new one.
    """

    store: str | list[str]
    teachers: dict[str, str]
    output: str
    model: str | None = DEFAULT_MODEL
    keep_values: bool = True
    initial: str | None = None
    epochs: float = field(default=3.0, kw_only=True)
    batch_size: int = field(default=4, kw_only=True)
    learning_rate: float = field(default=1e-3, kw_only=True)
    warmup_steps: int = field(default=10, kw_only=True)

    def __post_init__(self) -> None:
        if not self.teachers:
            raise ValueError("teachers is empty: name at least one value function, by objective.")
        if not self.store:
            raise ValueError("store is empty: name at least one folder that `mavis collect` wrote.")
        self.training()  # checks what it shares

    def training(self) -> TrainModelConfig:
        """The same settings for what training a value model and distilling one have in common."""
        common = {f.name for f in fields(TrainModelConfig)} & {f.name for f in fields(self)}
        return TrainModelConfig(objectives=list(self.teachers), **{name: getattr(self, name) for name in common})


@dataclass
class TaughtTree(LabelledTree):
    """A tree whose truth is the teachers': `targets` `[n, M]` at the nodes' ends, `rewards` `[leaves, M]` at the
    leaves', and `values` `[N, M]` after every new token, in packed order. All in reward units."""

    values: NDArray[np.float32]


def distil(
    config: DistilConfig, model: PreTrainedModel | None = None, backbone: PreTrainedModel | None = None
) -> ValueModel:
    """Train the student, save it, and return it.

    Beside it lie `train_config.json`, `agreement.json` (with its teachers, on held-out trees) and, if the trees have
    the rewards, `metrics.json` (against these, as of every value function).

    Killed at any instant, a rerun with the same settings goes on: the teachers' values from the last shard, training
    from the last epoch. Of the epochs, the one with the smallest validation loss is kept.

    Args:
        config: how to distil.
        model: the loaded base model of the teachers, in place of the one that `config.model` names.
        backbone: a loaded decoder for the student, in place of the one that `config.backbone` names.

    Raises:
        ValueError: teachers, student and trees of different tokenizers, a teacher without its objective or with values
            that are NaN, no training or validation trees, a student that cannot read packed trees, another training in
            `output`, or one that diverges.
        OSError: no store or teacher there, or a corrupt file.
    """
    set_seed(config.seed)
    objectives = list(config.teachers)
    stores = open_stores(config.store, alike=["tokenizer_fingerprint"])  # of any policies and base models
    bare = [LabelledTree(tree, np.empty((0, 0)), np.empty((0, 0))) for store in stores for tree in store]
    split_by_prompt(bare, config.validation_share)  # an empty side is told before the teachers are asked
    arguments = training_arguments(config.training())
    teachers, student = _teachers_and_student(config, stores, arguments.device, model, backbone)
    origin = training_origin(config.training(), student, stores, arguments)
    origin["teachers"] = {name: model_origin(source) for name, source in config.teachers.items()}
    record = Record(config.output, origin)
    with arguments.main_process_first():
        finished = record.is_finished(arguments.should_save, config.fresh)
    if finished:
        return finished_model(config.training(), backbone)
    recipe = recipe_of(asdict(config), stores) | {"teacher_iterations": _iterations(config, teachers)}
    with arguments.main_process_first():  # the others read what it kept
        trees = taught_trees(stores, teachers, objectives, config.keep_values)
    del teachers  # their memory is the student's now
    training, validation = split_by_prompt(trees, config.validation_share)
    trainer = ValueTrainer(
        student, arguments, TaughtSet(training), TaughtValidation(validation), tokens_per_batch=config.tokens_per_batch
    )
    resume(trainer)
    recipe["warmup_steps"] = trainer.args.warmup_steps  # as many as were taken
    trained = save_trained(trainer, config.training(), stores, backbone)
    trained.config.recipe, trained.config.iteration = recipe, max(recipe["teacher_iterations"].values())
    if trainer.is_world_process_zero():
        output = Path(config.output)
        trained.config.save_pretrained(output)
        write_json(output / "train_config.json", recipe)
        _measure(trained, stores, validation, config, {"training_trees": len(training)})
        record.write(finished=True)
        clear_checkpoints(output)  # done: the folder is ready to be published
    trainer.accelerator.wait_for_everyone()
    return trained


def taught_trees(
    stores: Sequence[TreeStore], teachers: Sequence[Teacher], objectives: Sequence[str], keep: bool
) -> list[TaughtTree]:
    """All trees with what the teachers say of them, store by store and shard by shard."""
    by_objective: dict[str, list[NDArray[np.float32]]] = {}
    for teacher in teachers:
        values = [v for store in stores for v in teacher_values(store, teacher, keep)]
        by_objective |= {name: [v[:, output] for v in values] for name, output in teacher.outputs.items()}
    columns = (by_objective[name] for name in objectives)
    trees = (tree for store in stores for tree in store)
    return [_taught(tree, np.stack(said, axis=1)) for tree, *said in zip(trees, *columns, strict=True)]


def _taught(tree: Tree, values: NDArray[np.float32]) -> TaughtTree:
    at_ends = values[tree.offsets() + tree.length - 1].astype(np.float64)
    return TaughtTree(tree, at_ends[tree.leaves()], at_ends, values)


class TaughtSet(TrainingSet):
    """Training sequences of taught trees: every new token has a target, the prompt's have none."""

    def __init__(self, trees: Sequence[TaughtTree]) -> None:
        super().__init__(trees, [np.ones(len(item.tree), dtype=bool) for item in trees], every_token=True)
        self.taught = list(trees)

    def __getitem__(self, index: int) -> Example:
        item = self.taught[index]
        layout = pack(item.tree)
        return Example(layout.input_ids, layout.position_ids, layout.visible(), layout.new, item.values)


class TaughtValidation(Validation):
    """Held-out taught trees, whose loss is over every new token, too."""

    def __init__(self, trees: Sequence[TaughtTree]) -> None:
        super().__init__(trees, [np.ones(len(item.tree), dtype=bool) for item in trees], every_token=True)
        self.taught = list(trees)

    def loss(self, values: Sequence[NDArray[np.float64]], scale: NDArray[np.float64]) -> float:
        """Mean squared difference from the teachers, in standardised units; `values` per tree `[T, M]`."""
        pairs = zip(self.taught, values, strict=True)
        return float(np.concatenate([((said[-len(t.values) :] - t.values) / scale) ** 2 for t, said in pairs]).mean())


def _measure(
    student: ValueModel,
    stores: Sequence[TreeStore],
    validation: Sequence[TaughtTree],
    config: DistilConfig,
    counts: dict[str, int],
) -> None:
    """Write `agreement.json` and, where every tree has the rewards, `metrics.json`; both record `counts`."""
    objectives, output = list(config.teachers), Path(config.output)
    asked = Teacher("the student", student, {name: i for i, name in enumerate(objectives)})
    said = [asked.values(item.tree).astype(np.float64) for item in validation]
    agreed = agreement(said, validation, objectives)
    write_json(output / "agreement.json", {"trees": len(validation)} | counts | agreed)
    if all(set(objectives) <= set(store.objectives()) for store in stores):
        rows = (row for store in stores for row in store.labelled(objectives))
        held_out = [(tree, r) for tree, r in rows if is_held_out(tree, config.validation_share)]
        true = [LabelledTree(tree, rewards, node_targets(tree, rewards)) for tree, rewards in held_out]
        judged = [Prediction(item, values, None) for item, values in zip(true, said, strict=True)]
        write_json(output / "metrics.json", validation_metrics(judged, objectives) | counts)


def agreement(
    values: Sequence[NDArray[np.float64]], taught: Sequence[TaughtTree], objectives: Sequence[str]
) -> dict[str, dict[str, float]]:
    """How well a student says what its teachers say.

    Args:
        values: the student's, per tree `[N, M]` in packed order.
        taught: the trees, with the teachers' values.
        objectives: names of the M outputs.

    Returns:
        By objective: `r2` and `correlation` over all completion tokens; `ranking`, the share of pairs of candidates of
        one step (first tokens of siblings) that both put in the same order, which is what steering uses, and
        `step_correlation` of the pairs' differences, with the number of `pairs`.
    """
    said = np.concatenate(values)
    truth = np.concatenate([item.values for item in taught]).astype(np.float64)
    offsets = np.cumsum([0, *(len(item.values) for item in taught[:-1])])
    trees = [item.tree for item in taught]
    pairs = np.concatenate([at + t.offsets()[sibling_pairs(t)] for at, t in zip(offsets, trees, strict=True)])
    student, teacher = (v[pairs[:, 0]] - v[pairs[:, 1]] for v in (said, truth))
    return {
        name: {
            "r2": r_squared(said[:, m], truth[:, m]),
            "correlation": correlation(said[:, m], truth[:, m]),
            "ranking": float((np.sign(student[:, m]) == np.sign(teacher[:, m])).mean()) if len(pairs) else 0.5,
            "step_correlation": correlation(student[:, m], teacher[:, m]),
            "pairs": len(pairs),
        }
        for m, name in enumerate(objectives)
    }


def _teachers_and_student(
    config: DistilConfig,
    stores: Sequence[TreeStore],
    device: torch.device,
    base: PreTrainedModel | None,
    backbone: PreTrainedModel | None,
) -> tuple[list[Teacher], ValueModel]:
    """Load the teachers and make the student, in the teachers' reward units, all of the stores' tokenizer."""
    if base is None and config.model is not None:
        base = _load(config.model, config.dtype, stores[0])
    if base is not None:
        base.to(device).eval()  # type: ignore[arg-type]
    teachers = load_teachers(config.teachers, base, torch_dtype(config.dtype), device)
    for teacher in teachers:
        for store in stores:
            check_tokenizer(teacher, store)
    if backbone is None and config.initial is None:
        backbone = base if config.backbone == config.model else _load(config.backbone, config.dtype, stores[0])
    student = starting_model(config.training(), stores, backbone)
    require_packable(student.backbone, "choose a student with ordinary attention")
    teacher_of = {name: teacher for teacher in teachers for name in teacher.outputs}
    units = [teacher_of[name].units(name) for name in config.teachers]
    set_reward_units(student, [mean for mean, _ in units], [scale for _, scale in units])
    columns = ((teacher_of[name].function.config, teacher_of[name].outputs[name]) for name in config.teachers)
    student.config.log_prob_weight = log_prob_weight_of(columns)
    return teachers, student


def _iterations(config: DistilConfig, teachers: Sequence[Teacher]) -> dict[str, int]:
    """By objective, the iteration of its teacher."""
    found = {name: teacher.function.config.iteration for teacher in teachers for name in teacher.outputs}
    return {name: found[name] for name in config.teachers}


def _load(name: str, dtype: str, store: TreeStore) -> PreTrainedModel:
    """A language model whose tokens are those of the trees."""
    model, tokenizer = load_chat_model(name, torch_dtype(dtype))
    found, expected = tokenizer_fingerprint(tokenizer), store.metadata.tokenizer_fingerprint
    if found != expected:
        raise ValueError(
            f"{name} has another tokenizer ({found}) than the trees in {store.folder} ({expected}, of "
            f"{store.metadata.model}): teachers, student and trees must share one tokenizer."
        )
    return model
