"""A tiny model in a folder and prompts for it: what collection runs on in tests, in this process or in others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from chat_model import chat_model
from mavis_training.collect import CollectConfig
from mavis_training.tree_store import TreeStore

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


def content(store: str | Path) -> dict[str, list[Any]]:
    """Trees by shard."""
    return {shard.path.name: shard.trees() for shard in TreeStore.open(store).shards()}
