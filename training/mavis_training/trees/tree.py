"""A tree of completions of one prompt (Algorithm 3), as flat arrays."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

NODE_DTYPES: dict[str, type] = {
    "parent": np.int32,
    "start": np.int32,
    "length": np.int32,
    "logp_gen": np.float64,
    "logp_ref": np.float64,
    "terminal": np.bool_,
}


@dataclass
class Tree:
    """One prompt's tree of completions: n nodes over N new tokens, after P prompt tokens. The prompt is the root (-1).

    Nodes come after their parents. A node holds only the tokens that its parent has not: its completion is the
    concatenation of `tokens[start[i] : start[i] + length[i]]` along the path from the top to it.

    Attributes:
        prompt_id: the prompt row's id.
        prompt: the prompt as the user wrote it (before the chat template).
        prompt_tokens: int32 `[P]`, what the model read.
        tokens: int32 `[N]`, the new tokens of all nodes.
        parent: int32 `[n]`, -1 for a child of the prompt.
        start: int32 `[n]`, where the node's own tokens begin in `tokens`.
        length: int32 `[n]`, how many they are.
        logp_gen: float64 `[n]`, log pi_gen of the node's own tokens, summed (nats).
        logp_ref: float64 `[n]`, log pi_ref of the same tokens, summed (nats).
        terminal: bool `[n]`, the node ends with EOS or at T new tokens.
        columns: the prompt row's other columns (JSON-able), handed on to reward functions.

    Raises:
        ValueError: arrays of different lengths, a parent that does not come before its child, tokens out of range, or
            a terminal node with children.
    """

    prompt_id: str
    prompt: str
    prompt_tokens: NDArray[np.int32]
    tokens: NDArray[np.int32]
    parent: NDArray[np.int32]
    start: NDArray[np.int32]
    length: NDArray[np.int32]
    logp_gen: NDArray[np.float64]
    logp_ref: NDArray[np.float64]
    terminal: NDArray[np.bool_]
    columns: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.prompt_tokens = np.asarray(self.prompt_tokens, dtype=np.int32)
        self.tokens = np.asarray(self.tokens, dtype=np.int32)
        for name, dtype in NODE_DTYPES.items():
            setattr(self, name, np.asarray(getattr(self, name), dtype=dtype))
        self._check()

    def __len__(self) -> int:
        """Number of nodes, the root not counted."""
        return len(self.parent)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Tree):
            return NotImplemented
        same_rows = (self.prompt_id, self.prompt, self.columns) == (other.prompt_id, other.prompt, other.columns)
        arrays = ("prompt_tokens", "tokens", *NODE_DTYPES)
        return same_rows and all(np.array_equal(getattr(self, name), getattr(other, name)) for name in arrays)

    def leaves(self) -> NDArray[np.int64]:
        """Indices of the nodes without children, in node order."""
        inner = np.zeros(len(self), dtype=bool)
        inner[self.parent[self.parent >= 0]] = True
        return np.flatnonzero(~inner)

    def children(self, node: int) -> NDArray[np.int64]:
        """Indices of the children of `node` (-1: of the prompt)."""
        return np.flatnonzero(self.parent == node)

    def path(self, node: int) -> list[int]:
        """Nodes from the top of the tree down to `node`, both included; empty for the root (-1)."""
        nodes: list[int] = []
        while node >= 0:
            nodes.append(node)
            node = int(self.parent[node])
        return nodes[::-1]

    def own_tokens(self, node: int) -> NDArray[np.int32]:
        """The tokens that `node` adds to its parent's."""
        return self.tokens[self.start[node] : self.start[node] + self.length[node]]

    def completion(self, node: int) -> NDArray[np.int32]:
        """All tokens from the prompt's end to the end of `node`."""
        own = [self.own_tokens(i) for i in self.path(node)]
        return np.concatenate(own) if own else np.empty(0, dtype=np.int32)

    def offsets(self) -> NDArray[np.int64]:
        """Where each node's tokens begin, `[n]`, when all nodes' are written one after the other (packed order)."""
        return np.cumsum(self.length, dtype=np.int64) - self.length

    def end(self) -> NDArray[np.int64]:
        """Completion length (in tokens) at the end of each node, `[n]`."""
        ends = self.length.astype(np.int64)
        for node in range(len(self)):
            if self.parent[node] >= 0:
                ends[node] += ends[self.parent[node]]
        return ends

    def _check(self) -> None:
        sizes = {name: len(getattr(self, name)) for name in NODE_DTYPES}
        if len(set(sizes.values())) != 1 or not sizes["parent"]:
            raise ValueError(f"tree {self.prompt_id!r}: node arrays must have one length of at least 1, got {sizes}.")
        late = np.flatnonzero((self.parent >= np.arange(len(self))) | (self.parent < -1))
        if late.size:
            raise ValueError(
                f"tree {self.prompt_id!r}: node {late[0]} has parent {self.parent[late[0]]}; "
                "parents come first (-1: the prompt)."
            )
        outside = np.flatnonzero((self.start < 0) | (self.length < 1) | (self.start + self.length > len(self.tokens)))
        if outside.size:
            raise ValueError(
                f"tree {self.prompt_id!r}: node {outside[0]} has no tokens, or points outside "
                f"the tree's {len(self.tokens)}."
            )
        extended = np.flatnonzero(self.terminal[self.parent[self.parent >= 0]])
        if extended.size:
            raise ValueError(
                f"tree {self.prompt_id!r}: a terminal node has children; a finished completion cannot be extended."
            )


def leaf_texts(tree: Tree, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The completion of every leaf as text, without special tokens, in the order of `Tree.leaves()`."""
    completions = [tree.completion(leaf).tolist() for leaf in tree.leaves()]
    return tokenizer.batch_decode(completions, skip_special_tokens=True)
