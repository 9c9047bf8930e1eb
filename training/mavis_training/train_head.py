"""Train a value head: equation 6 on the frozen base model's hidden states, every position of every tree a sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel, set_seed

from mavis_logits.backbone import Backbone, UnsupportedModel
from mavis_logits.demo.smollm2 import load_chat_model
from mavis_logits.fingerprint import Identity, parameters_fingerprint
from mavis_logits.value_head import ValueHead, ValueHeadConfig

from .data import (
    LabelledTree,
    data_origin,
    load_trees,
    recipe_of,
    reward_units,
    set_reward_units,
    settings_origin,
    split_by_prompt,
)
from .efficiency import sample_actions, steering_efficiency, steering_parts
from .files import write_json
from .head_fitting import bootstrapped, fit, gather, sample_loss, steps_of
from .kept import model_origin
from .metrics import Prediction, validation_metrics
from .packing import pack
from .ranks import join
from .settings import torch_dtype
from .soundness import fitting_warmup, require_finite
from .states import compute_states, read_states, tree_states
from .targets import Penalty, kept_nodes
from .training_record import Record
from .tree_store import TreeStore

_STEERING_TREES = 64  # of the validation trees, on which steering is foreseen
_ACTIONS = 8  # drawn from the reference at each of their states


@dataclass(frozen=True)
class TrainHeadConfig:
    """How to train a value head. Dropout, bootstrap and weight decay are by default what steers best in docs/results.

    Attributes:
        store: folder of the labelled tree store, or several, which are trained on together.
        objectives: rewards to predict, one output each.
        output: folder for the head and its metrics.
        model: Hub id or folder of the base model, or "smollm2".
        states: folder of hidden states, computed if missing, or one for each store; None for `<output>/states`.
        initial: folder or Hub id of a head to go on from (Algorithm 1: that of the iteration before); its base model
            and objectives must be the same. None for a new head.
        layer: of the base model, whose states a new head reads: after how many of its layers; "third": after a third of
            them, by the study in docs/results, and at a third of the prefill pass; "output": what enters the
            output embedding.
        width: of a new head.
        num_layers: residual layers of a new head.
        dropout: while training.
        bootstrap: share of a position's target that is the value of the state after its token, said by a small network
            of states alone which is trained first, in place of the completions' rewards; 0 is equation 6 alone.
        zeta: KL penalty multiplier of equation 6.
        penalty: "completion": zeta penalises all of a completion, as in equation 6; "continuation": what follows the
            sequence only, as in Theorem 1.
        drop_leaves: share of the leaves left out (balancing).
        epochs: passes over the training positions, at most.
        patience: epochs without a smaller validation loss after which training stops; the best epoch is kept.
        batch_size: positions per step.
        learning_rate: of AdamW, at its peak; decays to 0 along a cosine.
        weight_decay: of AdamW.
        warmup_steps: of the learning rate; a tenth of the run where these are more than half of it.
        validation_share: of the prompts, held out.
        seed: of initialisation, order, dropout and balancing.
        dtype: of the base model in the prefill pass.
        device: of the prefill pass and the training; None for a GPU if there is one.
        iteration: of Algorithm 1, recorded with the head.
        fresh: train anew also what is finished.
    """

    store: str | list[str]
    objectives: list[str]
    output: str
    model: str = "smollm2"
    states: str | list[str] | None = None
    initial: str | None = None
    layer: int | Literal["third", "output"] = "third"
    width: int = 512
    num_layers: int = 1
    dropout: float = 0.5
    bootstrap: float = 0.5
    zeta: float = 0.0
    penalty: Penalty = "completion"
    drop_leaves: float = 0.5
    epochs: int = 6
    patience: int = 2
    batch_size: int = 512
    learning_rate: float = 1e-3
    weight_decay: float = 1.0
    warmup_steps: int = 100
    validation_share: float = 0.1
    seed: int = 0
    dtype: str = "float32"
    device: str | None = None
    iteration: int = 0
    fresh: bool = False

    def __post_init__(self) -> None:
        if not self.objectives:
            raise ValueError("objectives is empty: name at least one that the store has been labelled for.")
        for name in ("width", "num_layers", "epochs", "patience", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.layer not in ("third", "output") and not (isinstance(self.layer, int) and self.layer >= 1):
            raise ValueError(f"layer must be a number from 1 on, 'third' or 'output', got {self.layer!r}.")
        if not 0 <= self.bootstrap <= 1:
            raise ValueError(f"bootstrap must be from 0 to 1, got {self.bootstrap}.")
        if self.states is not None and len(_listed(self.states)) != len(_listed(self.store)):
            raise ValueError(
                f"states names {len(_listed(self.states))} folders for {len(_listed(self.store))} stores: give one "
                "for each store, in the same order, or none."
            )

    def layer_of(self, model: PreTrainedModel) -> int | None:
        """`ValueHeadConfig.layer` of the head that is trained, for `model`."""
        if self.initial is not None:
            return ValueHeadConfig.from_pretrained(self.initial).layer  # type: ignore[no-any-return]
        if self.layer == "third":
            try:
                return max(1, round(len(Backbone.of(model).layers) / 3))
            except UnsupportedModel:
                return None  # what enters the output embedding is there in every model
        return None if self.layer == "output" else self.layer

    def states_folders(self) -> list[Path]:
        """Where each store's hidden states lie."""
        if self.states is not None:
            return [Path(folder) for folder in _listed(self.states)]
        folder, count = Path(self.output) / "states", len(_listed(self.store))
        return [folder] if count == 1 else [folder / str(i) for i in range(count)]


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
    stores, trees = load_trees(config.store, config.objectives, config.zeta, config.penalty)
    training, validation = split_by_prompt(trees, config.validation_share)
    if model is None:
        model = load_chat_model(config.model, torch_dtype(config.dtype))[0]
    ranks = join(config.device)
    model.to(ranks.device).eval()  # type: ignore[arg-type]
    head = starting_head(config, model, reward_units(training))
    of_head = {name: getattr(head.config, name) for name in ("layer", "width", "num_layers")}
    recipe = recipe_of(asdict(config) | of_head, stores)
    head.config.recipe, head.config.iteration = recipe, config.iteration
    head.config.tokenizer_fingerprint = stores[-1].metadata.tokenizer_fingerprint
    head.config.base_model, head.config.base_revision = stores[-1].metadata.model, stores[-1].metadata.revision

    for store in stores:  # before anything is written
        store.require_base(model)
    origin = training_origin(config, head, model, stores)
    record = Record(config.output, origin)
    if ranks.agree(lambda: record.is_finished(ranks.is_main, config.fresh, replaces=True)):
        return ValueHead.from_pretrained(config.output).to(model.device).bind(model).float().eval()  # type: ignore[arg-type]

    folders = config.states_folders()
    for store, folder in zip(stores, folders, strict=True):
        compute_states(store, model, folder, head.config.layer)
    if not ranks.is_main:  # the rest is minutes of work for one process: the others wait for its head
        ranks.wait()
        return ValueHead.from_pretrained(config.output)
    states = [tensor for store, folder in zip(stores, folders, strict=True) for tensor in read_states(store, folder)]
    of_tree = {id(item): tensor for item, tensor in zip(trees, states, strict=True)}  # prompts recur between stores

    everything = [np.ones(len(item.tree), dtype=bool) for item in validation]
    kept = [kept_nodes(item.tree, config.drop_leaves, config.seed) for item in training]
    to_train = gather([(item, k, of_tree[id(item)]) for item, k in zip(training, kept, strict=True)])
    held_out = gather([(item, k, of_tree[id(item)]) for item, k in zip(validation, everything, strict=True)])
    if config.bootstrap:
        to_train = bootstrapped(head, to_train, held_out, config)
    history = fit(head, to_train, held_out, config, sample_loss, "head")
    metrics = validation_metrics([predict(head, item, of_tree[id(item)]) for item in validation], config.objectives)
    require_finite(metrics, "validation")
    metrics |= {"training_trees": len(training), "validation_loss_by_epoch": history}
    if all(_is_reference(store) for store in stores):
        metrics["steering"] = steering(head, model, [(item, of_tree[id(item)]) for item in validation], config.seed)
    recipe["warmup_steps"] = fitting_warmup(config.warmup_steps, steps_of(config, to_train))
    output = Path(config.output)
    head.save_pretrained(output)
    write_json(output / "train_config.json", recipe)
    write_json(output / "metrics.json", metrics)
    record.write(finished=True)
    ranks.wait()
    return head


def training_origin(
    config: TrainHeadConfig, head: ValueHead, model: PreTrainedModel, stores: Sequence[TreeStore]
) -> dict[str, Any]:
    """Everything that shapes what is learned: settings, base model, the head at the start, trees with rewards."""
    return settings_origin(asdict(config)) | {
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
        head = ValueHead.for_model(model, config.objectives, *shape, layer=config.layer_of(model))
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


def steering(
    head: ValueHead, model: PreTrainedModel, trees: Sequence[tuple[LabelledTree, Tensor]], seed: int
) -> dict[str, dict[str, float]]:
    """`steering_efficiency` of a head on up to 64 trees, each with the states `[P + N, d]` that it reads; empty if none
    has the two branches at its prompt which that takes."""
    branching = [(item, states) for item, states in trees if (item.tree.parent == -1).sum() > 1][:_STEERING_TREES]
    embedding = Backbone.of(model).output_embedding
    generator = torch.Generator(embedding.device).manual_seed(seed)
    parts = []
    for item, states in branching:
        final = states if head.config.layer is None else tree_states(model, pack(item.tree))
        parts.append(steering_parts(head, item, states, sample_actions(embedding, final, _ACTIONS, generator)))
    return steering_efficiency(parts, [item.rewards for item, _ in branching], head.config.objectives) if parts else {}


def _is_reference(store: TreeStore) -> bool:
    """Whether its trees were sampled from the reference policy itself."""
    return not store.metadata.policy and store.metadata.sampling.get("temperature", 1.0) == 1.0


def _listed(folders: str | list[str]) -> list[str]:
    return [folders] if isinstance(folders, str) else folders
