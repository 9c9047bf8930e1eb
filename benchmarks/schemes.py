"""How value-guided decoding is done elsewhere, as plain baselines that define the same distribution.

Every scheme is a logits processor that computes Algorithm 2. They differ in how the k candidates get their values:

- `SlowTwin`: every candidate's sequence from its first token, without a cache.
- `RepeatedCache`: the cache repeated k times, one token in each of R x k rows; the rows of the chosen ones stay.
- `RecomputedRows`: the chosen token again, by itself; then the cache repeated k times as above, and thrown away.
- `RecomputedQueries`: in one forward pass the chosen token again, and behind it k candidates that do not see each
  other; then these are cut off the cache. This is the paper's "Batch decoding" (section F.5).

All keep the padding that they are given on the left, run the objectives one after another and move each one's values to
the CPU, as public implementations do. Beyond that nothing is slowed down: caches are kept from step to step, and
nothing is copied that the scheme does not have to copy.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import DynamicCache, LogitsProcessor

from mavis_logits import ValueModel
from mavis_logits.core.tilting import combine, normalize, tilt


class Scheme(LogitsProcessor):
    """Algorithm 2 over one value model an objective; subclasses say how candidates are evaluated.

    Args:
        models: value model of each objective.
        weights: lambda of each objective.
        beta: strength of the tilt.
        top_k: candidates at every step.
        pad_token_id: of the padding on the left.
    """

    def __init__(
        self, models: Mapping[str, ValueModel], weights: Mapping[str, float], beta: float, top_k: int, pad_token_id: int
    ) -> None:
        self.models, self.beta, self.top_k, self.pad_token_id = dict(models), beta, top_k, pad_token_id
        self.weights = torch.tensor([weights[name] for name in self.models])
        self.reset()

    def reset(self) -> None:
        """Forget what was decoded: the next call brings new prompts."""
        self.caches: dict[str, DynamicCache] = {}
        self.candidates: Tensor | None = None  # [R, k] of the step before

    @torch.inference_mode()
    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> Tensor:  # type: ignore[override]
        """Map ids [R, T] and scores [R, V] to tilted scores [R, V]."""
        reference, candidates = torch.log_softmax(scores.float(), dim=-1).topk(self.top_k)
        real = (input_ids != self.pad_token_id).cumsum(dim=1) > 0
        values = [self.values(name, input_ids, real, candidates).cpu() for name in self.models]
        self.candidates = candidates
        combined = combine(torch.cat(values, dim=-1), self.weights).to(scores.device)
        normalised = normalize(combined, reference.isfinite(), "minmax")
        tilted = tilt(reference, normalised, self.beta).to(scores.dtype)
        return torch.full_like(scores, -torch.inf).scatter(1, candidates, tilted)

    @abstractmethod
    def values(self, name: str, ids: Tensor, real: Tensor, candidates: Tensor) -> Tensor:
        """Values [R, k, 1] of `candidates` [R, k] after `ids` [R, T], of which `real` [R, T] are no padding."""

    def cache(self, name: str) -> DynamicCache:
        """The cache of a value model, empty at first."""
        return self.caches.setdefault(name, DynamicCache(config=self.models[name].backbone.config))

    def read(self, name: str, ids: Tensor, real: Tensor) -> DynamicCache:
        """Feed a value model what its cache has not seen of `ids` [R, T]."""
        cache = self.cache(name)
        self.models[name](
            ids[:, cache.get_seq_length() :], attention_mask=real.long(), past_key_values=cache, use_cache=True
        )
        return cache

    def branch(self, name: str, cache: DynamicCache, real: Tensor, candidates: Tensor) -> tuple[Tensor, DynamicCache]:
        """Values [R, k, 1] by `cache` repeated for every candidate, and the repeated cache."""
        rows, k = candidates.shape
        repeated = copy.copy(cache)
        repeated.layers = [copy.copy(layer) for layer in cache.layers]  # their tensors are replaced, not changed
        repeated.batch_repeat_interleave(k)
        mask = torch.cat([real.long(), real.new_ones(rows, 1).long()], dim=1).repeat_interleave(k, dim=0)
        output = self.models[name](
            candidates.reshape(-1, 1), attention_mask=mask, past_key_values=repeated, use_cache=True
        )
        return output.values[:, -1].view(rows, k, 1), repeated


class SlowTwin(Scheme):
    """Algorithm 2 word for word: every candidate's sequence goes through every value model from its first token."""

    def values(self, name: str, ids: Tensor, real: Tensor, candidates: Tensor) -> Tensor:
        """See `Scheme.values`."""
        return torch.stack(
            [self.row(name, own[keep], tokens) for own, keep, tokens in zip(ids, real, candidates, strict=True)]
        )

    def row(self, name: str, ids: Tensor, candidates: Tensor) -> Tensor:
        """Values [k, 1] of the candidates [k] of one row [t] without padding."""
        sequences = torch.cat([ids.expand(len(candidates), -1), candidates[:, None]], dim=1)
        return self.models[name](sequences, use_cache=False).values[:, -1]


class RepeatedCache(Scheme):
    """Every step repeats the cache k times; the rows of the chosen candidates go on, and nothing is computed twice."""

    def values(self, name: str, ids: Tensor, real: Tensor, candidates: Tensor) -> Tensor:
        """See `Scheme.values`."""
        if self.candidates is None:
            cache = self.read(name, ids, real)
        else:
            cache = self.caches[name]
            rows, k = self.candidates.shape
            chosen = (self.candidates == ids[:, -1:]).int().argmax(dim=1)
            cache.batch_select_indices(torch.arange(rows, device=ids.device) * k + chosen)
        values, self.caches[name] = self.branch(name, cache, real, candidates)
        return values


class RecomputedRows(Scheme):
    """The chosen token goes through the value model once more, then k rows for the candidates, thrown away."""

    def values(self, name: str, ids: Tensor, real: Tensor, candidates: Tensor) -> Tensor:
        """See `Scheme.values`."""
        return self.branch(name, self.read(name, ids, real), real, candidates)[0]


class RecomputedQueries(Scheme):
    """Chosen token and candidates in one sequence, under a mask by which candidates do not see each other."""

    def values(self, name: str, ids: Tensor, real: Tensor, candidates: Tensor) -> Tensor:
        """See `Scheme.values`."""
        model, cache = self.models[name], self.cache(name)
        seen, (_, length), k = cache.get_seq_length(), ids.shape, candidates.shape[1]
        order = torch.arange(length, device=ids.device)
        causal = (order[seen:, None] >= order) & real[:, None]  # [R, new, T]
        prefix = torch.cat([causal, real[:, None].expand(-1, k, -1)], dim=1)  # [R, new + k, T]
        own = torch.zeros(length - seen + k, k, dtype=torch.bool, device=ids.device)
        own[length - seen :] = torch.eye(k, dtype=torch.bool, device=ids.device)
        allowed = torch.cat([prefix, own.expand(len(ids), -1, -1)], dim=2)  # [R, new + k, T + k]
        lowest = torch.finfo(model.dtype).min
        mask = torch.zeros(allowed.shape, dtype=model.dtype, device=ids.device).masked_fill(~allowed, lowest)
        positions = (real.long().cumsum(dim=1) - 1).clamp(min=0)
        positions = torch.cat([positions[:, seen:], (positions[:, -1:] + 1).expand(-1, k)], dim=1)
        output = model(
            torch.cat([ids[:, seen:], candidates], dim=1),
            attention_mask=mask[:, None],
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        )
        cache.crop(-k)
        return output.values[:, -k:]
