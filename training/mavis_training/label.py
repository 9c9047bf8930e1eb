"""Add the reward of every finished completion to a tree store, objective by objective."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from mavis_logits.backbone.fingerprint import tokenizer_fingerprint
from mavis_logits.models import load_tokenizer

from .base.ranks import join
from .rewards.identity import object_digest
from .rewards.load import Reward, RewardSpec, compute_rewards, describe_spec, load_reward, reward_digest, split_spec
from .trees.tree import Tree, leaf_texts
from .trees.tree_store import Shard, TreeStore


@dataclass(frozen=True)
class LabelConfig:
    """Which rewards to add to which trees.

    Attributes:
        store: folder of the tree store.
        rewards: reward by objective: folder or Hub id of a sequence classifier, or `module:function`; or a mapping of
            `model` and how to read it (label, template, output, ...: `ClassifierSettings`).
        tokenizer: turns tokens into text; None for that of the model which the store names.
        device: where reward models run; None for a GPU if there is one, of several processes each its own.
        fresh: compute anew the rewards of these objectives that another reward gave, or another text of its function or
            other weights of its model. Without it they are an error.
        keep: keep rewards that another text of the function, or other weights of the model, gave, and compute the
            missing ones only: after mending what raised, say.
    """

    store: str
    rewards: Mapping[str, str | dict[str, Any]]
    tokenizer: str | None = None
    device: str | None = None
    fresh: bool = False
    keep: bool = False

    def __post_init__(self) -> None:
        if self.fresh and self.keep:
            raise ValueError("fresh computes rewards anew and keep keeps them: give one of the two.")
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
    load: Callable[[RewardSpec], Reward] | None = None,
) -> TreeStore:
    """Label every shard that has no rewards yet. Each shard and objective is written when done; a rerun continues.

    Several processes (`mavis_training.base.ranks`) share the shards.

    Args:
        config: what to label.
        rewards: reward functions by objective, in place of those that `config.rewards` names.
        tokenizer: in place of the one that `config.tokenizer` names.
        load: loads what `config.rewards` names; `load_reward` by default.

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
    given, read = rewards or {}, load or partial(load_reward, device=ranks.device)
    digests = {
        name: object_digest(given[name]) if name in given else reward_digest(spec)
        for name, spec in config.rewards.items()
    }
    todo = ranks.agree(lambda: {name: unlabelled(store, config, name, digests[name]) for name in config.rewards})
    for objective, spec in config.rewards.items():
        shards = ranks.share(todo[objective])
        if shards:
            reward = given[objective] if objective in given else read(spec)
            source = describe_spec(spec), digests[objective]
            _label_objective(shards, objective, reward, source, tokenizer, quiet=not ranks.is_main)
    ranks.wait()
    if ranks.is_main:
        for objective in config.rewards:
            tell_sameness(store, objective)
    return store


def unlabelled(store: TreeStore, config: LabelConfig, objective: str, digest: str | None) -> list[Shard]:
    """The shards that have no rewards of `objective` yet, or with `config.fresh` none of this reward's.

    Args:
        store: the trees.
        config: how they are labelled.
        objective: one of its rewards.
        digest: of that reward's text or weights; None if not known.

    Raises:
        ValueError: some have rewards that another reward computed, or another version of this one; the message says how
            to replace them, or to keep both.
    """
    source, todo = describe_spec(config.rewards[objective]), []
    for shard in store.shards():
        found, version = shard.reward_source(objective), shard.reward_digest(objective)
        edited = None not in (version, digest) and version != digest
        if found is None:
            todo.append(shard)
        elif found == source and (not edited or config.keep):
            continue
        elif config.fresh:
            todo.append(shard)
        elif found != source:
            every = shard.path.with_name(f"trees-*.reward-{objective}.h5")
            raise ValueError(
                f"{shard.path} has rewards for {objective!r} from {found!r}, this run has {source!r}. To replace them, "
                f"run again with --fresh true, or delete {every}; to keep both, give this objective another name."
            )
        else:
            raise ValueError(
                f"{shard.path} has rewards for {objective!r} from {source!r} as it was: its text or weights have "
                f"changed since (digest {version}, now {digest}). To compute all anew, run again with --fresh true; to "
                "keep these because they would be the same, with --keep true; to keep both, give this objective "
                "another name."
            )
    return todo


def sameness(rewards: Sequence[NDArray[np.float64]]) -> Literal["constant", "by prompt"] | None:
    """Whether rewards, an array a tree, are all the same, or the same within every tree that has several; else None."""
    rewards = [each for each in rewards if len(each)]
    if sum(map(len, rewards)) < 2:
        return None
    if np.ptp(np.concatenate(rewards)) == 0:
        return "constant"
    by_prompt = any(len(each) > 1 for each in rewards) and all(np.ptp(each) == 0 for each in rewards)
    return "by prompt" if by_prompt else None


def tell_sameness(store: TreeStore, objective: str) -> None:
    """Warn of rewards that are the same for every completion, or for every completion of a prompt: nothing to learn."""
    rewards = store.rewards(objective)
    same = sameness(rewards)
    if same == "constant":
        values = np.concatenate(rewards)
        warnings.warn(
            f"The reward {objective!r} is constant: {values[0]:g} for all {len(values)} completions of {store.folder}. "
            "There is nothing to learn from it: check what the function looks at.",
            stacklevel=2,
        )
    elif same == "by prompt":
        warnings.warn(
            f"The reward {objective!r} is the same for all completions of a prompt, in all {len(rewards)} trees of "
            f"{store.folder}: it depends on the prompt alone, and nothing that a model writes can change it.",
            stacklevel=2,
        )


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
    source: tuple[str, str | None],
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
                    f"{shard.path} could not be labelled for {objective!r} with {source[0]}: {told}\n"
                    "The shards labelled before it are kept: mend the reward and run the same command again (with "
                    "--keep true if its text was edited and those are still right)."
                ) from (error.__cause__ or error)
            shard.reward_path(objective).unlink(missing_ok=True)  # fresh: of another reward
            shard.write_rewards(objective, rewards, *source)
            leaves += sum(map(len, rewards))
            progress.set_postfix_str(f"{leaves / (time.monotonic() - started):.0f} leaves/s")
