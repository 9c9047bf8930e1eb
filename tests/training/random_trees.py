"""Small random trees, and stores of them, for the tests of `mavis_training`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mavis_training.trees.tree import Tree
from mavis_training.trees.tree_store import StoreMetadata, TreeStore
from tiny_models import TOKENIZER


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


def make_store(
    folder: Path, trees: Sequence[Tree], rewards: Mapping[str, Callable[[Tree], Any]] | None = None, **metadata: Any
) -> TreeStore:
    """A store of these trees in one shard, with rewards by objective: functions of a tree that give its leaves'."""
    given = {"model": "tiny", "tokenizer_fingerprint": TOKENIZER, "sampling": {"max_new_tokens": 12}} | metadata
    store = TreeStore.create(folder, StoreMetadata(**given))
    add_shard(store, trees, rewards)
    return store


def add_shard(
    store: TreeStore, trees: Sequence[Tree], rewards: Mapping[str, Callable[[Tree], Any]] | None = None
) -> None:
    """One more shard, likewise."""
    shard = store.write(trees)
    for objective, reward in (rewards or {}).items():
        shard.write_rewards(objective, [np.array(reward(tree), dtype=float) for tree in trees], "test")


def share_of_low(tree: Tree) -> np.ndarray:
    """Of every leaf's tokens, how many have low ids: a reward that can be learned."""
    return np.array([(tree.completion(leaf) < 25).mean() for leaf in tree.leaves()])
