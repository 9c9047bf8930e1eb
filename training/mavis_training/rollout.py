"""Batched sampling of extensions of sequences that share prefixes, for Algorithm 3.

Rows live in one `RaggedCache`: a prompt is computed once, forking copies rows instead of recomputing them, and rows
that reached their limit leave the forward pass while they wait to be forked.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mavis_logits.cache import RaggedCache, supports_ragged_cache
from mavis_logits.strategies.sampling import sample_index


@dataclass
class Extension:
    """What one row added: n tokens, their natural log probabilities, and whether the last one is EOS."""

    tokens: list[int]
    logp_gen: list[float]
    logp_ref: list[float]
    ended: bool


class Rollout:
    """R sequences under a base model, extended in place by ancestral sampling.

    Args:
        model: causal language model, the reference policy.
        prompts: token ids of each row's prompt; none empty.
        eos_token_ids: tokens that end a sequence.
        generator: source of randomness, on the model's device.
        temperature: softmax temperature T of the sampling policy; `logp_ref` is always that of T = 1.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        prompts: list[list[int]],
        eos_token_ids: set[int],
        generator: torch.Generator,
        temperature: float = 1.0,
    ) -> None:
        if not supports_ragged_cache(model.config):
            raise ValueError(
                f"{type(model).__name__} keeps no token-addressed key-value cache; trees can only be collected from "
                "attention decoders. Use an attention-based base model."
            )
        if any(not prompt for prompt in prompts):
            raise ValueError("a prompt has no tokens; drop empty prompts from the prompt file")
        self.model, self.generator, self.temperature = model, generator, temperature
        self.eos = torch.tensor(sorted(eos_token_ids), device=model.device)
        self.cache = RaggedCache(model.config.num_hidden_layers, len(prompts), model.device)
        longest = max(map(len, prompts))
        tokens = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=model.device)
        counts = torch.tensor([len(p) for p in prompts], device=model.device)
        self.logits = self._forward(tokens, counts, None)

    @torch.no_grad()
    def _forward(self, tokens: Tensor, counts: Tensor, rows: Tensor | None) -> Tensor:
        feed = self.cache.prepare(tokens, counts, rows=rows)
        inputs = feed.inputs(self.model.config, self.model.dtype)
        logits = self.model(**inputs, past_key_values=self.cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        if rows is None:
            self.cache.advance(counts, tokens.shape[1])
        else:
            # `longest` must bound every row, also those that rest: let it grow by what is really needed.
            self.cache.advance(counts, 0, rows)
            self.cache.longest = int(self.cache.lengths.max())
        return logits.float()

    def fork(self, rows: list[int]) -> None:
        """Replace the rows by copies of `rows` (repeats allowed)."""
        index = torch.tensor(rows, device=self.logits.device)
        self.cache.select(index)
        self.logits = self.logits[index]

    def rewind(self, rows: list[int], lengths: list[int], last_tokens: list[int]) -> None:
        """Take each of `rows` back to `lengths` tokens (prompt included), of which `last_tokens` are the last."""
        if not rows:
            return
        index = torch.tensor(rows, device=self.logits.device)
        kept = self.cache.lengths.clone()
        kept[index] = torch.tensor(lengths, device=kept.device) - 1
        self.cache.crop(kept, int(kept.max()))
        tokens = torch.tensor(last_tokens, device=kept.device)
        self.logits[index] = self._forward(tokens[:, None], torch.ones_like(tokens), index)

    def extend(self, limits: list[int]) -> list[Extension]:
        """Sample up to `limits[r]` (>= 1) more tokens in every row, stopping a row at EOS."""
        count = len(self.logits)
        if len(limits) != count or min(limits) < 1:
            raise ValueError(f"extend needs {count} limits of at least 1, one a row; got {limits}")
        device = self.logits.device
        remaining = torch.tensor(limits, device=device)
        ended = torch.zeros(count, dtype=torch.bool, device=device)
        sampled: list[tuple[Tensor, ...]] = []  # one entry a step: rows, tokens, log pi_gen, log pi_ref
        rows = torch.arange(count, device=device)
        while len(rows):
            reference = torch.log_softmax(self.logits[rows], dim=-1)
            policy = reference if self.temperature == 1 else torch.log_softmax(reference / self.temperature, dim=-1)
            token = sample_index(policy, self.generator, policy.dtype)
            log_probs = (distribution.gather(1, token[:, None])[:, 0] for distribution in (policy, reference))
            sampled.append((rows, token, *log_probs))
            ended[rows] = torch.isin(token, self.eos)
            remaining[rows] -= 1
            keep = ~ended[rows]  # a row at its limit is fed too: its children start from the state after its last token
            rows, token = rows[keep], token[keep]
            if len(rows):
                every = len(rows) == count
                self.logits[rows] = self._forward(token[:, None], torch.ones_like(token), None if every else rows)
                rows = rows[remaining[rows] > 0]
        extensions = [Extension([], [], [], flag) for flag in ended.tolist()]
        for step in sampled:
            for row, token_id, logp_gen, logp_ref in zip(*(column.tolist() for column in step), strict=True):
                extensions[row].tokens.append(token_id)
                extensions[row].logp_gen.append(logp_gen)
                extensions[row].logp_ref.append(logp_ref)
        return extensions
