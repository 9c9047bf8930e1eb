"""Values of k candidate tokens under a value model, each step at the cost of k query tokens.

`RaggedScorer` feeds the candidates as k queries of one forward that see their row's committed tokens and themselves,
and when one of them is chosen moves its keys and values into place: the chosen token is never computed again.
`RepeatedStateScorer` is for backbones whose state is not addressed by token (Mamba): it repeats the state k times.
Both agree with re-forwarding every candidate from scratch (`mavis_logits.testing.recompute_values`).
"""

from __future__ import annotations

import copy
import weakref
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

from .attention import IMPLEMENTATION, holding
from .cache import RaggedCache, supports_ragged_cache
from .fused import FusedValueModel
from .rows import Plan
from .value_model import ValueModel

_PROBE_TOLERANCE = 0.05
_Setup = tuple[object, ...]
_supports: weakref.WeakKeyDictionary[PreTrainedModel, tuple[_Setup, str | None]] = weakref.WeakKeyDictionary()
Scored = ValueModel | FusedValueModel


class ValueScorer(ABC):
    """Rows of tokens that a value model has read, and values of candidates after them.

    Attributes:
        lengths: tokens read, row by row.
    """

    def __init__(self, model: Scored) -> None:
        self.model = model
        self.lengths: list[int] = []

    def score(self, plan: Plan, candidates: Tensor, kept: Tensor | None = None) -> Tensor:
        """Values [R, k, M] (float32, reward units) of `candidates` [R, k] after the sequences of `plan`.

        Args:
            plan: how the rows read so far become the sequences to score.
            candidates: [R, k].
            kept: [R, k] bool, the candidates that matter, None for all; the values of others mean nothing.
        """
        device = candidates.device
        if plan.source is None or not self.lengths:
            self.begin(len(plan.sequences))
        else:
            if not plan.in_place:
                self.select(torch.from_numpy(plan.source).to(device))
            grown = plan.chosen >= 0
            if grown.any():
                rows = None if grown.all() else torch.from_numpy(np.flatnonzero(grown)).to(device)
                self.commit(torch.from_numpy(plan.chosen[grown]).to(device), rows)
            self.crop((plan.kept + grown).tolist())
        counts = [len(tokens) for tokens in plan.pending]
        new = np.zeros((len(counts), max(counts)), dtype=np.int64)
        for row, tokens in zip(new, plan.pending, strict=True):
            row[new.shape[1] - len(tokens) :] = tokens
        return self.read(torch.from_numpy(new).to(device), counts, candidates, kept)

    @abstractmethod
    def begin(self, count: int) -> None:
        """Forget all rows and begin `count` empty ones."""

    @abstractmethod
    def select(self, rows: Tensor) -> None:
        """Keep `rows` [R'], in that order; a row named twice is copied."""

    @abstractmethod
    def crop(self, lengths: Sequence[int]) -> None:
        """Forget all but the first `lengths[r]` tokens of every row."""

    @abstractmethod
    def commit(self, chosen: Tensor, rows: Tensor | None = None) -> None:
        """Make candidate number `chosen[i]` of the last `read` the next token of row `rows[i]` (None: of every row)."""

    @abstractmethod
    def read(self, tokens: Tensor, counts: Sequence[int], candidates: Tensor, kept: Tensor | None = None) -> Tensor:
        """Read the last `counts[r]` of each row's `tokens` [R, p]; then values [R, k, M] of `candidates` [R, k].

        `kept` [R, k] tells the candidates that matter; a row without tokens and with at most one of them may be left
        out of the forward pass only if it has none: what is kept is always scored.
        """

    @abstractmethod
    def reset(self) -> None:
        """Forget all rows and free their memory."""


def make_scorer(model: Scored, compile: bool = False) -> ValueScorer:
    """The fastest scorer that is right for `model`'s backbone, which is tried once on a few tokens.

    Args:
        model: a value model, or several fused into one.
        compile: run steps as a compiled graph (`RaggedScorer`).

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
    kind = ragged_support(model.backbone)
    if kind is not None:
        return RaggedScorer(model, packed=kind == "packed", compile=compile)
    if compile:
        raise ValueError(
            f"compile=True needs a backbone with a token-addressed cache, which {type(model.backbone).__name__} has "
            "not: leave it out"
        )
    if isinstance(model, FusedValueModel):
        raise ValueError(
            f"the adapters for {model.config.objectives} cannot be scored in one forward: "
            f"{type(model.backbone).__name__} keeps no token-addressed cache. Load them with fuse=False"
        )
    return RepeatedStateScorer(model)


def ragged_support(decoder: PreTrainedModel) -> str | None:
    """How a decoder can run on a `RaggedCache`, found by trying it on a few tokens, once for each decoder.

    Returns:
        `"packed"`: with `ragged_attention`; `"masked"`: with its own attention and 4-D masks; None: not at all.
    """
    implementation = decoder.config._attn_implementation
    setup = ("sdpa" if implementation == IMPLEMENTATION else implementation, decoder.dtype, decoder.device)
    if decoder not in _supports or _supports[decoder][0] != setup:
        _supports[decoder] = (setup, _try_ragged_cache(decoder))
    return _supports[decoder][1]


def _try_ragged_cache(decoder: PreTrainedModel) -> str | None:
    if not supports_ragged_cache(decoder.config):
        return None
    if decoder.config._attn_implementation in ("sdpa", IMPLEMENTATION) and _agrees_with_plain_forward(decoder, True):
        return "packed"
    return "masked" if _agrees_with_plain_forward(decoder, False) else None


class RaggedScorer(ValueScorer):
    """For decoders whose state is keys and values: one forward a step over a `RaggedCache`.

    Args:
        model: the value model, or several fused into one.
        packed: run `ragged_attention`, which leaves void queries out.
        compile: compile the forward of a step, on a GPU into a CUDA graph. Shapes then are few: queries see the whole
            capacity, which doubles as it fills up, and none is left out. A prompt is read without. It pays where a
            step's time goes into launching kernels, and where batches keep their size.
    """

    def __init__(self, model: Scored, packed: bool = False, compile: bool = False) -> None:
        super().__init__(model)
        self.packed = packed and not compile
        mode = "reduce-overhead" if model.device.type == "cuda" else None
        self._compiled = torch.compile(model.forward, mode=mode) if compile else None
        self._cache: RaggedCache | None = None

    @property
    def cache(self) -> RaggedCache:
        """Keys and values of the rows."""
        assert self._cache is not None, "begin() comes first"
        return self._cache

    def reset(self) -> None:
        self._cache, self.lengths = None, []

    def begin(self, count: int) -> None:
        layers = self.model.backbone.config.num_hidden_layers
        static = self._compiled is not None
        self._cache = RaggedCache(layers, count, self.model.device, copies=self.model.copies, static=static)
        self.lengths = [0] * count

    def select(self, rows: Tensor) -> None:
        self.cache.select(rows)
        self.lengths = [self.lengths[row] for row in rows.tolist()]
        self.cache.longest = max(self.lengths)

    def crop(self, lengths: Sequence[int]) -> None:
        if list(lengths) != self.lengths:
            self.lengths = list(lengths)
            self.cache.crop(torch.tensor(self.lengths, device=self.cache.lengths.device), max(self.lengths))

    def commit(self, chosen: Tensor, rows: Tensor | None = None) -> None:
        self.cache.commit(chosen, rows)
        for row in range(len(self.lengths)) if rows is None else rows.tolist():
            self.lengths[row] += 1
        self.cache.longest = max(self.lengths)

    @torch.no_grad()
    def read(self, tokens: Tensor, counts: Sequence[int], candidates: Tensor, kept: Tensor | None = None) -> Tensor:
        cache, most = self.cache, tokens.shape[1]
        new = torch.tensor(counts, device=tokens.device) if most else torch.zeros_like(cache.lengths)
        try:
            feed = cache.prepare(tokens, new, candidates, kept=kept, pack=self.packed)
            inputs = feed.inputs(self.model.backbone.config, self.model.dtype)
            forward = self.model if self._compiled is None or most > 1 else self._compiled
            with holding(self.model.backbone) if self.packed else nullcontext():
                values = forward(**inputs, past_key_values=cache, use_cache=True).values
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not isinstance(error, torch.OutOfMemoryError) and "memory" not in str(error):
                raise
            raise _out_of_memory(cache, self.model) from error
        if most:
            cache.advance(new, most)
            self.lengths = [have + more for have, more in zip(self.lengths, counts, strict=True)]
            cache.longest = max(self.lengths)
        assert values is not None
        return self.model.join(feed.columns(values, most))


@dataclass
class _State:
    """One row of a `RepeatedStateScorer`: the tokens read, the state after them, and after each candidate too."""

    tokens: Tensor
    state: Cache | None = None
    candidates: Tensor | None = None
    branches: Cache | None = None


class RepeatedStateScorer(ValueScorer):
    """For any decoder with a cache, recurrent ones too: row by row, the state repeated for every candidate."""

    model: ValueModel

    def reset(self) -> None:
        self.begin(0)

    def begin(self, count: int) -> None:
        empty = torch.empty(0, dtype=torch.long, device=self.model.device)
        self._rows = [_State(empty) for _ in range(count)]
        self.lengths = [0] * count

    def select(self, rows: Tensor) -> None:
        self._rows = [copy.deepcopy(self._rows[row]) for row in rows.tolist()]
        self.lengths = [len(row.tokens) for row in self._rows]

    def crop(self, lengths: Sequence[int]) -> None:
        for row, length in zip(self._rows, lengths, strict=True):
            if length < len(row.tokens):  # a state cannot be cropped, only begun anew
                row.tokens, row.state, row.branches = row.tokens[:length], None, None
        self.lengths = list(lengths)

    def commit(self, chosen: Tensor, rows: Tensor | None = None) -> None:
        numbers = range(len(self._rows)) if rows is None else rows.tolist()
        for number, index in zip(numbers, chosen, strict=True):
            row = self._rows[number]
            assert row.branches is not None
            assert row.candidates is not None
            row.state = copy.deepcopy(row.branches)
            row.state.reorder_cache(index[None])
            row.tokens = torch.cat([row.tokens, row.candidates[index][None]])
            self.lengths[number] += 1

    @torch.no_grad()
    def read(self, tokens: Tensor, counts: Sequence[int], candidates: Tensor, kept: Tensor | None = None) -> Tensor:
        values = []
        for row, new, count, own in zip(self._rows, tokens, counts, candidates, strict=True):
            self._take(row, new[len(new) - count :])
            branch = copy.deepcopy(row.state)
            assert branch is not None
            branch.reorder_cache(torch.zeros(len(own), dtype=torch.long, device=own.device))
            values.append(self.model(own[:, None], past_key_values=branch, use_cache=True).values[:, -1])
            row.candidates, row.branches = own, branch
        self.lengths = [len(row.tokens) for row in self._rows]
        return torch.stack(values)

    def _take(self, row: _State, new: Tensor) -> None:
        """Read `new` tokens: a whole prompt at once, later tokens one by one, as recurrent layers expect them."""
        row.tokens = torch.cat([row.tokens, new])
        if row.state is None:
            row.state = DynamicCache(config=self.model.backbone.config)
            self.model(row.tokens[None], past_key_values=row.state, use_cache=True)
            return
        for token in new:
            self.model(token[None, None], past_key_values=row.state, use_cache=True)


@torch.no_grad()
def _agrees_with_plain_forward(decoder: PreTrainedModel, packed: bool) -> bool:
    """Whether custom masks and positions reach the decoder's attention: some architectures ignore them.

    Two rows of different lengths, each with two candidates, against plain forwards of every one.
    """
    device, size = decoder.device, decoder.config.vocab_size
    rows = [torch.arange(3, 6, device=device) % size, torch.arange(3, 9, device=device) % size]
    candidates = torch.tensor([[1, 2], [2, 0]], device=device) % size
    tokens = torch.stack([torch.cat([rows[0], rows[0]]), rows[1]])
    try:
        with ExitStack() as stack:
            if packed:
                stack.enter_context(holding(decoder))
            cache = RaggedCache(decoder.config.num_hidden_layers, 2, device, copies=getattr(decoder, "copies", 1))
            feed = cache.prepare(tokens, torch.tensor([3, 6], device=device), candidates, pack=packed)
            inputs = feed.inputs(decoder.config, decoder.dtype)
            fast = feed.columns(decoder(**inputs, past_key_values=cache, use_cache=True).last_hidden_state, 6)
        for r, row in enumerate(rows):
            for i, candidate in enumerate(candidates[r]):
                sequence = torch.cat([row, candidate[None]])[None].expand(cache.copies, -1)
                slow = decoder(input_ids=sequence, use_cache=False).last_hidden_state[:, -1].float()
                if not torch.linalg.norm(fast[:, r, i].float() - slow) <= _PROBE_TOLERANCE * torch.linalg.norm(slow):
                    return False
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError):
        return False  # it takes no such mask, positions or cache
    return True


def _out_of_memory(cache: RaggedCache, model: Scored) -> MemoryError:
    return MemoryError(
        f"no memory left for the value model's cache: {len(cache.lengths)} rows x {cache.capacity} slots x "
        f"{len(cache.layers)} layers, {cache.nbytes() / 2**20:.0f} MiB in {model.dtype}. Use fewer rows a batch, "
        "shorter prompts or load the value model in bfloat16."
    )
