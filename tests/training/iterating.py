"""Policy iteration on a tiny model: what it runs on in tests, in this process or in others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from chat_model import chat_model
from mavis_training.iterate import IterateConfig, IterationConfig, ValidationConfig

TREES = {"limit": 24, "max_new_tokens": 8, "layers": 2, "root_children": 2, "children": 2}
TRAINING: dict[str, dict[str, Any]] = {
    "head": {"width": 16, "dropout": 0.0, "epochs": 8, "batch_size": 32, "learning_rate": 0.01, "warmup_steps": 0},
    "model": {
        "num_layers": 1, "lora": {"rank": 8, "dropout": 0.0}, "targets": "tokens", "epochs": 4, "batch_size": 4,
        "learning_rate": 0.01, "warmup_steps": 0,
    },
}  # fmt: skip
SHARED = {"validation_share": 0.25}


def write_inputs(folder: Path, prompts: int = 64, held_out: int = 16) -> Path:
    """The base model, and prompts to sample from and to validate on, in `folder`."""
    base, tokenizer = chat_model()
    base.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = [{"id": f"p{i}", "prompt": f"w{i % 40} w{i * 7 % 40} w{i % 11}"} for i in range(prompts + held_out)]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows[:prompts])))
    (folder / "validation.jsonl").write_text("\n".join(map(json.dumps, rows[prompts:])))
    return folder


def make(files: Path, output: Path, kind: str = "head", **changes: Any) -> IterateConfig:
    """Three iterations on these inputs, with these changes."""
    settings: dict[str, Any] = {
        "prompts": str(files / "prompts.jsonl"),
        "output": str(output),
        "objectives": ["low"],
        "rewards": {"low": "text_rewards:low"},
        "iterations": [IterationConfig(), IterationConfig(zeta=0.02), IterationConfig(zeta=0.01, beta=3.0)],
        "validation": ValidationConfig(str(files / "validation.jsonl"), seeds=[0, 1], max_new_tokens=8, batch_size=32),
        "kind": kind,
        "model": str(files / "model"),
        "policy": {"top_k": 12},
        "collect": TREES,
        "train": TRAINING.get(kind, {}) | SHARED,
        "early_stop": False,
        "device": "cpu",
    }
    return IterateConfig(**settings | changes)
