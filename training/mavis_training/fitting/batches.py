"""Batches of labelled trees: sequences grouped by length up to a token budget, and what is read back to validate."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mavis_logits.backbone.cache import Windows

from ..trees.data import LabelledTree
from ..trees.packing import (
    Example,
    Layout,
    node_examples,
    nodes_read,
    pack,
    packed_inputs,
    path_readings,
    plain_inputs,
    term_inputs,
    tree_example,
)

Packing = Literal["trees", "nodes"]


class GroupedBatches(torch.utils.data.Sampler[list[int]]):
    """Batches of sequences of similar length, cut where one more would make them too large.

    The batches are the same in every epoch but for sequences of equal length, which are dealt anew; their order is
    shuffled. So an epoch always has the same number of steps, and padding is as small as can be.

    Args:
        lengths: `[S]`, tokens of each sequence.
        tokens: the most padded tokens of a batch, its longest sequence times their number; a sequence longer than that
            is alone. None for no limit.
        sequences: the most sequences of a batch; None for no limit.
        seed: of the order; None keeps batches in order of length.

    Raises:
        ValueError: no limit, or one below 1.
    """

    def __init__(
        self, lengths: Sequence[int], tokens: int | None = None, sequences: int | None = None, seed: int | None = 0
    ) -> None:
        limits = [limit for limit in (tokens, sequences) if limit is not None]
        if not limits or min(limits) < 1:
            raise ValueError(f"a batch needs a limit of at least 1, got tokens {tokens} and sequences {sequences}.")
        self.lengths, self.seed, self.epoch = np.asarray(lengths), seed, 0
        self.ends: list[int] = []
        ascending = np.sort(self.lengths)
        start = 0
        for index, length in enumerate(ascending):  # ascending, so this one is the longest so far
            count = index - start + 1
            full = (tokens is not None and length * count > tokens) or (sequences is not None and count > sequences)
            if full and count > 1:
                self.ends.append(index)
                start = index
        self.ends.append(len(ascending))

    def __len__(self) -> int:
        """Batches of an epoch."""
        return len(self.ends)

    def set_epoch(self, epoch: int) -> None:
        """Which epoch's order comes next."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        rng = None if self.seed is None else np.random.default_rng([self.seed, self.epoch])
        ties = np.arange(len(self.lengths)) if rng is None else rng.permutation(len(self.lengths))
        ascending = np.lexsort((ties, self.lengths))
        batches = np.split(ascending, self.ends[:-1])
        for number in range(len(batches)) if rng is None else rng.permutation(len(batches)):
            yield batches[number].tolist()


class TrainingSet(torch.utils.data.Dataset[Example]):
    """Training sequences of labelled trees; masks are built when a sequence is asked for.

    Args:
        trees: with their targets.
        kept: per tree, bool `[n]`, the nodes that train.
        packing: "trees": a tree is one sequence; "nodes": a kept node is.
        every_token: of `tree_example`.

    Attributes:
        lengths: tokens of each sequence.
    """

    def __init__(
        self,
        trees: Sequence[LabelledTree],
        kept: Sequence[NDArray[np.bool_]],
        packing: Packing = "trees",
        every_token: bool = False,
    ) -> None:
        self.trees, self.kept, self.every_token = list(trees), list(kept), every_token
        self.plain: list[Example] | None = None
        if packing == "nodes":
            pairs = zip(self.trees, self.kept, strict=True)
            self.plain = [e for item, k in pairs for e in node_examples(item, k, every_token)]
            self.lengths = [len(example.input_ids) for example in self.plain]
        else:
            self.lengths = [
                len(item.tree.prompt_tokens) + int(item.tree.length[nodes_read(item.tree, k)].sum())
                for item, k in zip(self.trees, self.kept, strict=True)
            ]

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Example:
        if self.plain is not None:
            return self.plain[index]
        return tree_example(self.trees[index], self.kept[index], self.every_token)


class ReadingSet(torch.utils.data.Dataset[tuple[int, Any, NDArray[np.int64]]]):
    """Sequences whose values together are those of every token of every tree.

    An item is a tree's index, what to read, and the place `[T]` of each token read in that tree's packed sequence.

    Args:
        trees: held-out trees.
        packing: "trees": one sequence a tree; "nodes": one a leaf.

    Attributes:
        lengths: tokens of each sequence.
        sizes: `[trees]`, tokens of each tree's packed sequence.
    """

    def __init__(self, trees: Sequence[LabelledTree], packing: Packing = "trees") -> None:
        layouts = [pack(item.tree) for item in trees]
        self.sizes = np.array([len(layout) for layout in layouts])
        self.items: list[tuple[int, Any, NDArray[np.int64]]] = []
        for index, layout in enumerate(layouts):
            if packing == "trees":
                self.items.append((index, layout, np.arange(len(layout))))
            else:
                self.items.extend((index, example, where) for example, where in path_readings(layout))
        self.lengths = [len(where) for _, _, where in self.items]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[int, Any, NDArray[np.int64]]:
        return self.items[index]


class Collator:
    """Makes batches of a value model's inputs.

    Args:
        windows: of its backbone (`Backbone.windows`).
        dtype: of its weights, and so of masks.
        packing: what the sequences are.
        pad_token_id: fills the right of shorter sequences.
    """

    def __init__(self, windows: Windows, dtype: torch.dtype, packing: Packing = "trees", pad_token_id: int = 0) -> None:
        self.windows, self.dtype, self.packing, self.pad_token_id = windows, dtype, packing, pad_token_id

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        """Inputs and terms of training sequences."""
        return self._inputs(examples) | term_inputs(examples)

    def readings(self, items: Sequence[tuple[int, Any, NDArray[np.int64]]]) -> dict[str, Any]:
        """Inputs of a `ReadingSet`'s items, with `trees` `[B]` and `places` `[B, T]`, -1 where there is padding."""
        inputs = self._inputs([sequence for _, sequence, _ in items])
        places = torch.full_like(inputs["input_ids"], -1)
        for row, (_, _, where) in enumerate(items):
            places[row, : len(where)] = torch.from_numpy(where)
        return inputs | {"trees": torch.tensor([index for index, _, _ in items]), "places": places}

    def _inputs(self, sequences: Sequence[Example] | Sequence[Layout]) -> dict[str, Any]:
        if self.packing == "trees":
            return packed_inputs(sequences, self.windows, self.dtype, self.pad_token_id)
        return plain_inputs(sequences, self.pad_token_id)  # type: ignore[arg-type]


def collect_values(values: Tensor, batch: dict[str, Tensor], starts: Tensor, into: Tensor, count: Tensor) -> None:
    """Add the values `[B, T, M]` of a batch of readings to the trees' flat rows.

    Args:
        values: of the batch.
        batch: `trees` and `places` of `Collator.readings`.
        starts: `[trees]`, the first row of each tree.
        into: `[rows, M]`, sums of values.
        count: `[rows]`, how many were added.
    """
    real = batch["places"] >= 0
    rows = (starts[batch["trees"]][:, None] + batch["places"])[real]
    into.index_add_(0, rows, values[real].to(into.dtype))
    count.index_add_(0, rows, torch.ones_like(rows, dtype=count.dtype))
