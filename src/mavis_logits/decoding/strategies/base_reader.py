"""How a session's base model reads: over a ragged cache where that is right, else in the way of `generate` itself."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.utils import ModelOutput

from ...backbone import Backbone
from ...backbone.anatomy import given_cache
from ...backbone.cache import RaggedCache

Groups = Sequence[tuple[list[int], Tensor]]


class BaseReader(Protocol):
    """The base model's side of a session: what it has read of every row."""

    def read(self, groups: Groups, lengths: Sequence[int], requests: Tensor) -> Iterator[tuple[list[int], Tensor]]:
        """Read what is new; give next-token scores.

        Args:
            groups: the rows, those of one width together: their numbers, and their ids [n, T], padded on the left.
            lengths: tokens of every row.
            requests: [R] which of the rows given at first each one comes from.

        Yields:
            some rows, and their scores [n, V] in float32.
        """

    def select(self, rows: Tensor) -> None:
        """Keep `rows` [R'], in that order; a row named twice is copied."""

    def crop(self, lengths: Sequence[int]) -> None:
        """Forget all but the first `lengths[r]` tokens of every row, at the most."""


class RaggedReader:
    """Keys and values of all rows in a `RaggedCache`: rows leave, multiply and go back at no cost."""

    def __init__(self, backbone: Backbone, rows: int, device: torch.device) -> None:
        self._backbone, self._windows = backbone, backbone.windows
        self._cache = RaggedCache(rows, device)
        self._read = [0] * rows

    def read(self, groups: Groups, lengths: Sequence[int], requests: Tensor) -> Iterator[tuple[list[int], Tensor]]:
        width = max(ids.shape[1] for _, ids in groups)
        counts = [length - read for length, read in zip(lengths, self._read, strict=True)]
        most = max(counts)
        if len(groups) == 1:
            tokens = groups[0][1][:, width - most :]
        else:
            tokens = groups[0][1].new_zeros(len(lengths), most)
            for rows, ids in groups:
                taken = min(most, ids.shape[1])
                tokens[rows, most - taken :] = ids[:, ids.shape[1] - taken :]
        cache = self._cache
        new = torch.tensor(counts, device=tokens.device) if most > 1 else torch.ones_like(cache.lengths)
        inputs = cache.prepare(tokens, new).inputs(self._windows, self._backbone.decoder.dtype)
        logits = self._backbone.logits(**inputs, cache=cache, use_cache=True)
        cache.advance(new, most)
        self._read = list(lengths)
        cache.longest = max(self._read)
        yield list(range(len(lengths))), logits[:, -1].float()

    def select(self, rows: Tensor) -> None:
        self._read = [self._read[row] for row in rows.tolist()]
        self._cache.select(rows)
        self._cache.longest = max(self._read, default=0)

    def crop(self, lengths: Sequence[int]) -> None:
        self._read = [min(have, length) for have, length in zip(self._read, lengths, strict=True)]
        self._cache.crop(torch.tensor(self._read, device=self._cache.lengths.device), max(self._read))


@dataclass(frozen=True)
class _Group:
    """Rows of one width, read together.

    Attributes:
        rows: their numbers.
        width: tokens read, padding included.
        inputs: what `generate` would go on with: mask, positions, cache and whatever else the model wants.
    """

    rows: list[int]
    width: int
    inputs: dict[str, Any]


class GenerateReader:
    """Reads as `generate` does: its cache, its masks, its preparation of inputs; for every model that it runs.

    Rows leave and multiply by reordering the cache. Going back means to read from scratch.

    Args:
        model: the base model.
        inputs: the keyword arguments that `generate` has prepared for the rows given at first, at their width.
        width: of these rows.
    """

    def __init__(self, model: PreTrainedModel, inputs: Mapping[str, Any], width: int, count: int) -> None:
        self._model: Any = model
        self._first, self._width, self._count = dict(inputs), width, count
        self._groups: list[_Group] = []

    def read(self, groups: Groups, lengths: Sequence[int], requests: Tensor) -> Iterator[tuple[list[int], Tensor]]:
        known = {tuple(group.rows): group for group in self._groups}
        self._groups = []
        for rows, ids in groups:
            group = known.get(tuple(rows))
            logits, inputs = self._step(
                ids, None if group is None or group.width >= ids.shape[1] else group, requests[rows]
            )
            self._groups.append(_Group(rows, ids.shape[1], inputs))
            yield rows, logits

    def _step(self, ids: Tensor, group: _Group | None, requests: Tensor) -> tuple[Tensor, dict[str, Any]]:
        inputs = self._begun(ids.shape[1], requests) if group is None else group.inputs
        new = None if group is None or not inputs.get("use_cache") else ids.shape[1] - group.width
        prepared = self._model.prepare_inputs_for_generation(
            ids, next_sequence_length=new, is_first_iteration=group is None, **inputs
        )
        output = self._model(**prepared, return_dict=True)
        return output.logits[:, -1].float(), self._grown(output, inputs, 1)

    def _begun(self, width: int, requests: Tensor) -> dict[str, Any]:
        """What `generate` would begin with, had it been given these rows at this width."""
        inputs = taken(self._first, requests, self._count)
        more = width - self._width
        return self._grown(ModelOutput(), inputs, more) if more else inputs

    def _grown(self, output: Any, inputs: dict[str, Any], tokens: int) -> dict[str, Any]:
        config = self._model.config
        return self._model._update_model_kwargs_for_generation(
            output, inputs, is_encoder_decoder=config.is_encoder_decoder, num_new_tokens=tokens
        )

    def select(self, rows: Tensor) -> None:
        numbers = rows.tolist()
        kept = []
        for group in self._groups:
            places = [i for i, row in enumerate(numbers) if row in group.rows]
            if not places:
                continue
            index = torch.tensor([group.rows.index(numbers[i]) for i in places], device=rows.device)
            inputs = taken(group.inputs, index, len(group.rows), in_place=True)
            if _is_lost(inputs):
                continue  # a state that cannot be reordered: these rows are read from scratch
            kept.append(replace(group, rows=places, inputs=inputs))
        self._groups = kept

    def crop(self, lengths: Sequence[int]) -> None:
        self._groups = []


def taken(inputs: Mapping[str, Any], rows: Tensor, count: int, in_place: bool = False) -> dict[str, Any]:
    """Keyword arguments for `rows` [R'] of the `count` rows that `inputs` are for.

    Caches are copied, unless `in_place`; what is not given by row stays as it is.
    """

    def take(value: Any, axis: int = 0) -> Any:
        if isinstance(value, Cache):
            value = value if in_place else copy.deepcopy(value)
            if in_place:  # one that is copied is empty still
                value.reorder_cache(rows)
            return value
        if isinstance(value, Tensor):
            fits = value.ndim > axis and value.shape[axis] == count
            return value.index_select(axis, rows.to(value.device)) if fits else value
        if isinstance(value, ModelOutput):
            return type(value)(**{name: take(item) for name, item in value.items()})
        if isinstance(value, tuple | list):
            return type(value)(take(item) for item in value)
        return value

    # Positions of several kinds ([3, R, T], of images and text) have their rows second.
    return {
        name: take(value, 1 if name.endswith("position_ids") and getattr(value, "ndim", 0) == 3 else 0)
        for name, value in inputs.items()
    }


def _is_lost(inputs: Mapping[str, Any]) -> bool:
    cache = given_cache(inputs)
    own = {"state", "mems", "past_buckets_states", "cache_params"} & set(inputs)
    return cache is None or not isinstance(cache, Cache) or any(not isinstance(inputs[n], Cache) for n in own)


def prepared_inputs(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None) -> dict[str, Any]:
    """The keyword arguments that `generate` prepares for these prompts."""

    def capture(model: Any, input_ids: Tensor, **prepared: Any) -> Any:
        return prepared

    generate: Any = model.generate
    found = generate(input_ids, attention_mask=attention_mask, custom_generate=capture, max_new_tokens=1)
    return {
        name: value
        for name, value in found.items()
        if name not in ("logits_processor", "stopping_criteria", "generation_config")
    }
