"""Values of k candidate tokens under a value model, each step at the cost of k query tokens.

`RaggedScorer` feeds the candidates as k queries of one forward that see their row's committed tokens and themselves,
and when one of them is chosen moves its keys and values into place: the chosen token is never computed again.
`RepeatedStateScorer` is for backbones whose state is not addressed by token (Mamba): it repeats the state k times.
Both agree with re-forwarding every candidate from scratch (`mavis_logits.testing.recompute_values`).
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache

from .cache import RaggedCache, supports_ragged_cache
from .rows import Plan
from .value_model import ValueModel

_PROBE_TOLERANCE = 0.05


class ValueScorer(ABC):
    """Scores candidates under one `ValueModel`, keeping what it has computed between steps."""

    def __init__(self, model: ValueModel) -> None:
        self.model = model

    @abstractmethod
    def score(self, plan: Plan, candidates: Tensor) -> Tensor:
        """Values [R, k, M] (float32, reward units) of `candidates` [R, k] after the sequences of `plan`."""

    @abstractmethod
    def reset(self) -> None:
        """Forget all rows."""


def make_scorer(model: ValueModel) -> ValueScorer:
    """The fastest scorer that is right for `model`'s backbone, which is tried once on a few tokens.

    Raises:
        ValueError: the backbone was loaded with an attention implementation that takes no 4-D mask.
    """
    config = model.backbone.config
    implementation = getattr(config, "_attn_implementation", None) or ""
    if "flash" in implementation:
        raise ValueError(
            f"the value model runs {implementation}, which takes no 4-D attention mask: load it with "
            'attn_implementation="sdpa"'
        )
    if supports_ragged_cache(config) and _agrees_with_plain_forward(model):
        return RaggedScorer(model)
    return RepeatedStateScorer(model)


class RaggedScorer(ValueScorer):
    """For decoders whose state is keys and values: one forward a step over a `RaggedCache`."""

    def __init__(self, model: ValueModel) -> None:
        super().__init__(model)
        self._cache: RaggedCache | None = None

    def reset(self) -> None:
        self._cache = None

    @torch.no_grad()
    def score(self, plan: Plan, candidates: Tensor) -> Tensor:
        cache = self._cache = self._follow(plan, candidates.device)
        most = max(len(tokens) for tokens in plan.pending)
        new = np.zeros((len(plan.pending), most), dtype=np.int64)
        for row, tokens in zip(new, plan.pending, strict=True):
            row[most - len(tokens) :] = tokens
        counts = torch.tensor([len(tokens) for tokens in plan.pending], device=candidates.device)
        feed = cache.prepare(torch.from_numpy(new).to(candidates.device), counts, candidates)
        inputs = feed.inputs(self.model.backbone.config, self.model.dtype)
        try:
            values = self.model(**inputs, past_key_values=cache, use_cache=True).values
        except torch.OutOfMemoryError as error:
            raise _out_of_memory(cache, self.model) from error
        if most:
            cache.advance(counts, most)
            cache.longest = max(len(sequence) for sequence in plan.sequences)
        return values[:, most:]

    def _follow(self, plan: Plan, device: torch.device) -> RaggedCache:
        """The cache whose rows are the plan's sequences up to their pending tokens."""
        cache = self._cache
        if cache is None or plan.source is None:
            return RaggedCache(self.model.backbone.config.num_hidden_layers, len(plan.sequences), device)
        if not plan.in_place:
            cache.select(torch.from_numpy(plan.source).to(device))
        grown = plan.chosen >= 0
        if grown.any():
            rows = None if grown.all() else torch.from_numpy(np.flatnonzero(grown)).to(device)
            cache.commit(torch.from_numpy(plan.chosen[grown]).to(device), rows)
        lengths = plan.kept + grown
        cache.crop(torch.from_numpy(lengths).to(device), int(lengths.max()))
        return cache


class RepeatedStateScorer(ValueScorer):
    """For any decoder with a cache, recurrent ones too: row by row, the state repeated for every candidate."""

    def __init__(self, model: ValueModel) -> None:
        super().__init__(model)
        self.reset()

    def reset(self) -> None:
        self._states: list[Cache] = []  # one a row, batch of one
        self._branches: list[Cache] = []  # the same, one batch entry for each candidate, that candidate read
        self._lengths: list[int] = []

    @torch.no_grad()
    def score(self, plan: Plan, candidates: Tensor) -> Tensor:
        states: list[Cache] = []
        branches: list[Cache] = []
        values: list[Tensor] = []
        for i in range(len(plan.sequences)):
            state, unread = self._resume(plan, i)
            if state is None or len(unread):
                state = self._read(state, torch.from_numpy(unread).to(candidates.device))
            branch = copy.deepcopy(state)
            branch.reorder_cache(torch.zeros(candidates.shape[1], dtype=torch.long, device=candidates.device))
            output = self.model(candidates[i][:, None], past_key_values=branch, use_cache=True)
            values.append(output.values[:, -1])
            states.append(state)
            branches.append(branch)
        self._states, self._branches = states, branches
        self._lengths = [len(sequence) for sequence in plan.sequences]
        return torch.stack(values)

    def _resume(self, plan: Plan, row: int) -> tuple[Cache | None, np.ndarray]:
        """A state to go on from, and the tokens it has not read. A state cannot be cropped, only begun anew."""
        if plan.source is None or not self._states:
            return None, plan.sequences[row]
        source = int(plan.source[row])
        if plan.kept[row] != self._lengths[source]:
            return None, plan.sequences[row]
        if plan.chosen[row] < 0:
            return copy.deepcopy(self._states[source]), plan.pending[row]
        branch = copy.deepcopy(self._branches[source])
        branch.reorder_cache(torch.tensor([int(plan.chosen[row])], device=self.model.device))
        return branch, plan.pending[row]

    def _read(self, state: Cache | None, tokens: Tensor) -> Cache:
        """Feed `tokens`: a whole prompt at once, later tokens one by one, as recurrent layers expect them."""
        if state is None:
            state = DynamicCache(config=self.model.backbone.config)
            self.model(tokens[None], past_key_values=state, use_cache=True)
            return state
        for token in tokens:
            self.model(token[None, None], past_key_values=state, use_cache=True)
        return state


@torch.no_grad()
def _agrees_with_plain_forward(model: ValueModel) -> bool:
    """Whether custom masks and positions reach the backbone's attention: some architectures ignore them."""
    vocabulary = model.backbone.config.vocab_size
    tokens = np.arange(3, 9, dtype=np.int64) % vocabulary
    candidates = torch.tensor([[1, 2], [2, 0]], device=model.device) % vocabulary
    sequences = [tokens[:3], tokens]
    hidden: list[Tensor] = []
    hook = model.backbone.register_forward_hook(lambda _, __, output: hidden.append(output.last_hidden_state.float()))
    try:
        RaggedScorer(model).score(Plan(sequences, None, np.zeros(2, np.int64), np.full(2, -1), sequences), candidates)
        fast = hidden.pop()[:, -2:]
        for row, sequence in enumerate(sequences):
            for i, candidate in enumerate(candidates[row]):
                model(torch.cat([torch.from_numpy(sequence).to(candidate), candidate[None]])[None])
                slow = hidden.pop()[0, -1]
                if not torch.linalg.norm(fast[row, i] - slow) <= _PROBE_TOLERANCE * torch.linalg.norm(slow):
                    return False
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError):
        return False  # it takes no such mask, positions or cache
    finally:
        hook.remove()
    return True


def _out_of_memory(cache: RaggedCache, model: ValueModel) -> MemoryError:
    size = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers if layer.is_initialized)
    return MemoryError(
        f"no memory left for the value model's cache: {len(cache.lengths)} rows x {cache.capacity} slots x "
        f"{len(cache.layers)} layers, {size / 2**20:.0f} MiB in {model.dtype}. Use fewer rows a batch, shorter "
        "prompts or load the value model in bfloat16."
    )
