"""ARGS (Khanov et al., 2024): a reward model for whole answers, asked about the text with every candidate token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedTokenizerBase

from ..rewards.load import Reward, compute_rewards, shared_columns


class PartialRewards(LogitsProcessor):
    """log pi_ref + sum of w_i r_i(prompt, text so far + token) over the likeliest tokens; the others are dropped.

    Args:
        tokenizer: of the base model.
        rewards: by spec.
        strengths: w by spec.
        prompts: the R rows.
        start: length of the prompts that `generate` is called with.
        candidates: tokens a step.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        rewards: Mapping[str, Reward],
        strengths: Mapping[str, float],
        prompts: Sequence[Mapping[str, Any]],
        start: int,
        candidates: int,
    ) -> None:
        self.tokenizer, self.rewards, self.strengths = tokenizer, rewards, strengths
        self.prompts, self.start, self.candidates = prompts, start, candidates

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        log_probs = torch.log_softmax(scores.float(), dim=-1)
        top = log_probs.topk(min(self.candidates, scores.shape[1]), dim=1)
        ended = torch.isin(input_ids[:, -1], torch.tensor(self._ends, device=input_ids.device))
        live = [row for row in range(len(input_ids)) if input_ids.shape[1] == self.start or not bool(ended[row])]
        texts, rows = [], []
        for row in live:
            written = input_ids[row, self.start :].tolist()
            for token in top.indices[row].tolist():
                texts.append(self.tokenizer.decode([*written, token], skip_special_tokens=True))
                rows.append(self.prompts[row])
        tilt = torch.zeros_like(top.values)
        columns = shared_columns(rows) if live else {}
        for spec, reward in self.rewards.items() if live else ():
            values = compute_rewards(reward, [row["prompt"] for row in rows], texts, columns, spec)
            own = torch.tensor(values, dtype=tilt.dtype, device=tilt.device).view(len(live), -1)
            tilt[live] += self.strengths[spec] * own
        return torch.full_like(log_probs, -torch.inf).scatter(1, top.indices, top.values + tilt)

    @property
    def _ends(self) -> list[int]:
        return [token for token in (self.tokenizer.eos_token_id, self.tokenizer.pad_token_id) if token is not None]
