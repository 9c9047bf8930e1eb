"""How well values would steer, from trees of the reference policy alone: reward gained for the KL divergence spent.

Tilting by beta Q moves every step to pi_ref exp(beta A) up to normalisation, A = Q(s, a) - E Q(s, .) the advantage that
the value function sees. Let G be the sum of A along a completion. To first order in beta the expected reward rises by
beta Cov(R, G), at a KL divergence of beta^2 / 2 times the summed variance of Q within the steps. So

    reward gained = Cov(R, G) / sqrt(sum of variances) * sqrt(2 KL),

and the first factor, here in standard deviations of the reward, is the `gain` by which value functions can be compared
at equal KL without decoding anything. Cov(R, G) over the summed variance is the `calibration`: 1 where values differ
within a step as much as they should, less where these differences are mostly error.

The reference's own log pi_ref(a | s) is a value that costs nothing, and tilting by it is lowering the temperature. What
a nat of it is to count for beside Q (`ObjectivesMixin.log_prob_weight`) follows from the same first order: of all tilts
by Q + w log pi_ref the one that gains most for its KL has (1, w) proportional to S^-1 c, c being the covariances of
both sums with the reward, and S their covariances within the steps.
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
_MOST = 2.0  # times as far as the values spread candidates, log pi_ref is to spread them at most
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
def log_probs(
    embedding: Tensor, states: Tensor, tokens: Tensor, temperature: float = 1.0, top_p: float = 1.0
) -> Tensor:
    """log pi_ref of tokens at some states, float32 `[S, J]` on the CPU.

    One that was sampled, but that rounding leaves out of the nucleus here, counts as the least likely within.

    Args:
        embedding, states, temperature, top_p: as for `sample_actions`.
        tokens: `[S, J]`.
    """
    found, shaped = [], warpers(temperature, top_p)
    for part, own in zip(states.split(_CHUNK), tokens.split(_CHUNK), strict=True):
        scores = shaped(None, (part.to(embedding) @ embedding.T).float())  # type: ignore[arg-type]
        every = scores.log_softmax(dim=-1)
        least = every.masked_fill(every == -torch.inf, torch.inf).amin(dim=-1, keepdim=True)
        found.append(every.gather(1, own.long().to(scores.device)).maximum(least).cpu())
    return torch.cat(found)


@torch.inference_mode()
def steering_parts(
    head: ValueHead, item: LabelledTree, states: Tensor, actions: Tensor, likely: Tensor | None = None
) -> tuple[Array, Array]:
    """What one tree adds to the estimates of `steering_efficiency`.

    Args:
        head: what is to steer.
        item: a tree of the reference policy; its prompt has at least two children.
        states: `[P + N, d]`, in packed order.
        actions: `[P + N, J]`, of `sample_actions`, J at least 2.
        likely: `[N, 1 + J]` log pi_ref of every token and of the actions at its place, of `log_probs`.

    Returns:
        (R - b) G and the summed variance of a completion, `[M]` each, averaged over the completions. The baseline b is
        the mean reward of those completions that share no token with this one, so that it brings no bias. With `likely`
        the same of values and log pi_ref together: `[M, 2]` and `[M, 2, 2]`.
    """
    layout = pack(item.tree)
    tokens = torch.from_numpy(layout.input_ids[layout.new])
    drawn = actions[torch.from_numpy(layout.previous)].long()
    hidden = states[torch.from_numpy(layout.previous)].float()
    said = (
        head(hidden.to(head.device), torch.cat([tokens[:, None], drawn], dim=1).to(head.device)).double().cpu().numpy()
    )
    leaves, share = item.tree.leaves(), leaf_shares(item.tree)
    centred = item.rewards - baselines(item.tree, item.rewards)
    if likely is None:
        both = said[..., None]
    else:
        both = np.stack(np.broadcast_arrays(said, likely.double().numpy()[..., None]), axis=-1)  # [N, 1 + J, M, 2]
    expected = both[:, 1:].mean(axis=1)
    apart = both[:, 1:] - expected[:, None]
    within = np.einsum("njmf,njmg->nmfg", apart, apart) / (apart.shape[1] - 1)
    along, spread = (_summed(item.tree, x)[leaves] for x in (both[:, 0] - expected, within))
    covariance = np.einsum("l,lm,lmf->mf", share, centred, along)
    variance = np.einsum("l,lmfg->mfg", share, spread)
    return (covariance, variance) if likely is not None else (covariance[:, 0], variance[:, 0, 0])


def log_prob_weights(parts: Sequence[tuple[Array, Array]]) -> Array:
    """What a nat of log pi_ref is best to count for beside a head's values, `[M]`, in the values' units.

    0 where the values by themselves tell nothing, and never so much that log pi_ref spreads the candidates more than
    twice as far as the values do.

    Args:
        parts: of `steering_parts` with `likely`, tree by tree.
    """
    found = []
    covariance, variance = (np.mean([part[i] for part in parts], axis=0) for i in (0, 1))
    for c, s in zip(covariance, variance, strict=True):
        value, likely = np.linalg.lstsq(s, c, rcond=1e-9)[0]
        most = _MOST * np.sqrt(s[0, 0] / s[1, 1]) if s[1, 1] > 0 else 0.0
        found.append(float(np.clip(likely / value, -most, most)) if value > 0 else 0.0)
    return np.array(found)


def sharpened(parts: Sequence[tuple[Array, Array]], weights: Array) -> list[tuple[Array, Array]]:
    """What the values with `weights` of log pi_ref beside them, `[M]`, add to the estimates of `steering_efficiency`.

    Args:
        parts: of `steering_parts` with `likely`, tree by tree.
        weights: of `log_prob_weights`; zeros for the values alone.
    """
    both = np.stack([np.ones_like(weights), weights], axis=-1)
    return [(np.einsum("mf,mf->m", c, both), np.einsum("mf,mfg,mg->m", both, s, both)) for c, s in parts]


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
