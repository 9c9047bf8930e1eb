"""Add the reward of every finished completion to a tree store, objective by objective."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from mavis_logits.demo.smollm2 import MODEL_ID, converted_folder
from mavis_logits.fingerprint import tokenizer_fingerprint

from .ranks import join
from .rewards import Reward, RewardSpec, compute_rewards, describe_spec, load_reward, split_spec
from .tree import Tree
from .tree_store import Shard, TreeStore


@dataclass(frozen=True)
class LabelConfig:
    """Which rewards to add to which trees.

    Attributes:
        store: folder of the tree store.
        rewards: reward by objective: folder or Hub id of a sequence classifier, or `module:function`; or a mapping of
            `model` and how to read it (label, template, output, ...: `ClassifierSettings`).
        tokenizer: turns tokens into text; None for that of the model which the store names.
        device: where reward models run; of several processes on "cuda" each has its own GPU.
    """

    store: str
    rewards: Mapping[str, str | dict[str, Any]]
    tokenizer: str | None = None
    device: str = "cpu"

    def __post_init__(self) -> None:
        if not self.rewards:
            raise ValueError(
                "rewards is empty: give at least one objective and its reward, e.g. helpful: path/to/model."
            )
        for spec in self.rewards.values():
            split_spec(spec)


def label(
    config: LabelConfig,
    rewards: Mapping[str, Reward] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> TreeStore:
    """Label every shard that has no rewards yet. Each shard and objective is written when done; a rerun continues.

    Several processes (`mavis_training.ranks`) share the shards.

    Args:
        config: what to label.
        rewards: reward functions by objective, in place of those that `config.rewards` names.
        tokenizer: in place of the one that `config.tokenizer` names.

    Raises:
        ValueError: another tokenizer than the trees were sampled with, rewards of the same name from another source, or
            a reward that cannot be loaded, fails, or returns a wrong count or a number that is not finite. What was
            labelled before stays.
        OSError: there is no store, a corrupt shard, or no room for the rewards.
    """
    store = TreeStore.open(config.store)
    if rewards is not None and (missing := config.rewards.keys() - rewards.keys()):
        raise ValueError(f"rewards has {sorted(rewards)}, and none for {sorted(missing)}: give a function for each.")
    tokenizer = tokenizer or load_tokenizer(config.tokenizer or store.metadata.model)
    store.require_origin(tokenizer_fingerprint(tokenizer))
    ranks = join(config.device)
    todo = ranks.agree(lambda: {name: unlabelled(store, name, spec) for name, spec in config.rewards.items()})
    for objective, spec in config.rewards.items():
        shards = ranks.share(todo[objective])
        if shards:
            reward = rewards[objective] if rewards is not None else load_reward(spec, str(ranks.device))
            _label_objective(shards, objective, reward, describe_spec(spec), tokenizer, quiet=not ranks.is_main)
    ranks.wait()
    return store


def unlabelled(store: TreeStore, objective: str, spec: RewardSpec) -> list[Shard]:
    """The shards that have no rewards of `objective` yet.

    Raises:
        ValueError: some have rewards that another reward than `spec` computed; the message says how to replace them.
    """
    source, todo = describe_spec(spec), []
    for shard in store.shards():
        found = shard.reward_source(objective)
        if found is None:
            todo.append(shard)
        elif found != source:
            every = shard.path.with_name(f"trees-*.reward-{objective}.h5")
            raise ValueError(
                f"{shard.path} has rewards for {objective!r} from {found!r}, this run has {source!r}. To replace them, "
                f"delete {every} and run again; to keep both, give this objective another name."
            )
    return todo


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
    prompt_ids = [tree.prompt_id for tree, n in zip(trees, counts, strict=True) for _ in range(n)]
    completions = [text for group in texts for text in group]
    completion_ids = [tree.completion(leaf).tolist() for tree in trees for leaf in tree.leaves()]
    values = compute_rewards(reward, prompts, completions, columns, name, prompt_ids, completion_ids)
    return np.split(np.array(values, dtype=np.float64), np.cumsum(counts)[:-1])


def _label_objective(
    shards: list[Shard],
    objective: str,
    reward: Reward,
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    quiet: bool,
) -> None:
    started, leaves = time.monotonic(), 0
    with tqdm(shards, desc=f"label {objective}", unit="shard", disable=quiet) as progress:
        for shard in progress:
            trees = shard.trees()
            try:
                rewards = label_trees(trees, reward, objective, tokenizer)
            except Exception as error:  # a reward function is a user's: anything may come out of it
                told = error if isinstance(error, ValueError) else repr(error)
                raise ValueError(
                    f"{shard.path} could not be labelled for {objective!r} with {source}: {told}\n"
                    "The shards labelled before it are kept: mend the reward and run the same command again."
                ) from error
            shard.write_rewards(objective, rewards, source)
            leaves += sum(map(len, rewards))
            progress.set_postfix_str(f"{leaves / (time.monotonic() - started):.0f} leaves/s")
