"""Catching the hidden states that the base model has just computed on its way to the logits.

What enters the output embedding is caught by a forward pre-hook; how many tokens the base model has read by then, by
another on the model. Together they tell, for every call of a logits processor, whether its scores come from the base
model at all, and from which of the positions of its last forward pass. States of inner layers, for value heads that
read those, are caught by forward hooks on the layers.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .backbone import Backbone
from .backbone.anatomy import given_cache


class HiddenStates:
    """The states of the base model's latest forward pass, each handed out once. Every thread has its own.

    Args:
        model: the base model.
        layers: which are wanted, as for `Backbone.catch`.
    """

    def __init__(self, model: PreTrainedModel, layers: Iterable[int | None] = (None,)) -> None:
        inner = {layer for layer in layers if layer is not None}
        backbone = Backbone.of(model)
        handles = [backbone.catch(layer, self._catcher(layer)) for layer in inner]
        handles.append(backbone.catch(None, self._at_output))
        _let_compiled_code_see_hooks()
        self.model = model
        self._local = threading.local()
        self._handles = [backbone.model.register_forward_pre_hook(self._before_model, with_kwargs=True), *handles]

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()

    def take(self, length: int) -> dict[int | None, Tensor] | None:
        """The states [R, d] behind the scores of sequences of `length` tokens (padding included), by layer.

        None if no forward pass of the base model has led to these scores: then they are an assistant's, or a probe's.
        """
        states: dict[int | None, Tensor] | None = getattr(self._local, "states", None)
        if states is None:
            return None
        count = states[None].shape[1]
        index = 0 if count == 1 else count - 1 - (self._local.read - length)
        if not self._local.next <= index < count:
            return None
        self._local.next = index + 1
        if index == count - 1:
            self._local.states = None
        return {layer: tensor[:, index - count] for layer, tensor in states.items()}

    def _before_model(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tokens = kwargs.get("input_ids", args[0] if args else None)
        tokens = kwargs.get("inputs_embeds") if tokens is None else tokens
        past = given_cache(kwargs)
        self._local.states, self._local.inner = None, {}
        if tokens is not None and tokens.shape[1] > 1:  # a single position needs no counting
            self._local.read = tokens.shape[1] + (int(past.get_seq_length()) if past is not None else 0)

    def _catcher(self, layer: int) -> Callable[[Tensor], None]:
        def catch(states: Tensor) -> None:
            self._local.__dict__.setdefault("inner", {})[layer] = states

        return catch

    def _at_output(self, states: Tensor) -> None:
        # Often the last positions only go on to the output embedding; those of inner layers are counted from the end.
        output = states if states.ndim == 3 else states[:, None]
        self._local.states = {None: output, **self._local.__dict__.get("inner", {})}
        self._local.next = 0


def _let_compiled_code_see_hooks() -> None:
    """Have compiled forwards (generate's static cache) check which hooks are set.

    By default torch.compile takes hooks as they were when it first compiled: a model compiled before would go on
    without ours, and its sequences unsteered. What was compiled so is dropped, and compiled again when used.
    """
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None:
        dynamo.config.skip_nnmodule_hook_guards = False
        torch.compiler.reset()
