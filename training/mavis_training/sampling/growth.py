"""How a tree grows in Algorithm 3, whatever samples its extensions."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..trees.tree import NODE_DTYPES, Tree
from .config import CollectConfig


@dataclass
class Branch:
    """One extension being sampled: up to `limit` tokens after `before`.

    Attributes:
        tree: index of the prompt.
        parent: the node it extends, -1 for the prompt.
        layer: l, from 0.
        left: T - t, tokens that the completion may still get, this extension's included.
        limit: tau, tokens that this extension may get.
        before: token ids before it, the prompt's included.
        tokens, logp_gen, logp_ref: what has been sampled: ids, and log pi_gen and log pi_ref of each (nats).
    """

    tree: int
    parent: int
    layer: int
    left: int
    limit: int
    before: list[int]
    tokens: list[int] = field(default_factory=list)
    logp_gen: list[float] = field(default_factory=list)
    logp_ref: list[float] = field(default_factory=list)

    def add(self, token: int, logp_gen: float, logp_ref: float) -> None:
        """Append a sampled token."""
        self.tokens.append(token)
        self.logp_gen.append(logp_gen)
        self.logp_ref.append(logp_ref)

    @property
    def sequence(self) -> list[int]:
        """All token ids so far, the prompt's included."""
        return self.before + self.tokens


class Growth:
    """The trees of P prompts while they grow. A branch that has been sampled to its end is handed to `finish`.

    Args:
        rows: the prompt rows, with `id`, `prompt` and other columns.
        prompts: their token ids.
        eos: tokens that end a completion.
        shape: T, L, K_root, K and whether a first-layer completion that ended is split.
        rng: of the extensions' lengths.
    """

    def __init__(
        self,
        rows: Sequence[dict[str, Any]],
        prompts: Sequence[list[int]],
        eos: set[int],
        shape: CollectConfig,
        rng: random.Random,
    ) -> None:
        self.rows, self.prompts, self.eos, self.shape, self.rng = rows, prompts, eos, shape, rng
        self._tokens: list[list[int]] = [[] for _ in rows]
        self._nodes: list[dict[str, list[Any]]] = [{name: [] for name in NODE_DTYPES} for _ in rows]

    def start(self) -> list[Branch]:
        """K_root branches for every prompt, prompt by prompt."""
        return [
            branch
            for tree, prompt in enumerate(self.prompts)
            for branch in self._children(tree, -1, 0, self.shape.max_new_tokens, prompt, self.shape.root_children)
        ]

    def finished(self, branch: Branch) -> bool:
        """Whether `branch` has all its tokens."""
        return len(branch.tokens) == branch.limit or branch.tokens[-1] in self.eos

    def finish(self, branch: Branch) -> list[Branch]:
        """Add a finished branch to its tree as a node; returns the branches that go on from it.

        A first-layer completion that ended is cut in two at random if the shape has `two_layers` (appendix C): its
        first part becomes a node that goes on with K - 1 more branches, its second part that node's first child.
        """
        shape, added = self.shape, len(branch.tokens)
        ended = branch.tokens[-1] in self.eos
        if shape.two_layers and branch.layer == 0 and shape.layers > 1 and ended and added > 1:
            cut = self.rng.randint(1, added - 1)
            node = self._add(branch, slice(cut), branch.parent, terminal=False)
            self._add(branch, slice(cut, None), node, terminal=True)
            before = branch.before + branch.tokens[:cut]
            return self._children(branch.tree, node, 1, branch.left - cut, before, shape.children - 1)
        terminal = ended or added == branch.left
        node = self._add(branch, slice(None), branch.parent, terminal)
        if terminal:
            return []
        left, before = branch.left - added, branch.sequence
        return self._children(branch.tree, node, branch.layer + 1, left, before, shape.children)

    def trees(self) -> list[Tree]:
        """The trees; call it when no branch is left."""
        every = zip(self.rows, self.prompts, self._tokens, self._nodes, strict=True)
        return [_tree(row, prompt, tokens, nodes) for row, prompt, tokens, nodes in every]

    def _children(self, tree: int, parent: int, layer: int, left: int, before: list[int], count: int) -> list[Branch]:
        limit = extension_length(layer, left, self.shape.layers, self.rng)
        return [Branch(tree, parent, layer, left, limit, before) for _ in range(count)]

    def _add(self, branch: Branch, span: slice, parent: int, terminal: bool) -> int:
        """Append the node that holds `branch.tokens[span]`; returns its index."""
        tokens, nodes = self._tokens[branch.tree], self._nodes[branch.tree]
        own = branch.tokens[span]
        sums = sum(branch.logp_gen[span]), sum(branch.logp_ref[span])
        for column, value in zip(nodes.values(), (parent, len(tokens), len(own), *sums, terminal), strict=True):
            column.append(value)
        tokens.extend(own)
        return len(nodes["parent"]) - 1


def extension_length(layer: int, left: int, layers: int, rng: random.Random) -> int:
    """Tokens that a node of `layer` (from 0) adds: Unif{1, 2 Round((T-t)/(L-l)) - 1}, all that is left at the last.

    The bounds are those of appendix C's text, where the mean is an equal share of the `left` = T - t tokens.
    """
    if layer == layers - 1:
        return left
    return min(left, rng.randint(1, max(1, 2 * round(left / (layers - layer)) - 1)))


def _tree(row: dict[str, Any], prompt: list[int], tokens: list[int], nodes: dict[str, list[Any]]) -> Tree:
    columns = {key: value for key, value in row.items() if key not in ("id", "prompt")}
    prompt_ids, token_ids = (np.array(ids, dtype=np.int32) for ids in (prompt, tokens))
    return Tree(str(row["id"]), row["prompt"], prompt_ids, token_ids, columns=columns, **nodes)  # type: ignore[arg-type]
