"""Catching the hidden states that the base model has just computed on its way to the logits.

What enters the output embedding is caught by a forward pre-hook; which tokens the base model was given, by another on
the model. Together they tell, for every call of a logits processor, whether its scores come from the base model at all,
and from which position of which of its forward passes. States of inner layers, for value heads that read those, are
caught by forward hooks on the layers, and the logits, as the model gave them, by one on the model.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack
from typing import Any, Final, Literal

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from ..core.holds import Hold
from . import Backbone
from .anatomy import tokens_in
from .hooks import after, before, is_compiled, let_compiled_code_see, undisturbed

LOGITS: Final = "logits"  # in place of a layer: the scores of all tokens, before any processor
SOURCE: Final = "source"  # what an encoder-decoder's encoder has read, for whom its hidden states are not enough
Layer = int | None | Literal["logits", "source"]

_REMEMBERED = 3  # forward passes, all of them on other caches, that one call of a processor may have to choose from


class HiddenStates:
    """The states of the base model's latest forward passes, each handed out once. Every thread has its own.

    The hooks go when this object does. Where the model has been run more than once since the last call of the processor
    (classifier-free guidance runs it on another prompt), the pass that read the sequences in question is found by its
    cache, and else by its tokens.

    Args:
        model: the base model.
        layers: which are wanted, as for `Backbone.catch`; `LOGITS` for what the model makes of the last.
    """

    def __init__(self, model: PreTrainedModel, layers: Iterable[Layer] = (None,)) -> None:
        wanted = set(layers)
        self._inner = sorted(layer for layer in wanted if isinstance(layer, int))
        self._local = threading.local()
        self._seen: Hold | None = None
        backbone = Backbone.of(model)
        self.moved = False  # whether the output layer has been replaced since, by one of other weights perhaps
        self._model, self._layer = weakref.ref(backbone.model), weakref.ref(backbone.output_layer)
        with ExitStack() as stack:  # what fails half way leaves no hook
            for layer in self._inner:
                stack.callback(backbone.catch(layer, self._weakly(HiddenStates._at_layer, layer)).remove)
            self._output = [backbone.catch(None, self._weakly(HiddenStates._at_output))]
            stack.callback(_remove_all, self._output)
            stack.callback(before(backbone.model, self._weakly(HiddenStates._before_model), with_kwargs=True).remove)
            if LOGITS in wanted:
                stack.callback(after(backbone.model, self._weakly(HiddenStates._after_model)).remove)
            self._remove = weakref.finalize(self, stack.pop_all().close)
        self._remove.atexit = False
        self._seen = let_compiled_code_see(model)  # held for as long as this object lives

    def remove(self) -> None:
        """Take the hooks off, and forget all states."""
        self._remove()
        self._seen = None
        self._local = threading.local()

    @property
    def may_be_unseen(self) -> bool:
        """Whether the model has been compiled meanwhile, so that forward passes may go by without this object."""
        model = self._model()
        return self._seen is None and model is not None and is_compiled(model)

    def undisturbed(self) -> AbstractContextManager[None]:
        """While it is open, what the model reads is no concern of this object's: it is read for someone else."""
        return undisturbed(self._local)

    def take(self, input_ids: Tensor) -> dict[Layer, Tensor] | None:
        """The states [R, d] behind the scores of the sequences `input_ids` [R, T] (padding included), by layer.

        None if no forward pass of the base model has led to these scores: then they are an assistant's, or a probe's.
        """
        fitting = [f for f in self._recent() if f.index(input_ids) is not None]
        if not fitting:
            return None
        taken = fitting[0] if len(fitting) == 1 else self._behind(input_ids, fitting)
        self._local.past = taken.past
        index = taken.index(input_ids)
        assert index is not None
        taken.next = index + 1
        count = taken.count
        self._local.forwards = [taken] if taken.next < count else []
        found: dict[Layer, Tensor] = {layer: states[:, index - count] for layer, states in taken.states.items()}
        if taken.logits is not None:
            found[LOGITS] = taken.logits[:, index - count]
        return found

    def _weakly(self, method: Callable[..., None], *first: Any) -> Callable[..., None]:
        """A method of this object that does not keep it alive."""
        reference = weakref.ref(self)

        def call(*given: Any) -> None:
            own = reference()
            if own is not None:
                method(own, *first, *given)

        return call

    # Compiled forward passes run these too. They only ever write what they do not read, so that the compiler has
    # nothing to watch.

    def _before_model(self, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
        named = kwargs or {}
        if not torch.compiler.is_compiling():
            self._follow()
        tokens = named.get("decoder_input_ids", named.get("input_ids", args[0] if args else None))
        read = tokens if tokens is not None else named.get("inputs_embeds")
        past = next((given for given in (*args, *named.values()) if isinstance(given, Cache)), None)
        count = None
        if read is not None and (read.shape[1] > 1 or past is None):  # else a single position, which needs no counting
            count = read.shape[1] + (0 if past is None else tokens_in(past) or 0)
        self._local.tokens, self._local.read = tokens, count
        self._local.current = None
        if not torch.compiler.is_compiling():
            self._local.current = None if past is None else weakref.ref(past)
            model = self._model()
            if (
                self._seen is None and model is not None and "_compiled_call" in vars(model)
            ):  # of generate's later steps
                self._seen = let_compiled_code_see(model)

    def _follow(self) -> None:
        """Listen to the output layer that the model has now (resized embeddings are another one)."""
        model = self._model()
        layer = None if model is None else model.get_output_embeddings()
        if model is None or layer is None or layer is self._layer():
            return
        _remove_all(self._output)
        self._output.append(Backbone.of(model).catch(None, self._weakly(HiddenStates._at_output)))
        self._layer, self.moved = weakref.ref(layer), True

    def _at_layer(self, layer: int, states: Tensor) -> None:
        setattr(self._local, f"layer{layer}", states)

    def _at_output(self, states: Tensor) -> None:
        # Often the last positions only go on to the output embedding; those of inner layers are counted from the end.
        local = self._local
        every: dict[int | None, Tensor] = {None: states if states.ndim == 3 else states[:, None]}
        for layer in self._inner:
            inner = getattr(local, f"layer{layer}", None)
            if inner is None:  # it had been under way before the hooks came
                return
            every[layer] = inner
            setattr(local, f"layer{layer}", None)
        names = ("tokens", "read", "current")
        forward = _Forward(every, *(getattr(local, name, None) for name in names))
        if torch.compiler.is_compiling():
            local.compiled = forward
        else:
            local.forwards = [*(f for f in self._recent() if not forward.replaces(f)), forward][-_REMEMBERED:]

    def _after_model(self, args: tuple[Any, ...], output: Any) -> None:
        logits = output[0] if isinstance(output, tuple) else output.logits
        if torch.compiler.is_compiling():
            self._local.logits = logits
        elif self._local.__dict__.get("forwards"):
            self._local.forwards[-1].logits = logits

    def _recent(self) -> list[_Forward]:
        """The forward passes since the last call, and that which it asked for if there is more to be had of it."""
        known = self._local.__dict__.setdefault("forwards", [])
        compiled = self._local.__dict__.pop("compiled", None)
        if compiled is not None:
            compiled.logits = self._local.__dict__.pop("logits", None)
        return [*known, compiled] if compiled is not None else list(known)

    def _behind(self, input_ids: Tensor, fitting: list[_Forward]) -> _Forward:
        """That of several forward passes that has read `input_ids`."""
        found = [f for f in fitting if f.has_read(input_ids)] or fitting
        past = getattr(self._local, "past", None)
        followed = [f for f in found if past is not None and f.past is not None and f.past() is past()]
        if len(found) > 1 and not followed:
            # Compiled passes are those of generate, and so is one with a cache; guidance begins without.
            followed = [f for f in found if f.past is not None] or [f for f in found if f.read is None]
        return (followed or found)[-1]


def _remove_all(handles: list[RemovableHandle]) -> None:
    while handles:
        handles.pop().remove()


class _Forward:
    """A forward pass of the base model, and how far its states have been handed out.

    Args:
        states: [R, T, d] by layer; of inner layers there may be more positions, the last of which are the same.
        tokens: [R, n] that it was given; None if it was given none.
        read: positions read by then, padding included; None if not counted.
        past: the cache that it went on from, if that is known.
    """

    def __init__(self, states: dict[int | None, Tensor], tokens: Tensor | None, read: int | None, past: Any) -> None:
        self.states, self.tokens, self.read, self.past = states, tokens, read, past
        self.count = states[None].shape[1]
        self.next = 0
        self.logits: Tensor | None = None  # [R, T, V], at the same positions

    def index(self, input_ids: Tensor) -> int | None:
        """The position at the end of the sequences; None if it is not there, or has been handed out."""
        rows, length = input_ids.shape
        if len(self.states[None]) != rows or (self.count > 1 and self.read is None):
            return None
        # Embeddings (a soft prompt) are none of the sequences' tokens: they were read just before the first.
        behind = 0 if self.count == 1 or self.tokens is None or self.read is None else self.read - length
        index = self.count - 1 - behind
        return index if self.next <= index < self.count else None

    def replaces(self, other: _Forward) -> bool:
        """Whether nobody will ask for the `other`, earlier pass: it was over the same cache, or over one since gone."""
        return other.past is not None and other.past() in (None, self.past() if self.past is not None else None)

    def has_read(self, input_ids: Tensor) -> bool:
        """Whether it may have read these sequences. Waits for the device."""
        past = self.past() if self.past is not None else None
        read = self.read if self.read is not None or past is None else int(past.get_seq_length())
        if self.tokens is None or read is None:
            return True
        length = input_ids.shape[1]
        end = self.tokens.shape[1] - (read - length)
        seen = self.tokens[:, max(0, end - length) : max(0, end)]
        return 0 < end <= self.tokens.shape[1] and torch.equal(seen, input_ids[:, length - seen.shape[1] :])
