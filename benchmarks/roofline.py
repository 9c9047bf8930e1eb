"""The roofline of a decoding step: bytes and operations counted from configs, against measured ceilings.

A forward pass reads every weight once and every cached key and value once, and multiplies and adds for every query. It
takes at least the longer of the two times, at the memory bandwidth and at the matrix throughput of the device, both
measured in the run that they are compared with. Counted are the matrix products of a Llama-like decoder (rotary
attention with grouped key-value heads, gated MLP). Embeddings, norms, softmax, sampling and all overhead are not
counted: no implementation reaches the bound, but two can be compared by it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from transformers import PreTrainedConfig

_REPEATS = 5


@dataclass(frozen=True)
class Cost:
    """What one kind of work takes.

    Attributes:
        bytes: read from memory.
        flops: floating-point operations, two for a multiplication with addition.
        rows: of the matrix products, on which their throughput depends.
        shape: width and inner width of the layers, likewise.
        dtype: of the weights.
    """

    bytes: float
    flops: float
    rows: int
    shape: tuple[int, int]
    dtype: torch.dtype


def layer_weights(config: PreTrainedConfig) -> int:
    """Number of weights in the matrices of one decoder layer."""
    width, heads = config.hidden_size, config.num_attention_heads
    attention = width * head_size(config) * (2 * heads + 2 * config.num_key_value_heads)
    return attention + 3 * width * config.intermediate_size


def head_size(config: PreTrainedConfig) -> int:
    """Width of one attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def forward_cost(
    config: PreTrainedConfig, dtype: torch.dtype, rows: int, queries: float, past: int, causal: bool = True
) -> Cost:
    """Cost of a decoder's layers for `rows` sequences of `past` cached tokens and `queries` new ones each.

    Args:
        config: of a Llama-like decoder.
        dtype: of weights and cache.
        rows, queries, past: as above; queries may be a mean.
        causal: new tokens see those before them; candidates (False) see the cached tokens and themselves.
    """
    seen = past + ((queries + 1) / 2 if causal else 1)  # keys a query, on average
    size, layers = head_size(config), config.num_hidden_layers
    products = 2 * layer_weights(config) * rows * queries
    attention = 4 * config.num_attention_heads * size * seen * rows * queries
    read = layer_weights(config) + 2 * config.num_key_value_heads * size * past * rows
    shape = (config.hidden_size, config.intermediate_size)
    return Cost(layers * read * dtype.itemsize, layers * (products + attention), _whole(rows * queries), shape, dtype)


def logits_cost(config: PreTrainedConfig, dtype: torch.dtype, rows: int) -> Cost:
    """Cost of the output embedding at one position a row."""
    weights = config.vocab_size * config.hidden_size
    return Cost(
        weights * dtype.itemsize, 2 * weights * rows, rows, (config.hidden_size, config.intermediate_size), dtype
    )


def head_cost(hidden_size: int, width: int, rows: int, candidates: float, dtype: torch.dtype = torch.float32) -> Cost:
    """Cost of a value head of one residual layer: its matrices, and its table's line of every candidate."""
    weights = hidden_size * width + width * width
    table = width * rows * candidates
    flops = 2 * rows * (hidden_size * width + candidates * width * width)
    return Cost((weights + table) * dtype.itemsize, flops, _whole(rows * candidates), (width, width), dtype)


def adapters_cost(config: PreTrainedConfig, dtype: torch.dtype, rank: int, count: int, tokens: float) -> Cost:
    """Cost of the low-rank updates of `count` adapters on all matrices, `tokens` in all passing through them."""
    width, inner, size = config.hidden_size, config.intermediate_size, head_size(config)
    heads, kv_heads = config.num_attention_heads * size, config.num_key_value_heads * size
    weights = config.num_hidden_layers * rank * (2 * (width + heads) + 2 * (width + kv_heads) + 3 * (width + inner))
    return Cost(count * weights * dtype.itemsize, 2 * weights * tokens, _whole(tokens), (width, inner), dtype)


class Ceilings:
    """The best that a device does, measured when first asked for.

    Args:
        device: to measure.
        buffer: bytes read to measure the bandwidth; more than any cache holds.
        shortest: seconds that a matrix product is repeated for, at least.
    """

    def __init__(self, device: torch.device | str, buffer: int = 1 << 30, shortest: float = 0.03) -> None:
        self.device, self.buffer, self.shortest = torch.device(device), buffer, shortest
        self.bandwidth = cache(self._bandwidth)
        self.throughput = cache(self._throughput)

    def seconds(self, cost: Cost) -> float:
        """The least time that a cost can take."""
        throughput = self.throughput(cost.rows, cost.shape, cost.dtype)
        return max(cost.bytes / self.bandwidth(), cost.flops / throughput)

    def _bandwidth(self) -> float:
        """Bytes per second of a matrix-vector product or a sum, whichever is faster, over what no cache holds."""
        matrix = torch.ones(self.buffer // 4 // 4096, 4096, device=self.device)
        vector = torch.ones(4096, device=self.device)
        fastest = min(self._fastest(lambda: matrix @ vector), self._fastest(matrix.sum))
        return matrix.nbytes / fastest

    def _throughput(self, rows: int, shape: tuple[int, int], dtype: torch.dtype) -> float:
        """Operations per second of a product of [rows, width] with a layer's [width, inner width] matrix."""
        width, inner = shape
        states = torch.ones(rows, width, dtype=dtype, device=self.device)
        matrix = torch.ones(inner, width, dtype=dtype, device=self.device)
        return 2 * rows * width * inner / self._fastest(lambda: torch.nn.functional.linear(states, matrix))

    def _fastest(self, work: Callable[[], object]) -> float:
        """Seconds of one call, in the fastest of several runs of many calls."""
        calls = 1
        while True:
            seconds = min(self._run(work, calls) for _ in range(_REPEATS))
            if seconds >= self.shortest or calls >= 1 << 14:
                return seconds / calls
            calls *= max(2, min(64, int(self.shortest / max(seconds, 1e-6)) + 1))

    def _run(self, work: Callable[[], object], calls: int) -> float:
        synchronize(self.device)
        start = time.perf_counter()
        for _ in range(calls):
            work()
        synchronize(self.device)
        return time.perf_counter() - start


def _whole(rows: float) -> int:
    return max(1, round(rows))


def synchronize(device: torch.device) -> None:
    """Wait until an accelerator has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
