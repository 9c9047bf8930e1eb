"""A ragged, slot-addressed key-value cache: rows of different lengths, no padding, nothing copied step by step.

Every layer keeps one buffer of shape [R, kv_heads, capacity, head_dim]. Row r owns the slots 0 .. lengths[r]-1 (its
*committed* tokens); the slots behind them are scratch space for tokens that are only being tried. A forward pass is
described by a `Feed`: which tokens each row brings, the slot each is written to, and what each may attend to.
Left padding, beams, rejected drafts and a tree of candidates are then the same thing: another choice of slots.

The cache is handed to a transformers decoder as `past_key_values`, with the feed's own 4-D mask and position ids. The
mask is additive and floating point, because a boolean mask is *added* by the eager attention of transformers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin

ATTENTION_LAYERS = {"full_attention", "sliding_attention"}


@dataclass
class Feed:
    """One forward pass over a `RaggedCache`: R rows, q query tokens each, n visible slots.

    Attributes:
        input_ids: [R, q] tokens.
        position_ids: [R, q] position of each token in its own sequence.
        slots: [R, q] slot that each token's keys and values are written to.
        allowed: [R, q, n] bool, whether query may attend to slot.
        rows: [R] rows of the cache this pass is about, or None for all of them, in order.
    """

    input_ids: Tensor
    position_ids: Tensor
    slots: Tensor
    allowed: Tensor
    rows: Tensor | None = None

    def inputs(self, config: PreTrainedConfig, dtype: torch.dtype) -> dict[str, Any]:
        """Keyword arguments for the decoder: `input_ids`, `position_ids`, `attention_mask`.

        Layers that attend within a sliding window get a mask of their own, also limited by distance.
        """
        # A slot's number is its token's position; a candidate's own slot lies behind its position, hence within reach.
        slots = torch.arange(self.allowed.shape[-1], device=self.allowed.device)[None]
        mask = attention_masks(self.allowed, self.position_ids, slots, config, dtype)
        return {"input_ids": self.input_ids, "position_ids": self.position_ids, "attention_mask": mask}


def attention_windows(config: PreTrainedConfig) -> dict[str, int | None]:
    """The kinds of attention layer a decoder has, each with its window in tokens (None: unlimited)."""
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ())
    if not kinds:
        kinds = {"full_attention"} if window is None else {"sliding_attention"}
    return {kind: window if kind == "sliding_attention" else None for kind in sorted(kinds)}


def supports_ragged_cache(config: PreTrainedConfig) -> bool:
    """Whether the decoder's whole state is keys and values addressed by token (not so for Mamba and its kin)."""
    kinds = set(getattr(config, "layer_types", None) or ATTENTION_LAYERS)
    recurrent = any(
        hasattr(config, name) for name in ("state_size", "mamba_d_state", "ssm_state_size", "attn_layer_indices")
    )
    return kinds <= ATTENTION_LAYERS and not recurrent and getattr(config, "num_attention_heads", None) is not None


def attention_masks(
    allowed: Tensor, query_positions: Tensor, key_positions: Tensor, config: PreTrainedConfig, dtype: torch.dtype
) -> Tensor | dict[str, Tensor]:
    """What a decoder takes as its 4-D attention mask: additive, one per kind of attention layer if it has several.

    Args:
        allowed: [R, q, n] bool, whether query may attend to key.
        query_positions: [R, q].
        key_positions: [R, n] or [1, n]; layers with a sliding window attend only within that distance.
        config: of the decoder.
        dtype: of the decoder.

    Returns:
        [R, 1, q, n], 0 or the smallest number of `dtype`; a dictionary of them by layer type if there are several.
    """
    zero = torch.zeros((), dtype=dtype, device=allowed.device)
    masks = {}
    for kind, window in attention_windows(config).items():
        seen = allowed
        if window is not None:
            seen = allowed & (query_positions[:, :, None] - key_positions[:, None] < window)
        masks[kind] = torch.where(seen, zero, torch.finfo(dtype).min)[:, None]
    return masks if len(masks) > 1 else next(iter(masks.values()))


class RaggedLayer(CacheLayerMixin):
    """Keys and values of one decoder layer, each [R, kv_heads, capacity, head_dim]."""

    is_sliding = False
    is_compileable = False

    def __init__(self, cache: RaggedCache) -> None:
        super().__init__()
        self.cache = cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        rows, capacity = len(self.cache.lengths), self.cache.capacity
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = key_states.new_zeros(rows, key_states.shape[1], capacity, key_states.shape[3])
        self.values = value_states.new_zeros(rows, value_states.shape[1], capacity, value_states.shape[3])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the [R, kv_heads, q, head_dim] states into the feed's slots; return the slots the mask speaks of."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        feed = self.cache.feed
        width = feed.allowed.shape[-1]
        rows = torch.arange(len(self.keys), device=self.keys.device) if feed.rows is None else feed.rows
        self.keys[rows[:, None], :, feed.slots] = key_states.transpose(1, 2)
        self.values[rows[:, None], :, feed.slots] = value_states.transpose(1, 2)
        if feed.rows is None:
            return self.keys[:, :, :width], self.values[:, :, :width]
        return self.keys[rows, :, :width], self.values[rows, :, :width]

    def grow(self, capacity: int) -> None:
        """Enlarge the buffers to `capacity` slots."""
        if self.is_initialized:
            self.keys = _grown(self.keys, capacity)
            self.values = _grown(self.values, capacity)

    def select(self, rows: Tensor) -> None:
        """Keep `rows` (repeats allowed), in that order."""
        if self.is_initialized:
            self.keys, self.values = self.keys[rows], self.values[rows]

    def move(self, rows: Tensor, source: Tensor, target: Tensor) -> None:
        """Copy slot `source[i]` of row `rows[i]` over its slot `target[i]`."""
        if self.is_initialized:
            self.keys[rows, :, target] = self.keys[rows, :, source]
            self.values[rows, :, target] = self.values[rows, :, source]

    def get_seq_length(self) -> int:
        return self.cache.longest

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.feed.allowed.shape[-1], 0


def _grown(buffer: Tensor, capacity: int) -> Tensor:
    larger = buffer.new_zeros(*buffer.shape[:2], capacity, buffer.shape[3])
    larger[:, :, : buffer.shape[2]] = buffer
    return larger


class RaggedCache(Cache):
    """Key-value cache whose rows have their own lengths (design: ragged, slot-addressed).

    Args:
        num_layers: decoder layers.
        rows: number of sequences R, all empty at first.
        device: where `lengths` lives; buffers follow the states they are given.
        capacity: slots per row to begin with; doubled as needed.

    Attributes:
        lengths: [R] committed tokens per row.
        longest: an upper bound of `lengths`, kept on the host so that no step waits for the device.
    """

    feed: Feed

    def __init__(self, num_layers: int, rows: int, device: torch.device | str = "cpu", capacity: int = 64) -> None:
        super().__init__(layers=[RaggedLayer(self) for _ in range(num_layers)])
        self.capacity = capacity
        self.lengths = torch.zeros(rows, dtype=torch.long, device=device)
        self.longest = 0

    def prepare(
        self, tokens: Tensor, counts: Tensor, candidates: Tensor | None = None, rows: Tensor | None = None
    ) -> Feed:
        """Plan a forward pass: new tokens, then (optionally) k alternatives for the token after them.

        Args:
            tokens: [R, p] new tokens of each row, right-aligned: row r brings its last `counts[r]` columns.
            counts: [R] how many new tokens each row brings, 0 to p.
            candidates: [R, k] alternatives that each see their row's tokens and themselves, not each other.
            rows: [R] the cache rows meant, when not all.

        Returns:
            the feed; its queries are [R, p + k], the last k being the candidates. New tokens become part of the row
            with `advance`, a candidate with `commit`.
        """
        lengths = self.lengths if rows is None else self.lengths[rows]
        device = lengths.device
        pending = tokens.shape[1]
        k = 0 if candidates is None else candidates.shape[1]
        input_ids = tokens if candidates is None else torch.cat([tokens, candidates], dim=1)

        # Query j of row r is its new token number j - skip[r]; earlier columns are padding, which writes to slots
        # behind the candidates, is attended by nothing but itself and read by nobody.
        order = torch.arange(pending + k, device=device) - (pending - counts)[:, None]
        offset = torch.where(order < 0, order + pending + k, order)
        slots = lengths[:, None] + offset
        positions = lengths[:, None] + order.clamp(min=0).minimum(counts[:, None])
        width = self.longest + pending + k
        self._reserve(width)

        slot = torch.arange(width, device=device)[None, None]
        committed = slot < lengths[:, None, None]
        # Slots of the row's new tokens up to the query itself (all of them, for a candidate).
        reach = lengths[:, None] + torch.where(order < 0, 0, (order + 1).minimum(counts[:, None]))
        new = (slot >= lengths[:, None, None]) & (slot < reach[..., None])
        allowed = committed | new | (slot == slots[..., None])
        self.feed = Feed(input_ids, positions, slots, allowed, rows)
        return self.feed

    def advance(self, counts: Tensor, most: int, rows: Tensor | None = None) -> None:
        """Commit the tokens just fed: lengths grow by `counts` [R], of which `most` is an upper bound."""
        if rows is None:
            self.lengths = self.lengths + counts
        else:
            self.lengths = self.lengths.index_add(0, rows, counts)
        self.longest += most

    def commit(self, chosen: Tensor, rows: Tensor | None = None) -> None:
        """Make candidate number `chosen[r]` of the last feed row r's next token, without recomputing it.

        Its keys and values move from scratch slot lengths[r] + chosen[r] to slot lengths[r].
        """
        target = self.lengths if rows is None else self.lengths[rows]
        row_ids = torch.arange(len(self.lengths), device=self.lengths.device) if rows is None else rows
        for layer in self.layers:
            layer.move(row_ids, target + chosen, target)
        self.advance(torch.ones_like(target), 1, rows)

    def crop(self, lengths: Tensor, longest: int) -> None:
        """Forget all but the first `lengths[r]` tokens of every row; `longest` is their maximum."""
        self.lengths, self.longest = lengths, longest

    def select(self, rows: Tensor) -> None:
        """Keep `rows` [R'], in that order; a row named twice is copied."""
        self.lengths = self.lengths[rows]
        for layer in self.layers:
            layer.select(rows)

    def _reserve(self, slots: int) -> None:
        if slots > self.capacity:
            self.capacity = max(slots, 2 * self.capacity)
            for layer in self.layers:
                layer.grow(self.capacity)
