"""The folder of HDF5 shards that keeps trees of rollouts and their rewards.

A store is a folder:

    metadata.json                      what the trees were sampled with (StoreMetadata)
    trees-00000.h5, trees-00001.h5     shards: flat columns and offsets, compressed, checksummed
    trees-00000.reward-helpful.h5      the leaf rewards of one objective for one shard, added later by `label`

Every file appears under its name only when whole, and is never changed afterwards.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from mavis_logits.backbone.fingerprint import Identity

from ..base.files import TEMPORARY_SUFFIX, read_json, write_json
from .columns import FORMAT_VERSION, attributes_of, read_columns, write_columns
from .sample import Sample
from .tree import NODE_DTYPES, Tree

__all__ = ["FORMAT_VERSION", "Shard", "StoreMetadata", "Tree", "TreeStore"]

METADATA_FILE = "metadata.json"
_PACKED = 90_000  # numbers from here on are of packed shards: no collection plans so many
# Fields that may differ between the runs that fill one store.
_DESCRIPTIVE_FIELDS = frozenset({"created", "versions", "weights_sketch"})
_MAY_BE_UNKNOWN = frozenset({"weights_fingerprint", "reference"})
_SHARD_NAME = re.compile(r"trees-(\d{5})\.h5")
_ALL = Sample()
_OBJECTIVE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.]*")


@dataclass
class StoreMetadata:
    """What a store's trees were sampled with.

    Attributes:
        model: base model id or a name for it.
        tokenizer_fingerprint: of the base model's tokenizer (`fingerprint.tokenizer_fingerprint`).
        sampling: max_new_tokens, layers, root_children, children, temperature, seed, dtype: what shapes the samples.
        policy: steering settings of pi_gen; empty when pi_gen is the reference.
        reference: pi_ref, as `Reference.record` says it; None for stores of versions that did not record it.
        revision: base model revision, if it has one.
        weights_fingerprint, weights_sketch: of the base model (`fingerprint.Identity`); None if not known.
        versions: library versions of the run that created the store (not compared on reopening).
        created: ISO time of creation (not compared on reopening).
        format_version: of the files.
    """

    model: str
    tokenizer_fingerprint: str
    sampling: dict[str, Any]
    policy: dict[str, Any] = field(default_factory=dict)
    reference: dict[str, Any] | None = None
    revision: str | None = None
    weights_fingerprint: str | None = None
    weights_sketch: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    format_version: int = FORMAT_VERSION

    def has_weights_of(self, other: StoreMetadata) -> bool:
        """Whether both are known to be of one base model, whatever its name or folder is."""
        return self.weights_fingerprint is not None and self.weights_fingerprint == other.weights_fingerprint

    @classmethod
    def from_dict(cls, content: dict[str, Any], source: str) -> StoreMetadata:
        """Read metadata written by `asdict`; `source` names the file in errors.

        Raises:
            ValueError: a newer format, or a missing or unknown field.
        """
        version = content.get("format_version") if isinstance(content, dict) else None
        if not isinstance(version, int):
            raise ValueError(f"{source} is not the metadata of a tree store: it has no format_version.")
        if version > FORMAT_VERSION:
            raise ValueError(
                f"{source} has format_version {version}, this mavis-logits reads up to {FORMAT_VERSION}: upgrade it."
            )
        try:
            return cls(**content)
        except TypeError as error:
            raise ValueError(f"{source} is not the metadata of a tree store: {error}.") from error


@dataclass(frozen=True)
class Shard:
    """One whole file of trees, or a sample of what is in it; trees are read when asked for."""

    path: Path
    sample: Sample = _ALL

    def trees(self) -> list[Tree]:
        """All trees of the shard, or those of the sample.

        Raises:
            OSError: the file is truncated or corrupt.
            ValueError: it is of a newer format.
        """
        return [self.sample.thin(tree) for tree in self._whole() if self.sample.has(tree)]

    def _whole(self) -> list[Tree]:
        return _unpack(read_columns(self.path))

    def reward_path(self, objective: str) -> Path:
        """Where the rewards of `objective` for this shard lie, once they exist."""
        if not _OBJECTIVE_NAME.fullmatch(objective):
            raise ValueError(
                f"objective {objective!r}: use letters, digits, '_' and '.' only; it becomes part of a file name."
            )
        return self.path.with_name(f"{self.path.stem}.reward-{objective}.h5")

    def has_rewards(self, objective: str) -> bool:
        """Whether `objective` has been labelled for this shard."""
        return self.reward_path(objective).exists()

    def reward_source(self, objective: str) -> str | None:
        """What computed the rewards of `objective`; None if there are none.

        Raises:
            OSError: the reward file is truncated or corrupt.
            ValueError: it is of a newer format.
        """
        path = self.reward_path(objective)
        return attributes_of(path).get("source", "") if path.exists() else None

    def reward_digest(self, objective: str) -> str | None:
        """What `write_rewards` was told of the source's own text or weights; None if nothing. Raises as
        `reward_source`."""
        path = self.reward_path(objective)
        return attributes_of(path).get("source_digest") if path.exists() else None

    def write_rewards(
        self, objective: str, rewards: Sequence[NDArray[np.float64]], source: str, source_digest: str | None = None
    ) -> None:
        """Add the leaf rewards of one objective.

        Args:
            objective: its name.
            rewards: per tree, one reward per leaf in the order of `Tree.leaves()`.
            source: what computed them (kept as an attribute).
            source_digest: of its text or weights (`mavis_training.rewards.reward_digest`), if known.

        Raises:
            ValueError: a count that does not fit the trees, or a reward that is not finite.
        """
        expected = [len(tree.leaves()) for tree in self._whole()]
        if [len(r) for r in rewards] != expected:
            raise ValueError(
                f"{self.path.name}: {objective!r} has {sum(map(len, rewards))} rewards for {len(rewards)} trees, "
                f"expected {sum(expected)} (one a leaf) for {len(expected)}, tree by tree."
            )
        flat = np.concatenate(rewards).astype(np.float64)
        if not np.isfinite(flat).all():
            raise ValueError(
                f"{self.path.name}: {objective!r} has {(~np.isfinite(flat)).sum()} rewards that are NaN or infinite."
            )
        attributes = {"objective": objective, "source": source}
        if source_digest is not None:
            attributes["source_digest"] = source_digest
        write_columns(self.reward_path(objective), {"rewards": flat, "offsets": _offsets(expected)}, attributes)

    def rewards(self, objective: str) -> list[NDArray[np.float64]]:
        """Leaf rewards of `objective`, one array per tree in the order of `Tree.leaves()`.

        Raises:
            ValueError: the shard has not been labelled for it.
            OSError: the reward file is truncated or corrupt.
        """
        if self.sample == _ALL:
            return self._whole_rewards(objective)
        return [own[:, 0] for _, own in self.labelled([objective])]

    def _whole_rewards(self, objective: str) -> list[NDArray[np.float64]]:
        path = self.reward_path(objective)
        if not path.exists():
            raise ValueError(f"{self.path.name} has no rewards for {objective!r}: run `mavis label` for it first.")
        columns = read_columns(path)
        return [columns["rewards"][a:b] for a, b in itertools.pairwise(columns["offsets"])]

    def labelled(self, objectives: Sequence[str]) -> Iterator[tuple[Tree, NDArray[np.float64]]]:
        """Iterate over trees with their leaf rewards `[leaves, M]` for M objectives. Raises as `rewards`."""
        columns = [self._whole_rewards(objective) for objective in objectives]
        for i, tree in enumerate(self._whole()):
            if self.sample.has(tree):
                leaves = self.sample.leaves(tree)
                own = np.array([column[i][leaves] for column in columns]).reshape(len(columns), len(leaves))
                yield self.sample.thin(tree), own.T


class TreeStore:
    """A folder of tree shards that were all sampled with the same settings. Use `create` to write, `open` to read."""

    def __init__(self, folder: str | Path, metadata: StoreMetadata, sample: Sample = _ALL) -> None:
        self.folder = Path(folder)
        self.metadata = metadata
        self.sample = sample

    def sampled(self, trees: int | None, answers: int | None) -> TreeStore:
        """This store for reading, as if it held some of its trees only, and of each some of its answers.

        Args:
            trees: prompts, at most; None for all.
            answers: leaves of a tree, at most; None for all.

        Raises:
            ValueError: as `Sample.of`.
        """
        if trees is None and answers is None:
            return self
        prompts = () if trees is None else self.prompt_ids()  # which reads all trees
        return TreeStore(self.folder, self.metadata, Sample.of(prompts, trees, answers))

    @classmethod
    def create(cls, folder: str | Path, metadata: StoreMetadata) -> TreeStore:
        """Begin a store, or go on with one begun under the same metadata. Leftovers of a killed run are removed.

        Raises:
            ValueError: the folder holds a store sampled with other settings; the message names the field.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(f"*{TEMPORARY_SUFFIX}"):
            leftover.unlink()
        path = folder / METADATA_FILE
        if not path.exists():
            write_json(path, asdict(metadata))
        store = cls.open(folder)
        store.require_same(metadata)
        return store

    @classmethod
    def open(
        cls, folder: str | Path, tokenizer_fingerprint: str | None = None, weights_fingerprint: str | None = None
    ) -> TreeStore:
        """Open a store for reading.

        Args:
            folder: the store.
            tokenizer_fingerprint: if given, the tokenizer that the reader is about to use.
            weights_fingerprint: if given, the base model that the reader is about to use.

        Raises:
            OSError: there is no store in `folder`.
            ValueError: a newer format, or trees made with another tokenizer or base model.
        """
        path = Path(folder) / METADATA_FILE
        if not path.exists():
            raise FileNotFoundError(
                f"{folder} is not a tree store (it has no {METADATA_FILE}): give the folder that `mavis collect` wrote."
            )
        store = cls(folder, StoreMetadata.from_dict(read_json(path), str(path)))
        store.require_origin(tokenizer_fingerprint, weights_fingerprint)
        return store

    def require_origin(self, tokenizer_fingerprint: str | None = None, weights_fingerprint: str | None = None) -> None:
        """Raise `ValueError` if the trees were made with another tokenizer or base model; None: not known."""
        folder, metadata = self.folder, self.metadata
        if tokenizer_fingerprint not in (None, metadata.tokenizer_fingerprint):
            raise ValueError(
                f"{folder} was sampled from {metadata.model} with tokenizer {metadata.tokenizer_fingerprint}, "
                f"but the tokenizer given is {tokenizer_fingerprint}: use the same tokenizer, or collect new trees."
            )
        if len({weights_fingerprint, metadata.weights_fingerprint} - {None}) == 2:
            raise ValueError(
                f"{folder} was sampled from {metadata.model} with weights {metadata.weights_fingerprint}, but the base "
                f"model given has weights {weights_fingerprint}: give that model, or collect new trees from this one."
            )

    def require_base(self, model: nn.Module) -> None:
        """Raise `ValueError` if the trees were sampled from another base model than `model`, as far as is known."""
        metadata, identity = self.metadata, Identity(model)
        difference = identity.difference(metadata.weights_fingerprint, metadata.weights_sketch)
        if difference is not None:
            raise ValueError(
                f"{self.folder} was sampled from {metadata.model} with weights {metadata.weights_fingerprint}, but the "
                f"base model given has weights {identity.fingerprint}: give that model, or collect new trees from this "
                f"one. What is different: {difference}."
            )

    def require_same(self, metadata: StoreMetadata) -> None:
        """Refuse to mix trees sampled under different settings.

        Raises:
            ValueError: this store was begun under others; the message names the field.
        """
        for name in (f.name for f in fields(StoreMetadata) if f.name not in _DESCRIPTIVE_FIELDS):
            # Through JSON, so that tuples and lists compare equal.
            old, new = json.loads(json.dumps([getattr(self.metadata, name), getattr(metadata, name)]))
            unknown = name in _MAY_BE_UNKNOWN and None in (old, new)
            unknown |= name == "model" and self.metadata.has_weights_of(metadata)
            if old != new and not unknown:
                raise ValueError(
                    f"{self.folder} was begun with {name} = {old!r}, this run has {new!r}: "
                    "use another folder or the same settings."
                )

    def shards(self) -> list[Shard]:
        """The whole shards, in the order of their numbers."""
        paths = [path for path in sorted(self.folder.iterdir()) if _SHARD_NAME.fullmatch(path.name)]
        return [Shard(path, self.sample) for path in paths]

    def write(self, trees: Sequence[Tree], number: int | None = None) -> Shard | None:
        """Add trees as one new shard, which appears only when whole. No trees: nothing is written.

        Args:
            trees: what to write.
            number: of the shard, if it has been planned (`free_numbers`); None for the one after the last.
        """
        if not trees:
            return None
        number = max(self._numbers(), default=-1) + 1 if number is None else number
        path = self.folder / f"trees-{number:05d}.h5"
        write_columns(path, _pack(trees), {"metadata": json.dumps(asdict(self.metadata))})
        return Shard(path)

    def pack(self, size: int, rest: bool = False) -> None:
        """Put the trees of small shards together in shards of `size`: an eighth of the bytes, and fewer files.

        Killed at any instant, another call goes on; nothing is lost, and nothing is there twice after it. A collection
        that is running may go on. Shards with rewards stay as they are: rewards are kept shard by shard.

        Args:
            size: trees of a packed shard; those that have as many stay.
            rest: pack what is left over, too; else it stays in small shards.
        """
        ids = {shard: {tree.prompt_id for tree in shard.trees()} for shard in self.shards()}
        ids = {shard: own for shard, own in ids.items() if not self._is_labelled(shard)}
        small: list[Shard] = []
        seen: set[str] = set()
        for shard in sorted(ids, key=lambda shard: -len(ids[shard])):
            if ids[shard] <= seen:  # of a run that was killed after it had packed them
                shard.path.unlink()
            elif len(ids[shard]) < size:
                small.append(shard)
            seen |= ids[shard]
        small.sort(key=lambda shard: shard.path)
        waiting: list[Shard] = []
        trees: list[Tree] = []
        for shard in small:
            waiting, trees = [*waiting, shard], [*trees, *shard.trees()]
            if len(trees) >= size or (rest and shard is small[-1] and len(waiting) > 1):
                taken = self._numbers()
                self.write(trees, next(number for number in itertools.count(_PACKED) if number not in taken))
                for written in waiting:
                    written.path.unlink()
                waiting, trees = [], []

    def _is_labelled(self, shard: Shard) -> bool:
        return any(self.folder.glob(f"{shard.path.stem}.reward-*.h5"))

    def free_numbers(self) -> Iterator[int]:
        """Numbers that no shard has, from the smallest, without end."""
        taken = self._numbers()
        return (number for number in itertools.count() if number not in taken)

    def _numbers(self) -> set[int]:
        names = (_SHARD_NAME.fullmatch(shard.path.name) for shard in self.shards())
        return {int(name[1]) for name in names if name}

    def __iter__(self) -> Iterator[Tree]:
        for shard in self.shards():
            yield from shard.trees()

    def __len__(self) -> int:
        """Number of trees."""
        return sum(len(shard.trees()) for shard in self.shards())

    def prompt_ids(self) -> set[str]:
        """Ids of the prompts that already have a tree."""
        return {tree.prompt_id for tree in self}

    def objectives(self) -> list[str]:
        """Objectives for which every shard has rewards."""
        shards = self.shards()
        if not shards:
            return []
        prefix = f"{shards[0].path.stem}.reward-"
        names = sorted(path.stem.removeprefix(prefix) for path in self.folder.glob(f"{prefix}*.h5"))
        return [name for name in names if all(shard.has_rewards(name) for shard in shards)]

    def rewards(self, objective: str) -> list[NDArray[np.float64]]:
        """Leaf rewards of `objective`, one array per tree, in the order of iteration. Raises as `Shard.rewards`."""
        return [rewards for shard in self.shards() for rewards in shard.rewards(objective)]

    def labelled(self, objectives: Sequence[str]) -> Iterator[tuple[Tree, NDArray[np.float64]]]:
        """Iterate over trees with their leaf rewards, as `Shard.labelled`."""
        for shard in self.shards():
            yield from shard.labelled(objectives)


def _offsets(lengths: Sequence[int]) -> NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)


def _pack(trees: Sequence[Tree]) -> dict[str, NDArray[Any]]:
    """Trees to flat columns: every column is the concatenation over trees, cut by one of the offset arrays."""
    rows = [json.dumps([t.prompt_id, t.prompt, t.columns], ensure_ascii=False).encode() for t in trees]
    columns: dict[str, NDArray[Any]] = {
        "rows": np.frombuffer(b"".join(rows), dtype=np.uint8),
        "row_offsets": _offsets([len(row) for row in rows]),
        "prompt_tokens": np.concatenate([t.prompt_tokens for t in trees]),
        "prompt_offsets": _offsets([len(t.prompt_tokens) for t in trees]),
        "tokens": np.concatenate([t.tokens for t in trees]),
        "token_offsets": _offsets([len(t.tokens) for t in trees]),
        "node_offsets": _offsets([len(t) for t in trees]),
    }
    return columns | {name: np.concatenate([getattr(t, name) for t in trees]) for name in NODE_DTYPES}


def _unpack(columns: dict[str, NDArray[Any]]) -> list[Tree]:
    def cut(name: str, offsets: str, i: int) -> NDArray[Any]:
        return columns[name][columns[offsets][i] : columns[offsets][i + 1]]

    trees = []
    for i in range(len(columns["node_offsets"]) - 1):
        prompt_id, prompt, others = json.loads(cut("rows", "row_offsets", i).tobytes().decode())
        prompt_tokens, tokens = cut("prompt_tokens", "prompt_offsets", i), cut("tokens", "token_offsets", i)
        nodes = {name: cut(name, "node_offsets", i) for name in NODE_DTYPES}
        trees.append(Tree(prompt_id, prompt, prompt_tokens, tokens, **nodes, columns=others))
    return trees
