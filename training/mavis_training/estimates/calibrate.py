"""Short real runs on a few prompts and trees, in a temporary folder: what the estimates of a dry run rest on."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mavis_logits.models import load_chat_model, load_tokenizer

from ..base.ranks import join
from ..base.settings import torch_dtype
from ..collect import CollectConfig, collect
from ..fitting.states import compute_states
from ..label import LabelConfig, label
from ..rewards.load import Reward, RewardSpec, describe_spec, load_reward
from ..train_head import TrainHeadConfig, train_head
from ..train_model import TrainModelConfig, train_model
from ..trees.data import is_held_out
from ..trees.tree import Tree
from ..trees.tree_store import StoreMetadata, TreeStore

T = TypeVar("T")
Base = tuple[PreTrainedModel, PreTrainedTokenizerBase]
# Prompts that are sampled, and trees that are labelled and trained on. Heads read trees fast, but an epoch has a cost
# of its own (validation projects the embeddings of the whole vocabulary): more trees, so that it weighs less.
PROMPTS, TREES, HEAD_TREES = 8, 8, 32
# Arguments of `TrainingArguments` that would make a short run long, or tell others about it.
_NOT_NOW = {"max_steps", "num_train_epochs", "report_to", "run_name", "push_to_hub", "output_dir"}


@dataclass(frozen=True)
class Sample:
    """What a short run did and took.

    Attributes:
        amount: work done, in any unit.
        seconds: that grow with the amount.
        bytes: written, that grow with the amount.
        fixed_seconds: that do not grow, such as loading and saving.
        fixed_bytes: that do not grow, such as the size of a value function.
    """

    amount: float
    seconds: float
    bytes: float = 0.0
    fixed_seconds: float = 0.0
    fixed_bytes: float = 0.0


@dataclass(frozen=True)
class Counts:
    """How large some trees are: trees, leaves, new tokens, and tokens of the packed sequences (with prompts)."""

    trees: float
    leaves: float
    tokens: float
    packed: float

    @classmethod
    def of(cls, trees: Sequence[Tree]) -> Counts:
        """Of these trees."""
        tokens = sum(len(tree.tokens) for tree in trees)
        prompts = sum(len(tree.prompt_tokens) for tree in trees)
        return cls(len(trees), sum(len(tree.leaves()) for tree in trees), tokens, tokens + prompts)

    def for_trees(self, trees: float) -> Counts:
        """Of so many trees like these."""
        return Counts(*(value * trees / self.trees for value in asdict(self).values()))

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(a + b for a, b in zip(asdict(self).values(), asdict(other).values(), strict=True)))


def spread(items: Sequence[T], count: int) -> list[T]:
    """At most `count` of the items, evenly spaced."""
    if len(items) <= count:
        return list(items)
    return [items[int(i)] for i in np.linspace(0, len(items) - 1, count)]


class Calibration:
    """Runs the real functions on small samples; everything lies in one temporary folder.

    Args:
        folder: for its files.
        model: the base model's name, loaded when first needed.
        dtype: of its weights.
        device: where it runs; None for a GPU if there is one.
    """

    def __init__(self, folder: Path, model: str = "smollm2", dtype: str = "float32", device: str | None = None) -> None:
        self.folder, self.model, self.dtype, self.device = folder, model, dtype, device
        self._count = 0
        self._base: Base | None = None
        self._rewards: dict[str, Reward] = {}

    @property
    def base(self) -> Base:
        """The base model and its tokenizer."""
        if self._base is None:
            model, tokenizer = load_chat_model(self.model, torch_dtype(self.dtype))
            where = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
            self._base = model.to(where).eval(), tokenizer  # type: ignore[arg-type]
        return self._base

    def place(self) -> Path:
        """A new name in the folder."""
        self._count += 1
        return self.folder / f"{self._count:03d}"

    def collect(self, config: CollectConfig, rows: Sequence[dict[str, Any]]) -> tuple[Sample, TreeStore]:
        """Sample trees of a few prompts, as many side by side as a shard has. The amount is trees."""
        count = min(config.prompts_per_shard, PROMPTS)
        prompts = self.place()
        prompts.write_text("\n".join(json.dumps(row) for row in spread(rows, count)), encoding="utf-8")
        small = replace(config, prompts=str(prompts), store=str(self.place()), limit=None, prompts_per_shard=count)
        base = self.base if config.backend == "transformers" else (None, None)
        started = time.monotonic()
        store = collect(small, *base)
        seconds = time.monotonic() - started
        return Sample(len(store), seconds, sum(shard.path.stat().st_size for shard in store.shards())), store

    def label(
        self, store: TreeStore, rewards: Mapping[str, RewardSpec], tokenizer: str | None, device: str | None
    ) -> dict[str, Sample]:
        """Label all trees of a small store. The amounts are leaves."""
        reader = (
            self._base[1] if self._base and tokenizer is None else load_tokenizer(tokenizer or store.metadata.model)
        )
        leaves, samples = Counts.of(list(store)).leaves, {}
        for objective, spec in rewards.items():
            name = describe_spec(spec)
            if name not in self._rewards:
                self._rewards[name] = load_reward(spec, join(device).device)
            config = LabelConfig(str(store.folder), {objective: spec}, device=device)  # type: ignore[dict-item]
            started = time.monotonic()
            label(config, {objective: self._rewards[name]}, reader)
            size = sum(shard.reward_path(objective).stat().st_size for shard in store.shards())
            samples[objective] = Sample(leaves, time.monotonic() - started, size)
        return samples

    def measure(self, amount: float, work: Callable[[Path], object]) -> Sample:
        """Time any work of this amount, which writes into the folder that it is given."""
        folder = self.place()
        started = time.monotonic()
        work(folder)
        return Sample(amount, time.monotonic() - started, size_of(folder))

    def copy(
        self,
        metadata: StoreMetadata,
        labelled: Sequence[tuple[Tree, NDArray[np.float64] | None]],
        objectives: Sequence[str],
    ) -> TreeStore:
        """A small store of these trees, and of their rewards `[leaves, M]` for M objectives."""
        store = TreeStore.create(self.place(), metadata)
        shard = store.write([tree for tree, _ in labelled])
        assert shard is not None
        for m, objective in enumerate(objectives):
            shard.write_rewards(
                objective, [rewards[:, m] for _, rewards in labelled if rewards is not None], "calibration"
            )
        return store

    def train_model(self, config: TrainModelConfig, store: TreeStore) -> tuple[Sample, Path]:
        """Train a value model on a small store for 1 and for 3 epochs. The amount is trees times epochs."""
        trainer = {name: value for name, value in config.trainer.items() if name not in _NOT_NOW}
        small = replace(config, **_sampled(config, store), trainer=trainer)
        seconds, outputs = {}, {}
        for epochs in (1, 3):
            outputs[epochs] = self.place()
            started = time.monotonic()
            train_model(replace(small, output=str(outputs[epochs]), epochs=epochs))
            seconds[epochs] = time.monotonic() - started
        return _per_epoch(len(store), seconds, outputs[3]), outputs[3]

    def train_head(self, config: TrainHeadConfig, store: TreeStore) -> tuple[Sample, Sample, Path]:
        """Compute hidden states, then train a head for 1 and for 3 epochs; a `Sample` each. The amounts are trees (the
        states'), and trees times epochs."""
        model, states, output = self.base[0], self.place(), self.place()
        started = time.monotonic()
        compute_states(store, model, states, config.layer_of(model))
        pass_over = Sample(len(store), time.monotonic() - started, size_of(states))
        small = replace(config, **_sampled(config, store), states=str(states), output=str(output), patience=3)
        seconds = {}
        for epochs in (1, 3):
            started = time.monotonic()
            train_head(replace(small, epochs=epochs), model)
            seconds[epochs] = time.monotonic() - started
        return pass_over, _per_epoch(len(store), seconds, output), output


def size_of(folder: Path) -> int:
    """Bytes of all files under a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _per_epoch(trees: int, seconds: Mapping[int, float], output: Path) -> Sample:
    """From the times of 1 and 3 epochs: what an epoch takes, and what loading, measuring and saving take."""
    epoch = max(0.0, (seconds[3] - seconds[1]) / 2)
    return Sample(trees, epoch, fixed_seconds=max(0.0, seconds[1] - epoch), fixed_bytes=size_of(output))


def _sampled(config: TrainModelConfig | TrainHeadConfig, store: TreeStore) -> dict[str, Any]:
    """Changes by which a trainer reads a small store, whose validation share must leave trees on both sides."""
    trees = list(store)
    shares = sorted(np.linspace(0.01, 0.99, 99), key=lambda share: abs(share - config.validation_share))
    for share in shares:
        if 0 < sum(is_held_out(tree, float(share)) for tree in trees) < len(trees):
            return {"store": str(store.folder), "validation_share": float(share)}
    raise ValueError(
        f"a calibration needs at least two trees of different prompts, there are {len(trees)}: collect more."
    )
