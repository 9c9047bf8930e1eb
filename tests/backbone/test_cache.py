"""The ragged cache against a model of it: a list of tokens a row."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import Gemma2Config, Llama4TextConfig, LlamaConfig, MistralConfig

from mavis_logits.backbone.anatomy import attention_windows
from mavis_logits.backbone.cache import Feed, RaggedCache

HEADS, WIDTH = 2, 3


def states(tokens: Tensor, scale: float = 1.0) -> Tensor:
    """Key or value states [R, heads, q, width] by which each token can be recognised."""
    return (scale * tokens.double())[:, None, :, None].expand(-1, HEADS, -1, WIDTH)


def forward(cache: RaggedCache, feed: Feed) -> tuple[Tensor, Tensor]:
    """What a decoder does with a feed: every layer writes its keys and values, and sees the slots."""
    for layer in range(2):
        keys, values = cache.update(states(feed.input_ids), states(feed.input_ids, -1.0), layer)
    return keys, values


class Lists:
    """The obvious cache: a list of tokens a row, and the candidates tried after each."""

    def __init__(self, rows: int) -> None:
        self.rows: list[list[int]] = [[] for _ in range(rows)]
        self.tried: list[list[int]] = [[] for _ in range(rows)]


def assert_same(cache: RaggedCache, lists: Lists) -> None:
    assert cache.lengths.tolist() == [len(row) for row in lists.rows]
    assert cache.longest >= max(map(len, lists.rows))
    for layer in cache.layers:
        for r, row in enumerate(lists.rows):
            if layer.is_initialized:
                expected = states(torch.tensor([row], dtype=torch.long))[0]
                assert torch.equal(layer.keys[r, : len(row)].transpose(0, 1), expected)
                assert torch.equal(layer.values[r, : len(row)].transpose(0, 1), -expected)


def seen(feed: Feed, keys: Tensor, row: int, query: int) -> list[int]:
    """The tokens that a query attends to, in order of their slots."""
    return keys[row, 0, feed.allowed[row, query], 0].long().tolist()


@st.composite
def pasts(draw: Any) -> list[tuple[str, Any]]:
    """A random life of a cache: feeds (of all rows, or of some), commits, croppings and selections."""
    return [
        (draw(st.sampled_from(["feed", "feed", "commit", "crop", "select"])), draw(st.integers(0, 2**32 - 1)))
        for _ in range(draw(st.integers(1, 8)))
    ]


@given(st.integers(1, 3), pasts())
def test_every_life_of_a_cache_agrees_with_lists_of_tokens(rows: int, past: list[tuple[str, int]]) -> None:
    cache, lists = RaggedCache(rows, capacity=4), Lists(rows)
    for step, (action, seed) in enumerate([("feed", 0), *past]):
        generator = torch.Generator().manual_seed(seed)

        def whole(high: int, *shape: int, low: int = 0, generator: Any = generator) -> Tensor:
            return torch.randint(low, high, shape, generator=generator)

        count = len(lists.rows)
        if action == "feed":
            some = None if step == 0 or seed % 2 else torch.arange(count)[whole(2, count).bool()]
            if some is not None and not len(some):
                continue
            affected = list(range(count)) if some is None else some.tolist()
            pending, k = int(whole(4, 1)), int(whole(4, 1, low=1))
            tokens, candidates = whole(100, len(affected), pending, low=1), whole(100, len(affected), k, low=1)
            counts = whole(pending + 1, len(affected))
            feed = cache.prepare(tokens, counts, candidates, some)
            keys, _ = forward(cache, feed)
            for i, r in enumerate(affected):
                new = tokens[i, pending - int(counts[i]) :].tolist()
                for j in range(len(new)):
                    query = pending - len(new) + j
                    assert seen(feed, keys, i, query) == lists.rows[r] + new[: j + 1]
                    assert feed.position_ids[i, query] == len(lists.rows[r]) + j
                for j, candidate in enumerate(candidates[i].tolist()):
                    assert seen(feed, keys, i, pending + j) == [*lists.rows[r], *new, candidate]
                    assert feed.position_ids[i, pending + j] == len(lists.rows[r]) + len(new)
                lists.rows[r] += new
                lists.tried[r] = candidates[i].tolist()
            cache.advance(counts, pending, some)
            for r in set(range(count)) - set(affected):
                lists.tried[r] = []
        elif action == "commit" and all(lists.tried):
            k = min(map(len, lists.tried))
            chosen = whole(k, count)
            some = None if seed % 2 else torch.arange(count)[whole(2, count).bool()]
            cache.commit(chosen if some is None else chosen[some], some)
            for r in range(count) if some is None else some.tolist():
                lists.rows[r].append(lists.tried[r][int(chosen[r])])
            lists.tried = [[] for _ in lists.rows]
        elif action == "crop":
            lengths = torch.stack([whole(len(row) + 1, 1)[0] for row in lists.rows])
            cache.crop(lengths, int(lengths.max()))
            lists.rows = [row[: int(n)] for row, n in zip(lists.rows, lengths, strict=True)]
            lists.tried = [[] for _ in lists.rows]
        elif action == "select":
            order = whole(count, int(whole(4, 1, low=1)))
            cache.select(order)
            lists.rows = [list(lists.rows[int(r)]) for r in order]
            lists.tried = [list(lists.tried[int(r)]) for r in order]
        assert_same(cache, lists)


def test_buffers_grow_by_doubling_and_keep_what_they_hold() -> None:
    cache, lists = RaggedCache(2, capacity=4), Lists(2)
    capacities = []
    for token in range(1, 30):
        forward(cache, cache.prepare(torch.full((2, 1), token), torch.ones(2, dtype=torch.long)))
        cache.advance(torch.ones(2, dtype=torch.long), 1)
        for row in lists.rows:
            row.append(token)
        capacities.append(cache.capacity)
        assert cache.layers[0].keys.shape == (2, cache.capacity, HEADS, WIDTH)
    assert sorted(set(capacities)) == [4, 8, 16, 32]
    assert_same(cache, lists)


def test_a_cache_frees_its_memory_at_once() -> None:
    cache = RaggedCache(1)
    forward(cache, cache.prepare(torch.ones(1, 5, dtype=torch.long), torch.tensor([5])))
    buffer = weakref.ref(cache.layers[0].keys)
    gc.disable()  # no help from the collector of cycles
    del cache
    gone = buffer() is None
    gc.enable()
    assert gone


def test_a_long_prompt_gets_the_room_it_needs_at_once() -> None:
    cache = RaggedCache(1, capacity=4)
    forward(cache, cache.prepare(torch.ones(1, 50, dtype=torch.long), torch.tensor([50])))
    assert cache.capacity == 50


@pytest.mark.parametrize("window", [1, 3, 4])
def test_a_sliding_window_hides_what_lies_too_far_back(window: int) -> None:
    config = MistralConfig(sliding_window=window)
    cache = RaggedCache(2)
    tokens = torch.tensor([[11, 12, 13, 14, 15], [0, 0, 21, 22, 23]])
    feed = cache.prepare(tokens, torch.tensor([5, 3]), torch.tensor([[31, 32], [33, 34]]))
    keys, _ = forward(cache, feed)
    mask = feed.inputs(attention_windows(config), torch.float32)["attention_mask"]
    visible = [[keys[row, 0, mask[row, 0, query] == 0, 0].long().tolist() for query in range(5, 7)] for row in range(2)]
    for row, words in enumerate(([11, 12, 13, 14, 15], [21, 22, 23])):
        near = words[max(0, len(words) - window + 1) :]
        assert visible[row] == [[*near, 31 + 2 * row], [*near, 32 + 2 * row]]
    last_of_prompt = keys[0, 0, mask[0, 0, 4] == 0, 0].long().tolist()
    assert last_of_prompt == [11, 12, 13, 14, 15][-window:]


def test_every_kind_of_layer_gets_its_own_mask() -> None:
    kinds = ["sliding_attention", "full_attention"]
    config = Gemma2Config(num_hidden_layers=2, layer_types=kinds, sliding_window=2)
    feed = RaggedCache(1).prepare(torch.tensor([[5, 6, 7]]), torch.tensor([3]), torch.tensor([[8]]))
    masks = feed.inputs(attention_windows(config), torch.bfloat16)["attention_mask"]
    assert sorted(masks) == sorted(kinds)
    assert (masks["full_attention"] == 0).sum(-1).tolist() == [[[1, 2, 3, 4]]]
    assert (masks["sliding_attention"] == 0).sum(-1).tolist() == [[[1, 2, 2, 2]]]
    assert {mask.dtype for mask in masks.values()} == {torch.bfloat16}
    assert all(torch.isfinite(mask).all() for mask in masks.values())


def test_windows_by_architecture() -> None:
    assert attention_windows(LlamaConfig()) == {"full_attention": None}
    assert attention_windows(MistralConfig(sliding_window=7)) == {"sliding_attention": 7}
    assert attention_windows(MistralConfig(sliding_window=None)) == {"full_attention": None}
    assert attention_windows(Gemma2Config(num_hidden_layers=2, sliding_window=7)) == {
        "full_attention": None,
        "sliding_attention": 7,
    }
    assert attention_windows(Llama4TextConfig()) is None  # chunks: a kind whose mask is not known


def test_an_empty_cache_can_be_selected_cropped_and_grown() -> None:
    cache = RaggedCache(3)
    cache.select(torch.tensor([2, 0]))
    cache.crop(torch.zeros(2, dtype=torch.long), 0)
    assert cache.lengths.tolist() == [0, 0]
    assert cache.get_seq_length() == 0


@given(rows=st.lists(st.integers(0, 5), min_size=1, max_size=9), still=st.booleans(), copies=st.integers(1, 3))
def test_selecting_rows_is_indexing_however_few_of_them_move(rows: list[int], still: bool, copies: int) -> None:
    if still:  # all but the first stay where they are
        rows = [rows[0], *range(1, min(len(rows), 6))]
    cache = RaggedCache(6, copies=copies, capacity=4)
    cache.prepare(torch.zeros(6, 1, dtype=torch.long), torch.ones(6, dtype=torch.long))
    given = torch.randn(6 * copies, 2, 1, 3)
    cache.update(given, -given, 0)
    layer = cache.layers[0]
    before = layer.keys.unflatten(0, (copies, 6)).clone()
    cache.select(torch.tensor(rows))
    assert torch.equal(layer.keys.unflatten(0, (copies, len(rows))), before[:, rows])
    assert torch.equal(layer.values, -layer.keys)
    assert len(cache.lengths) == len(rows)
