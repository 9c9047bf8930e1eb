"""The call of `generate` that is under way: what it was given, and hands on to nobody that it calls."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from transformers import GenerationMixin, PreTrainedModel, TemperatureLogitsWarper

from ..backbone import Backbone
from ..backbone.anatomy import unwrapped

_CALL = inspect.unwrap(GenerationMixin.generate).__code__
_NEAR = 16  # frames: wrappers that may stand between


def call_of(model: PreTrainedModel) -> Mapping[str, Any]:
    """The variables of the `generate` call of `model` that runs what asks; empty if there is no such call.

    They are looked up where they stand. Only its arguments, which are those of a public function, are to be relied on.
    """
    frame, own = inspect.currentframe(), unwrapped(model)
    for _ in range(_NEAR):
        frame = None if frame is None else frame.f_back
        if frame is None:
            break
        if frame.f_code is _CALL:
            found = frame.f_locals
            if found.get("self") is own:
                return found
    return {}


def temperature_of(processors: Iterable[Any]) -> float:
    """The temperature that logits processors bring scores to."""
    return math.prod(float(one.temperature) for one in processors if isinstance(one, TemperatureLogitsWarper))


def temperature_of_call(model: PreTrainedModel) -> float:
    """The temperature at which the `generate` call of `model` that runs what asks samples in the end; 1 if none does.

    It counts warpers that the call was given as logits processors as well.
    """
    call = call_of(model)
    config = call.get("generation_config")
    own = (getattr(config, "temperature", None) or 1.0) if getattr(config, "do_sample", False) else 1.0
    return float(own) * temperature_of(call.get("logits_processor") or ())


def encoder_prompts(model: PreTrainedModel, rows: int) -> Tensor:
    """What an encoder-decoder's encoder was given in the `generate` call under way, [R, S] token ids, -1 for padding.

    Args:
        model: the base model.
        rows: R; of every prompt there are as many rows, one after another.

    Raises:
        ValueError: there is no such call, or it was not given ids.
    """
    call = call_of(model)
    given = call.get("kwargs") or {}
    ids = next((x for x in (call.get("inputs"), given.get("input_ids")) if isinstance(x, Tensor)), None)
    if ids is None or given.get("encoder_outputs") is not None or rows % max(1, len(ids)):
        raise ValueError(
            f"{Backbone.of(model).name} reads prompts with an encoder, and what it has read is not known: objectives "
            "in words, and tuned policies, need a call of generate with input_ids (not encoder_outputs or "
            "inputs_embeds)"
        )
    mask = given.get("attention_mask")
    if mask is not None:  # without one generate has an encoder read padding like any other token
        ids = ids.masked_fill(mask == 0, -1)
    return ids.repeat_interleave(rows // len(ids), dim=0)
