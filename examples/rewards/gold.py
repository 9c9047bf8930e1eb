"""Second opinions on helpful, harmless and humour, which nothing here is trained on.

Steering, or tuning, towards a reward finds what that reward mistakes. These know the same objectives from other prompts
and other replies than the rewards beside them, through another model: linear in what SmolLM2 reads a third of the way
up, learnt by `examples/train_gold_rewards.py` from the collections' test halves. Where a strength goes on raising the
reward and no longer these, it has gone too far (Gao et al., 2023, of whom "gold" is).
"""

from __future__ import annotations

from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from mavis_logits.models import load_chat_model

WEIGHTS = Path(__file__).with_name("gold.safetensors")
LAYERS = 10  # of 30
MAX_LENGTH = 192  # tokens of prompt and reply; a longer prompt loses its beginning
_BATCH = 16


@cache
def _model() -> tuple[Any, Any]:
    model, tokenizer = load_chat_model(dtype=torch.bfloat16)
    model.model.layers = model.model.layers[:LAYERS]
    return model.model.eval(), tokenizer


@torch.inference_mode()
def features(prompts: list[str], completions: list[str]) -> Tensor:
    """float32 [R, 3 d]: mean state of the reply, its last, and the mean one times the prompt's (what it is about)."""
    model, tokenizer = _model()
    found: list[Tensor] = [torch.empty(0)] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]) + len(completions[i]))  # less padding
    for start in range(0, len(order), _BATCH):
        rows = order[start : start + _BATCH]
        ids, counts = [], []
        for i in rows:
            turn = [{"role": "user", "content": prompts[i]}]
            asked = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False)
            own = tokenizer(completions[i], add_special_tokens=False)["input_ids"] or [tokenizer.eos_token_id]
            own = own[: MAX_LENGTH // 2]
            ids.append(asked[-(MAX_LENGTH - len(own)) :] + own)
            counts.append(len(own))
        batch = tokenizer.pad({"input_ids": ids}, padding_side="right", return_tensors="pt")
        states = model(**batch, use_cache=False).last_hidden_state.float()
        for row, own_ids, count, state in zip(rows, ids, counts, states, strict=True):
            prompt, reply = state[: len(own_ids) - count], state[len(own_ids) - count : len(own_ids)]
            found[row] = torch.cat([reply.mean(dim=0), reply[-1], reply.mean(dim=0) * prompt.mean(dim=0)])
    return torch.stack(found)


@lru_cache(4)
def _features(prompts: tuple[str, ...], completions: tuple[str, ...]) -> Tensor:
    return features(list(prompts), list(completions))  # of the same texts for helpful and for harmless


@cache
def _weights() -> dict[str, Tensor]:
    return load_file(WEIGHTS)


def _gold(objective: str, prompts: list[str], completions: list[str], **columns: object) -> list[float]:
    weights = _weights()
    asked = [""] * len(prompts) if objective == "humour" else prompts
    read = (_features(tuple(asked), tuple(completions)) - weights["mean"]) / weights["scale"]
    return [float(value) for value in read @ weights[objective]]


helpful, harmless, humour = (partial(_gold, objective) for objective in ("helpful", "harmless", "humour"))
