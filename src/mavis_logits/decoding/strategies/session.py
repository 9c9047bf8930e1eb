"""Sequences being written by a base model, with the value functions reading along.

A session is what every strategy decodes with. Base model and value models keep their keys and values in ragged caches,
so that rows may leave, multiply, change places or go back, and nothing is ever padded or computed twice.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedModel

from ...backbone import Backbone
from ...backbone.hidden import LOGITS, SOURCE, Layer
from ...backbone.hooks import let_compiled_code_see
from ...scoring.reader import ValueReader
from ...steering.policy import Requests
from ...steering.steering import Steering
from ...steering.step import Choice, Step
from .base_reader import BaseReader, GenerateReader, RaggedReader, prepared_inputs
from .processors import RowProcessors

if TYPE_CHECKING:
    from transformers.generation.streamers import BaseStreamer

    from ...steering.trace import MavisTrace


class Session:
    """R rows of text, their next-token distributions and values. Use it in a `with` block.

    `append` and `select` only note what happens; the base model reads new tokens when `reference` or `score` asks for
    the distribution after them, value models when `score` or `values` does.

    Args:
        steering: value functions and settings; None where only the reference is wanted.
        model: the base model.
        input_ids: [R, T] prompts, padded on the left.
        attention_mask: [R, T], 0 for padding; None if there is none.
        processors: what `generate` would apply to the scores, its temperature, top-k and top-p included: together they
            make the reference. They see the rows still being written.
        inputs: the other keyword arguments that `generate` has prepared for these rows; by default it is asked for them
            if they are needed.
        sources: [R, S] what the encoder of an encoder-decoder has read for each row, -1 for padding; for objectives in
            words.
        as_generate: have the base model read in the way of `generate` itself even where a ragged cache would do.

    Attributes:
        input_ids: [R, T] the rows so far, padded on the left.
        lengths: tokens of every row without padding.
        requests: [R] which of the rows given at first each one comes from.
        given: how many rows were given at first.
        streamer: who is told the tokens of this call, and
        trace: what records its steps; None for nobody and nothing. They are a call's own: one strategy may be in
            several at once.

    Raises:
        ValueError: right padding or an empty row.
    """

    def __init__(
        self,
        steering: Steering | None,
        model: PreTrainedModel,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        processors: LogitsProcessorList | RowProcessors | None = None,
        inputs: Mapping[str, Any] | None = None,
        as_generate: bool = False,
        sources: Tensor | None = None,
    ) -> None:
        self._sources = sources
        self._steering, self.model = steering, model
        self.input_ids = input_ids
        self.lengths = _lengths(input_ids, attention_mask)
        self.given = len(input_ids)
        self.requests = torch.arange(self.given, device=input_ids.device)
        self._padding = [input_ids.shape[1] - length for length in self.lengths]
        if not isinstance(processors, RowProcessors):
            processors = RowProcessors(processors or LogitsProcessorList(), self.given)
        self._processors = processors
        self._backbone = Backbone.of(model)
        self._given = (input_ids, attention_mask, inputs)
        self._stable_length = self._backbone.stable_length
        self._reader: BaseReader
        self._packed = False
        reading, wanted = self._backbone.reading, "auto" if steering is None else steering.reading
        if wanted == "packed" and reading.kind != "packed":
            raise ValueError(
                f"reading='packed', but the base {self._backbone.name} is {reading.kind}: {reading.reason}"
            )
        as_generate = as_generate or wanted == "repeated" or self._backbone.drifts or not reading.ragged
        if as_generate or self._backbone.why_not_handed_on(input_ids.device) is not None:
            self._reader = self._generate_reader()
        else:
            self._reader = RaggedReader(self._backbone, len(input_ids), input_ids.device)
            self._packed = reading.kind == "packed"
        self._scores: Tensor | None = None
        self._logits: Tensor | None = None
        self._hidden: dict[Layer, Tensor] = {}  # [R, d] by layer
        self._values: ValueReader | None = None
        if steering is not None:
            self._values = ValueReader(steering.functions, steering.compile, steering.reading)
            self._values.begin(len(input_ids))
        self._listening = False  # whether a forward pass is the session's own
        self.streamer: BaseStreamer | None = None
        self.trace: MavisTrace | None = None

    def __enter__(self) -> Self:
        with ExitStack() as stack:  # what fails half way leaves nothing behind
            if self._packed:
                stack.enter_context(self._backbone.packed_attention())
            if self._steering is not None:
                functions = self._steering.functions
                stack.enter_context(functions.reading())
                functions.refresh()
                for layer in functions.layers:
                    if isinstance(layer, str):
                        continue
                    handle = self._backbone.catch(layer, partial(self._keep, threading.get_ident(), layer))
                    stack.callback(handle.remove)
                if functions.heads:
                    stack.enter_context(let_compiled_code_see(self.model) or nullcontext())
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _keep(self, thread: int, layer: int | None, states: Tensor) -> None:
        if self._listening and threading.get_ident() == thread:
            self._hidden[layer] = states[:, -1] if states.ndim == 3 else states

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def steering(self) -> Steering:
        """Value functions and settings.

        Raises:
            ValueError: the session was given none.
        """
        if self._steering is None:
            raise ValueError("this session has no value functions: it gives the reference only")
        return self._steering

    @property
    def of_requests(self) -> Requests:
        """Which of the rows given at first each one comes from, as a policy asks for it."""
        return Requests(self.requests, self.given)

    def reference(self) -> Tensor:
        """[R, V] next-token scores of the reference: the base model's logits after all processors, not normalised."""
        if self._scores is None:
            self._logits = self._forward()
            self._scores = self._processed(self._logits) if self._processors else self._logits
        return self._scores

    @property
    def logits(self) -> Tensor:
        """[R, V] those of the base model behind `reference`, before any processor."""
        self.reference()
        assert self._logits is not None
        return self._logits

    def score(self, need_values: bool = False) -> Step:
        """One step of Algorithm 2 after every row.

        Args:
            need_values: score the lone candidate of a row too, whose value cannot change the distribution.
        """
        steering, seconds = self.steering, 0.0

        def read(choice: Choice, kept: Tensor) -> Tensor:
            nonlocal seconds
            started = time.perf_counter()
            whole, cut = steering.config.top_k is None, steering.config.candidate_min_p is not None
            values = self.values(choice.candidates, kept if cut else None, whole)
            seconds = time.perf_counter() - started
            return values

        scores = steering.known(self.reference())
        policy = steering.policy_at(self._processors.temperature)
        step = policy.step(scores, read, self.of_requests, all_values=need_values)
        steering.stats.add(len(self), step.kl, seconds)
        return step

    def values(self, candidates: Tensor, kept: Tensor | None = None, whole_vocabulary: bool = False) -> Tensor:
        """Values [R, k, M] of appending each of `candidates` [R, k], in reward units.

        Args:
            candidates: [R, k] token ids.
            kept: [R, k] bool, those whose values are wanted, in front of the others; None for all.
            whole_vocabulary: `candidates` are all tokens in order.

        Raises:
            ValueError: a sequence longer than a value model can read, or a value that is not finite.
            MemoryError: no room for a value model's cache.
        """
        reader, steering = self._values, self.steering
        assert reader is not None
        if steering.functions.layers:
            self.reference()
        states = self._hidden | ({LOGITS: self.logits} if steering.functions.words else {})
        if self._sources is not None:
            states[SOURCE] = self._sources[self.requests]
        return reader.values(
            self.input_ids, self.lengths, states, candidates, kept, steering.idle, whole=whole_vocabulary
        )

    def append(self, tokens: Tensor, chosen: Tensor | None = None) -> None:
        """Add one token to every row.

        Args:
            tokens: [R].
            chosen: [R] which of the candidates of the last `score` or `values` they are, if that is known of all: it
                spares the search for them.
        """
        if self._values is not None:
            self._values.grow(tokens, chosen)
        self.input_ids = torch.cat([self.input_ids, tokens[:, None]], dim=1)
        self._processors.append(tokens, self.requests)
        self.lengths = [length + 1 for length in self.lengths]
        self._scores = self._logits = None

    def select(self, rows: Tensor) -> None:
        """Keep `rows` [R'], in that order; a row named twice is copied."""
        numbers = rows.tolist()
        self.input_ids, self.requests = self.input_ids[rows], self.requests[rows]
        self.lengths = [self.lengths[row] for row in numbers]
        self._padding = [self._padding[row] for row in numbers]
        self._reader.select(rows)
        if self._values is not None:
            self._values.select(rows)
        if self._scores is not None:
            plain = self._logits is self._scores
            self._scores = self._scores[rows]
            self._logits = self._scores if plain else self.logits[rows]
        self._hidden = {layer: states[rows] for layer, states in self._hidden.items()}

    def replace(self, sequences: Sequence[Sequence[int]], pad_token_id: int = 0) -> None:
        """Make every row another sequence of its own, prompt included; what it shares with the old one stays cached.

        The rows may then differ in the number of tokens written; `input_ids` is padded on the left as needed.
        """
        old = [row[len(row) - n :] for row, n in zip(self.input_ids.tolist(), self.lengths, strict=True)]
        shared = [_shared(a, b) for a, b in zip(old, sequences, strict=True)]
        # The last token is always read anew: the distribution after it is wanted.
        self._reader.crop([min(same, len(s) - 1) for same, s in zip(shared, sequences, strict=True)])
        if self._values is not None:
            self._values.crop(shared)
        self.lengths = [len(sequence) for sequence in sequences]
        width = max(padding + length for padding, length in zip(self._padding, self.lengths, strict=True))
        padded = [[pad_token_id] * (width - len(s)) + list(s) for s in sequences]
        self.input_ids = torch.tensor(padded, device=self.input_ids.device)
        self._scores = self._logits = None
        self._hidden = {}

    def by_width(self) -> list[tuple[list[int], Tensor]]:
        """The rows as `generate` would have them, those of one width together: numbers of rows, and ids [n, T].

        There are several widths only after `replace`. What reads ids (processors, stopping criteria) may go by theirs.
        """
        widths = [padding + length for padding, length in zip(self._padding, self.lengths, strict=True)]
        groups = {width: [row for row, own in enumerate(widths) if own == width] for width in sorted(set(widths))}
        if len(groups) == 1:
            return [(groups[widths[0]], self.input_ids[:, self.input_ids.shape[1] - widths[0] :])]
        return [(rows, self.input_ids[rows, self.input_ids.shape[1] - width :]) for width, rows in groups.items()]

    def _processed(self, logits: Tensor) -> Tensor:
        """The base model's `logits` [R, V] after all processors."""
        groups = self.by_width()
        if len(groups) == 1:
            return self._processors(groups[0][1], logits, self.requests)
        scores = torch.empty_like(logits)
        for rows, ids in groups:
            scores[rows] = self._processors(ids, logits[rows], self.requests[rows])
        return scores

    def _forward(self) -> Tensor:
        """The base model's logits [R, V] after the tokens that it has not read yet."""
        limit = self._stable_length
        if limit is not None and isinstance(self._reader, RaggedReader) and max(self.lengths) > limit:
            self._reader = self._generate_reader()
        logits, hidden = [], []
        self._listening = True
        try:
            for rows, scores in self._reader.read(self.by_width(), self.lengths, self.requests):
                logits.append((rows, scores))
                hidden.append((rows, self._hidden))
                self._hidden = {}
        finally:
            self._listening = False
        self._hidden = {layer: _joined([(rows, states[layer]) for rows, states in hidden]) for layer in hidden[0][1]}
        return _joined(logits)

    def _generate_reader(self) -> GenerateReader:
        input_ids, mask, inputs = self._given
        if inputs is None:
            inputs = prepared_inputs(self.model, input_ids, mask)
        return GenerateReader(self._backbone.model, inputs, input_ids.shape[1], len(input_ids))


def _lengths(input_ids: Tensor, attention_mask: Tensor | None) -> list[int]:
    if attention_mask is None:
        return [input_ids.shape[1]] * len(input_ids)
    if (attention_mask[:, 1:] < attention_mask[:, :-1]).any():
        raise ValueError(
            "the prompts are padded on the right or masked in the middle; strategies go on at the right end: set "
            'tokenizer.padding_side = "left"'
        )
    lengths = attention_mask.sum(dim=1).tolist()
    if not all(lengths):
        raise ValueError(f"row {lengths.index(0)} of the batch is an empty prompt: its attention mask is all 0")
    return lengths


def _joined(parts: Sequence[tuple[list[int], Tensor]]) -> Tensor:
    """[R, ...] from the parts of some rows each."""
    if len(parts) == 1:
        return parts[0][1]
    whole = parts[0][1].new_empty(sum(len(rows) for rows, _ in parts), *parts[0][1].shape[1:])
    for rows, part in parts:
        whole[rows] = part
    return whole


def _shared(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common prefix."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
