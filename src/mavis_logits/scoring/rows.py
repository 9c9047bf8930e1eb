"""Which cached row each incoming sequence continues.

A logits processor sees only token ids. New prompts, the next token, reordered beams, rejected drafts and a second chat
turn are told apart by one rule: every incoming sequence goes on from the cached row with which it shares the longest
prefix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Tokens = NDArray[np.int64]
_ABSENT = -1  # fills the matrix of cached rows; no token has this id


@dataclass
class Plan:
    """What to do with a cache so that its rows become the incoming sequences.

    Attributes:
        sequences: the R incoming sequences, without padding.
        source: [R] cached row that each is made from; None if nothing cached is of use.
        kept: [R] tokens of that row that stay.
        chosen: [R] which of that row's last candidates comes next, -1 for none.
        pending: the tokens after these, which the cache has not seen.
    """

    sequences: list[Tokens]
    source: Tokens | None
    kept: Tokens
    chosen: Tokens
    pending: list[Tokens]
    _cached: int = 0

    @property
    def in_place(self) -> bool:
        """Whether every sequence goes on from the cached row of its own number, all of which are used."""
        return self.source is not None and self.source.tolist() == list(range(self._cached))

    @property
    def is_next_token(self) -> bool:
        """Whether every sequence is the cached row of its own number, with at most one token more."""
        return self.in_place and all(
            len(tokens) + (chosen >= 0) <= 1 for tokens, chosen in zip(self.pending, self.chosen, strict=True)
        )


class RowTracker:
    """The tokens of the cached rows, and the candidates scored after each of them."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget all rows."""
        self._rows: NDArray[np.int64] = np.empty((0, 0), dtype=np.int64)
        self._lengths: NDArray[np.int64] = np.empty(0, dtype=np.int64)
        self._candidates: NDArray[np.int64] = np.empty((0, 0), dtype=np.int64)

    def plan(self, sequences: list[Tokens]) -> Plan:
        """How to turn the cached rows into `sequences`, each of at least one token."""
        count = len(sequences)
        if not len(self._rows):
            return Plan(sequences, None, np.zeros(count, np.int64), np.full(count, -1), sequences)
        shared = np.stack([self._shared(sequence) for sequence in sequences])  # [R, cached rows]
        # Among equals prefer the row of the same number: then nothing moves.
        own = np.arange(count) % len(self._rows)
        is_own = shared[np.arange(count), own] == shared.max(axis=1)
        source = np.where(is_own, own, shared.argmax(axis=1))
        kept = shared[np.arange(count), source]
        if not kept.any():
            return Plan(sequences, None, kept, np.full(count, -1), sequences)
        chosen = np.full(count, -1)
        for i, sequence in enumerate(sequences):
            if kept[i] == self._lengths[source[i]] and len(sequence) > kept[i]:
                hits = np.flatnonzero(self._candidates[source[i]] == sequence[kept[i]])
                if len(hits):
                    chosen[i] = hits[0]
        pending = [sequence[kept[i] + (chosen[i] >= 0) :] for i, sequence in enumerate(sequences)]
        return Plan(sequences, source, kept, chosen, pending, _cached=len(self._rows))

    def update(self, sequences: list[Tokens], candidates: Tokens) -> None:
        """Remember that the cached rows are now `sequences`, with `candidates` [R, k] scored after them."""
        lengths = np.array([len(s) for s in sequences])
        rows = np.full((len(sequences), lengths.max(initial=0)), _ABSENT, dtype=np.int64)
        for row, sequence in zip(rows, sequences, strict=True):
            row[: len(sequence)] = sequence
        self._rows, self._lengths, self._candidates = rows, lengths, candidates

    def _shared(self, sequence: Tokens) -> Tokens:
        """Length of the prefix that `sequence` shares with every cached row."""
        width = min(len(sequence), self._rows.shape[1])
        same = self._rows[:, :width] == sequence[:width]
        return np.where(same.all(axis=1), width, (~same).argmax(axis=1)).astype(np.int64)


class LeftPadding:
    """How much padding stands before every row of the batch being written.

    Where the attention mask is known it tells. Else tokens have to: padding is what begins a row and is the padding
    token. That is a guess where the same token also begins or ends texts, and is not made where it can be wrong.
    """

    def __init__(self) -> None:
        self._prompts: NDArray[np.int64] = np.empty((0, 0), dtype=np.int64)
        self._starts: NDArray[np.int64] = np.empty(0, dtype=np.int64)

    def strip(
        self, input_ids: Tokens, masked: Tokens | None, pad_token_id: int | None, borders: frozenset[int]
    ) -> list[Tokens]:
        """Rows of `input_ids` [R, T] without their leading padding.

        Args:
            input_ids: that which goes on from the prompts of an earlier call has their padding.
            masked: [R] tokens of padding by the attention mask, if this is known anew.
            pad_token_id: the padding token, if there is one.
            borders: tokens that begin or end texts.

        Raises:
            ValueError: a row holds nothing but padding, or what begins the rows may be padding or text.
        """
        if masked is None and not self._go_on(input_ids):
            masked = guess_padding(input_ids, pad_token_id, borders)
        if masked is not None:
            if (masked >= input_ids.shape[1]).any():
                row = int(np.flatnonzero(masked >= input_ids.shape[1])[0])
                raise ValueError(f"row {row} of the batch is an empty prompt: it holds nothing but padding")
            self._prompts, self._starts = input_ids.copy(), masked
        return [row[start:] for row, start in zip(input_ids, self._starts, strict=True)]

    def _go_on(self, input_ids: Tokens) -> bool:
        rows, length = self._prompts.shape
        if rows != len(input_ids) or input_ids.shape[1] < length:
            return False
        return np.array_equal(self._prompts, input_ids[:, :length])


def guess_padding(input_ids: Tokens, pad_token_id: int | None, borders: frozenset[int]) -> Tokens:
    """[R] how many tokens at the beginning of each row of `input_ids` [R, T] are padding, by the tokens alone.

    A batch is as a rule padded to its longest row. So a token that also begins or ends texts is padding where it begins
    some rows only, and else may be either.

    Raises:
        ValueError: a row holds nothing but padding, or what begins the rows may be padding or text.
    """
    if input_ids.shape[1] == 1:  # a prompt of the padding token alone (a lone EOS, say) is a prompt
        return np.zeros(len(input_ids), dtype=np.int64)
    fills = [pad_token_id] if pad_token_id is not None else sorted(borders)
    filled = np.isin(input_ids, fills)
    runs = np.where(filled.all(axis=1), input_ids.shape[1], (~filled).argmax(axis=1)).astype(np.int64)
    if pad_token_id is None:
        if (runs == 0).all() or (runs == 1).all():  # a token that begins every prompt
            return np.zeros_like(runs)
        raise ValueError(
            f"rows of the batch begin with token {int(input_ids[runs.argmax(), 0])}, which may be padding or text, and "
            "no padding token is known: pass model=, so that the attention mask tells, or tokenizer= or pad_token_id="
        )
    if (runs == input_ids.shape[1]).any():
        row = int(np.flatnonzero(runs == input_ids.shape[1])[0])
        raise ValueError(
            f"row {row} of the batch is an empty prompt: it holds nothing but padding (token {pad_token_id})"
        )
    if pad_token_id in borders and (runs > 0).all():
        raise ValueError(
            f"every row of the batch begins with token {pad_token_id}, which is the padding token and also begins or "
            "ends texts: pass model=, so that the attention mask tells which of the two it is"
        )
    return runs


def strip_padding(input_ids: Tokens, pad_token_id: int | None) -> list[Tokens]:
    """Rows of `input_ids` [R, T] without their leading padding, where no text begins with the padding token.

    Raises:
        ValueError: a row holds nothing but padding.
    """
    return LeftPadding().strip(input_ids, None, pad_token_id, frozenset())


class Endings(NamedTuple):
    """What the last tokens of R rows tell.

    Attributes:
        closed: [R] whether `generate` has closed the row: its last token is padding that follows EOS or other padding.
        ended: [R] whether the last token is an EOS.
        over: [R] whether it is one or padding.
    """

    closed: list[bool]
    ended: list[bool]
    over: list[bool]

    def goes_on(self, empty: Sequence[bool]) -> list[bool]:
        """[R] which rows `generate` has not closed.

        Args:
            empty: [R] whether nothing is allowed after a row: a grammar may well forbid all once a text has ended.
        """
        each = zip(self.closed, self.over, empty, strict=True)
        return [not closed and not (over and nothing) for closed, over, nothing in each]


def endings(
    last: Sequence[Sequence[int]],
    length: int,
    eos_token_ids: frozenset[int],
    pad_token_id: int | None,
    begun: int = 0,
) -> Endings:
    """Which of R rows have ended.

    A lone EOS is no proof (a prompt, or a chat turn, may end with it), so a row is scored once more after its EOS. If
    all rows look closed, none is: `generate` would have stopped, so these are prompts.

    Args:
        last: [R, 2] the last tokens of every row; fewer if there are no more.
        length: tokens of a row, padding included.
        eos_token_ids: what ends a text.
        pad_token_id: the padding token; without one `generate` fills up with EOS.
        begun: length of the prompts, where it is known: they close nothing.
    """
    fills = eos_token_ids if pad_token_id is None else {pad_token_id}
    marks = eos_token_ids | fills
    ended = [bool(len(row)) and row[-1] in eos_token_ids for row in last]
    over = [bool(len(row)) and row[-1] in marks for row in last]
    if length < max(3, begun + 2):
        return Endings([False] * len(last), ended, over)
    closed = [row[-1] in fills and row[-2] in marks for row in last]
    return Endings([False] * len(last) if all(closed) else closed, ended, over)


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # they outlive the mode that they are first asked for in
def ids_on(ids: frozenset[int], device: torch.device) -> Tensor:
    """[n] token ids on `device`, in order; kept, so that no step waits for them to be copied."""
    return torch.tensor(sorted(ids), dtype=torch.long, device=device)
