"""What the base model is given to read beside the ids that a logits processor sees: masks, embeddings, images."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..backbone import Backbone
from ..backbone.hooks import before, undisturbed
from ..scoring.rows import Tokens

_REMEMBERED = 3  # prompts read since the last call: guidance reads one of its own
_UNREADABLE = ("pixel", "image", "video", "audio", "speech", "input_features", "input_values", "mm_encoder")


def says_something(value: Any) -> bool:
    """Whether an argument was given: generate hands empty collections on for inputs that there are none of."""
    if isinstance(value, Mapping | list | tuple):
        return any(says_something(item) for item in (value.values() if isinstance(value, Mapping) else value))
    return value is not None


def unreadable(named: Mapping[str, Any]) -> str | None:
    """The first of a model's keyword arguments that is no text; None if all are."""
    given = (name for name, value in named.items() if says_something(value))
    return next((name for name in given if any(part in name for part in _UNREADABLE)), None)


@dataclass(frozen=True)
class Prompt:
    """A forward pass over more than one position.

    Attributes:
        tokens: [R, n] that were read; None if these were embeddings.
        mask: attention mask [R, T] as it was given; None if there was none.
        positions: [R, n] of the tokens, if they were given.
        unreadable: a kind of input that is no text, if there was one.
        masked: whether the model is given masks at all, so that none means that there is no padding.
    """

    tokens: Tensor | None
    mask: Any
    positions: Tensor | None
    unreadable: str | None
    masked: bool = True

    def padding(self, input_ids: Tokens) -> Tokens | None:
        """[R] padding on the left of `input_ids` [R, T]; None if this is another text, or not told. Waits for it."""
        rows, length = input_ids.shape
        drafted = 0  # tokens that an assistant has put behind the prompt
        if self.tokens is not None:
            read = self.tokens.cpu().numpy()
            drafted = max(0, read.shape[1] - length)
            read = read[:, : read.shape[1] - drafted]
            if len(read) != rows or not np.array_equal(read, input_ids[:, length - read.shape[1] :]):
                return None
        if self.mask is None:
            return np.zeros(rows, dtype=np.int64) if self.masked else None
        if isinstance(self.mask, Tensor) and self.mask.ndim == 2:
            # What a soft prompt or a cache adds stands on the left.
            end = self.mask.shape[1] - drafted
            if len(self.mask) != rows or end < length:
                return None
            real = self.mask[:, end - length : end].cpu().numpy() != 0
            return np.where(real.any(axis=1), real.argmax(axis=1), length).astype(np.int64)
        if self.positions is not None and self.positions.ndim == 2 and len(self.positions) == rows:
            return np.clip(length + drafted - 1 - self.positions[:, -1].cpu().numpy(), 0, length).astype(np.int64)
        return None


class Given:
    """The prompts that the base model has read since the last call. Every thread has its own.

    The hook goes when this object does. It is no business of it how single tokens are read.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._local = threading.local()
        self._masked = Backbone.of(model).hands_mask_on
        reference = weakref.ref(self)

        def note(args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
            own = reference()
            if own is not None:
                own._note(args, kwargs or {})

        self.remove = weakref.finalize(self, before(model, note, with_kwargs=True).remove)
        self.remove.atexit = False

    @property
    def waiting(self) -> bool:
        """Whether there is something for `take`."""
        return bool(self._local.__dict__.get("prompts"))

    def undisturbed(self) -> AbstractContextManager[None]:
        """While it is open, what the model reads is no prompt: it is read for someone else."""
        return undisturbed(self._local)

    def take(self) -> list[Prompt]:
        """What was read since the last call, each handed out once."""
        found: list[Prompt] = self._local.__dict__.pop("prompts", [])
        return found

    def _note(self, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():  # generate reads prompts before it compiles
            return
        tokens = named.get("decoder_input_ids", named.get("input_ids", args[0] if args else None))
        read = tokens if tokens is not None else named.get("inputs_embeds")
        if not isinstance(read, Tensor) or read.ndim < 2 or read.shape[1] < 2:
            return
        own = "decoder_" if "decoder_input_ids" in named else ""  # of what the encoder reads is the other mask
        mask, positions = named.get(f"{own}attention_mask"), named.get("position_ids")
        prompt = Prompt(tokens, mask, positions, unreadable(named), self._masked)
        self._local.prompts = [*self._local.__dict__.get("prompts", []), prompt][-_REMEMBERED:]
