"""What every trainer shares: trees with targets, the split by prompt, reward units, the recorded recipe."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from mavis_logits.values.value_head import ValueHead
from mavis_logits.values.value_model import ValueModel

from ..base.kept import files_digest
from ..base.prompts import same_prompt_key
from .targets import Penalty, is_validation, node_targets, root_target
from .tree import Tree
from .tree_store import TreeStore

# In a store's `sampling`, where its trees are pairs of answers that nobody sampled (`mavis_training.pairs`).
PAIRS = "pairs"
# Settings that say where a run took place, not what it computed.
_PLACES = frozenset({"store", "output", "states", "device", "fresh"})


@dataclass
class LabelledTree:
    """A tree with what its nodes are worth.

    Attributes:
        tree: n nodes.
        rewards: `[leaves, M]`.
        targets: `[n, M]`, of equation 6.
        continuation_zeta: zeta of targets that leave out the penalty of the nodes' own tokens; else 0.
    """

    tree: Tree
    rewards: NDArray[np.float64]
    targets: NDArray[np.float64]
    continuation_zeta: float = field(default=0.0, kw_only=True)

    @property
    def root_target(self) -> NDArray[np.float64]:
        """Value target of the prompt, `[M]`."""
        return root_target(self.tree, self.targets, self.continuation_zeta)


Item = TypeVar("Item", bound=LabelledTree)


def open_stores(
    store: str | Sequence[str], alike: Sequence[str] = ("tokenizer_fingerprint", "model")
) -> list[TreeStore]:
    """Open one or several stores whose trees are to be trained on together.

    Args:
        store: a folder, or several.
        alike: fields of their metadata that must be the same.

    Raises:
        ValueError: no store or one store twice, or stores of different tokenizers or base models.
        OSError: no store there.
    """
    folders = [store] if isinstance(store, str) else list(store)
    if not folders or len({Path(folder).resolve() for folder in folders}) != len(folders):
        raise ValueError(f"store must name one or several different folders of trees, got {folders}.")
    first, *others = stores = [TreeStore.open(folder) for folder in folders]
    for other in others:
        for name in alike:
            one, two = getattr(first.metadata, name), getattr(other.metadata, name)
            if one != two and not (name == "model" and first.metadata.has_weights_of(other.metadata)):
                raise ValueError(
                    f"{first.folder} and {other.folder} cannot be trained on together: their {name} differ, "
                    f"{one!r} and {two!r}."
                )
    return stores


def load_trees(
    store: str | Sequence[str],
    objectives: Sequence[str],
    zeta: float,
    penalty: Penalty = "completion",
    most: int | None = None,
    answers: int | None = None,
) -> tuple[list[TreeStore], list[LabelledTree]]:
    """All trees of one or several stores with their targets.

    Args:
        store: folder of a store, or several, which are trained on together (a prompt may have a tree in each).
        objectives: names of the M rewards.
        zeta: KL penalty multiplier of equation 6.
        penalty: what it penalises (`node_targets`).
        most: trees of a store that are read; None for all.
        answers: of each tree that are read; None for all.

    Returns:
        The opened stores, in the order given, and their trees, store by store and shard by shard.

    Raises:
        ValueError: rewards of an objective are missing (the message names what has been labelled), two stores hold the
            same trees, or as `open_stores`.
        OSError: no store there, or a corrupt shard.
    """
    stores = [opened.sampled(most, answers) for opened in open_stores(store)]
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
    by_store = [list(opened.labelled(objectives)) for opened in stores]
    require_no_copies(stores, [[tree for tree, _ in rows] for rows in by_store])
    rows = [row for of_one in by_store for row in of_one]
    tell_repeats((tree for tree, _ in rows), " and ".join(str(opened.folder) for opened in stores))
    left_out = zeta if penalty == "continuation" else 0.0
    return stores, [
        LabelledTree(tree, r, node_targets(tree, r, zeta, penalty), continuation_zeta=left_out) for tree, r in rows
    ]


def data_origin(stores: Sequence[TreeStore], objectives: Sequence[str]) -> list[str]:
    """A digest of every store's trees and of their rewards, by what the files hold."""
    found = []
    for store in stores:
        shards = store.shards()
        paths = [path for shard in shards for path in (shard.path, *map(shard.reward_path, objectives))]
        found.append(files_digest(path for path in paths if path.exists()))
    return found


def settings_origin(config: dict[str, Any]) -> dict[str, Any]:
    """Of a training's settings as a dictionary, those that shape what is learned by themselves."""
    aside = _PLACES | {"backbone", "model", "initial", "teachers"}  # these by the weights that they name
    return {name: value for name, value in config.items() if name not in aside}


def split_by_prompt(trees: Sequence[Item], share: float) -> tuple[list[Item], list[Item]]:
    """Training and validation trees; a prompt is on the same side in every run, whatever its ids are.

    Raises:
        ValueError: one side is empty.
    """
    training = [item for item in trees if not is_held_out(item.tree, share)]
    validation = [item for item in trees if is_held_out(item.tree, share)]
    if not training or not validation:
        raise ValueError(
            f"{len(trees)} trees split into {len(training)} for training and {len(validation)} for validation at "
            f"validation_share {share}: collect more trees or change the share."
        )
    return training, validation


def is_held_out(tree: Tree, share: float) -> bool:
    """Whether a tree is for validation: by its prompt's text, so that one prompt under two ids is on one side."""
    return is_validation(prompt_text(tree), share)


def prompt_text(tree: Tree) -> str:
    """The prompt's text (and turns, if it has several) without regard to case and spaces."""
    return same_prompt_key(tree.prompt, tree.columns.get("conversation"))


def tell_repeats(trees: Iterable[Tree], where: str) -> None:
    """Warn of prompts that stand under several ids, with their count."""
    ids: dict[str, set[str]] = {}
    for tree in trees:
        ids.setdefault(prompt_text(tree), set()).add(tree.prompt_id)
    repeated = [sorted(names) for names in ids.values() if len(names) > 1]
    if repeated:
        warnings.warn(
            f"{where}: {len(repeated)} of {len(ids)} prompts stand under several ids, such as "
            f"{' and '.join(map(repr, repeated[0][:2]))}; they count once for each of their "
            f"{sum(map(len, repeated))} ids. All trees of one prompt go to the same side of the split; "
            "mavis prompts leaves repeats out.",
            stacklevel=3,
        )


def require_no_copies(stores: Sequence[TreeStore], trees: Sequence[Sequence[Tree]]) -> None:
    """Raise `ValueError` for trees that lie in two stores: sampled with the same seed, they would count twice."""
    first: dict[tuple[Any, ...], TreeStore] = {}
    for store, own in zip(stores, trees, strict=True):
        made = json.dumps([store.metadata.sampling, store.metadata.policy], sort_keys=True)
        keys = [(made, tree.prompt_tokens.tobytes(), tree.tokens.tobytes(), tree.parent.tobytes()) for tree in own]
        again = [first[key] for key in keys if key in first]
        if again:
            raise ValueError(
                f"{len(again)} of {len(own)} trees of {store.folder} are those of {again[0].folder}: both were sampled "
                f"with the same settings and seed {store.metadata.sampling.get('seed')}, and would count twice. Give "
                "one of the two, or collect one of them anew with another seed."
            )
        first |= dict.fromkeys(keys, store)


def reward_units(trees: Sequence[LabelledTree]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and standard deviation of the leaf targets of the training trees, `[M]` each; 1 where nothing varies."""
    leaves = np.concatenate([item.targets[item.tree.leaves()] for item in trees])
    scale = leaves.std(axis=0)
    return leaves.mean(axis=0), np.where(scale > 0, scale, 1.0)


@torch.no_grad()
def set_reward_units(function: ValueModel | ValueHead, mean: Iterable[float], scale: Iterable[float]) -> None:
    """Standardise by another mean and scale `[M]` each, changing the output layer so that values stay the same.

    An output layer still at zero, of a new value model, keeps saying the mean: now the new one.
    """
    old_mean, old_scale = function.config.reward_units(function.device)
    function.config.reward_mean, function.config.reward_scale = list(map(float, mean)), list(map(float, scale))
    function.config.tilt_scale = function.config.log_prob_weight = None  # found for other values
    new_mean, new_scale = function.config.reward_units(function.device)
    layer = function.head if isinstance(function, ValueModel) else function.out
    if layer.weight.any() or layer.bias.any():
        layer.weight.copy_(layer.weight.float() * (old_scale / new_scale)[:, None])
        layer.bias.copy_((old_mean + old_scale * layer.bias.float() - new_mean) / new_scale)


def recipe_of(config: dict[str, Any], stores: Sequence[TreeStore]) -> dict[str, Any]:
    """What a value function records of its training: settings without the places of files, data and versions.

    Args:
        config: settings as a dictionary. A folder in it becomes its name; that of the backbone, the base model's name.
        stores: where the trees came from, if from any. "data" is the last one's, the newest policy's; "earlier_data"
            the others'.
    """
    settings = {name: value for name, value in config.items() if name not in _PLACES}
    for name in ("backbone", "model"):
        if stores and name in settings and Path(str(settings[name])).is_dir():
            settings[name] = stores[-1].metadata.model
    data = [{"model": m.model, "sampling": m.sampling, "policy": m.policy} for m in (s.metadata for s in stores)]
    recipe: dict[str, Any] = _without_folders(settings)
    if data:
        recipe["data"] = data[-1]
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
