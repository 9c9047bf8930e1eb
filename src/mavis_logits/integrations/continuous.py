"""Steering in transformers' continuous batching, every request by weights of its own: value heads only.

    manager = steered_batching(model, mavis)          # in place of model.init_continuous_batching()
    manager.start()
    manager.add_request(ids, max_new_tokens=64, mavis_weights="helpful=0.7,humour=0.3")

Its processors are given no history, which a value head does not need, and one whole number for each row, which here
names the settings that the row is steered by.
"""

from __future__ import annotations

from collections import OrderedDict
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessor

from ..backbone import Backbone
from ..backbone.hidden import Layer
from ..backbone.hooks import before
from ..decoding.calls import temperature_of
from .asked import PREFIX, Asked, arguments
from .serving import Offer
from .slots import Rows, Slots, Wanted, head_values

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.generation.continuous_batching.requests import FutureRequestState

    from ..steering.steering import Steering

_KINDS = 4096  # of settings that are remembered; more than a batch has rows
_UNSTEERED = 0


def steered_batching(model: PreTrainedModel, mavis: Steering, **given: Any) -> Any:
    """A manager of continuous batching whose requests may be steered.

    Args:
        model: the language model.
        mavis: value heads that are attached to it, and the defaults of requests that ask to be steered.
        given: arguments of `model.init_continuous_batching`.

    Returns:
        the manager; `add_request` and `add_requests` take `mavis_...` arguments, as a server does (docs/serving.md).
        `manager.mavis.close()` takes the hooks off the model when it is done with.

    Raises:
        ValueError: value models or words, which need what a request has written; CUDA graphs or compiled passes, in
            which rows cannot be told apart.
    """
    if mavis.functions.models:
        raise ValueError(
            f"the values of {[m.config.objectives for m in mavis.functions.models]} need what a request has written, "
            "which continuous batching does not tell: use value heads, or vLLM"
        )
    given.setdefault("continuous_batching_config", ContinuousBatchingConfig(use_cuda_graph=False))
    steering = ContinuousSteering(model, mavis)
    prepare = model._get_logits_processor

    def with_ours(*args: Any, **named: Any) -> LogitsProcessorList:
        prepared = prepare(*args, **named)
        steering.temperature = temperature_of(prepared)
        return LogitsProcessorList([steering, *prepared])

    model._get_logits_processor = with_ours  # type: ignore[method-assign]
    try:
        manager = model.init_continuous_batching(**given)
    finally:
        del model._get_logits_processor
    listed = manager.logit_processor
    if steering not in list(listed.logits_processor):
        raise ValueError("the model has a manager of continuous batching already: destroy it first")
    listed.tensors_required += 1
    config = manager.continuous_batching_config
    graphs = config.use_cuda_graph
    if any(graphs) if isinstance(graphs, tuple) else graphs:
        raise ValueError("steering is not possible in CUDA graphs here: pass use_cuda_graph=False, or use vLLM")
    add_request = manager.add_request

    def adding(*args: Any, **named: Any) -> Any:
        Asked.read(named, steering.offer)  # here, since an error later would end another thread
        return add_request(*args, **named)

    manager.add_request = adding
    manager.mavis = steering
    return manager


class ContinuousSteering(ContinuousBatchingLogitsProcessor):
    """What steers the rows of a manager's batches.

    Args:
        model: the language model.
        mavis: value heads that are attached to it, and defaults.

    Attributes:
        offer: what requests may ask for.
        temperature: that requests are sampled at which name no other; at 1 the manager lets none do so.
    """

    supported_kwargs: dict[str, type] = dict.fromkeys(arguments(), object)
    ignored_kwargs: tuple[str, ...] = ()

    def __init__(self, model: PreTrainedModel, mavis: Steering) -> None:
        names = dict(zip(mavis.objectives, mavis.weights.reshape(-1, len(mavis.objectives))[0].tolist(), strict=True))
        config = {**vars(mavis.config), "weights": names, "beta": float(mavis.beta.reshape(-1)[0])}
        self.offer = Offer(mavis.functions, type(mavis.config)(**config))
        self.temperature = 1.0
        self._functions = mavis.functions
        self._slots = Slots(_KINDS, mavis.functions, self.offer, mavis.special.eos)
        self._known: OrderedDict[str, int] = OrderedDict()  # settings as text, the last used at the end
        self._states: dict[Layer, Tensor] = {}
        self._places: Tensor | None = None
        self._kept = False
        backbone = Backbone.of(model)
        with ExitStack() as hooks:
            for head in mavis.functions.heads:
                hooks.callback(backbone.catch(head.config.layer, partial(self._catch, head.config.layer)).remove)
            hooks.callback(before(backbone.model, self._before, with_kwargs=True).remove)
            self._hooks = hooks.pop_all()

    def close(self) -> None:
        """Take the hooks off the model."""
        self._hooks.close()

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        """Rows that are not said to be steered are not."""
        int32_tensor.fill_(_UNSTEERED)

    def prepare_tensor_args(self, requests_with_new_token: list[FutureRequestState]) -> Tensor:
        """[requests] the number of each one's settings."""
        numbers = [self._number(request.state.logit_processor_kwargs) for request in requests_with_new_token]
        return torch.tensor(numbers, dtype=torch.int32)

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        """`scores` [rows, V] with those of steered requests tilted."""
        slots = tensor_arg[: len(scores)]
        scores = scores.clone()
        rows = Rows(slots, sorted(set(slots.tolist())), one_each=False)
        self._slots.steer(scores, rows, self._read)
        return scores

    def _read(self, wanted: Wanted) -> Tensor:
        states = {}
        for layer, every in self._states.items():
            rows = every if layer is None and self._kept else every[self._places]
            states[layer] = rows if wanted.rows is None else rows[wanted.rows]
        return head_values(self._functions, states, wanted)

    def _number(self, given: dict[str, Any]) -> int:
        own = {key: value for key, value in given.items() if key.startswith(PREFIX)}
        if not own:
            return _UNSTEERED
        temperature = self.temperature if self.temperature == 1.0 else given.get("temperature", self.temperature)
        key = repr([temperature, *sorted(own.items(), key=lambda item: item[0])])
        if key not in self._known:
            full = len(self._known) == _KINDS - 1
            number = self._known.popitem(last=False)[1] if full else len(self._known) + 1
            self._known[key] = number
            self._slots.put(number, Asked.read(own, self.offer, temperature))
        self._known.move_to_end(key)
        return self._known[key]

    def _before(self, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
        named = kwargs or {}
        self._states.clear()
        self._places, self._kept = named.get("logits_indices"), named.get("logits_to_keep") is not None

    def _catch(self, layer: Layer, states: Tensor) -> None:
        self._states[layer] = states.reshape(-1, states.shape[-1])
