"""Regression targets of equation 6, computed on a tree's arrays. Pure functions."""

from __future__ import annotations

import hashlib
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from .tree import Tree

Penalty = Literal["completion", "continuation"]


def log_ratios(tree: Tree) -> NDArray[np.float64]:
    """log pi_gen / pi_ref of the whole completion that ends at each node, `[n]` (nats)."""
    ratios = tree.logp_gen - tree.logp_ref
    for node in range(len(tree)):  # parents come first
        if tree.parent[node] >= 0:
            ratios[node] += ratios[tree.parent[node]]
    return ratios


def node_targets(
    tree: Tree, rewards: NDArray[np.float64], zeta: float = 0.0, penalty: Penalty = "completion"
) -> NDArray[np.float64]:
    """Value target of every node (Algorithm 3, equation 6): leaves get R - zeta log pi_gen/pi_ref, others their
    children's mean.

    Args:
        tree: n nodes.
        rewards: `[leaves, M]`, in the order of `tree.leaves()`.
        zeta: KL penalty multiplier; 0 ignores the log probabilities.
        penalty: "completion" penalises the log-ratio of the whole completion, as equation 6 and Algorithm 3 have it. It
            counts that of the node's own tokens too: with zeta = 1/beta it undoes the tilt of an optimal policy.
            "continuation" penalises what follows the node only: the regularised value of Theorem 1 (equation 9).

    Returns:
        `[n, M]`, in reward units.

    Raises:
        ValueError: rewards of another shape, or an unknown penalty.
    """
    if penalty not in get_args(Penalty):
        raise ValueError(f"penalty must be one of {', '.join(get_args(Penalty))}, got {penalty!r}.")
    leaves = tree.leaves()
    if rewards.ndim != 2 or len(rewards) != len(leaves):
        raise ValueError(
            f"tree {tree.prompt_id!r} has {len(leaves)} leaves: expected rewards [leaves, M], got {rewards.shape}."
        )
    targets = np.zeros((len(tree), rewards.shape[1]))
    targets[leaves] = rewards
    if zeta:
        targets[leaves] -= zeta * log_ratios(tree)[leaves, None]
    counts = np.bincount(tree.parent[tree.parent >= 0], minlength=len(tree))
    for node in range(len(tree) - 1, -1, -1):  # children before parents
        if counts[node]:
            targets[node] /= counts[node]
        if tree.parent[node] >= 0:
            targets[tree.parent[node]] += targets[node]
    if zeta and penalty == "continuation":
        targets += zeta * log_ratios(tree)[:, None]
    return targets


def root_target(tree: Tree, targets: NDArray[np.float64], zeta: float = 0.0) -> NDArray[np.float64]:
    """Value target of the prompt itself, `[M]`: the mean of its children's.

    Args:
        tree: n nodes.
        targets: `[n, M]`, of `node_targets`.
        zeta: of the penalty "continuation", which leaves the children's own tokens out of their targets; they follow
            the prompt, so that its target is the same under both penalties. 0 for the penalty "completion".
    """
    first = tree.parent == -1
    return (targets - zeta * log_ratios(tree)[:, None])[first].mean(axis=0)


def kept_nodes(tree: Tree, drop_leaves: float, seed: int) -> NDArray[np.bool_]:
    """Which nodes train, `[n]`: all but a random share of the leaves (section F.4, balancing).

    The choice depends on the seed and the prompt's id alone, not on the order of trees.

    Args:
        tree: n nodes.
        drop_leaves: share of the leaves to drop, 0 to 1; the paper's is 0.5.
        seed: of the choice.

    Raises:
        ValueError: a share outside 0 to 1.
    """
    if not 0 <= drop_leaves <= 1:
        raise ValueError(f"drop_leaves must be from 0 to 1, got {drop_leaves}.")
    leaves = tree.leaves()
    rng = np.random.default_rng([seed, stable_hash(tree.prompt_id)])
    kept = np.ones(len(tree), dtype=bool)
    kept[rng.permutation(leaves)[: int(len(leaves) * drop_leaves)]] = False
    return kept


def is_validation(prompt_id: str, share: float, seed: int = 0) -> bool:
    """Whether a prompt's tree is held out for validation: by hash, so the same for every objective."""
    return stable_hash(f"{seed}/{prompt_id}") / 2**32 < share


def stable_hash(text: str) -> int:
    """A 32-bit hash that is the same in every process."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
