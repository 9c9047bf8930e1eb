"""How likely given texts are under the steered policy, token by token, from one forward pass of the base model."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor

from ..backbone import Backbone
from ..backbone.hidden import Layer
from ..steering.policy import Requests
from ..steering.steering import Steering
from ..steering.step import Choice

_ROWS = 512  # positions that are steered at once: [rows, V] of float32 are alive several times


@torch.no_grad()
def steered_log_probs(steering: Steering, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """log pi_MAVIS of the token after every prefix of given texts (Algorithm 2 at every position), [R, T, V].

    Value heads read states that the base model has at all positions of one forward pass. Value models and objectives
    in words would have to read every candidate after every prefix, which `generate` does as it goes.

    Args:
        steering: a strategy of value heads, such as `MavisSampling(head, model=model)`. A processor that is attached
            to the model would take the pass for one of generate's.
        input_ids: [R, T] of the base model.
        attention_mask: [R, T], 0 for padding, where nothing is steered; None if there is none.

    Returns:
        float32 on the device of the logits; -inf for tokens without probability (`unscored="drop"`).

    Raises:
        ValueError: value models or objectives in words, no base model, or values that are not finite.
    """
    functions, model = steering.functions, steering.base
    if model is None:
        raise ValueError("there is no base model to read the texts with: give the strategy model=")
    if functions.busy_models(steering.idle):
        names = [one.config.objectives for one in functions.busy_models(steering.idle)]
        raise ValueError(
            f"likelihoods of given texts are steered by value heads alone, and {names} are value models or objectives "
            "in words, which read every candidate: use heads (mavis distil makes one of them), or tasks that generate"
        )
    if Backbone.of(model).is_encoder_decoder:
        raise ValueError(f"{type(model).__name__} has an encoder: likelihoods are steered for decoders alone")
    steering.follow_base()
    functions.refresh()
    states: dict[Layer, Tensor] = {}
    with ExitStack() as stack:
        for layer in {head.config.layer for head in functions.heads}:
            stack.callback(Backbone.of(model).catch(layer, partial(states.__setitem__, layer)).remove)
        logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
    rows, length, vocabulary = logits.shape
    read = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    steered = torch.log_softmax(logits.float(), dim=-1).flatten(0, 1)
    places = torch.nonzero(read.flatten())[:, 0].to(steered.device)
    request = torch.arange(rows, device=steered.device).repeat_interleave(length)
    whole = steering.config.top_k is None
    for part in places.split(_ROWS):
        own = {layer: state.flatten(0, 1)[part.to(state.device)] for layer, state in states.items()}

        def values(choice: Choice, kept: Tensor, own: dict[Layer, Tensor] = own) -> Tensor:
            with functions.reading():
                return functions.gather(functions.read_heads(own, None if whole else choice.candidates, steering.idle))

        scores = steering.known(logits.flatten(0, 1)[part])
        step = steering.policy.step(scores, values, Requests(of=request[part], count=rows))
        steering.check_step(step)
        steered[part] = step.log_probs(vocabulary)
    return steered.view(rows, length, vocabulary)
