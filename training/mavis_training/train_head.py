"""Train a value head: equation 6 on the frozen base model's hidden states, every position of every tree a sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel, set_seed

from mavis_logits.backbone.fingerprint import Identity, parameters_fingerprint
from mavis_logits.models import load_chat_model
from mavis_logits.values.value_head import ValueHead
from mavis_logits.values.value_policy import SETTINGS, ValuePolicy

from .base.files import write_json
from .base.kept import model_origin
from .base.ranks import join
from .base.record import Record
from .base.settings import torch_dtype
from .fitting.foreseen import log_prob_weight_of, reference_of, steering_by_reference
from .fitting.head_config import TrainHeadConfig as TrainHeadConfig
from .fitting.head_fitting import bootstrapped, fit, gather, sample_loss, steps_of
from .fitting.metrics import Prediction, validation_metrics
from .fitting.paths import fit_paths, ordered_right, paths_of
from .fitting.policies import (
    answers_of,
    fit_rewarded,
    fit_taught,
    gather_taught,
    head_ratios,
    mean_taught_loss,
    ratio_metrics,
)
from .fitting.soundness import fitting_warmup, require_finite
from .fitting.states import (
    compute_actions,
    compute_states,
    compute_taught,
    read_actions,
    read_states,
    read_taught,
)
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
from .trees.packing import pack
from .trees.targets import kept_nodes
from .trees.tree_store import TreeStore

T = TypeVar("T")


def train_head(config: TrainHeadConfig, model: PreTrainedModel | None = None) -> ValueHead:
    """Train a value head, save it with `metrics.json` and `train_config.json`, and return it.

    The prefill pass over the trees is resumable, and shared by several processes; the training itself takes minutes,
    and rank 0 does it alone. A head that is finished under the same settings is not trained again; one of other
    settings is replaced.

    Args:
        config: how to train.
        model: the loaded base model, in place of the one that `config.model` names.

    Raises:
        ValueError: no rewards for an objective, no training or validation trees, states of another model or of other
            trees, an initial head of another base model or other objectives, or a training that diverges.
        OSError: no store there, or a corrupt file.
    """
    set_seed(config.seed)
    sample = config.trees, config.answers
    stores, trees = load_trees(config.store, config.objectives, config.zeta, config.penalty, *sample)
    training, validation = split_by_prompt(trees, config.validation_share)
    if model is None:
        model = load_chat_model(config.model, torch_dtype(config.dtype))[0]
    ranks = join(config.device)
    model.to(ranks.device).eval()  # type: ignore[arg-type]
    units = reward_units(training)
    head = _head_to_train(config, model, stores, units)
    sources = {name: config.teachers[name] for name in config.objectives if config.teachers}
    teachers = {name: ValuePolicy.from_pretrained(source, model) for name, source in sources.items()}
    for store in stores:  # before anything is written
        store.require_base(model)
    record = Record(config.output, training_origin(config, head, model, stores))
    if ranks.agree(lambda: record.is_finished(ranks.is_main, config.fresh, replaces=True)):
        return ValueHead.from_pretrained(config.output).to(model.device).bind(model).float().eval()  # type: ignore[arg-type]

    stored = list(zip(stores, config.states_folders(), strict=True))
    for store, folder in stored:
        compute_states(store, model, folder, head.config.layer)
        if config.rule != "positions":
            compute_actions(store, model, folder, config.actions, config.seed)
        if teachers:
            compute_taught(store, model, teachers, folder, config.tokens)
    if not ranks.is_main:  # the rest is minutes of work for one process: the others wait for its head
        ranks.wait()
        return ValueHead.from_pretrained(config.output)
    states = [read_states(store, folder) for store, folder in stored]
    of_tree = _of_trees(trees, states)
    if teachers:
        said_of = _of_trees(trees, [read_taught(store, folder) for store, folder in stored])
        etas = np.array([(policy.config.eta or 1.0) / policy.config.strength for policy in teachers.values()])
        metrics = teach_head(head, training, validation, of_tree, said_of, (etas, units[1]), config)
    else:
        drawn_at = None
        if config.rule != "positions":
            drawn_at = _of_trees(trees, [read_actions(store, folder) for store, folder in stored])
        metrics = fit_head(head, training, validation, of_tree, config, drawn_at)
    references = [[reference_of(store)] * len(own) for store, own in zip(stores, states, strict=True)]
    of_reference = _of_trees(trees, references)
    foreseen = steering_by_reference(head, model, validation, of_tree, of_reference, config.seed)
    if config.sharpen:
        head.config.log_prob_weight = log_prob_weight_of(foreseen, config.objectives)
    for number, ((temperature, top_p), found) in enumerate(foreseen.items()):
        metrics[f"steering at temperature {temperature:g}, top-p {top_p:g}" if number else "steering"] = found
    recipe = head.config.recipe
    recipe["warmup_steps"] = metrics.pop("warmup_steps")
    output = Path(config.output)
    head.save_pretrained(output)
    write_json(output / "train_config.json", recipe)
    write_json(output / "metrics.json", metrics)
    record.write(finished=True)
    ranks.wait()
    return head


def _head_to_train(
    config: TrainHeadConfig,
    model: PreTrainedModel,
    stores: Sequence[TreeStore],
    units: tuple[NDArray[np.float64], NDArray[np.float64]],
) -> ValueHead:
    """A head that knows where it comes from; `units` as for `starting_head`."""
    nats = np.zeros(len(config.objectives)), np.ones(len(config.objectives))  # what policies say is in nats
    head = starting_head(config, model, nats if config.teachers else units)
    of_head = {name: getattr(head.config, name) for name in ("layer", "width", "num_layers", "rank")}
    head.config.recipe, head.config.iteration = recipe_of(asdict(config) | of_head, stores), config.iteration
    if config.teachers:
        head.config.settings = dict(SETTINGS)  # as its teachers recommend; mavis calibrate finds the strength
    last = stores[-1].metadata
    head.config.tokenizer_fingerprint = last.tokenizer_fingerprint
    head.config.base_model, head.config.base_revision = last.model, last.revision
    return head


def _of_trees(trees: Sequence[LabelledTree], by_store: Sequence[Sequence[T]]) -> dict[int, T]:
    """What there is of every tree, store by store, by the tree's `id`: prompts recur between stores."""
    return dict(zip(map(id, trees), chain.from_iterable(by_store), strict=True))


def fit_head(
    head: ValueHead,
    training: Sequence[LabelledTree],
    validation: Sequence[LabelledTree],
    of_tree: Mapping[int, Tensor],
    config: TrainHeadConfig,
    drawn_at: Mapping[int, Tensor] | None = None,
) -> dict[str, Any]:
    """Fit `head` to the training trees, position by position and then by a rule; its metrics on the others, the warmup
    steps that were taken and, of a rule, `ordered_right` before and after.

    Args:
        head: trained in place.
        training, validation: trees.
        of_tree: hidden states `[P + N, d]` of each tree, by its `id`.
        config: how to train.
        drawn_at: actions of the reference `[P + N, J]` of each tree, by its `id`, for a rule on whole completions.
    """
    everything = [np.ones(len(item.tree), dtype=bool) for item in validation]
    kept = [kept_nodes(item.tree, config.drop_leaves, config.seed) for item in training]
    to_train = gather([(item, k, of_tree[id(item)]) for item, k in zip(training, kept, strict=True)])
    held_out = gather([(item, k, of_tree[id(item)]) for item, k in zip(validation, everything, strict=True)])
    if config.bootstrap:
        to_train = bootstrapped(head, to_train, held_out, config)
    history = fit(head, to_train, held_out, config, sample_loss, "head")
    by_rule: dict[str, Any] = {}
    if config.rule != "positions":
        assert drawn_at is not None
        by_rule = fit_by_rule(head, training, validation, of_tree, drawn_at, config)
    metrics = validation_metrics([predict(head, item, of_tree[id(item)]) for item in validation], config.objectives)
    require_finite(metrics, "validation")
    warmup = fitting_warmup(config.warmup_steps, steps_of(config, len(to_train), config.batch_size))
    return metrics | {
        "training_trees": len(training), "validation_loss_by_epoch": history, "warmup_steps": warmup, **by_rule
    }  # fmt: skip


def teach_head(
    head: ValueHead,
    training: Sequence[LabelledTree],
    validation: Sequence[LabelledTree],
    of_tree: Mapping[int, Tensor],
    said_of: Mapping[int, Mapping[str, Tensor]],
    units: tuple[NDArray[np.float64], NDArray[np.float64]],
    config: TrainHeadConfig,
) -> dict[str, Any]:
    """Fit `head` to what policies make likelier in the training trees, and to the trees' rewards if it is to; its
    metrics on the others (`ratio_metrics`), the warmup steps that were taken, and the share of the teachers' KL
    divergence from the reference that it explains.

    Args:
        head, training, validation, of_tree, config: as for `fit_head`.
        said_of: `said_by_policies` of each tree, by its `id`.
        units: etas of the policies, for rewards in standard deviations, and these deviations, `[M]` each.
    """
    etas, deviations = units
    standard = [LabelledTree(i.tree, i.rewards / deviations, i.targets / deviations) for i in validation]
    to_train, held_out = (
        gather_taught([(item.tree, of_tree[id(item)], said_of[id(item)]) for item in part])
        for part in (training, validation)
    )
    if config.reward_share:
        answers = answers_of(to_train, training, deviations), answers_of(held_out, validation, deviations)
        both = list(zip((to_train, held_out), answers, strict=True))
        history, steps = fit_rewarded(head, both, torch.from_numpy(etas), config)
    else:
        history = fit_taught(head, to_train, held_out, config)
        steps = steps_of(config, len(to_train), config.batch_size)
    ratios = [etas * head_ratios(head, item.tree, of_tree[id(item)], said_of[id(item)]) for item in validation]
    metrics = ratio_metrics(standard, ratios, config.objectives)
    require_finite(metrics, "validation")
    nothing = mean_taught_loss(None, held_out, config.batch_size)
    missed = mean_taught_loss(head, held_out, config.batch_size)
    return metrics | {
        "training_trees": len(training), "validation_loss_by_epoch": history,
        "explained": 1 - missed / nothing if nothing > 0 else 0.0,
        "warmup_steps": fitting_warmup(config.warmup_steps, steps),
    }  # fmt: skip


def fit_by_rule(
    head: ValueHead,
    training: Sequence[LabelledTree],
    validation: Sequence[LabelledTree],
    of_tree: Mapping[int, Tensor],
    drawn_at: Mapping[int, Tensor],
    config: TrainHeadConfig,
) -> dict[str, Any]:
    """Go on from a head that was fitted position by position, by `config.rule` on whole completions.

    Args:
        head, training, validation, of_tree, drawn_at, config: as for `fit_head`.

    Returns:
        `rule_loss_by_epoch` on the validation trees and, by objective, `ordered_right` before and after.
    """
    seen, unseen = (
        [paths_of(item, of_tree[id(item)], drawn_at[id(item)]) for item in part] for part in (training, validation)
    )
    before = ordered_right(head, unseen)
    losses = fit_paths(head, seen, unseen, config)
    after = ordered_right(head, unseen)
    found = {name: {"before": before[name], "after": after[name]} for name in config.objectives}
    return {"rule_loss_by_epoch": losses, "ordered_right": found}


def training_origin(
    config: TrainHeadConfig, head: ValueHead, model: PreTrainedModel, stores: Sequence[TreeStore]
) -> dict[str, Any]:
    """Everything that shapes what is learned: settings, base model, the head at the start, trees with rewards."""
    settings = settings_origin(asdict(config))
    if config.rule == "positions":  # later settings: heads that were trained without them are known again
        settings = {name: value for name, value in settings.items() if name not in ("rule", "anchor", "actions")}
    for name in ("rank", "trees", "answers"):
        if settings[name] is None:
            settings.pop(name)
    for name in ("reward_share", "sharpen"):
        if not settings[name]:
            settings.pop(name)
    if not config.teachers:
        settings.pop("tokens")
    else:
        settings["teachers"] = {name: model_origin(source) for name, source in config.teachers.items()}
    return settings | {
        "base": Identity(model).fingerprint,
        "starting_weights": parameters_fingerprint(head),
        "initial": config.initial and model_origin(config.initial),
        "data": data_origin(stores, config.objectives),
    }


def starting_head(
    config: TrainHeadConfig, model: PreTrainedModel, units: tuple[NDArray[np.float64], NDArray[np.float64]]
) -> ValueHead:
    """A new head for `model`, or the one that `config.initial` names, in the reward units of the training trees.

    Args:
        config: how to train.
        model: the base model.
        units: mean and standard deviation of the targets, `[M]` each.

    Raises:
        ValueError: the head to go on from has other objectives or belongs to another base model.
        OSError: there is none.
    """
    if config.initial is None:
        shape = config.width, config.num_layers, config.dropout
        head = ValueHead.for_model(model, config.objectives, *shape, layer=config.layer_of(model), rank=config.rank)
        head.config.reward_mean, head.config.reward_scale = (values.tolist() for values in units)
        return head.float()
    head = ValueHead.from_pretrained(config.initial).to(model.device).bind(model).float()  # type: ignore[arg-type]
    if head.config.objectives != config.objectives:
        raise ValueError(
            f"initial {config.initial} predicts {head.config.objectives}, this run is for {config.objectives}: name "
            "the same objectives in the same order, or train a new head."
        )
    head.config.dropout = head.dropout.p = config.dropout
    set_reward_units(head, *units)
    return head


@torch.inference_mode()
def predict(head: ValueHead, item: LabelledTree, states: Tensor) -> Prediction:
    """What the head says of every token of a held-out tree, given the state before it."""
    layout = pack(item.tree)
    hidden = states[layout.previous].to(head.device).float()
    tokens = torch.from_numpy(layout.input_ids[layout.new]).to(head.device)
    values = head(hidden, tokens[:, None])[:, 0].double().cpu().numpy()
    return Prediction(item, values, prompt_value=None)
