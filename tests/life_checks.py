"""A model, what steers it, and what is left on it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mavis_logits import MavisLogitsProcessor
from tiny import EOS, PAD, make_head, make_value_model

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
SETTINGS: dict[str, Any] = {"top_k": 6, "pad_token_id": PAD, "eos_token_id": EOS}
KINDS = ["model", "head", "inner", "mixed"]


def functions(kind: str, base: PreTrainedModel) -> Any:
    return {
        "model": lambda: make_value_model("a"),
        "head": lambda: make_head(base, "a"),
        "inner": lambda: make_head(base, "a", layer=1),
        "mixed": lambda: {"a": make_head(base, "a", layer=1), "b": make_value_model("b")},
    }[kind]()


def steer(kind: str, base: PreTrainedModel, **settings: Any) -> MavisLogitsProcessor:
    return MavisLogitsProcessor(functions(kind, base), beta=4.0, model=base, **SETTINGS | settings)


def write(base: Any, *processors: Any, ids: Tensor = IDS, **arguments: Any) -> Tensor:
    settings = {"do_sample": False, "max_new_tokens": 6, "pad_token_id": PAD, "attention_mask": torch.ones_like(ids)}
    return base.generate(ids, logits_processor=list(processors), **settings | arguments)


def hooks(model: nn.Module) -> int:
    names = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
    return sum(len(getattr(module, name)) for module in model.modules() for name in names)
