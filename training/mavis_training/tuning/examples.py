"""What trees teach a tuned policy: pairs of answers, best answers; the tokens are those that were sampled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..trees.data import LabelledTree, load_trees, reward_units, split_by_prompt
from ..trees.sample import Sample, with_leaves
from ..trees.targets import node_targets, stable_hash
from ..trees.tree_store import TreeStore


class ChosenTrees(NamedTuple):
    """Trees to tune on.

    Attributes:
        training: these.
        held_out: those that value functions are not trained on either.
        deviations: of the rewards, by objective.
        tokens: that were sampled for those to train on.
        stores: where they lie.
    """

    training: list[LabelledTree]
    held_out: list[LabelledTree]
    deviations: dict[str, float]
    tokens: int
    stores: list[TreeStore]


def chosen_trees(
    store: str | list[str],
    weights: Mapping[str, float],
    most: int | None,
    seed: int,
    held_out: float = 0.1,
    deviations: Mapping[str, float] | None = None,
    answers: int | None = None,
) -> ChosenTrees:
    """Up to `most` trees of a store to tune on, and those, with all their answers, of the `held_out` share of the
    prompts.

    Args:
        store: one or several.
        weights: by objective.
        most: None for all.
        seed: of the choice.
        held_out: share of the prompts.
        deviations: of the rewards; None for those of the trees.
        answers: of each tree to tune on, at most; None for all.

    Raises:
        ValueError: as `load_trees`.
        OSError: no store there.
    """
    stores, trees = load_trees(store, list(weights), 0.0)
    training, rest = (
        sorted(part, key=lambda item: stable_hash(f"{seed}/{item.tree.prompt_id}"))
        for part in split_by_prompt(trees, held_out)
    )
    kept = training[:most]
    own = dict(zip(weights, map(float, reward_units(kept)[1]), strict=True)) if deviations is None else dict(deviations)
    if answers is not None:
        kept = [_with_leaves(item, Sample(answers=answers).leaves(item.tree)) for item in kept]
    return ChosenTrees(kept, rest, own, sum(len(item.tree.tokens) for item in kept), stores)


def combined(item: LabelledTree, weights: Mapping[str, float], deviations: Mapping[str, float]) -> NDArray[np.float64]:
    """Weighted reward of every leaf, in standard deviations, [leaves]."""
    return np.asarray(item.rewards @ np.array([weights[name] / deviations[name] for name in weights]))


def ranked_pairs(rewards: NDArray[np.floating[Any]], count: int) -> list[tuple[int, int]]:
    """Up to `count` pairs of answers, by number, the better first: the best with the worst, the second with the ...

    Args:
        rewards: of all answers of a tree, [leaves]; equal ones make no pair.
    """
    order = np.argsort(rewards, kind="stable")
    pairs = [(int(order[-1 - i]), int(order[i])) for i in range(min(count, len(order) // 2))]
    return [(better, worse) for better, worse in pairs if rewards[better] > rewards[worse]]


def preference_pairs(
    trees: Sequence[LabelledTree], weights: Mapping[str, float], deviations: Mapping[str, float], count: int
) -> list[dict[str, list[int]]]:
    """Token ids of prompts with a better and a worse answer, up to `count` a tree.

    Raises:
        ValueError: no tree has answers of different rewards.
    """
    found = []
    for item in trees:
        leaves = item.tree.leaves()
        for better, worse in ranked_pairs(combined(item, weights, deviations), count):
            ends = {"chosen_ids": int(leaves[better]), "rejected_ids": int(leaves[worse])}
            own = {name: item.tree.completion(leaf).tolist() for name, leaf in ends.items()}
            found.append({"prompt_ids": item.tree.prompt_tokens.tolist()} | own)
    if not found:
        raise _nothing_to_prefer(weights)
    return found


def paired_trees(
    trees: Sequence[LabelledTree], weights: Mapping[str, float], deviations: Mapping[str, float], count: int
) -> list[LabelledTree]:
    """The trees of these pairs' answers alone, with the one weighted reward.

    Raises:
        ValueError: as `preference_pairs`.
    """
    found = []
    for item in trees:
        one = combined_item(item, weights, deviations)
        numbers = sorted({n for pair in ranked_pairs(one.rewards[:, 0], count) for n in pair})
        if numbers:
            found.append(_with_leaves(one, numbers))
    if not found:
        raise _nothing_to_prefer(weights)
    return found


def _with_leaves(item: LabelledTree, numbers: Sequence[int] | NDArray[np.int64]) -> LabelledTree:
    """The tree of some of its leaves alone, by number, and what its nodes are worth by these."""
    tree, rewards = with_leaves(item.tree, numbers), item.rewards[numbers]
    return LabelledTree(tree, rewards, node_targets(tree, rewards))


def _nothing_to_prefer(weights: Mapping[str, float]) -> ValueError:
    return ValueError(f"no tree has answers of different rewards for {', '.join(weights)}: there is nothing to prefer")


def best_answers(
    trees: Sequence[LabelledTree], weights: Mapping[str, float], deviations: Mapping[str, float]
) -> list[dict[str, Any]]:
    """`input_ids` of prompts with the best answer of each tree, and `completion_mask`, 1 where the loss counts."""
    found = []
    for item in trees:
        best = int(item.tree.leaves()[int(combined(item, weights, deviations).argmax())])
        prompt, own = item.tree.prompt_tokens.tolist(), item.tree.completion(best).tolist()
        found.append({"input_ids": prompt + own, "completion_mask": [0] * len(prompt) + [1] * len(own)})
    return found


def combined_item(item: LabelledTree, weights: Mapping[str, float], deviations: Mapping[str, float]) -> LabelledTree:
    """A tree whose one reward is the weighted one."""
    shares = np.array([weights[name] / deviations[name] for name in weights])
    return LabelledTree(item.tree, combined(item, weights, deviations)[:, None], (item.targets @ shares)[:, None])
