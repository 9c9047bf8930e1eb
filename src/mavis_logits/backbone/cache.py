"""A ragged, slot-addressed key-value cache: rows of different lengths, no padding, nothing copied step by step.

Every layer keeps one buffer of shape [R, kv_heads, capacity, head_dim]. Row r owns the slots 0 .. lengths[r]-1 (its
*committed* tokens); the slots behind them are scratch space for tokens that are only being tried. A forward pass is
described by a `Feed`: which tokens each row brings, the slot each is written to, and what each may attend to.
Left padding, beams, rejected drafts and a tree of candidates are then the same thing: another choice of slots.

The cache is handed to a transformers decoder as `past_key_values`, with the feed's own 4-D mask and position ids. The
mask is additive and floating point, because a boolean mask is *added* by the eager attention of transformers.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

Windows = Mapping[str, int | None]  # the kinds of attention layer of a decoder, each with its reach (None: unlimited)


@dataclass
class Feed:
    """One forward pass over a `RaggedCache`: R rows, q query columns each, n visible slots.

    Where rows bring different numbers of tokens, some columns are void. A decoder that runs `ragged_attention` is fed
    only the others, row after row (`packed`); any other computes the void ones too, which nobody reads.

    Attributes:
        input_ids: [R, q] tokens.
        position_ids: [R, q] position of each token in its own sequence.
        slots: [R, q] slot that each token's keys and values are written to.
        allowed: [R, q, n] bool, whether query may attend to slot.
        rows: [R] rows of the cache this pass is about, or None for all of them, in order.
        packed: [Q] the columns that are not void, as indices into R * q; None to feed all of them.
        copies: C, how often the decoder runs every row (`RaggedCache`).
    """

    input_ids: Tensor
    position_ids: Tensor
    slots: Tensor
    allowed: Tensor
    rows: Tensor | None = None
    packed: Tensor | None = None
    copies: int = 1

    @property
    def queries(self) -> int:
        """Positions of a row as the decoder sees it: columns, or all columns that are not void in one row."""
        return self.input_ids.shape[1] if self.packed is None else len(self.packed)

    def inputs(self, windows: Windows, dtype: torch.dtype) -> dict[str, Any]:
        """Keyword arguments for the decoder: `input_ids`, `position_ids`, `attention_mask`.

        Args:
            windows: of the decoder (`Backbone.windows`). Layers with a sliding window get a mask of their own, also
                limited by distance.
            dtype: of the decoder.
        """
        # A slot's number is its token's position; a candidate's own slot lies behind its position, hence within reach.
        slots = torch.arange(self.allowed.shape[-1], device=self.allowed.device)[None]
        mask = attention_masks(self.allowed, self.position_ids, slots, windows, dtype)
        ids, positions = self.input_ids, self.position_ids
        if self.packed is not None:
            ids, positions = (x.reshape(-1)[self.packed][None] for x in (ids, positions))
        elif self.copies > 1:
            masks = mask.items() if isinstance(mask, dict) else [("", mask)]
            repeated = {kind: m.repeat(self.copies, 1, 1, 1) for kind, m in masks}
            mask = repeated if isinstance(mask, dict) else repeated[""]
        ids, positions = (x.repeat(self.copies, 1) for x in (ids, positions))
        return {"input_ids": ids, "position_ids": positions, "attention_mask": mask}

    def columns(self, output: Tensor, first: int) -> Tensor:
        """What the decoder gave for columns `first` to q of every row.

        Args:
            output: [C * R, q, ...], or [C, Q, ...] if packed.

        Returns:
            [C, R, q - first, ...]; zeros in void columns.
        """
        count, columns = self.input_ids.shape
        if self.packed is None:
            return output.unflatten(0, (self.copies, count))[:, :, first:]
        every = output.new_zeros(self.copies, count * columns, *output.shape[2:])
        return every.index_copy(1, self.packed, output).unflatten(1, (count, columns))[:, :, first:]


def attention_masks(
    allowed: Tensor, query_positions: Tensor, key_positions: Tensor, windows: Windows, dtype: torch.dtype
) -> Tensor | dict[str, Tensor]:
    """What a decoder takes as its 4-D attention mask: additive, one per kind of attention layer if it has several.

    Args:
        allowed: [R, q, n] bool, whether query may attend to key.
        query_positions: [R, q].
        key_positions: [R, n] or [1, n]; layers with a sliding window attend only within that distance.
        windows: of the decoder (`Backbone.windows`).
        dtype: of the decoder.

    Returns:
        [R, 1, q, n], 0 or the smallest number of `dtype`; a dictionary of them by layer type if there are several.
    """
    zero = torch.zeros((), dtype=dtype, device=allowed.device)
    masks = {}
    for kind, window in windows.items():
        seen = allowed
        if window is not None:
            seen = allowed & (query_positions[:, :, None] - key_positions[:, None] < window)
        masks[kind] = torch.where(seen, zero, torch.finfo(dtype).min)[:, None]
    return masks if len(masks) > 1 else next(iter(masks.values()))


class _Layout(NamedTuple):
    """Where the columns of a feed go: new tokens, right-aligned, then candidates, in order.

    Attributes:
        lengths: [R] committed tokens.
        order: [R, q] which of its row's queries a column is; below 0 it is void: attended by nothing but itself, and
            read by nobody.
        slots: [R, q] that its keys and values are written to.
        positions: [R, q] of its token; the same for all candidates of a row.
        width: slots that are looked at.
    """

    lengths: Tensor
    order: Tensor
    slots: Tensor
    positions: Tensor
    width: int

    def allowed(self, pending: int, counts: Tensor, width: int) -> Tensor:
        """[R, q, width] bool, what each column may attend to: what is committed, new tokens up to it, and itself."""
        slot = torch.arange(width, device=self.slots.device)[None, None]
        start = self.lengths[:, None, None]
        allowed = (slot < start) | (slot == self.slots[..., None])
        if pending:
            # Slots of the row's new tokens up to the query itself (all of them, for a candidate).
            reach = torch.where(self.order < 0, 0, (self.order + 1).minimum(counts[:, None]))
            allowed |= (slot >= start) & (slot < start + reach[..., None])
        return allowed

    def packed(self, pending: int, kept: Tensor | None) -> Tensor:
        """[Q] the columns that matter, as indices into R * q. Waits for the device."""
        matters = self.order >= 0
        if kept is not None:
            matters[:, pending:] &= kept
        return torch.nonzero(matters.reshape(-1))[:, 0]


class RaggedLayer(CacheLayerMixin):
    """Keys and values of one decoder layer, each [C * R, capacity, kv_heads, head_dim]: slot after slot in memory.

    They may be the first rows of larger buffers, so that rows that come one by one do not move the others.
    Rows are copied by `index_select` and `index_copy_`: on a CPU several times as fast as `buffer[rows]`.
    """

    is_sliding = False
    is_compileable = False

    def __init__(self, cache: weakref.ref[RaggedCache]) -> None:
        super().__init__()
        # No reference cycle: the memory is to be free when decoding ends, not when the garbage collector comes round.
        self._cache = cache

    @property
    def cache(self) -> RaggedCache:
        """The cache that this layer belongs to."""
        cache = self._cache()
        assert cache is not None
        return cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        rows, capacity = len(self.cache.lengths) * self.cache.copies, self.cache.capacity
        self.dtype, self.device = key_states.dtype, key_states.device
        self._rows = [x.new_zeros(rows, capacity, x.shape[1], x.shape[3]) for x in (key_states, value_states)]
        self.is_initialized = True
        self._settle(rows)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the [*, kv_heads, *, head_dim] states into the feed's slots; return the slots the mask speaks of."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        cache = self.cache
        feed = cache.feed
        width = feed.allowed.shape[-1]
        found = []
        for buffer, states in ((self.keys, key_states), (self.values, value_states)):
            flat = states.transpose(1, 2).reshape(-1, states.shape[1], states.shape[3])
            buffer.view(-1, *buffer.shape[2:]).index_copy_(0, cache.written, flat)
            visible = buffer if cache.read is None else buffer.index_select(0, cache.read)
            found.append(visible[:, :width].transpose(1, 2))
        if not torch.compiler.is_compiling():
            found[0].ragged_feed = feed  # type: ignore[attr-defined]  # for `ragged_attention`, which gets these keys
        return found[0], found[1]

    def grow(self, capacity: int) -> None:
        """Enlarge the buffers to `capacity` slots."""
        if self.is_initialized:
            count = len(self.keys)
            self._rows = [_grown(buffer, count, capacity) for buffer in (self.keys, self.values)]
            self._settle(count)

    def _settle(self, count: int) -> None:
        """Use the first `count` rows; tell the compiler that they stay where they are, so that a CUDA graph may write
        to them."""
        self.keys, self.values = (buffer[:count] for buffer in self._rows)
        if self.cache.static:
            torch._dynamo.mark_static_address(self.keys)
            torch._dynamo.mark_static_address(self.values)

    def select(self, rows: Tensor, moved: Tensor | None, slots: int) -> None:
        """Keep `rows` (repeats allowed), in that order.

        Args:
            rows: [n].
            moved: which of the n come from elsewhere; only these are copied, into memory that is there already or has
                room for half as many more. None: all, into memory for n rows.
            slots: that hold something, in front of the others.
        """
        if not self.is_initialized:
            return
        if moved is None:
            self._rows = [buffer.index_select(0, rows) for buffer in self._rows]
        else:
            if len(rows) > len(self._rows[0]):
                self._rows = [_grown(buffer, len(rows) * 3 // 2, self.cache.capacity) for buffer in self._rows]
            for buffer in self._rows:
                used = buffer[:, :slots]
                used.index_copy_(0, moved, used.index_select(0, rows[moved]))
        self._settle(len(rows))

    def move(self, source: Tensor, target: Tensor) -> None:
        """Copy slots `source` over slots `target`, both counted through all rows."""
        if self.is_initialized:
            for buffer in (self.keys, self.values):
                slots = buffer.view(-1, *buffer.shape[2:])
                slots.index_copy_(0, target, slots.index_select(0, source))

    def buffers(self) -> list[Tensor]:
        """Keys and values with the rows that are spare; empty before the first feed."""
        return self._rows if self.is_initialized else []

    def get_seq_length(self) -> int:
        return self.cache.longest

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.feed.allowed.shape[-1], 0


def _grown(buffer: Tensor, rows: int, capacity: int) -> Tensor:
    count, slots = buffer.shape[:2]
    larger = buffer.new_empty(rows, capacity, *buffer.shape[2:])
    larger[:count, :slots] = buffer
    larger[:count, slots:] = 0  # what is masked takes part in a product with 0, which a NaN would survive
    larger[count:] = 0
    return larger


class RaggedCache(Cache):
    """Key-value cache whose rows have their own lengths (design: ragged, slot-addressed). Layers come as they are used.

    Args:
        rows: number of sequences R, all empty at first.
        device: where `lengths` lives; buffers follow the states they are given.
        capacity: slots per row to begin with; doubled as needed.
        copies: C, how many decoders at once keep their keys and values here (value models fused into one): every row
            is there C times, copy after copy, with the same slots and lengths.
        static: for compiled decoders: queries see all slots, whose number changes only when the buffers grow.

    Attributes:
        lengths: [R] committed tokens per row.
        longest: an upper bound of `lengths`, kept on the host so that no step waits for the device.
    """

    feed: Feed
    written: Tensor  # [C * Q] slots that the feed's tokens are written to, counted through all copies and rows
    read: Tensor | None  # [C * R'] rows that the feed's queries see, None for all

    def __init__(
        self,
        rows: int,
        device: torch.device | str = "cpu",
        capacity: int = 64,
        copies: int = 1,
        static: bool = False,
    ) -> None:
        super().__init__(layer_class_to_replicate=partial(RaggedLayer, weakref.ref(self)))  # type: ignore[arg-type]
        self.capacity, self.copies, self.static = capacity, copies, static
        self.lengths = torch.zeros(rows, dtype=torch.long, device=device)
        self.longest = 0
        self._reach = 0  # slots behind which nothing has been written

    def prepare(
        self,
        tokens: Tensor,
        counts: Tensor,
        candidates: Tensor | None = None,
        rows: Tensor | None = None,
        kept: Tensor | None = None,
        pack: bool = False,
    ) -> Feed:
        """Plan a forward pass: new tokens, then (optionally) k alternatives for the token after them.

        Args:
            tokens: [R, p] new tokens of each row, right-aligned: row r brings its last `counts[r]` columns.
            counts: [R] how many new tokens each row brings, 0 to p.
            candidates: [R, k] alternatives that each see their row's tokens and themselves, not each other.
            rows: [R] the cache rows meant, when not all.
            kept: [R, k] bool, the alternatives that matter; None for all of them.
            pack: leave void columns out of the pass, for a decoder that runs `ragged_attention`.

        Returns:
            the feed; its queries are [R, p + k], the last k being the candidates. New tokens become part of the row
            with `advance`, a candidate with `commit`.
        """
        pending = tokens.shape[1]
        input_ids = tokens if candidates is None else torch.cat([tokens, candidates], dim=1)
        layout = self._layout(counts, pending, input_ids.shape[1], rows)
        self._reserve(layout.width)
        self._reach = max(self._reach, layout.width)
        packed = layout.packed(pending, kept) if pack and (kept is not None or pending) else None
        allowed = layout.allowed(pending, counts, self.capacity if self.static else layout.width)
        self.feed = Feed(input_ids, layout.positions, layout.slots, allowed, rows, packed, self.copies)
        row = torch.arange(len(self.lengths), device=counts.device) if rows is None else rows
        written = (row[:, None] * self.capacity + layout.slots).reshape(-1)
        self.written = self._every_copy(written if packed is None else written[packed], self.capacity)
        self.read = None if rows is None else self._every_copy(rows)
        return self.feed

    def _layout(self, counts: Tensor, pending: int, columns: int, rows: Tensor | None) -> _Layout:
        """Where a feed's `columns` go, `pending` of them for new tokens, of which row r brings its last `counts[r]`."""
        lengths = self.lengths if rows is None else self.lengths[rows]
        order = torch.arange(columns, device=lengths.device) - (pending - counts)[:, None]
        # Void columns write to slots behind the candidates.
        offset = torch.where(order < 0, order + columns, order)
        positions = lengths[:, None] + order.clamp(min=0).minimum(counts[:, None])
        return _Layout(lengths, order, lengths[:, None] + offset, positions, self.longest + columns)

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
        row = torch.arange(len(self.lengths), device=self.lengths.device) if rows is None else rows
        target = row * self.capacity + (self.lengths if rows is None else self.lengths[rows])
        slots = [self._every_copy(x, self.capacity) for x in (target + chosen, target)]
        for layer in self.layers:
            layer.move(*slots)
        self.advance(torch.ones_like(target), 1, rows)

    def crop(self, lengths: Tensor, longest: int) -> None:
        """Forget all but the first `lengths[r]` tokens of every row; `longest` is their maximum."""
        self.lengths, self.longest = lengths, longest

    def select(self, rows: Tensor) -> None:
        """Keep `rows` [R'], in that order; a row named twice is copied."""
        every = self._every_copy(rows)
        elsewhere = torch.nonzero(every != torch.arange(len(every), device=every.device))[:, 0]
        moved = elsewhere if 2 * len(elsewhere) <= len(every) else None
        self.lengths = self.lengths[rows]
        for layer in self.layers:
            layer.select(every, moved, self._reach)

    def nbytes(self) -> int:
        """Memory of all buffers."""
        return sum(buffer.nbytes for layer in self.layers for buffer in layer.buffers())

    def _every_copy(self, index: Tensor, per_row: int = 1) -> Tensor:
        """`index` into one copy's rows (or their `per_row` slots each), repeated for every copy."""
        if self.copies == 1:
            return index
        step = len(self.lengths) * per_row
        return (torch.arange(self.copies, device=index.device)[:, None] * step + index).reshape(-1)

    def _reserve(self, slots: int) -> None:
        if slots > self.capacity:
            self.capacity = max(slots, 2 * self.capacity)
            for layer in self.layers:
                layer.grow(self.capacity)
