"""Add the reward of every finished completion to a tree store, objective by objective."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from mavis_logits.demo.smollm2 import MODEL_ID, converted_folder
from mavis_logits.fingerprint import tokenizer_fingerprint

from .rewards import Reward, compute_rewards, load_reward
from .tree import Tree
from .tree_store import Shard, TreeStore


@dataclass(frozen=True)
class LabelConfig:
    """Which rewards to add to which trees.

    Attributes:
        store: folder of the tree store.
        rewards: reward by objective: folder or Hub id of a sequence classifier, or `module:function`.
        tokenizer: turns tokens into text; None for that of the model which the store names.
        device: where reward models run.
    """

    store: str
    rewards: dict[str, str]
    tokenizer: str | None = None
    device: str = "cpu"

    def __post_init__(self) -> None:
        if not self.rewards:
            raise ValueError(
                "rewards is empty: give at least one objective and its reward, e.g. helpful: path/to/model."
            )


def label(
    config: LabelConfig,
    rewards: Mapping[str, Reward] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> TreeStore:
    """Label every shard that has no rewards yet. Each shard and objective is written when done; a rerun continues.

    Args:
        config: what to label.
        rewards: reward functions by objective, in place of those that `config.rewards` names.
        tokenizer: in place of the one that `config.tokenizer` names.

    Raises:
        ValueError: a reward that cannot be loaded, returns a wrong count or a number that is not finite, or another
            tokenizer than the trees were sampled with. What was labelled before stays.
    """
    store = TreeStore.open(config.store)
    tokenizer = tokenizer or load_tokenizer(config.tokenizer or store.metadata.model)
    TreeStore.open(config.store, tokenizer_fingerprint(tokenizer))
    shards = store.shards()
    for objective, spec in config.rewards.items():
        todo = [shard for shard in shards if not shard.has_rewards(objective)]
        if todo:
            reward = rewards[objective] if rewards else load_reward(spec, config.device)
            _label_objective(todo, objective, reward, spec, tokenizer)
    return store


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of `"smollm2"` (the model of the demo), or of a Hub id or folder."""
    return AutoTokenizer.from_pretrained(converted_folder() if name in ("smollm2", MODEL_ID) else name)


def leaf_texts(tree: Tree, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The completion of every leaf as text, without special tokens, in the order of `Tree.leaves()`."""
    completions = [tree.completion(leaf).tolist() for leaf in tree.leaves()]
    return tokenizer.batch_decode(completions, skip_special_tokens=True)


def label_trees(
    trees: list[Tree], reward: Reward, name: str, tokenizer: PreTrainedTokenizerBase
) -> list[NDArray[np.float64]]:
    """Leaf rewards of every tree: one call of `reward` for all of them.

    Columns of the prompt row that all trees have are handed on, repeated for each leaf.
    """
    texts = [leaf_texts(tree, tokenizer) for tree in trees]
    counts = [len(t) for t in texts]
    shared = set.intersection(*(set(tree.columns) for tree in trees)) if trees else set()
    columns = {
        key: [tree.columns[key] for tree, n in zip(trees, counts, strict=True) for _ in range(n)] for key in shared
    }
    prompts = [tree.prompt for tree, n in zip(trees, counts, strict=True) for _ in range(n)]
    values = compute_rewards(reward, prompts, [text for group in texts for text in group], columns, name)
    return np.split(np.array(values, dtype=np.float64), np.cumsum(counts)[:-1])


def _label_objective(
    shards: list[Shard], objective: str, reward: Reward, source: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    started, leaves = time.monotonic(), 0
    with tqdm(shards, desc=f"label {objective}", unit="shard") as progress:
        for shard in progress:
            rewards = label_trees(shard.trees(), reward, objective, tokenizer)
            shard.write_rewards(objective, rewards, source)
            leaves += sum(map(len, rewards))
            progress.set_postfix_str(f"{leaves / (time.monotonic() - started):.0f} leaves/s")
