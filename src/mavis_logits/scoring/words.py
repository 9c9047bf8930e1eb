"""Reading objectives in words: the base model over every text once more, with each instruction in its prompt."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..backbone import Backbone
from ..backbone.cache import RaggedCache
from ..values.words import Place, Words
from .scorer import ValueScorer


class WordsScorer(ValueScorer):
    """log pi_ref(a | instruction, s) of candidates a, for M instructions: text r under instruction m is row r * M + m
    of one `RaggedCache`.

    A candidate costs nothing, and one that is chosen has not been read: `commit` leaves it to the next `read`.

    Args:
        model: the instructions, bound to their base model.
        cached: False to read everything from scratch, as where the base model keeps no token-addressed cache.
    """

    model: Words  # type: ignore[assignment]

    def __init__(self, model: Words, cached: bool = True) -> None:
        self.model, self.lengths = model, []
        self._each = len(model.config.objectives)
        self._backbone = Backbone.of(model.backbone)
        self._windows, self._longest = self._backbone.windows, self._backbone.longest
        reading = self._backbone.reading
        self._packed = reading.kind == "packed"
        why = self._backbone.why_not_handed_on(model.device) if reading.ragged else reading.reason
        self._limit = self._backbone.stable_length  # tokens for which a cache is right; None: any number
        if why is not None or not cached:
            self._limit = 0
        if why is not None and cached:
            warnings.warn(
                f"{model.told} is read from scratch at every token, which is slow: "
                f"{self._backbone.name} cannot be read faster ({why})",
                stacklevel=2,
            )
        self.begin(0)

    def reset(self) -> None:
        self.begin(0)

    def begin(self, count: int) -> None:
        self.lengths = [0] * count
        self._places: list[list[Place]] = [[] for _ in range(count)]
        self._cache: RaggedCache | None = None
        if self._limit != 0:
            self._cache = RaggedCache(count * self._each, self.model.device)
        nothing = torch.empty(0, dtype=torch.long, device=self.model.device)
        # What is to be read from scratch, some day or always.
        self._texts = None if self._limit is None else [nothing] * (count * self._each)
        self._logits = torch.empty(count * self._each, 0, device=self.model.device)  # [R * M, V] after what was read

    def select(self, rows: Tensor) -> None:
        numbers = rows.tolist()
        self.lengths = [self.lengths[row] for row in numbers]
        self._places = [self._places[row] for row in numbers]
        own = (rows[:, None] * self._each + torch.arange(self._each, device=rows.device)).flatten()
        self._logits = self._logits[own]
        if self._texts is not None:
            self._texts = [self._texts[row] for row in own.tolist()]
        if self._cache is not None:
            self._cache.select(own)
            self._cache.longest = max(self._own_lengths(), default=0)

    def crop(self, lengths: Sequence[int]) -> None:
        if list(lengths) == self.lengths:
            return
        for row, (have, length) in enumerate(zip(self.lengths, lengths, strict=True)):
            if length < have:  # the last token is read again: what comes after it is to be known
                begun = length > max((place.start + place.removed for place in self._places[row]), default=length)
                self.lengths[row] = length - 1 if begun else 0
                if not begun:
                    self._places[row] = []
        own = self._own_lengths()
        if self._texts is not None:
            self._texts = [text[:length] for text, length in zip(self._texts, own, strict=True)]
        if self._cache is not None:
            self._cache.crop(torch.tensor(own, device=self.model.device), max(own, default=0))

    def commit(self, chosen: Tensor, rows: Tensor | None = None) -> None:
        """Nothing has been read of it."""

    @torch.no_grad()
    def read(self, tokens: Tensor, counts: Sequence[int], candidates: Tensor, kept: Tensor | None = None) -> Tensor:
        new, amounts = self._instructed(tokens, counts)
        self.lengths = [have + more for have, more in zip(self.lengths, counts, strict=True)]
        longest = max(self._own_lengths())
        if self._longest is not None and longest > self._longest:
            raise ValueError(
                f"{self.model.told}: a sequence has {longest} tokens, more than the {self._longest} that "
                f"{self._backbone.name} can read: shorten the prompt, max_new_tokens or the instructions"
            )
        if self._texts is not None:
            ends = new.shape[1]
            self._texts = [
                torch.cat([text, row[ends - count :]])
                for text, row, count in zip(self._texts, new, amounts, strict=True)
            ]
        if self._cache is not None and self._limit is not None and longest > self._limit:
            self._cache = None  # from now on from scratch
        if max(amounts):
            self._logits = self._after(new, amounts)
        log_probs = torch.log_softmax(self._logits, dim=-1).unflatten(0, (len(counts), self._each))
        return log_probs.gather(2, candidates[:, None].expand(-1, self._each, -1)).transpose(1, 2)

    def _after(self, new: Tensor, amounts: Sequence[int]) -> Tensor:
        """Logits [R * M, V] after `new` tokens, of which each row brings its last `amounts`."""
        if self._cache is None:
            assert self._texts is not None
            rows = [self._backbone.logits(text[None], use_cache=False)[:, -1] for text in self._texts]
            return torch.cat(rows).float()
        cache, counts = self._cache, torch.tensor(amounts, device=new.device)
        inputs = cache.prepare(new, counts).inputs(self._windows, self._backbone.decoder.dtype)
        with self._backbone.packed_attention() if self._packed else nullcontext():
            logits = self._backbone.logits(**inputs, cache=cache, use_cache=True)[:, -1].float()
        cache.advance(counts, max(amounts))
        cache.longest = max(self._own_lengths())
        return logits if min(amounts) else torch.where(counts[:, None] > 0, logits, self._logits)

    def _instructed(self, tokens: Tensor, counts: Sequence[int]) -> tuple[Tensor, list[int]]:
        """New tokens [R * M, q] right-aligned, with the instructions where texts begin, and how many of each row."""
        width = tokens.shape[1]
        if all(self.lengths[row] or not count for row, count in enumerate(counts)):
            return tokens.repeat_interleave(self._each, dim=0), [count for count in counts for _ in range(self._each)]
        parts = []
        for row, (text, count) in enumerate(zip(tokens.tolist(), counts, strict=True)):
            fresh = text[width - count :]
            if self.lengths[row] or not count:
                parts += [fresh] * self._each
                continue
            places = self._places[row] = self.model.places(fresh)
            parts += [place.applied(fresh) for place in places]
        longest = max(map(len, parts))
        padded = [[0] * (longest - len(part)) + part for part in parts]
        return torch.tensor(padded, device=tokens.device), list(map(len, parts))

    def _own_lengths(self) -> list[int]:
        """Tokens read of every row, instructions included."""
        own = []
        for length, places in zip(self.lengths, self._places, strict=True):
            more = [len(place.inserted) - place.removed for place in places] or [0] * self._each
            own += [length + delta for delta in more]
        return own


@dataclass
class _Reader:
    """An answer under one instruction: `tokens` read after the prompt `source`, and what comes of them."""

    source: tuple[int, ...]
    encoded: Any
    tokens: Tensor
    cache: Any = None
    logits: Tensor | None = None  # [V]


class EncodedWordsScorer(ValueScorer):
    """The same for encoder-decoders: the instruction goes into the prompt, which the encoder reads once for each row.

    The answers are read row by row, each with a cache as `generate` keeps it. Rows whose prompt is another one than
    that of the row that they go on from are read from their beginning.

    Args:
        model: the instructions (or a tuned policy), bound to their base model.

    Attributes:
        sources: [R, S] the prompts of the rows of the next `read`, -1 for padding.
    """

    model: Words  # type: ignore[assignment]

    def __init__(self, model: Words) -> None:
        self.model, self.lengths = model, []
        self.sources: Tensor | None = None
        self._backbone = Backbone.of(model.backbone)
        self.begin(0)

    def reset(self) -> None:
        self.begin(0)

    def begin(self, count: int) -> None:
        self.lengths = [0] * count
        self._texts = [torch.empty(0, dtype=torch.long, device=self.model.device)] * count
        self._readers: list[list[_Reader]] = [[] for _ in range(count)]

    def select(self, rows: Tensor) -> None:
        numbers, taken = rows.tolist(), set[int]()
        self._texts = [self._texts[row] for row in numbers]
        self.lengths = [len(text) for text in self._texts]
        readers = []
        for row in numbers:
            readers.append(copy.deepcopy(self._readers[row]) if row in taken else self._readers[row])
            taken.add(row)
        self._readers = readers

    def crop(self, lengths: Sequence[int]) -> None:
        self._texts = [text[:length] for text, length in zip(self._texts, lengths, strict=True)]
        self.lengths = [len(text) for text in self._texts]

    def commit(self, chosen: Tensor, rows: Tensor | None = None) -> None:
        """Nothing has been read of it."""

    @torch.no_grad()
    def read(self, tokens: Tensor, counts: Sequence[int], candidates: Tensor, kept: Tensor | None = None) -> Tensor:
        assert self.sources is not None
        new = [row[len(row) - count :] for row, count in zip(tokens, counts, strict=True)]
        self._texts = [torch.cat(both) for both in zip(self._texts, new, strict=True)]
        self.lengths = [len(text) for text in self._texts]
        logits = []
        for row, (text, source) in enumerate(zip(self._texts, self.sources.tolist(), strict=True)):
            prompt = [token for token in source if token >= 0]
            wanted = [tuple(place.applied(prompt)) for place in self.model.places(prompt)]
            if [reader.source for reader in self._readers[row]] != wanted:
                self._readers[row] = [self._begun(source) for source in wanted]
            logits.append(torch.stack([self._after(reader, text) for reader in self._readers[row]]))
        log_probs = torch.log_softmax(torch.stack(logits), dim=-1)  # [R, M, V]
        return log_probs.gather(2, candidates[:, None].expand(-1, log_probs.shape[1], -1)).transpose(1, 2)

    def _begun(self, source: tuple[int, ...]) -> _Reader:
        longest = self._backbone.longest
        if longest is not None and len(source) > longest:
            raise ValueError(
                f"{self.model.told}: a prompt has {len(source)} tokens, more than the {longest} that "
                f"{self._backbone.name} can read: shorten it or the instructions"
            )
        ids = torch.tensor([source], device=self.model.device)
        return _Reader(source, self._backbone.encoded(ids), ids.new_empty(0))

    def _after(self, reader: _Reader, text: Tensor) -> Tensor:
        """Logits [V] after `text` [T]."""
        have = len(reader.tokens)
        if have > len(text) or not torch.equal(reader.tokens, text[:have]):
            reader.tokens, reader.cache, reader.logits, have = text[:0], None, None, 0
        if have < len(text) or reader.logits is None:
            logits, reader.cache = self._backbone.decoded(reader.encoded, text[None, have:], reader.cache)
            reader.tokens, reader.logits = text, logits[0]
        return reader.logits
