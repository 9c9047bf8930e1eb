"""Attention over a `RaggedCache`: packed queries, grouped heads without repeating keys, one kernel call a layer.

Registered with transformers under the name `IMPLEMENTATION`. Given other keys than a ragged cache's it is transformers'
own `sdpa`, so a model that is switched to it computes the same as before.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

if TYPE_CHECKING:
    from .cache import Feed

IMPLEMENTATION = "mavis_ragged"
_lock = threading.Lock()
_users: dict[int, int] = {}


def ragged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Scaled dot-product attention as transformers calls it.

    Args:
        module: the attention layer.
        query: [C * R, heads, q, head_dim], or packed, [C, heads, Q, head_dim].
        key, value: [C * R, kv_heads, n, head_dim] of the cache's rows.
        attention_mask: [R, 1, q, n] or [C * R, 1, q, n], additive.

    Returns:
        what `query` attends to, in its own layout with heads and positions swapped.
    """
    feed: Feed | None = getattr(key, "ragged_feed", None)
    biased = any(kwargs.get(name) is not None for name in ("softcap", "position_bias", "s_aux"))
    # Gemma 4 reads its last layers at the last position only; then queries are no columns of the feed.
    if feed is None or attention_mask is None or biased or dropout or query.shape[2] != feed.queries:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    heads, size = query.shape[1], query.shape[3]
    count, columns = feed.input_ids.shape
    if feed.packed is not None:
        every = query.new_zeros(feed.copies, count * columns, heads, size)
        query = every.index_copy_(1, feed.packed, query.transpose(1, 2)).view(-1, columns, heads, size).transpose(1, 2)
    # Heads that share keys become further queries of one head: the keys need not be repeated for each.
    kv_heads = key.shape[1]
    groups = heads // kv_heads
    query = query.reshape(len(query), kv_heads, groups * columns, size)
    mask = attention_mask.expand(-1, groups, -1, -1).reshape(len(attention_mask), 1, groups * columns, -1)
    if len(mask) != len(query):
        mask = mask.repeat(feed.copies, 1, 1, 1)
    output = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    output = output.reshape(len(query), heads, columns, -1).transpose(1, 2)
    if feed.packed is not None:
        output = output.reshape(feed.copies, count * columns, heads, -1)[:, feed.packed]
    return output.contiguous(), None


@contextmanager
def ragged_attention_on(decoder: PreTrainedModel) -> Iterator[None]:
    """Have `decoder` run `ragged_attention` in place of sdpa; users in several threads share the switch."""
    with _lock:
        _users[id(decoder)] = _users.get(id(decoder), 0) + 1
        decoder.config._attn_implementation = IMPLEMENTATION
    try:
        yield
    finally:
        with _lock:
            _users[id(decoder)] -= 1
            if not _users[id(decoder)]:
                del _users[id(decoder)]
                decoder.config._attn_implementation = "sdpa"


AttentionInterface.register(IMPLEMENTATION, ragged_attention)
AttentionMaskInterface.register(IMPLEMENTATION, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
