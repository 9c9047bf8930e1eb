"""How well values would steer, from trees of the reference policy alone: reward gained for the KL divergence spent.

Tilting by beta Q moves every step to pi_ref exp(beta A) up to normalisation, A = Q(s, a) - E Q(s, .) the advantage that
the value function sees. Let G be the sum of A along a completion. To first order in beta the expected reward rises by
beta Cov(R, G), at a KL divergence of beta^2 / 2 times the summed variance of Q within the steps. So

    reward gained = Cov(R, G) / sqrt(sum of variances) * sqrt(2 KL),

and the first factor, here in standard deviations of the reward, is the `gain` by which value functions can be compared
at equal KL without decoding anything. Cov(R, G) over the summed variance is the `calibration`: 1 where values differ
within a step as much as they should, less where these differences are mostly error.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mavis_logits.values.value_head import ValueHead

from ..sampling.reference import warpers
from ..trees.data import LabelledTree
from ..trees.packing import pack
from ..trees.tree import Tree

Array = NDArray[np.float64]
_CHUNK = 128  # states whose distribution over the vocabulary is alive at once


@torch.inference_mode()
def sample_actions(
    embedding: Tensor,
    states: Tensor,
    count: int,
    generator: torch.Generator,
    temperature: float = 1.0,
    top_p: float = 1.0,
) -> Tensor:
    """Tokens that the reference policy would choose at some states.

    Args:
        embedding: `[V, d]`, the base model's output embedding.
        states: `[S, d]`, what entered it.
        count: tokens per state, drawn independently.
        generator: of the draws, on the embedding's device.
        temperature, top_p: of the reference.

    Returns:
        int32 `[S, count]` on the CPU.
    """
    drawn, shaped = [], warpers(temperature, top_p)
    for part in states.split(_CHUNK):
        scores = shaped(None, (part.to(embedding) @ embedding.T).float())  # type: ignore[arg-type]
        probability = scores.softmax(dim=-1)
        drawn.append(torch.multinomial(probability, count, replacement=True, generator=generator).int().cpu())
    return torch.cat(drawn)


@torch.inference_mode()
def steering_parts(head: ValueHead, item: LabelledTree, states: Tensor, actions: Tensor) -> tuple[Array, Array]:
    """What one tree adds to the estimates of `steering_efficiency`.

    Args:
        head: what is to steer.
        item: a tree of the reference policy; its prompt has at least two children.
        states: `[P + N, d]`, in packed order.
        actions: `[P + N, J]`, of `sample_actions`, J at least 2.

    Returns:
        (R - b) G and the summed variance of a completion, `[M]` each, averaged over the completions. The baseline b is
        the mean reward of those completions that share no token with this one, so that it brings no bias.
    """
    layout = pack(item.tree)
    tokens = torch.from_numpy(layout.input_ids[layout.new])
    drawn = actions[torch.from_numpy(layout.previous)].long()
    hidden = states[torch.from_numpy(layout.previous)].float()
    said = (
        head(hidden.to(head.device), torch.cat([tokens[:, None], drawn], dim=1).to(head.device)).double().cpu().numpy()
    )
    advantage, variance = said[:, 0] - said[:, 1:].mean(axis=1), said[:, 1:].var(axis=1, ddof=1)
    leaves, share = item.tree.leaves(), leaf_shares(item.tree)[:, None]
    along, spread = (_summed(item.tree, x)[leaves] for x in (advantage, variance))
    centred = item.rewards - baselines(item.tree, item.rewards)
    return (share * centred * along).sum(axis=0), (share * spread).sum(axis=0)


def steering_efficiency(
    parts: Sequence[tuple[Array, Array]], rewards: Sequence[Array], objectives: Sequence[str]
) -> dict[str, dict[str, float]]:
    """`gain` (standard deviations of the reward for sqrt(2 KL) = 1) and `calibration` by objective.

    Args:
        parts: of `steering_parts`, tree by tree.
        rewards: `[leaves, M]`, tree by tree.
        objectives: names of the M rewards.
    """
    covariance, variance = (np.mean([part[i] for part in parts], axis=0) for i in (0, 1))
    deviation = np.concatenate(list(rewards)).std(axis=0)
    flat = (variance <= 0) | (deviation <= 0)  # values that differ nowhere do not steer
    variance, deviation = np.where(flat, 1.0, variance), np.where(flat, 1.0, deviation)
    gain = np.where(flat, 0.0, covariance / np.sqrt(variance) / deviation)
    calibration = np.where(flat, 0.0, covariance / variance)
    return {
        objective: {"gain": float(gain[m]), "calibration": float(calibration[m])}
        for m, objective in enumerate(objectives)
    }


def baselines(tree: Tree, rewards: Array) -> Array:
    """Per leaf, the mean reward under the prompt's other children, each child counted once: `[leaves, M]`.

    Raises:
        ValueError: the prompt has one child only.
    """
    top = np.arange(len(tree))
    for node in np.flatnonzero(tree.parent >= 0):  # parents come first
        top[node] = top[tree.parent[node]]
    children, branch = np.unique(top, return_inverse=True)
    if len(children) < 2:
        raise ValueError(
            f"tree {tree.prompt_id!r} has one branch at its prompt: a baseline needs two, so collect with "
            "root_children of at least 2."
        )
    leaves, share = tree.leaves(), leaf_shares(tree)[:, None]
    mean = np.zeros((len(children), rewards.shape[1]))
    np.add.at(mean, branch[leaves], share * rewards * len(children))
    return (mean.sum(axis=0) - mean[branch[leaves]]) / (len(children) - 1)


def leaf_shares(tree: Tree) -> Array:
    """Weights `[leaves]`, summing to 1, under which siblings count alike: a node's is divided between its children."""
    counts = np.bincount(tree.parent + 1, minlength=len(tree) + 1)
    share = np.ones(len(tree))
    for node, parent in enumerate(tree.parent):
        share[node] = (share[parent] if parent >= 0 else 1.0) / counts[parent + 1]
    return share[tree.leaves()]


def _summed(tree: Tree, per_token: Array) -> Array:
    """`[N, M]` of tokens in packed order, summed from the prompt to the end of each node: `[n, M]`."""
    starts = np.cumsum(tree.length, dtype=np.int64) - tree.length
    total = np.add.reduceat(per_token, starts, axis=0)
    for node, parent in enumerate(tree.parent):
        if parent >= 0:
            total[node] += total[parent]
    return total
