"""Catching the hidden state that the base model has just turned into logits.

What enters the output embedding is caught by a forward pre-hook; how many tokens the base model has read by then, by
another on the model. Together they tell, for every call of a logits processor, whether its scores come from the base
model at all, and from which of the positions of its last forward pass.
"""

from __future__ import annotations

import sys
import threading
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


class HiddenStates:
    """The states of the base model's latest forward pass, each handed out once. Every thread has its own."""

    def __init__(self, model: PreTrainedModel) -> None:
        layer = model.get_output_embeddings()
        if layer is None:
            raise ValueError(f"{type(model).__name__} has no output embedding; steering needs a causal language model")
        _let_compiled_code_see_hooks()
        self.model = model
        self._local = threading.local()
        self._handles = [
            model.register_forward_pre_hook(self._before_model, with_kwargs=True),
            layer.register_forward_pre_hook(self._before_output),
        ]

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()

    def take(self, length: int) -> Tensor | None:
        """The state [R, d] behind the scores of sequences of `length` tokens (padding included).

        None if no forward pass of the base model has led to these scores: then they are an assistant's, or a probe's.
        """
        states: Tensor | None = getattr(self._local, "states", None)
        if states is None:
            return None
        count = states.shape[1]
        index = 0 if count == 1 else count - 1 - (self._local.read - length)
        if not self._local.next <= index < count:
            return None
        self._local.next = index + 1
        if index == count - 1:
            self._local.states = None
        return states[:, index]

    def _before_model(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tokens = kwargs.get("input_ids", args[0] if args else None)
        tokens = kwargs.get("inputs_embeds") if tokens is None else tokens
        past = kwargs.get("past_key_values")
        self._local.states = None
        if tokens is not None and tokens.shape[1] > 1:  # a single position needs no counting
            self._local.read = tokens.shape[1] + (int(past.get_seq_length()) if past is not None else 0)

    def _before_output(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        states: Tensor = args[0]
        self._local.states = states.detach() if states.ndim == 3 else states.detach()[:, None]
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
