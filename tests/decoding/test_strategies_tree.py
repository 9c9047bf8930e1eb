"""The tree of `MavisTreeSearch`: its counts add up, and it goes where the most is to be found."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mavis_logits.decoding.strategies.tree import Children, Node, Tree


def children(log_priors: list[float], scores: list[float]) -> Children:
    """Candidates 10, 11, ... of one objective."""
    values = np.array(scores, dtype=np.float32)
    return Children(np.arange(10, 10 + len(scores)), np.array(log_priors, dtype=np.float32), values, values[:, None])


def simulate(tree: Tree, rng: np.random.Generator, depth: int = 3, width: int = 3) -> Node:
    """One simulation in a made-up world, where texts of `depth` tokens end."""
    path = tree.descend()
    leaf = path.leaf
    if leaf.ended is None:
        leaf.ended = len(path.text) == 1 + depth
    if not leaf.ended and leaf.children is None:
        tree.expand(leaf, children(np.log(rng.dirichlet(np.ones(width))).tolist(), rng.normal(size=width).tolist()))
    path.back_up()
    return leaf


def nodes(node: Node) -> list[Node]:
    below = node.children.nodes.values() if node.children is not None else []
    return [node, *itertools.chain.from_iterable(nodes(child) for child in below)]


@given(st.integers(1, 60), st.integers(1, 4), st.integers(1, 3), st.floats(0, 5), st.integers(0, 10_000))
def test_visits_add_up_to_the_budget(budget: int, width: int, depth: int, exploration: float, seed: int) -> None:
    tree, rng = Tree([5], 0, exploration), np.random.default_rng(seed)
    leaves = [simulate(tree, rng, depth, width) for _ in range(budget)]
    assert tree.root.children is not None
    assert tree.root.children.visits.sum() == budget - 1  # the first looked at the root
    for node in nodes(tree.root):
        if node.children is None:
            continue
        for place, child in node.children.nodes.items():
            # A node's visits are its own first one and those of its children; those of an end are all its own.
            below = child.children.visits.sum() if child.children is not None else leaves.count(child) - 1
            assert node.children.visits[place] == 1 + below
            inside = [leaf for leaf in leaves if any(leaf is own for own in nodes(child))]
            assert len(inside) == node.children.visits[place]
            assert node.children.totals[place] == pytest.approx(sum(leaf.score for leaf in inside))


def test_the_first_visit_goes_where_value_and_prior_say() -> None:
    tree = Tree([5], 0, 2.0)
    log_priors = np.log([0.5, 0.2, 0.3]).tolist()
    tree.expand(tree.root, children(log_priors, [1.0, 3.0, 2.0]))
    assert tree.root.children is not None
    # Q in [0, 1]: 0, 1, 0.5; the prior adds c P: 1, 0.4, 0.6
    assert tree.best_place(tree.root.children) == 1
    tree.exploration = 5.0  # 2.5, 2.0, 2.0
    assert tree.best_place(tree.root.children) == 0
    tree.root.children.visits[0], tree.root.children.totals[0] = 3, 9.0  # Q is 1 now; c P sqrt(4) / 4 is 1.25
    assert tree.best_place(tree.root.children) == 2  # 0.5 + 5 * 0.3 * 2, against 1 + 5 * 0.2 * 2
    tree.exploration = 0.0
    tree.root.children.totals[0] = 10.0
    assert tree.best_place(tree.root.children) == 0


def test_banned_candidates_are_never_visited() -> None:
    tree, rng = Tree([5], 0, 1.0), np.random.default_rng(0)
    tree.expand(tree.root, children([math.log(0.5), -math.inf, math.log(0.5)], [-3.0, 0.0, -4.0]))
    for _ in range(50):
        simulate(tree, rng, depth=2, width=2)
    assert tree.root.children is not None
    assert tree.root.children.visits[1] == 0
    assert math.isinf(tree.policy()[1])


def test_the_policy_begins_as_the_prior_and_becomes_the_visits() -> None:
    tree = Tree([5], 0, 1.0)
    priors = np.array([0.5, 0.2, 0.3])
    tree.expand(tree.root, children(np.log(priors).tolist(), [1.0, 2.0, 3.0]))
    assert np.exp(tree.policy()) == pytest.approx(priors)
    assert tree.root.children is not None
    tree.root.children.visits[:] = [0, 7, 3]
    assert np.exp(tree.policy()) == pytest.approx([0.5, 7.2, 3.3])


@pytest.mark.parametrize("seed", range(5))
def test_many_simulations_find_the_best_of_all_texts(seed: int) -> None:
    rng = np.random.default_rng(seed)
    priors = np.log(rng.dirichlet(np.full(3, 2.0), size=(4, 4)))  # of two tokens, by the first and without
    worth = rng.normal(size=(3, 3))
    tree = Tree([5], 0, 0.5)
    for _ in range(1000):
        path = tree.descend()
        leaf, written = path.leaf, [token - 10 for token in path.text[1:]]
        leaf.ended = len(written) == 2
        if not leaf.ended and leaf.children is None:
            scores = worth[written[0]] if written else worth.mean(axis=1)
            tree.expand(leaf, children(priors[written[0] if written else 3][0].tolist(), scores.tolist()))
        path.back_up()
    chosen = []
    for _ in range(2):
        chosen.append(int(tree.policy().argmax()))
        tree.advance(chosen[-1])
    assert chosen == list(np.unravel_index(worth.argmax(), worth.shape))


def test_what_is_known_behind_the_move_is_kept() -> None:
    tree, rng = Tree([0, 5], 1, 1.0), np.random.default_rng(0)
    for _ in range(40):
        simulate(tree, rng, depth=3)
    assert tree.root.children is not None
    place = int(tree.policy().argmax())
    below, visits = tree.root.child(place), tree.root.children.visits[place]
    assert below.children is not None
    assert tree.advance(place) is below
    assert tree.text == [0, 5, 10 + place]
    assert below.children.visits.sum() == visits - 1
    kept = [n.children.scores for n in nodes(below) if n.children is not None]
    assert (tree._low, tree._high) == (np.min(kept), np.max(kept))
    simulate(tree, rng, depth=3)
    assert below.children.visits.sum() == visits


def test_a_move_to_what_nobody_has_visited_begins_anew() -> None:
    tree, rng = Tree([5], 0, 1.0), np.random.default_rng(0)
    simulate(tree, rng)
    node = tree.advance(2)
    assert (node.tokens, node.children, node.ended) == ([12], None, None)
    node.ended = False
    assert simulate(tree, rng) is node
    assert node.children is not None
