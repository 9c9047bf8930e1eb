"""A whole tree as one sequence under an ancestor mask, so that shared prefixes are computed once.

The packed sequence is the prompt's tokens, then the tokens of every node in node order. A token sees the prompt, the
nodes above its own and what comes before it in its own node; its position is its place in its own completion. Values
and hidden states at each token are then those of reading that token's path alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mavis_logits.backbone import Backbone
from mavis_logits.backbone.cache import Windows, attention_masks

from .data import LabelledTree
from .tree import Tree


@dataclass(frozen=True)
class Layout:
    """Where a tree's tokens lie in its packed sequence of T = P + N tokens.

    Attributes:
        input_ids: `[T]`.
        position_ids: `[T]`, position of each token in its own completion.
        node: `[T]`, the node of each token; -1 for the prompt's.
        ancestry: bool `[n + 1, n + 1]`, `ancestry[i, j]`: node j is i or above i; index -1 (the last) is the prompt.
        last: `[n + 1]`, index of each node's last token; `last[-1]` is the prompt's.
        previous: `[N]`, for each new token, in the order of `Layout.new`, the index of the token read before it.
        new: `[N]`, indices of the new tokens, P .. T - 1.
    """

    input_ids: NDArray[np.int64]
    position_ids: NDArray[np.int64]
    node: NDArray[np.int64]
    ancestry: NDArray[np.bool_]
    last: NDArray[np.int64]
    previous: NDArray[np.int64]
    new: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.input_ids)

    def paths(self) -> list[NDArray[np.int64]]:
        """For every leaf the places of its tokens, the prompt's among them: sequences that need no packing."""
        above = self.ancestry[:-1, :-1]
        leaves = np.flatnonzero(above.sum(axis=0) == 1) if len(above) else [-1]
        return [np.flatnonzero(self.ancestry[leaf][self.node]) for leaf in leaves]

    def before(self) -> NDArray[np.int64]:
        """The places of tokens that a new token follows, each once, in packed order."""
        return np.unique(self.previous)

    def by_path(self, read: Callable[[NDArray[np.int64]], torch.Tensor]) -> torch.Tensor:
        """What `read` says of every token, `[T, ...]`, asked path by path: for what cannot read a packed tree."""
        found: torch.Tensor | None = None
        for where in self.paths():
            own = read(where)
            found = own.new_empty(len(self), *own.shape[1:]) if found is None else found
            found[where] = own
        assert found is not None
        return found

    def visible(self) -> NDArray[np.bool_]:
        """`[T, T]`, whether token t may attend to token s."""
        causal = np.tri(len(self), dtype=bool)
        return self.ancestry[self.node[:, None], self.node[None, :]] & causal


def pack(tree: Tree) -> Layout:
    """Lay out a tree as one sequence.

    Raises:
        ValueError: the prompt has no tokens, so that there is nothing to predict its first token from.
    """
    prompt = len(tree.prompt_tokens)
    if not prompt:
        raise ValueError(
            f"tree {tree.prompt_id!r} has an empty prompt: at least one token must come before the answer."
        )
    count, depth = len(tree), prompt + tree.end()
    ancestry = np.eye(count + 1, dtype=bool)
    ancestry[:, -1] = True
    for child, parent in enumerate(tree.parent):
        ancestry[child] |= ancestry[parent]  # parent -1 is the last row, the prompt's
    last = np.append(prompt + np.cumsum(tree.length, dtype=np.int64) - 1, prompt - 1)
    starts = np.append(prompt, last[:-1] + 1)[:-1]
    node = np.concatenate([np.full(prompt, -1), np.repeat(np.arange(count), tree.length)])
    position_ids = [np.arange(prompt), *(np.arange(depth[i] - tree.length[i], depth[i]) for i in range(count))]
    new = np.arange(prompt, len(node))
    previous = new - 1
    previous[starts - prompt] = last[tree.parent]
    own = [tree.own_tokens(i) for i in range(count)]
    input_ids = np.concatenate([tree.prompt_tokens, *own]).astype(np.int64)
    return Layout(input_ids, np.concatenate(position_ids), node, ancestry, last, previous, new)


@dataclass(frozen=True)
class Example:
    """One training sequence and its terms of equation 6: `values[terms[i]]` regresses `targets[i]`.

    Attributes:
        input_ids: `[T]`.
        position_ids: `[T]`.
        visible: bool `[T, T]`; None for a plain sequence, in which a token sees all before it.
        terms: `[K]`, indices of tokens whose value has a target.
        targets: float32 `[K, M]`, in reward units.
    """

    input_ids: NDArray[np.int64]
    position_ids: NDArray[np.int64]
    visible: NDArray[np.bool_] | None
    terms: NDArray[np.int64]
    targets: NDArray[np.float32]


def tree_terms(
    item: LabelledTree, layout: Layout, kept: NDArray[np.bool_], every_token: bool
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Which tokens of a packed tree regress what.

    Args:
        item: a tree of n nodes.
        layout: of the tree.
        kept: bool `[n]`, nodes that contribute; the prompt itself always does.
        every_token: each token of a kept node regresses that node's target (an unbiased one: the node was sampled from
            there on); False: only the node's last token does, as in the paper.

    Returns:
        Indices `[K]` of tokens of the packed sequence, and their targets `[K, M]`.
    """
    chosen = layout.new[kept[layout.node[layout.new]]] if every_token else layout.last[:-1][kept]
    values = np.vstack([item.root_target, item.targets[layout.node[chosen]]])
    return np.append(layout.last[-1], chosen), values


def tree_example(item: LabelledTree, kept: NDArray[np.bool_], every_token: bool) -> Example:
    """The tree-packed form: one sequence for all terms of a tree. Arguments as for `tree_terms`.

    Nodes that no kept one is or goes on from are left out of it.
    """
    layout = pack(item.tree)
    terms, values = tree_terms(item, layout, kept, every_token)
    read = np.append(nodes_read(item.tree, kept), True)[layout.node]  # node -1, the last, is the prompt
    places = np.cumsum(read) - 1
    visible = layout.visible()[np.ix_(read, read)]
    return Example(layout.input_ids[read], layout.position_ids[read], visible, places[terms], values.astype(np.float32))


def nodes_read(tree: Tree, kept: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Which nodes must be read for the values of the `kept` ones, `[n]`: these and all above them."""
    read = kept.copy()
    for node in range(len(tree) - 1, -1, -1):  # children before parents
        if read[node] and tree.parent[node] >= 0:
            read[tree.parent[node]] = True
    return read


def node_examples(item: LabelledTree, kept: NDArray[np.bool_], every_token: bool) -> list[Example]:
    """The plain form, one sequence per kept node, with the same terms as `tree_example`. Fits any backbone."""
    tree = item.tree
    prompt = np.asarray(tree.prompt_tokens, dtype=np.int64)
    examples = [_chain(prompt, 1, item.root_target)]
    for node in np.flatnonzero(kept):
        tokens = np.concatenate([prompt, tree.completion(int(node))])
        examples.append(_chain(tokens, int(tree.length[node]) if every_token else 1, item.targets[node]))
    return examples


def _chain(tokens: NDArray[np.int64], terms: int, target: NDArray[np.float64]) -> Example:
    """A plain sequence whose last `terms` tokens have the same target."""
    size = len(tokens)
    repeated = np.tile(target.astype(np.float32), (terms, 1))
    return Example(tokens, np.arange(size), None, np.arange(size - terms, size), repeated)


def path_readings(layout: Layout) -> list[tuple[Example, NDArray[np.int64]]]:
    """One plain sequence per leaf, without terms, and the place `[T]` of each of its tokens in the packed sequence."""
    nothing = np.empty((0, 0), dtype=np.float32)
    return [
        (Example(layout.input_ids[where], np.arange(len(where)), None, np.empty(0, dtype=np.int64), nothing), where)
        for where in layout.paths()
    ]


def require_packable(model: nn.Module, advice: str) -> Windows:
    """The attention windows of a model that can read a tree as one sequence (`packed_inputs` takes them).

    Raises:
        ValueError: it cannot; the message says why and ends in `advice`.
    """
    backbone = Backbone.of(model)
    if backbone.trees.kind != "packed":
        raise ValueError(f"{backbone.name} cannot read a packed tree ({backbone.trees.reason}): {advice}.")
    return backbone.windows


def packed_inputs(
    examples: Sequence[Example | Layout], windows: Windows, dtype: torch.dtype, pad_token_id: int = 0
) -> dict[str, Any]:
    """A padded batch for a decoder: `input_ids` and `position_ids` `[B, T]`, and a float mask `[B, 1, T, T]`.

    Layers that attend within a sliding window get a mask of their own, limited by distance in the completion.

    Args:
        examples: B sequences.
        windows: of the decoder (`require_packable`).
        dtype: of the mask: the decoder's.
        pad_token_id: fills the right; padding sees itself only, and nothing sees it.
    """
    size = max(len(e.input_ids) for e in examples)
    input_ids = torch.full((len(examples), size), pad_token_id)
    position_ids = torch.zeros_like(input_ids)
    visible = torch.eye(size, dtype=torch.bool).repeat(len(examples), 1, 1)
    for row, example in enumerate(examples):
        count = len(example.input_ids)
        input_ids[row, :count] = torch.from_numpy(example.input_ids)
        position_ids[row, :count] = torch.from_numpy(example.position_ids)
        seen = example.visible if isinstance(example, Example) else example.visible()
        visible[row, :count, :count] = torch.from_numpy(np.tri(count, dtype=bool) if seen is None else seen)
    mask = attention_masks(visible, position_ids, position_ids, windows, dtype)
    return {"input_ids": input_ids, "position_ids": position_ids, "attention_mask": mask}


def plain_inputs(examples: Sequence[Example], pad_token_id: int = 0) -> dict[str, Any]:
    """A right-padded batch of plain sequences: `input_ids` and a 2-D `attention_mask` `[B, T]`."""
    size = max(len(e.input_ids) for e in examples)
    input_ids = torch.full((len(examples), size), pad_token_id)
    attention_mask = torch.zeros_like(input_ids)
    for row, example in enumerate(examples):
        count = len(example.input_ids)
        input_ids[row, :count] = torch.from_numpy(example.input_ids)
        attention_mask[row, :count] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def term_inputs(examples: Sequence[Example]) -> dict[str, Tensor]:
    """The terms of a batch: `rows` and `terms` `[K]` (where), `targets` `[K, M]` (what), over all examples."""
    rows = np.concatenate([np.full(len(e.terms), row) for row, e in enumerate(examples)])
    return {
        "rows": torch.from_numpy(rows),
        "terms": torch.from_numpy(np.concatenate([e.terms for e in examples])),
        "targets": torch.from_numpy(np.concatenate([e.targets for e in examples])),
    }
