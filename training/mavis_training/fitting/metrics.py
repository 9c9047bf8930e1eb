"""How well values predict: overall, by depth, by completion fraction, and between candidates, where it counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..trees.data import LabelledTree
from ..trees.tree import Tree

FRACTIONS = (0.0, 0.25, 0.5, 0.75, 1.0)
Array = NDArray[np.float64]


@dataclass
class Prediction:
    """What a value function says of one tree, beside the truth.

    Attributes:
        item: the tree, of n nodes and N new tokens, and the truth.
        values: `[N, M]`, value after each new token, in packed order (node by node).
        prompt_value: `[M]`, value of the prompt; None for a function of state and token, which has none.
    """

    item: LabelledTree
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
    items = [p.item for p in predictions]
    truth, rewards = np.concatenate([i.targets for i in items]), np.concatenate([i.rewards for i in items])
    said = np.concatenate([p.values[p.item.tree.offsets() + p.item.tree.length - 1] for p in predictions])
    is_inner = np.concatenate([np.isin(np.arange(len(i.tree)), i.tree.parent) for i in items])
    fractions = {f: _at_fraction(predictions, f) for f in FRACTIONS}
    layers = _by_depth(predictions, said, truth)
    pairs = _pairs(predictions)
    tree = np.repeat(np.arange(len(items)), [len(i.rewards) for i in items])
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


def sibling_pairs(tree: Tree) -> NDArray[np.int64]:
    """`[pairs, 2]`, nodes of one parent that begin with different tokens: candidates of one step."""
    opening = tree.tokens[tree.start]
    return np.argwhere(np.triu((tree.parent[:, None] == tree.parent) & (opening[:, None] != opening)))


def _by_depth(predictions: Sequence[Prediction], said: Array, truth: Array) -> dict[int, tuple[Array, Array]]:
    """Of values at node ends and targets, `[nodes, M]` each, those of each layer; 0 is the prompt."""
    depth = np.concatenate([_depths(p.item.tree) for p in predictions])
    layers = {int(d): (said[depth == d], truth[depth == d]) for d in np.unique(depth)}
    asked = [(p.prompt_value, p.item.root_target) for p in predictions if p.prompt_value is not None]
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
        tree, starts = p.item.tree, p.item.tree.offsets()
        for leaf in tree.leaves():
            along = np.concatenate([np.arange(starts[i], starts[i] + tree.length[i]) for i in tree.path(leaf)])
            taken = round(fraction * len(along))
            if taken == 0 and p.prompt_value is not None:
                rows.append(p.prompt_value)
            else:
                rows.append(p.values[along[max(taken, 1) - 1]])
    return np.stack(rows)


@dataclass
class _Pairs:
    """`sibling_pairs` of all trees, `[pairs, 2, M]` each: values after their first token and after their last, and
    targets."""

    first: Array
    last: Array
    targets: Array


def _pairs(predictions: Sequence[Prediction]) -> _Pairs:
    first, last, targets = [], [], []
    for p in predictions:
        tree, nodes = p.item.tree, sibling_pairs(p.item.tree)
        starts = tree.offsets()[nodes]
        first.append(p.values[starts])
        last.append(p.values[starts + tree.length[nodes] - 1])
        targets.append(p.item.targets[nodes])
    return _Pairs(np.concatenate(first), np.concatenate(last), np.concatenate(targets))


def _ranking(values: Array, targets: Array) -> float:
    """Pairwise accuracy over `[pairs, 2]`; ties of the targets are left out, ties of the values count half."""
    wanted, said = np.sign(targets[:, 1] - targets[:, 0]), np.sign(values[:, 1] - values[:, 0])
    decided = wanted != 0
    return float(np.where(said == 0, 0.5, said == wanted)[decided].mean()) if decided.any() else 0.5


def _centered(values: Array, group: NDArray[np.int64]) -> Array:
    """`[n]` values minus the mean of their group, which `group` `[n]` numbers from 0."""
    return values - (np.bincount(group, weights=values) / np.bincount(group))[group]
