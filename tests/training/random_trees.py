"""Small random trees for the tests of `mavis_training`."""

from __future__ import annotations

import numpy as np

from mavis_training.tree import Tree


def random_tree(
    seed: int, layers: int = 3, root_children: int = 3, children: int = 2, vocabulary: int = 50, prompt: int = 5
) -> Tree:
    """A tree whose nodes have 1 to 4 tokens each; some end early."""
    rng = np.random.default_rng(seed)
    parent: list[int] = []
    lengths: list[int] = []
    terminal: list[bool] = []
    frontier = [-1]
    for layer in range(1, layers + 1):
        following = []
        for node in frontier:
            for _ in range(root_children if layer == 1 else children):
                parent.append(node)
                lengths.append(int(rng.integers(1, 5)))
                terminal.append(layer == layers or bool(rng.random() < 0.2))
                if not terminal[-1]:
                    following.append(len(parent) - 1)
        frontier = following
    total = sum(lengths)
    return Tree(
        prompt_id=f"p{seed}",
        prompt=f"prompt number {seed} – naïve",
        prompt_tokens=rng.integers(0, vocabulary, prompt + seed % 3),
        tokens=rng.integers(0, vocabulary, total),
        parent=np.array(parent),
        start=np.cumsum([0, *lengths[:-1]]),
        length=np.array(lengths),
        logp_gen=-rng.random(len(parent)),
        logp_ref=-rng.random(len(parent)),
        terminal=np.array(terminal),
        columns={"source": "test", "rank": seed},
    )
