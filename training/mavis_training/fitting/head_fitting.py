"""Fit value heads to positions of trees: the samples, the loss of equation 6, and targets that look ahead."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import get_cosine_schedule_with_warmup

from mavis_logits.values.value_head import ValueHead, ValueHeadConfig

from ..trees.data import LabelledTree
from ..trees.packing import pack
from .soundness import fitting_warmup, require_finite

if TYPE_CHECKING:
    from .head_config import TrainHeadConfig


@dataclass(frozen=True)
class Samples:
    """S positions: the state before a token was chosen, the token, the state after it, and its value.

    Attributes:
        states: bfloat16 `[S', d]`, of all tokens of all trees.
        before: `[S]`, which state each sample starts from.
        after: `[S]`, which state its token leads to.
        tokens: `[S]`, token chosen there.
        targets: float32 `[S, M]`, in reward units.
    """

    states: Tensor
    before: Tensor
    after: Tensor
    tokens: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.before)


Loss = Callable[[Any, Samples, Tensor], Tensor]  # of a module, over some rows of samples, in standardised units


def gather(parts: Sequence[tuple[LabelledTree, NDArray[np.bool_], Tensor]]) -> Samples:
    """All samples of some trees: each new token of a kept node, with that node's target.

    The node was sampled from that token on, so its target is an unbiased estimate of Q(state before, token).

    Args:
        parts: per tree, its targets, the kept nodes `[n]` and the states `[P + N, d]`.
    """
    states, before, after, tokens, targets, offset = [], [], [], [], [], 0
    for item, kept, tensor in parts:
        layout = pack(item.tree)
        node = layout.node[layout.new]
        chosen = kept[node]
        states.append(tensor)
        before.append(torch.from_numpy(layout.previous[chosen] + offset))
        after.append(torch.from_numpy(layout.new[chosen] + offset))
        tokens.append(torch.from_numpy(layout.input_ids[layout.new][chosen]))
        targets.append(torch.from_numpy(item.targets[node[chosen]]).float())
        offset += len(tensor)
    return Samples(*map(torch.cat, (states, before, after, tokens, targets)))


class StateValue(nn.Module):
    """V(s) from the hidden state after s alone: LayerNorm(W h), residual GELU layers, M outputs, in reward units.

    Args:
        head: config of the value head that it helps to train; width, layers, dropout and reward units are the same.
    """

    def __init__(self, head: ValueHeadConfig) -> None:
        super().__init__()
        self.head = head
        self.state = nn.Sequential(nn.LayerNorm(head.hidden_size), nn.Linear(head.hidden_size, head.width))
        self.norm = nn.LayerNorm(head.width)
        self.layers = nn.ModuleList(nn.Linear(head.width, head.width) for _ in range(head.num_layers))
        self.dropout = nn.Dropout(head.dropout)
        self.out = nn.Linear(head.width, len(head.objectives))

    def forward(self, hidden: Tensor) -> Tensor:
        """Values `[S, M]` of states `[S, d]`."""
        features = self.dropout(self.norm(self.state(hidden)))
        for layer in self.layers:
            features = features + self.dropout(nn.functional.gelu(layer(features)))
        mean, scale = self.head.reward_units(hidden.device)
        return mean + scale * self.out(features)


def bootstrapped(head: ValueHead, training: Samples, validation: Samples, config: TrainHeadConfig) -> Samples:
    """Training samples whose targets lean on the value of the state after each token, by `config.bootstrap`.

    A completion's reward is a noisy target for one of its many tokens. The base model's state after the token already
    tells much of what the token changed, and a network of states learns to read it; what it says varies less.

    Args:
        head: the head to be trained.
        training, validation: as for `fit`; the network of states learns equation 6 on them.
        config: how to train both.
    """
    network = StateValue(head.config).to(head.device)
    fit(network, training, validation, config, state_loss, "states")
    with torch.inference_mode():
        batches = training.after.split(4096)
        values = torch.cat([network(training.states[rows].to(head.device).float()).cpu() for rows in batches])
    return replace(training, targets=torch.lerp(training.targets, values, config.bootstrap))


def fit(
    module: nn.Module,
    training: Samples,
    validation: Samples,
    config: TrainHeadConfig,
    loss_of: Loss,
    name: str,
) -> list[float]:
    """Minimise equation 6 over minibatches of positions; as `minimise`.

    Args:
        module: what to train.
        training: samples to learn.
        validation: samples to measure the loss on after each epoch.
        config: learning rate, epochs and so on.
        loss_of: `sample_loss` for a head, `state_loss` for a network of states.
        name: of the module, for the progress bar.

    Returns:
        Validation loss after each epoch, in standardised units (1 is the variance of the rewards).
    """
    return minimise(
        module,
        len(training),
        config.batch_size,
        lambda rows: loss_of(module, training, rows),
        lambda: _mean_loss(module, validation, config.batch_size, loss_of),
        config,
        name,
        "tokens",
    )


def minimise(
    module: nn.Module,
    count: int,
    batch_size: int,
    loss: Callable[[Tensor], Tensor],
    validation_loss: Callable[[], float],
    config: TrainHeadConfig,
    name: str,
    unit: str,
) -> list[float]:
    """Minimise a loss by AdamW in minibatches, and leave `module` at its best epoch.

    Args:
        module: what to train.
        count: of the samples.
        batch_size: samples of a step.
        loss: of the samples of these numbers, `[n]`.
        validation_loss: asked after each epoch.
        config: learning rate, epochs and so on.
        name: of the module or the rule, for the progress bar.
        unit: what a sample is.

    Returns:
        Validation loss after each epoch.

    Raises:
        ValueError: the training diverges.
    """
    optimizer = torch.optim.AdamW(module.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    steps = steps_of(config, count, batch_size)
    warmup = fitting_warmup(config.warmup_steps, steps, name)
    schedule = get_cosine_schedule_with_warmup(optimizer, warmup, steps)
    order = torch.Generator().manual_seed(config.seed)
    history: list[float] = []
    best = copy.deepcopy(module.state_dict())
    for epoch in range(config.epochs):
        module.train()
        started = time.monotonic()
        batches = torch.randperm(count, generator=order).split(batch_size)
        with tqdm(batches, desc=f"{name}, epoch {epoch + 1}/{config.epochs}", unit="step") as progress:
            for step, rows in enumerate(progress, start=1):
                current = loss(rows)
                optimizer.zero_grad()
                current.backward()
                optimizer.step()
                schedule.step()
                if step % 20 == 0:
                    rate = step * batch_size / (time.monotonic() - started)
                    progress.set_postfix_str(f"loss {current.item():.3f}, {rate:.0f} {unit}/s")
        history.append(validation_loss())
        require_finite({"validation loss": history[-1]}, f"{name}, epoch {epoch + 1}")
        tqdm.write(f"{name}, epoch {epoch + 1}: validation loss {history[-1]:.4f}")
        if history[-1] == min(history):
            best = copy.deepcopy(module.state_dict())
        elif len(history) - 1 - int(np.argmin(history)) >= config.patience:
            break
    module.load_state_dict(best)
    module.eval()
    return history


def steps_of(config: TrainHeadConfig, count: int, batch_size: int) -> int:
    """Optimizer steps of all epochs over `count` samples."""
    return config.epochs * -(-count // batch_size)


def sample_loss(head: ValueHead, samples: Samples, rows: Tensor) -> Tensor:
    """Equation 6 for Q(state before, token), averaged over the samples `rows` and the objectives."""
    hidden, tokens = samples.states[samples.before[rows]], samples.tokens[rows]
    values = head(hidden.to(head.device).float(), tokens.to(head.device)[:, None])[:, 0]
    return _squares(values, samples.targets[rows], head.config)


def state_loss(network: StateValue, samples: Samples, rows: Tensor) -> Tensor:
    """Equation 6 for V(state after), averaged likewise."""
    hidden = samples.states[samples.after[rows]].to(network.out.weight.device).float()
    return _squares(network(hidden), samples.targets[rows], network.head)


def _squares(values: Tensor, targets: Tensor, config: ValueHeadConfig) -> Tensor:
    _, scale = config.reward_units(values.device)
    return ((values - targets.to(values.device)) / scale).square().mean()


@torch.inference_mode()
def _mean_loss(module: nn.Module, samples: Samples, batch_size: int, loss_of: Loss) -> float:
    """The loss over all samples, without dropout."""
    module.eval()
    batches = torch.arange(len(samples)).split(batch_size)
    return sum(loss_of(module, samples, rows).item() * len(rows) for rows in batches) / len(samples)
