"""What every trainer shares: trees with targets, the split by prompt, reward units, the recorded recipe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .targets import is_validation, node_targets
from .tree import Tree
from .tree_store import StoreMetadata, TreeStore

# Settings that say where a run took place, not what it computed.
_PLACES = frozenset({"store", "output", "states", "device"})


@dataclass
class LabelledTree:
    """A tree with leaf rewards `[leaves, M]` and node targets `[n, M]` (equation 6)."""

    tree: Tree
    rewards: NDArray[np.float64]
    targets: NDArray[np.float64]


def load_trees(folder: str, objectives: Sequence[str], zeta: float) -> tuple[TreeStore, list[LabelledTree]]:
    """All trees of a store with their targets.

    Raises:
        ValueError: rewards of an objective are missing; the message names what has been labelled.
        OSError: no store there, or a corrupt shard.
    """
    store = TreeStore.open(folder)
    missing = [name for name in objectives if name not in store.objectives()]
    if missing:
        raise ValueError(
            f"{folder} has no complete rewards for {missing} (it has {store.objectives()}): run `mavis label` for them."
        )
    trees = [LabelledTree(tree, r, node_targets(tree, r, zeta)) for tree, r in store.labelled(objectives)]
    return store, trees


def split_by_prompt(trees: Sequence[LabelledTree], share: float) -> tuple[list[LabelledTree], list[LabelledTree]]:
    """Training and validation trees; a prompt is on the same side in every run.

    Raises:
        ValueError: one side is empty.
    """
    training = [item for item in trees if not is_validation(item.tree.prompt_id, share)]
    validation = [item for item in trees if is_validation(item.tree.prompt_id, share)]
    if not training or not validation:
        raise ValueError(
            f"{len(trees)} trees split into {len(training)} for training and {len(validation)} for validation at "
            f"validation_share {share}: collect more trees or change the share."
        )
    return training, validation


def reward_units(trees: Sequence[LabelledTree]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and standard deviation of the leaf targets of the training trees, `[M]` each; 1 where nothing varies."""
    leaves = np.concatenate([item.targets[item.tree.leaves()] for item in trees])
    scale = leaves.std(axis=0)
    return leaves.mean(axis=0), np.where(scale > 0, scale, 1.0)


def recipe_of(config: dict[str, Any], metadata: StoreMetadata) -> dict[str, Any]:
    """What a value function records of its training: settings without the places of files, data and versions."""
    settings = {name: value for name, value in config.items() if name not in _PLACES}
    for name in ("backbone", "model"):
        if name in settings and Path(str(settings[name])).is_dir():
            settings[name] = metadata.model
    data = {"model": metadata.model, "sampling": metadata.sampling, "policy": metadata.policy}
    return {**settings, "data": data, "versions": {name: version(name) for name in ("torch", "transformers", "peft")}}
