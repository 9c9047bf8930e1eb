"""generate's logits processors, on rows that have left its batch, multiplied or gone back."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterable, Sized
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerBase

from ..calls import temperature_of

_MOST = 10_000  # parts of a processor that are looked at for changes

# They look at every row alone, at nothing but its ids and scores, and remember nothing.
_ROW_BY_ROW = (
    "EpsilonLogitsWarper", "EtaLogitsWarper", "ExponentialDecayLengthPenalty", "ForcedBOSTokenLogitsProcessor",
    "ForcedEOSTokenLogitsProcessor", "InfNanRemoveLogitsProcessor", "LogitNormalization", "MinLengthLogitsProcessor",
    "MinNewTokensLengthLogitsProcessor", "MinPLogitsWarper", "NoBadWordsLogitsProcessor",
    "NoRepeatNGramLogitsProcessor", "SequenceBiasLogitsProcessor", "SuppressTokensAtBeginLogitsProcessor",
    "SuppressTokensLogitsProcessor", "TemperatureLogitsWarper", "TopHLogitsWarper", "TopKLogitsWarper",
    "TopPLogitsWarper", "TypicalLogitsWarper", "WatermarkLogitsProcessor",
)  # fmt: skip
# They remember every row of the batch from call to call.
_STATEFUL = {
    "SynthIDTextWatermarkLogitsProcessor": "watermarking_config=SynthIDTextWatermarkingConfig(...)",
    "UnbatchedClassifierFreeGuidanceLogitsProcessor": "guidance_scale",
}


def _for_rows(processor: Any, places: Callable[[int], Tensor]) -> LogitsProcessor | None:
    """A processor for some rows in some order; None if it is not known how to make one.

    Args:
        processor: for the whole batch.
        places: of these rows, in what has so many entries for the batch.
    """
    kind = type(processor).__name__
    if type(processor) is not getattr(transformers.generation.logits_process, kind, None):
        return None
    if kind in _ROW_BY_ROW:
        return processor  # type: ignore[no-any-return]
    own = copy.copy(processor)
    if kind == "RepetitionPenaltyLogitsProcessor":
        padding = processor.prompt_ignore_length
        if isinstance(padding, Tensor):
            own.prompt_ignore_length = padding[places(len(padding)).to(padding.device)]
    elif kind == "EncoderRepetitionPenaltyLogitsProcessor":
        ids = processor.encoder_input_ids
        own.encoder_input_ids = ids[places(len(ids)).to(ids.device)]
    elif kind == "EncoderNoRepeatNGramLogitsProcessor":
        numbers = places(processor.batch_size).tolist()
        own.generated_ngrams, own.batch_size = [processor.generated_ngrams[i] for i in numbers], len(numbers)
    elif kind == "PrefixConstrainedLogitsProcessor":
        numbers, allowed = places(0).tolist(), processor._prefix_allowed_tokens_fn
        own._prefix_allowed_tokens_fn = lambda row, ids: allowed(numbers[row], ids)
    else:
        return None
    return own  # type: ignore[no-any-return]


class RowProcessors:
    """Runs `generate`'s processors on the rows of a session, which are not the batch that they were made for.

    A processor that is not known to look at every row alone is shown the batch that `generate` would show it: rows
    under the numbers that they began with, and ended rows filled up with padding. So what it remembers stays right,
    and what it looks up by row is found. Where rows multiply or go back (a search), what a processor remembers of rows
    would be that of others: there it may be indexed by row, but one that answers by what it has seen before is refused.

    Args:
        processors: as `generate` has prepared them.
        given: rows that the session began with.
        copies: rows of generate's batch for each of these.
        pad: token that fills up ended rows.
        search: the strategy, if it moves rows; None if every row is written to its end, in order.

    Attributes:
        temperature: that they bring the scores to.

    Raises:
        ValueError: a processor that keeps a state of each row, in a search.
    """

    def __init__(
        self,
        processors: LogitsProcessorList,
        given: int,
        copies: int = 1,
        pad: int = 0,
        search: str | None = "a search",
    ) -> None:
        self._processors, self._given, self._copies, self._pad, self._search = processors, given, copies, pad, search
        self.temperature = temperature_of(processors)
        self._whole: Tensor | None = None  # [given, T] the batch, for those that must see all of it
        nowhere = torch.zeros(0, dtype=torch.long)
        self._watched = [_Watched(p) if _for_rows(p, lambda _: nowhere) is None else None for p in processors]
        for processor in processors if search is not None else []:
            argument = _STATEFUL.get(type(processor).__name__)
            if argument is not None:
                raise _keeps_state(processor, str(search), f" ({argument})")

    def __len__(self) -> int:
        return len(self._processors)

    def __call__(self, input_ids: Tensor, scores: Tensor, requests: Tensor) -> Tensor:
        """[R, V] the scores of some rows after all processors.

        Args:
            input_ids: [R, T] padded on the left.
            scores: [R, V] of the base model.
            requests: [R] which of the rows given at first each one comes from.
        """

        def places(count: int) -> Tensor:
            return requests * count // self._given if count else requests

        for processor, watched in zip(self._processors, self._watched, strict=True):
            if watched is None:
                scores = _for_rows(processor, places)(input_ids, scores)  # type: ignore[misc, assignment]
            elif self._search is not None:
                scores = self._in_rounds(watched, input_ids, scores, requests)
            else:
                scores = self._in_whole(processor, input_ids, scores, requests)
        return scores

    def append(self, tokens: Tensor, requests: Tensor) -> None:
        """Every row has got a token [R]: ended ones, which the session has no more, are filled up."""
        if self._whole is None:
            return
        column = torch.full_like(self._whole[:, 0], self._pad).index_copy(0, requests, tokens)
        self._whole = torch.cat([self._whole, column[:, None]], dim=1)

    def _in_whole(self, processor: LogitsProcessor, input_ids: Tensor, scores: Tensor, requests: Tensor) -> Tensor:
        if self._whole is None:
            self._whole = input_ids
        if len(requests) == self._given:
            return processor(self._whole, scores)  # type: ignore[return-value, arg-type]
        every = scores.new_zeros(self._given, scores.shape[1]).index_copy(0, requests, scores)
        return processor(self._whole, every)[requests]  # type: ignore[index, arg-type]

    def _in_rounds(self, watched: _Watched, input_ids: Tensor, scores: Tensor, requests: Tensor) -> Tensor:
        """As many rows of each request at a time as it has places in generate's batch."""
        slots, rounds, seen = [], [], dict[int, int]()
        for request in requests.tolist():
            number = seen[request] = seen.get(request, -1) + 1
            slots.append(request * self._copies + number % self._copies)
            rounds.append(number // self._copies)
        result: Tensor | None = None
        for turn in range(max(rounds) + 1):
            rows = [row for row, own in enumerate(rounds) if own == turn]
            filled = torch.full((self._given * self._copies,), rows[0], device=input_ids.device)
            places = torch.tensor([slots[row] for row in rows], device=input_ids.device)
            index = torch.tensor(rows, device=input_ids.device)
            filled = filled.index_copy(0, places, index)
            new = watched.run(input_ids[filled], scores[filled], str(self._search))[places]
            result = torch.empty_like(scores, dtype=new.dtype) if result is None else result
            result[index] = new
        assert result is not None
        return result


class _Watched:
    """A processor that may not answer by what it has seen, but for what it sets up when it is first called."""

    def __init__(self, processor: LogitsProcessor) -> None:
        self._processor: Any = processor
        self._begun: Any = None
        self._looks: Any = None

    def run(self, input_ids: Tensor, scores: Tensor, search: str) -> Tensor:
        """The processor's answer, unless it would be another one without the calls since the first."""
        answer: Tensor = self._processor(input_ids, scores.clone())
        looks = _looks(self._processor, [_MOST])
        if self._looks is None:
            self._looks = looks
            try:
                self._begun = _copied(self._processor)
            except Exception:  # what cannot be copied may not change
                self._begun = None
        elif looks != self._looks:
            try:
                same = torch.equal(_copied(self._begun)(input_ids, scores), answer)
            except Exception:  # a processor of a user's, at a place where it never expected to be called
                same = False
            if not same:
                raise _keeps_state(self._processor, search)
        return answer


def _copied(processor: Any) -> Any:
    """A deep copy that shares models and tokenizers."""
    shared = [value for value in vars(processor).values() if isinstance(value, nn.Module | PreTrainedTokenizerBase)]
    return copy.deepcopy(processor, {id(value): value for value in shared})


def _looks(value: Any, left: list[int], depth: int = 5) -> Any:
    """What changes when an object does, as far as that can be seen from outside by looking at `left[0]` parts."""
    left[0] -= 1
    if isinstance(value, str | bytes | int | float | None):
        return value
    if isinstance(value, Tensor):
        return value.data_ptr(), value._version, tuple(value.shape)
    if isinstance(value, np.ndarray):
        return value.tobytes()
    if isinstance(value, nn.Module | PreTrainedTokenizerBase | type) or depth == 0 or left[0] < 0:
        return id(value)
    parts: Iterable[Any] = getattr(value, "__dict__", {}).values()
    if isinstance(value, dict):
        parts = value.values()
    elif isinstance(value, list | tuple | set | frozenset | deque):
        parts = value
    looks = [_looks(part, left, depth - 1) for part in parts]
    return id(value), len(value) if isinstance(value, Sized) else 0, looks


def _keeps_state(processor: Any, search: str, argument: str = "") -> ValueError:
    return ValueError(
        f"{type(processor).__name__}{argument} keeps a state of every row from step to step, but {search} multiplies "
        "rows or goes back: use MavisSampling, or generate with a MavisLogitsProcessor"
    )
