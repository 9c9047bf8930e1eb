"""Train a value head: equation 6 on the frozen base model's hidden states, every position of every tree a sample."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, get_cosine_schedule_with_warmup, set_seed

from mavis_logits.demo.smollm2 import load_chat_model
from mavis_logits.value_head import ValueHead

from .data import LabelledTree, load_trees, recipe_of, reward_units, split_by_prompt
from .files import write_json
from .metrics import Prediction, validation_metrics
from .packing import pack
from .ranks import join
from .states import compute_states, read_states
from .targets import kept_nodes


@dataclass(frozen=True)
class TrainHeadConfig:
    """How to train a value head.

    Attributes:
        store: folder of the labelled tree store, or several, which are trained on together.
        objectives: rewards to predict, one output each.
        output: folder for the head and its metrics.
        model: Hub id or folder of the base model, or "smollm2".
        states: folder of hidden states, computed if missing, or one for each store; None for `<output>/states`.
        initial: folder or Hub id of a head to go on from (Algorithm 1: that of the iteration before); its base model
            and objectives must be the same. None for a new head.
        width: of a new head.
        num_layers: residual layers of a new head.
        dropout: while training.
        zeta: KL penalty multiplier of equation 6.
        drop_leaves: share of the leaves left out (balancing).
        epochs: passes over the training positions, at most.
        patience: epochs without a smaller validation loss after which training stops; the best epoch is kept.
        batch_size: positions per step.
        learning_rate: of AdamW, at its peak; decays to 0 along a cosine.
        weight_decay: of AdamW.
        warmup_steps: of the learning rate.
        validation_share: of the prompts, held out.
        seed: of initialisation, order, dropout and balancing.
        dtype: of the base model in the prefill pass.
        device: of the prefill pass and the training; None for a GPU if there is one.
        iteration: of Algorithm 1, recorded with the head.
    """

    store: str | list[str]
    objectives: list[str]
    output: str
    model: str = "smollm2"
    states: str | list[str] | None = None
    initial: str | None = None
    width: int = 512
    num_layers: int = 1
    dropout: float = 0.1
    zeta: float = 0.0
    drop_leaves: float = 0.5
    epochs: int = 6
    patience: int = 2
    batch_size: int = 512
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    warmup_steps: int = 100
    validation_share: float = 0.1
    seed: int = 0
    dtype: str = "float32"
    device: str | None = None
    iteration: int = 0

    def __post_init__(self) -> None:
        if not self.objectives:
            raise ValueError("objectives is empty: name at least one that the store has been labelled for.")
        for name in ("width", "num_layers", "epochs", "patience", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.states is not None and len(_listed(self.states)) != len(_listed(self.store)):
            raise ValueError(
                f"states names {len(_listed(self.states))} folders for {len(_listed(self.store))} stores: give one "
                "for each store, in the same order, or none."
            )

    def states_folders(self) -> list[Path]:
        """Where each store's hidden states lie."""
        if self.states is not None:
            return [Path(folder) for folder in _listed(self.states)]
        folder, count = Path(self.output) / "states", len(_listed(self.store))
        return [folder] if count == 1 else [folder / str(i) for i in range(count)]


@dataclass
class Samples:
    """S positions: the state before a token was chosen, the token, and its value.

    Attributes:
        states: bfloat16 `[S', d]`, of all tokens of all trees.
        before: `[S]`, which state each sample starts from.
        tokens: `[S]`, token chosen there.
        targets: float32 `[S, M]`, in reward units.
    """

    states: Tensor
    before: Tensor
    tokens: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.before)


def train_head(config: TrainHeadConfig, model: PreTrainedModel | None = None) -> ValueHead:
    """Train a value head, save it with `metrics.json` and `train_config.json`, and return it.

    The prefill pass over the trees is resumable, and shared by several processes; the training itself takes minutes,
    and rank 0 does it alone.

    Args:
        config: how to train.
        model: the loaded base model, in place of the one that `config.model` names.

    Raises:
        ValueError: no rewards for an objective, no training or validation trees, states of another model or of other
            trees, or an initial head of another base model or other objectives.
        OSError: no store there, or a corrupt file.
    """
    set_seed(config.seed)
    stores, trees = load_trees(config.store, config.objectives, config.zeta)
    training, validation = split_by_prompt(trees, config.validation_share)
    if model is None:
        model = load_chat_model(config.model, getattr(torch, config.dtype))[0]
    ranks = join(config.device)
    model.to(ranks.device).eval()  # type: ignore[arg-type]
    head = starting_head(config, model, reward_units(training))
    recipe = recipe_of(asdict(config) | {"width": head.config.width, "num_layers": head.config.num_layers}, stores)
    head.config.recipe, head.config.iteration = recipe, config.iteration
    head.config.tokenizer_fingerprint = stores[-1].metadata.tokenizer_fingerprint
    head.config.base_model, head.config.base_revision = stores[-1].metadata.model, stores[-1].metadata.revision

    folders = config.states_folders()
    for store, folder in zip(stores, folders, strict=True):
        compute_states(store, model, folder)
    if not ranks.is_main:  # the rest is minutes of work for one process: the others wait for its head
        ranks.wait()
        return ValueHead.from_pretrained(config.output)
    states = [tensor for store, folder in zip(stores, folders, strict=True) for tensor in read_states(store, folder)]
    of_tree = {id(item): tensor for item, tensor in zip(trees, states, strict=True)}  # prompts recur between stores

    everything = [np.ones(len(item.tree), dtype=bool) for item in validation]
    kept = [kept_nodes(item.tree, config.drop_leaves, config.seed) for item in training]
    history = fit(
        head,
        gather([(item, k, of_tree[id(item)]) for item, k in zip(training, kept, strict=True)]),
        gather([(item, k, of_tree[id(item)]) for item, k in zip(validation, everything, strict=True)]),
        config,
    )
    metrics = validation_metrics([predict(head, item, of_tree[id(item)]) for item in validation], config.objectives)
    metrics |= {"training_trees": len(training), "validation_loss_by_epoch": history}
    output = Path(config.output)
    head.save_pretrained(output)
    write_json(output / "train_config.json", recipe)
    write_json(output / "metrics.json", metrics)
    ranks.wait()
    return head


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
        head = ValueHead.for_model(model, config.objectives, config.width, config.num_layers, config.dropout)
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


@torch.no_grad()
def set_reward_units(head: ValueHead, mean: NDArray[np.float64], scale: NDArray[np.float64]) -> None:
    """Have a head regress rewards in other units, `[M]` each. What it says stays the same."""
    old_mean, old_scale = head.config.reward_units(head.device)
    head.config.reward_mean, head.config.reward_scale = mean.tolist(), scale.tolist()
    new_mean, new_scale = head.config.reward_units(head.device)
    head.out.weight.mul_((old_scale / new_scale)[:, None])
    head.out.bias.copy_((old_mean + old_scale * head.out.bias - new_mean) / new_scale)


def gather(parts: Sequence[tuple[LabelledTree, NDArray[np.bool_], Tensor]]) -> Samples:
    """All samples of some trees: each new token of a kept node, with that node's target.

    The node was sampled from that token on, so its target is an unbiased estimate of Q(state before, token).

    Args:
        parts: per tree, its targets, the kept nodes `[n]` and the states `[P + N, d]`.
    """
    states, before, tokens, targets, offset = [], [], [], [], 0
    for item, kept, tensor in parts:
        layout = pack(item.tree)
        node = layout.node[layout.new]
        chosen = kept[node]
        states.append(tensor)
        before.append(torch.from_numpy(layout.previous[chosen] + offset))
        tokens.append(torch.from_numpy(layout.input_ids[layout.new][chosen]))
        targets.append(torch.from_numpy(item.targets[node[chosen]]).float())
        offset += len(tensor)
    return Samples(torch.cat(states), torch.cat(before), torch.cat(tokens), torch.cat(targets))


def fit(head: ValueHead, training: Samples, validation: Samples, config: TrainHeadConfig) -> list[float]:
    """Minimise equation 6 by AdamW in minibatches, and leave `head` at its best epoch.

    Returns:
        Validation loss after each epoch, in standardised units (1 is the variance of the rewards).
    """
    steps_per_epoch = -(-len(training) // config.batch_size)
    optimizer = torch.optim.AdamW(head.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    schedule = get_cosine_schedule_with_warmup(optimizer, config.warmup_steps, config.epochs * steps_per_epoch)
    order = torch.Generator().manual_seed(config.seed)
    history: list[float] = []
    best = copy.deepcopy(head.state_dict())
    for epoch in range(config.epochs):
        head.train()
        started = time.monotonic()
        batches = torch.randperm(len(training), generator=order).split(config.batch_size)
        with tqdm(batches, desc=f"epoch {epoch + 1}/{config.epochs}", unit="step") as progress:
            for step, rows in enumerate(progress, start=1):
                loss = sample_loss(head, training, rows)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                if step % 20 == 0:
                    rate = step * config.batch_size / (time.monotonic() - started)
                    progress.set_postfix_str(f"loss {loss.item():.3f}, {rate:.0f} tokens/s")
        history.append(validation_loss(head, validation, config.batch_size))
        tqdm.write(f"epoch {epoch + 1}: validation loss {history[-1]:.4f}")
        if history[-1] == min(history):
            best = copy.deepcopy(head.state_dict())
        elif len(history) - 1 - int(np.argmin(history)) >= config.patience:
            break
    head.load_state_dict(best)
    head.eval()
    return history


def sample_loss(head: ValueHead, samples: Samples, rows: Tensor) -> Tensor:
    """Equation 6 in standardised units, averaged over the samples `rows` and the objectives."""
    device = head.device
    hidden, tokens = samples.states[samples.before[rows]], samples.tokens[rows]
    values = head(hidden.to(device).float(), tokens.to(device)[:, None])[:, 0]
    _, scale = head.config.reward_units(device)
    return ((values - samples.targets[rows].to(device)) / scale).square().mean()


@torch.inference_mode()
def validation_loss(head: ValueHead, samples: Samples, batch_size: int) -> float:
    """`sample_loss` over all samples, without dropout."""
    head.eval()
    batches = torch.arange(len(samples)).split(batch_size)
    return sum(sample_loss(head, samples, rows).item() * len(rows) for rows in batches) / len(samples)


@torch.inference_mode()
def predict(head: ValueHead, item: LabelledTree, states: Tensor) -> Prediction:
    """What the head says of every token of a held-out tree, given the state before it."""
    layout = pack(item.tree)
    hidden = states[layout.previous].to(head.device).float()
    tokens = torch.from_numpy(layout.input_ids[layout.new]).to(head.device)
    values = head(hidden, tokens[:, None])[:, 0].double().cpu().numpy()
    return Prediction(item.tree, item.targets, item.rewards, values, prompt_value=None)


def _listed(folders: str | list[str]) -> list[str]:
    return [folders] if isinstance(folders, str) else folders
