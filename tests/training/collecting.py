"""A tiny model in a folder and prompts for it: what collection runs on in tests, in this process or in others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from chat_model import chat_model
from mavis_training.collect import CollectConfig, collect
from mavis_training.trees.tree import Tree
from mavis_training.trees.tree_store import TreeStore

SHAPE: dict[str, Any] = {"max_new_tokens": 8, "layers": 3, "root_children": 3, "children": 2, "prompts_per_shard": 2}


def write_inputs(folder: Path, prompts: int = 9) -> None:
    """`model` and `prompts.jsonl`, in `folder`."""
    model, tokenizer = chat_model()
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = [{"id": f"p{i}", "prompt": f"w{i % 40} w{i * 7 % 40}"} for i in range(prompts)]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))


def config(folder: Path, store: str, **changes: Any) -> CollectConfig:
    """How to collect from them into `folder / store`."""
    given = {"model": str(folder / "model"), "device": "cpu"} | SHAPE | changes
    return CollectConfig(str(folder / "prompts.jsonl"), str(folder / store), **given)


def collect_here(folder: Path) -> None:
    """60 prompts in `folder / prompts.jsonl`, and trees of the chat model for them in `folder / trees`."""
    rows = [{"id": str(i), "prompt": f"w{i % 40} w{i // 3 % 40} w{i * 7 % 40}"} for i in range(60)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shape = {"max_new_tokens": 10, "layers": 2, "prompts_per_shard": 30}
    collect(CollectConfig(str(folder / "prompts.jsonl"), str(folder / "trees"), **shape), *chat_model())


def content(store: str | Path) -> dict[str, list[Any]]:
    """Trees by shard."""
    return {shard.path.name: shard.trees() for shard in TreeStore.open(store).shards()}


def assert_alike(store: str | Path, other: str | Path) -> None:
    """The same trees in the same shards; log-probabilities may differ by rounding, as between any two processes."""
    ours, theirs = content(store), content(other)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert [_plain(tree) for tree in ours[name]] == [_plain(tree) for tree in theirs[name]]
        for tree, its in zip(ours[name], theirs[name], strict=True):
            np.testing.assert_allclose(tree.logp_gen, its.logp_gen, rtol=0, atol=1e-4)
            np.testing.assert_allclose(tree.logp_ref, its.logp_ref, rtol=0, atol=1e-4)


def _plain(tree: Tree) -> list[Any]:
    arrays = (tree.prompt_tokens, tree.tokens, tree.parent, tree.start, tree.length, tree.terminal)
    return [tree.prompt_id, tree.prompt, *(array.tolist() for array in arrays)]
