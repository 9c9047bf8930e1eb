"""A part of a store's trees: some of the prompts, some of each tree's answers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .targets import stable_hash
from .tree import NODE_DTYPES, Tree


@dataclass(frozen=True)
class Sample:
    """Which trees of a store are read, and what of each.

    Attributes:
        prompts: ids; None for all.
        answers: leaves of each tree, at most; None for all.
    """

    prompts: frozenset[str] | None = None
    answers: int | None = None

    @classmethod
    def of(cls, prompt_ids: Iterable[str], trees: int | None, answers: int | None) -> Sample:
        """`trees` prompts of those given, always the same ones, and more of them for more; None for all.

        Raises:
            ValueError: fewer than two trees, or no answers.
        """
        if trees is not None and trees < 2:
            raise ValueError(f"trees must be at least 2, got {trees}")
        if answers is not None and answers < 1:
            raise ValueError(f"answers must be at least 1, got {answers}")
        return cls(None if trees is None else frozenset(sorted(set(prompt_ids), key=stable_hash)[:trees]), answers)

    def has(self, tree: Tree) -> bool:
        """Whether a tree is read."""
        return self.prompts is None or tree.prompt_id in self.prompts

    def leaves(self, tree: Tree) -> NDArray[np.int64]:
        """Numbers, in the order of `Tree.leaves()`, of the leaves that are read: of as many first branches as may be.

        Always the same ones, and more of them for more answers.
        """
        leaves = tree.leaves()
        if self.answers is None or self.answers >= len(leaves):
            return np.arange(len(leaves))
        order = np.random.default_rng(stable_hash(tree.prompt_id)).permutation(len(leaves))
        taken: dict[int, int] = {}  # of every first branch
        turns = []
        for number in order:
            branch = tree.path(int(leaves[number]))[0]
            turns.append((taken.get(branch, 0), int(number)))
            taken[branch] = taken.get(branch, 0) + 1
        chosen = [number for _, number in sorted(turns, key=lambda turn: turn[0])[: self.answers]]
        return np.array(sorted(chosen))

    def thin(self, tree: Tree) -> Tree:
        """The tree of these leaves alone."""
        return with_leaves(tree, self.leaves(tree))


def with_leaves(tree: Tree, numbers: Sequence[int] | NDArray[np.int64]) -> Tree:
    """The tree of some of its leaves alone.

    Args:
        tree: with all of them.
        numbers: of those that stay, in the order of `Tree.leaves()`.
    """
    leaves = tree.leaves()
    if len(numbers) == len(leaves):
        return tree
    nodes = sorted({node for leaf in leaves[numbers] for node in tree.path(int(leaf))})
    place = {node: i for i, node in enumerate(nodes)} | {-1: -1}
    arrays = {name: getattr(tree, name)[nodes] for name in NODE_DTYPES}
    arrays["parent"] = np.array([place[int(parent)] for parent in arrays["parent"]])
    arrays["start"] = np.cumsum(arrays["length"]) - arrays["length"]
    tokens = np.concatenate([tree.own_tokens(node) for node in nodes])
    return Tree(tree.prompt_id, tree.prompt, tree.prompt_tokens, tokens, **arrays, columns=tree.columns)
