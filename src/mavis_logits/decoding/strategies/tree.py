"""The tree that `MavisTreeSearch` grows for a prompt, and how it decides where to grow."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


@dataclass
class Children:
    """The ways to go on from a node, one for each of k candidates.

    Attributes:
        tokens: [k] the candidates.
        log_priors: [k] log-probability of the tilted policy, -inf for those that take no part.
        scores: [k] combined value of going on with each.
        values: [k, M] value of each by objective.
        visits: [k] simulations that went on with each.
        totals: [k] sum of what these found.
        nodes: those visited.
    """

    tokens: NDArray[np.int64]
    log_priors: Floats
    scores: Floats
    values: Floats
    visits: NDArray[np.int64] = field(init=False)
    totals: NDArray[np.float64] = field(init=False)
    nodes: dict[int, Node] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.visits = np.zeros(len(self.tokens), dtype=np.int64)
        self.totals = np.zeros(len(self.tokens))


@dataclass
class Node:
    """A text of the tree.

    Attributes:
        tokens: what it adds to its parent's.
        score: its combined value.
        values: [M] its value by objective.
        ended: whether generation stops there; None as long as nobody has asked.
        children: its continuations, once it is expanded.
    """

    tokens: list[int]
    score: float
    values: Floats
    ended: bool | None = None
    children: Children | None = None

    def child(self, place: int) -> Node:
        """The node that goes on with candidate number `place`."""
        children = self.children
        assert children is not None
        if place not in children.nodes:
            children.nodes[place] = Node(
                [int(children.tokens[place])], float(children.scores[place]), children.values[place]
            )
        return children.nodes[place]


class Tree:
    """What the simulations after one text have found.

    Args:
        text: the prompt with its padding.
        padding: how many tokens of it are padding.
        exploration: c in `best_place`.

    Attributes:
        text: the tokens up to the root, padding included.
        root: where all simulations begin.
    """

    def __init__(self, text: list[int], padding: int, exploration: float) -> None:
        self.text, self.padding, self.exploration = text, padding, exploration
        self.root = Node([], 0.0, np.zeros(0, dtype=np.float32), ended=False)
        self._low, self._high = math.inf, -math.inf

    def descend(self) -> Path:
        """From the root to a node that has not been expanded or has ended: a simulation's leaf."""
        node, steps, text = self.root, [], list(self.text)
        while node.children is not None:
            place = self.best_place(node.children)
            steps.append((node.children, place))
            node = node.child(place)
            text += node.tokens
        return Path(steps, node, text)

    def best_place(self, children: Children) -> int:
        """The child to visit next (PUCT): argmax of Q(a) + c P(a) sqrt(N) / (1 + N(a)).

        Q is the mean of what was found behind the child; as long as it has not been visited, its own value, which is
        what a first visit would find. It is rescaled by the smallest and the largest value of the tree, as MuZero does.
        N counts the visits of the node: one to itself, and those to its children.
        """
        visits = children.visits
        found = np.where(visits > 0, children.totals / np.maximum(visits, 1), children.scores)
        worth = (found - self._low) / (self._high - self._low) if self._high > self._low else 0.0
        bonus = self.exploration * np.exp(children.log_priors) * math.sqrt(1 + visits.sum()) / (1 + visits)
        return int(np.argmax(np.where(np.isneginf(children.log_priors), -math.inf, worth + bonus)))

    def expand(self, leaf: Node, children: Children) -> None:
        """Let simulations go on from `leaf`."""
        leaf.children = children
        self._see(children)

    def policy(self) -> NDArray[np.float64]:
        """[k] log of how good the children of the root turned out, up to a constant: of N(a) + P(a).

        The root's own visit is spread over its children as the prior is. So the first simulation leaves the prior, the
        tilted policy itself, and with more of them the visits prevail.
        """
        children = self.root.children
        assert children is not None
        with np.errstate(divide="ignore"):
            return np.logaddexp(children.log_priors.astype(np.float64), np.log(children.visits))

    def advance(self, place: int) -> Node:
        """Make the child number `place` the root, and keep what is known behind it."""
        self.root = self.root.child(place)
        self.text = self.text + self.root.tokens
        self._low, self._high = math.inf, -math.inf
        nodes = [self.root]
        while nodes:
            children = nodes.pop().children
            if children is not None:
                self._see(children)
                nodes += children.nodes.values()
        return self.root

    def _see(self, children: Children) -> None:
        scores = children.scores[np.isfinite(children.log_priors)]
        self._low, self._high = min(self._low, float(scores.min())), max(self._high, float(scores.max()))


@dataclass
class Path:
    """The way of one simulation.

    Attributes:
        steps: from the root on, the children among which it chose, and which of them.
        leaf: where it ends.
        text: the tokens up to the leaf, padding included.
    """

    steps: list[tuple[Children, int]]
    leaf: Node
    text: list[int]

    def write(self, token: int, score: float, values: Floats) -> None:
        """Add a token to the leaf, and what it is worth then."""
        self.leaf.tokens.append(token)
        self.text.append(token)
        self.leaf.score, self.leaf.values, self.leaf.ended = score, values, None

    def back_up(self) -> None:
        """Tell all nodes on the way what was found: the value of the leaf."""
        for children, place in self.steps:
            children.visits[place] += 1
            children.totals[place] += self.leaf.score
