"""What every trainer shares: trees with targets, the split by prompt, reward units, the recorded recipe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .targets import Penalty, is_validation, node_targets
from .tree import Tree
from .tree_store import TreeStore

# Settings that say where a run took place, not what it computed.
_PLACES = frozenset({"store", "output", "states", "device"})


@dataclass
class LabelledTree:
    """A tree with leaf rewards `[leaves, M]` and node targets `[n, M]` (equation 6)."""

    tree: Tree
    rewards: NDArray[np.float64]
    targets: NDArray[np.float64]


def load_trees(
    store: str | Sequence[str], objectives: Sequence[str], zeta: float, penalty: Penalty = "completion"
) -> tuple[list[TreeStore], list[LabelledTree]]:
    """All trees of one or several stores with their targets.

    Args:
        store: folder of a store, or several, which are trained on together (a prompt may have a tree in each).
        objectives: names of the M rewards.
        zeta: KL penalty multiplier of equation 6.
        penalty: what it penalises (`node_targets`).

    Returns:
        The opened stores, in the order given, and their trees, store by store and shard by shard.

    Raises:
        ValueError: rewards of an objective are missing (the message names what has been labelled), no store or one
            store twice, or stores of different tokenizers or base models.
        OSError: no store there, or a corrupt shard.
    """
    folders = [store] if isinstance(store, str) else list(store)
    if not folders or len({Path(folder).resolve() for folder in folders}) != len(folders):
        raise ValueError(f"store must name one or several different folders of labelled trees, got {folders}.")
    stores = [TreeStore.open(folder) for folder in folders]
    for other in stores[1:]:
        _require_one_language(stores[0], other)
    for opened in stores:
        labelled = opened.objectives()
        missing = [name for name in objectives if name not in labelled]
        if missing and not opened.shards():
            raise ValueError(f"{opened.folder} has no trees yet: run `mavis collect` to its end, then `mavis label`.")
        if missing:
            raise ValueError(
                f"{opened.folder} has no complete rewards for {missing} (it has {labelled}): "
                "run `mavis label` for them."
            )
    rows = (row for opened in stores for row in opened.labelled(objectives))
    return stores, [LabelledTree(tree, r, node_targets(tree, r, zeta, penalty)) for tree, r in rows]


def _require_one_language(first: TreeStore, other: TreeStore) -> None:
    """Refuse to train on trees whose token ids, or whose base models, are not the same."""
    for name in ("tokenizer_fingerprint", "model"):
        one, two = getattr(first.metadata, name), getattr(other.metadata, name)
        if one != two:
            raise ValueError(
                f"{first.folder} and {other.folder} cannot be trained on together: their {name} differ, "
                f"{one!r} and {two!r}."
            )


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


def recipe_of(config: dict[str, Any], stores: Sequence[TreeStore]) -> dict[str, Any]:
    """What a value function records of its training: settings without the places of files, data and versions.

    Args:
        config: settings as a dictionary. A folder in it becomes its name; that of the backbone, the base model's name.
        stores: where the trees came from. "data" is the last one's, the newest policy's; "earlier_data" the others'.
    """
    settings = {name: value for name, value in config.items() if name not in _PLACES}
    for name in ("backbone", "model"):
        if name in settings and Path(str(settings[name])).is_dir():
            settings[name] = stores[-1].metadata.model
    data = [{"model": m.model, "sampling": m.sampling, "policy": m.policy} for m in (s.metadata for s in stores)]
    recipe = {**_without_folders(settings), "data": data[-1]}
    if data[:-1]:
        recipe["earlier_data"] = data[:-1]
    return recipe | {"versions": {name: version(name) for name in ("torch", "transformers", "peft")}}


def _without_folders(value: Any) -> Any:
    """`value` with every absolute path in it cut to its last part."""
    if isinstance(value, dict):
        return {key: _without_folders(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_folders(item) for item in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value
