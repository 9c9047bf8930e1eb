"""How well values predict: overall, by completion fraction, and where it counts, between candidates of one step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .tree import Tree

FRACTIONS = (0.0, 0.25, 0.5, 0.75, 1.0)
Array = NDArray[np.float64]


@dataclass
class Prediction:
    """What a value function says of one tree, beside the truth.

    Attributes:
        tree: n nodes, N new tokens.
        targets: `[n, M]`, of `node_targets`.
        rewards: `[leaves, M]`.
        values: `[N, M]`, value after each new token, in packed order (node by node).
        prompt_value: `[M]`, value of the prompt; None for a function of state and token, which has none.
    """

    tree: Tree
    targets: Array
    rewards: Array
    values: Array
    prompt_value: Array | None


def validation_metrics(predictions: Sequence[Prediction], objectives: Sequence[str]) -> dict[str, Any]:
    """Metrics per objective on held-out trees.

    Returns:
        By objective: `r2` and `correlation` of values at node ends with their targets (`inner_*`: without leaves),
        `by_fraction` (correlation and R2 with the leaf's final reward after that share of its tokens), and `ranking`:
        the share of pairs of siblings whose values after their *first* token are in the order of their targets (0.5 is
        chance), with the number of pairs. R2 of fraction 0 uses the first token where there is no value of the prompt.
    """
    nodes = [_at_node_ends(p) for p in predictions]
    inner = [_inner(p.tree) for p in predictions]
    truth, said = np.concatenate([p.targets for p in predictions]), np.concatenate(nodes)
    is_inner = np.concatenate(inner)
    fractions = {f: _at_fraction(predictions, f) for f in FRACTIONS}
    rewards = np.concatenate([p.rewards for p in predictions])
    pairs = _sibling_pairs(predictions)
    metrics: dict[str, Any] = {"trees": len(predictions), "nodes": len(truth), "leaves": len(rewards)}
    for m, objective in enumerate(objectives):
        metrics[objective] = {
            "r2": r_squared(said[:, m], truth[:, m]),
            "correlation": correlation(said[:, m], truth[:, m]),
            "inner_r2": r_squared(said[is_inner, m], truth[is_inner, m]),
            "inner_correlation": correlation(said[is_inner, m], truth[is_inner, m]),
            "by_fraction": {
                str(f): {"correlation": correlation(v[:, m], rewards[:, m]), "r2": r_squared(v[:, m], rewards[:, m])}
                for f, v in fractions.items()
            },
            "ranking": _ranking(*(side[:, :, m] for side in pairs)),
        }
    return metrics


def correlation(predicted: Array, truth: Array) -> float:
    """Pearson correlation; 0 where one of the two does not vary."""
    if len(truth) < 2 or predicted.std() == 0 or truth.std() == 0:
        return 0.0
    return float(np.corrcoef(predicted, truth)[0, 1])


def r_squared(predicted: Array, truth: Array) -> float:
    """Share of the variance explained, 1 - residual / total; 0 where the truth does not vary."""
    total = ((truth - truth.mean()) ** 2).sum() if len(truth) else 0.0
    return float(1 - ((predicted - truth) ** 2).sum() / total) if total > 0 else 0.0


def _offsets(tree: Tree) -> NDArray[np.int64]:
    """Where each node's values begin in packed order, `[n]`."""
    return np.cumsum(tree.length, dtype=np.int64) - tree.length


def _at_node_ends(p: Prediction) -> Array:
    return p.values[_offsets(p.tree) + p.tree.length - 1]


def _inner(tree: Tree) -> NDArray[np.bool_]:
    inner = np.ones(len(tree), dtype=bool)
    inner[tree.leaves()] = False
    return inner


def _at_fraction(predictions: Sequence[Prediction], fraction: float) -> Array:
    """Value of every leaf's completion cut after this share of its tokens, `[leaves, M]` over all trees."""
    rows = []
    for p in predictions:
        starts = _offsets(p.tree)
        for leaf in p.tree.leaves():
            along = np.concatenate([np.arange(starts[i], starts[i] + p.tree.length[i]) for i in p.tree.path(leaf)])
            taken = round(fraction * len(along))
            if taken == 0 and p.prompt_value is not None:
                rows.append(p.prompt_value)
            else:
                rows.append(p.values[along[max(taken, 1) - 1]])
    return np.stack(rows)


def _sibling_pairs(predictions: Sequence[Prediction]) -> tuple[Array, Array]:
    """Values after the first token, and targets, of all pairs of siblings that differ there: `[pairs, 2, M]`."""
    values, targets = [], []
    for p in predictions:
        first = _offsets(p.tree)
        for parent in np.unique(p.tree.parent):
            children = p.tree.children(int(parent))
            for i, a in enumerate(children):
                for b in children[i + 1 :]:
                    if p.tree.tokens[p.tree.start[a]] != p.tree.tokens[p.tree.start[b]]:
                        values.append(p.values[first[[a, b]]])
                        targets.append(p.targets[[a, b]])
    empty = np.empty((0, 2, predictions[0].targets.shape[1]))
    return (np.stack(values), np.stack(targets)) if values else (empty, empty)


def _ranking(values: Array, targets: Array) -> dict[str, float]:
    """Pairwise accuracy over `[pairs, 2]`; ties of the targets are left out, ties of the values count half."""
    wanted, said = np.sign(targets[:, 1] - targets[:, 0]), np.sign(values[:, 1] - values[:, 0])
    decided = wanted != 0
    count = int(decided.sum())
    accuracy = float(np.where(said == 0, 0.5, said == wanted)[decided].mean()) if count else 0.5
    return {"accuracy": accuracy, "pairs": count}
