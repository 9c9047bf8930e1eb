"""How well values predict: overall, by depth, by completion fraction, and between candidates, where it counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .targets import root_target
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
        `by_depth` (the same for the nodes of each layer of the trees, 0 being the prompts where they have values, with
        their number), `by_fraction` (correlation and R2 with the leaf's final reward after that share of its tokens,
        and `within`, the correlation between completions of one prompt, which is what steering uses), and `ranking`:
        the share of pairs of siblings whose values after their *first* token (`at_end`: after their last) are in the
        order of their targets (0.5 is chance), with the number of pairs. Fraction 0 means the first token where there
        is no value of the prompt.
    """
    nodes = [_at_node_ends(p) for p in predictions]
    inner = [_inner(p.tree) for p in predictions]
    truth, said = np.concatenate([p.targets for p in predictions]), np.concatenate(nodes)
    is_inner = np.concatenate(inner)
    fractions = {f: _at_fraction(predictions, f) for f in FRACTIONS}
    rewards = np.concatenate([p.rewards for p in predictions])
    layers = _by_depth(predictions)
    pairs = _sibling_pairs(predictions)
    tree = np.repeat(np.arange(len(predictions)), [len(p.rewards) for p in predictions])
    metrics: dict[str, Any] = {"trees": len(predictions), "nodes": len(truth), "leaves": len(rewards)}
    for m, objective in enumerate(objectives):
        metrics[objective] = {
            "r2": r_squared(said[:, m], truth[:, m]),
            "correlation": correlation(said[:, m], truth[:, m]),
            "inner_r2": r_squared(said[is_inner, m], truth[is_inner, m]),
            "inner_correlation": correlation(said[is_inner, m], truth[is_inner, m]),
            "by_depth": {
                str(depth): {
                    "correlation": correlation(v[:, m], t[:, m]),
                    "r2": r_squared(v[:, m], t[:, m]),
                    "nodes": len(t),
                }
                for depth, (v, t) in layers.items()
            },
            "by_fraction": {
                str(f): {
                    "correlation": correlation(v[:, m], rewards[:, m]),
                    "r2": r_squared(v[:, m], rewards[:, m]),
                    "within": correlation(_centered(v[:, m], tree), _centered(rewards[:, m], tree)),
                }
                for f, v in fractions.items()
            },
            "ranking": {
                "accuracy": _ranking(pairs.first[:, :, m], pairs.targets[:, :, m]),
                "at_end": _ranking(pairs.last[:, :, m], pairs.targets[:, :, m]),
                "pairs": len(pairs.targets),
            },
        }
    return metrics


def flatten(metrics: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Nested metrics as one dictionary of numbers for loggers, with names such as `helpful/by_depth/1/r2`."""
    flat: dict[str, float] = {}
    for name, value in metrics.items():
        flat |= flatten(value, f"{prefix}{name}/") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


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


def _by_depth(predictions: Sequence[Prediction]) -> dict[int, tuple[Array, Array]]:
    """Values at node ends and targets, `[nodes, M]` each, of the nodes of each layer; 0 is the prompt."""
    depth = np.concatenate([_depths(p.tree) for p in predictions])
    said = np.concatenate([_at_node_ends(p) for p in predictions])
    truth = np.concatenate([p.targets for p in predictions])
    layers = {int(d): (said[depth == d], truth[depth == d]) for d in np.unique(depth)}
    asked = [(p.prompt_value, root_target(p.tree, p.targets)) for p in predictions if p.prompt_value is not None]
    if asked:
        layers = {0: (np.stack([value for value, _ in asked]), np.stack([target for _, target in asked]))} | layers
    return layers


def _depths(tree: Tree) -> NDArray[np.int64]:
    """Layer of each node, `[n]`; 1 for children of the prompt."""
    depth = np.ones(len(tree), dtype=np.int64)
    for node, parent in enumerate(tree.parent):  # parents come first
        if parent >= 0:
            depth[node] = depth[parent] + 1
    return depth


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


@dataclass
class _Pairs:
    """Pairs of siblings that begin with different tokens, `[pairs, 2, M]` each: values after their first token and
    after their last, and targets."""

    first: Array
    last: Array
    targets: Array


def _sibling_pairs(predictions: Sequence[Prediction]) -> _Pairs:
    empty = np.empty((0, 2, predictions[0].targets.shape[1]))
    first, last, targets = [empty], [empty], [empty]
    for p in predictions:
        starts, opening = _offsets(p.tree), p.tree.tokens[p.tree.start]
        siblings = (p.tree.children(int(parent)) for parent in np.unique(p.tree.parent))
        pairs = [pair for group in siblings for pair in combinations(group, 2) if len(set(opening[list(pair)])) == 2]
        if pairs:
            nodes = np.array(pairs)
            first.append(p.values[starts[nodes]])
            last.append(p.values[starts[nodes] + p.tree.length[nodes] - 1])
            targets.append(p.targets[nodes])
    return _Pairs(np.concatenate(first), np.concatenate(last), np.concatenate(targets))


def _ranking(values: Array, targets: Array) -> float:
    """Pairwise accuracy over `[pairs, 2]`; ties of the targets are left out, ties of the values count half."""
    wanted, said = np.sign(targets[:, 1] - targets[:, 0]), np.sign(values[:, 1] - values[:, 0])
    decided = wanted != 0
    return float(np.where(said == 0, 0.5, said == wanted)[decided].mean()) if decided.any() else 0.5


def _centered(values: Array, group: NDArray[np.int64]) -> Array:
    """`[n]` values minus the mean of their group, which `group` `[n]` numbers from 0."""
    return values - (np.bincount(group, weights=values) / np.bincount(group))[group]
