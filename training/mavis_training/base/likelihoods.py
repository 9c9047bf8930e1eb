"""How likely a language model finds texts."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

_LOGITS = 1 << 27  # that are held at once


def log_likelihoods(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    completions: Sequence[list[int]],
    temperature: float = 1.0,
) -> list[float]:
    """log pi_ref of every completion after its prompt, in nats, at a temperature."""
    most = max(map(len, completions), default=0) + 1
    size = max(1, _LOGITS // (most * model.config.get_text_config(decoder=True).vocab_size))
    found = []
    for start in range(0, len(prompts), size):
        part = slice(start, start + size)
        found += _together(model, prompts[part], completions[part], temperature)
    return found


@torch.inference_mode()
def _together(
    model: PreTrainedModel, prompts: Sequence[list[int]], completions: Sequence[list[int]], temperature: float
) -> list[float]:
    rows = [p + c for p, c in zip(prompts, completions, strict=True)]
    width, most = max(map(len, rows)), max(map(len, completions))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows], device=model.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=model.device)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    known = {"position_ids": positions, "logits_to_keep": most + 1}
    taken = {name: value for name, value in known.items() if name in inspect.signature(model.forward).parameters}
    logits = model(input_ids=ids, attention_mask=mask, **taken).logits[:, -most - 1 : -1]
    sums = []
    for row, completion in enumerate(completions):
        count = len(completion)
        own = torch.log_softmax(logits[row, most - count :].float() / temperature, dim=-1)
        sums.append(float(own.gather(1, ids[row, width - count :][:, None]).sum()))
    return sums
