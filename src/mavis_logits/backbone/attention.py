"""Attention over a `RaggedCache`: packed queries, grouped heads without repeating keys, one kernel call a layer.

Registered with transformers under the name `IMPLEMENTATION`. Given other keys than a ragged cache's it is transformers'
own `sdpa`, so a model that is switched to it computes the same as before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from ..core.holds import Hold, Holds, Undo

if TYPE_CHECKING:
    from .cache import Feed

IMPLEMENTATION = "mavis_ragged"


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


def holding(decoder: PreTrainedModel) -> Hold:
    """Have `decoder` run `ragged_attention` from now on, until the hold is released and nobody else has one.

    Use it in a `with` block around forward passes, or keep it and `release` it. Users in several threads share the
    switch, which is in the config; afterwards it is as it was.
    """
    return _switched.hold(decoder.config)


def implementation_of(config: PreTrainedConfig) -> str | None:
    """The attention that a model runs while nobody is `holding` it."""
    return "sdpa" if config._attn_implementation == IMPLEMENTATION else config._attn_implementation


def _switch(config: PreTrainedConfig) -> Undo:
    parts = [config, *(part for name in config.sub_configs if (part := getattr(config, name, None)) is not None)]
    before = [(part, part._attn_implementation) for part in parts]
    config._attn_implementation = IMPLEMENTATION

    def undo() -> None:
        for part, implementation in before:
            if part._attn_implementation == IMPLEMENTATION:  # else the user has set another meanwhile
                part._attn_implementation = implementation

    return undo


_switched = Holds(_switch)
AttentionInterface.register(IMPLEMENTATION, ragged_attention)
AttentionMaskInterface.register(IMPLEMENTATION, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
