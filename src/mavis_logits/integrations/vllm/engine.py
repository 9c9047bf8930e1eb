"""What both model runners of vLLM have in common: the value functions, the requests' settings, the states of a step."""

from __future__ import annotations

import logging
import sys
from typing import Any

import torch
from torch import Tensor, nn

from ...backbone.hidden import Layer
from ..asked import Asked
from ..serving import Serving, offer_of
from ..slots import Rows, Slots, head_values
from . import binding
from .metrics import Metrics
from .states import BatchStates

logger = logging.getLogger("vllm.mavis")  # below vLLM's own logger, which has a handler

CONFIG_KEY = "mavis"  # of vLLM's additional_config
_MARK = "mavis_states"


def serving_of(vllm_config: Any) -> Serving:
    """The settings that an engine was started with: `additional_config["mavis"]`, else the environment's."""
    more = getattr(vllm_config, "additional_config", None)
    return Serving.find(more.get(CONFIG_KEY) if isinstance(more, dict) else None)


def config_of_caller() -> Any:
    """The configuration of the engine on whose behalf this is called.

    vLLM asks a class whether a request's parameters are valid without saying for which engine. The one who asks holds
    its configuration.
    """
    frame = sys._getframe(1)
    while frame is not None:
        found = getattr(frame.f_locals.get("self"), "vllm_config", None)
        if found is not None:
            return found
        frame = frame.f_back  # type: ignore[assignment]
    return None


def runner_of_caller(vllm_config: Any) -> Any:
    """The model runner that is making a processor for `vllm_config`, which vLLM does not hand to it.

    Raises:
        RuntimeError: there is none, so this vLLM is not as those that this was written for.
    """
    frame = sys._getframe(1)
    while frame is not None:
        own = frame.f_locals.get("self")
        if getattr(own, "vllm_config", None) is vllm_config and hasattr(own, "execute_model"):
            return own
        frame = frame.f_back  # type: ignore[assignment]
    import vllm

    raise RuntimeError(
        f"vLLM {vllm.__version__} makes logits processors in another way than mavis-logits knows (0.29 to 0.32): "
        "install one of these, or a newer mavis-logits"
    )


def validate(sampling_params: Any) -> None:
    """Raise `ValueError` for a request whose `mavis_...` arguments are wrong: it is answered with status 400."""
    arguments = sampling_params.extra_args
    if not arguments or not any(str(key).startswith("mavis_") for key in arguments):
        return
    Asked.read(arguments, offer_of(serving_of(config_of_caller()).to_json()))


class Engine:
    """Steers the rows of one engine.

    Args:
        vllm_config: of the engine.
        slots: how many requests may be under way at once.
        device: of the logits.

    Attributes:
        slots: the requests' settings.
        layers: what is read of the served model.
        batch: states of the step under way; set by the runner's hooks.
    """

    def __init__(self, vllm_config: Any, slots: int, device: torch.device) -> None:
        self.vllm_config, self.device = vllm_config, device
        self.serving = serving_of(vllm_config)
        self._refuse_what_is_not_supported()
        offer = offer_of(self.serving.to_json())
        self.layers: set[Layer] = offer.functions.layers
        self.slots = Slots(slots, offer.functions, offer, binding.end_tokens(vllm_config))
        self.metrics = Metrics(self.slots)
        self.batch: BatchStates | None = None
        self._offer = offer

    @property
    def inner_layers(self) -> set[Layer]:
        """Those that are read before the last."""
        return {layer for layer in self.layers if layer is not None}

    def attach(self, model: nn.Module) -> None:
        """Load the value functions and bind them to the served model.

        Raises:
            ValueError: a value function does not fit it.
        """
        config, parallel = self.vllm_config.model_config, self.vllm_config.parallel_config
        functions = self.serving.load(model, self.device)
        if functions.models:
            raise ValueError(
                f"{[m.config.objectives for m in functions.models]} are value models, which this version does not run "
                "inside vLLM: use value heads"
            )
        binding.check_shapes(functions, config.get_hidden_size(), config.get_vocab_size())
        binding.bind(functions, model, self.serving.check_weights, parallel.tensor_parallel_size)
        self.slots.functions = functions
        places = ", ".join(
            f"{', '.join(head.config.objectives)} ({_place(head.config.layer)})" for head in functions.heads
        )
        own = self._offer.config
        logger.info(
            "mavis: steering by value heads for %s; beta %g, top_k %s, %s, at most %d candidates; requests without "
            "mavis_ arguments are not touched",
            places, own.beta, own.top_k, own.normalize, self._offer.max_top_k,
        )  # fmt: skip

    def mark(self, layers: tuple[int, ...]) -> None:
        """Let vLLM's cache of compiled code tell a model that hands out these layers from one that does not."""
        more = self.vllm_config.additional_config
        if isinstance(more, dict):
            more[_MARK] = list(layers)

    def put(self, slot: int, sampling_params: Any) -> bool:
        """Let a request take a slot; returns whether it is steered.

        One that was admitted in spite of bad settings is ended, since an error here would end the engine.
        """
        try:
            self.slots.put(slot, Asked.read(getattr(sampling_params, "extra_args", None), self._offer))
        except Exception as error:
            logger.error("mavis: a request is ended at once, since its settings are wrong: %s", error)
            self.slots.refuse(slot)
        return self.slots.is_steered(slot)

    def steer(self, logits: Tensor, rows: Rows, positions: Tensor | None) -> Tensor:
        """Tilt the rows of steered requests, in place.

        Args:
            logits: [R, V].
            rows: whose they are.
            positions: [R] in their requests' texts; None where rows are in the order of the forward pass.
        """

        def read(chosen: Tensor | None, choice: Any, whole: bool) -> Tensor:
            batch = self.batch
            if batch is None:
                raise RuntimeError("mavis: rows are to be steered, but no states of the model were seen for them")
            slots, places = rows.slots, positions
            if chosen is not None and batch.slots is None:
                batch, slots, places = BatchStates(batch.hidden, batch.tokens[chosen]), slots[chosen], None
            elif chosen is not None:
                slots, places = slots[chosen], None if places is None else places[chosen]
            return head_values(self.slots.functions, batch.of(slots, places, self.layers), choice, whole)

        self.slots.steer(logits, rows, read)
        self.metrics.update()
        return logits

    def _refuse_what_is_not_supported(self) -> None:
        parallel = self.vllm_config.parallel_config
        if getattr(parallel, "prefill_context_parallel_size", 1) > 1:
            raise ValueError("mavis: steering is not supported with prefill context parallelism: set it to 1")
        if self.vllm_config.lora_config is not None:
            logger.warning(
                "mavis: value heads read states of the served model, not of adapters: steer no request to one"
            )


def _place(layer: Layer) -> str:
    return "the state at the output" if layer is None else f"the state after layer {layer}"
