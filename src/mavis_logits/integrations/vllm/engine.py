"""What both model runners of vLLM have in common: the value functions, the requests' settings, the states of a step."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from ...backbone.hidden import Layer
from ...backbone.needs import Needs
from ...scoring.rows import Tokens
from ...values.ensemble import ValueFunctions
from ..asked import Asked
from ..histories import Histories
from ..serving import Serving, offer_of
from ..slots import Rows, Slots, Wanted, head_values
from . import binding
from .drafts import Drafts, watch
from .metrics import Metrics
from .states import BatchStates

logger = logging.getLogger("vllm.mavis")  # below vLLM's own logger, which has a handler

# Given numbers of rows, the tokens of each row's text up to where its logits stand.
Texts = Callable[[list[int]], list[Tokens]]

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
        drafts: what tilts a draft model's proposals; None where they are left alone.
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
        self.histories: Histories | None = None
        self.drafts: Drafts | None = None
        self._offer, self._count = offer, slots

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
        functions = self.serving.load(model, self.device, config.model)
        self._check_value_models(functions)
        binding.check_shapes(functions, config.get_hidden_size(), config.get_vocab_size())
        binding.bind(functions, model, self.serving.check_weights, parallel.tensor_parallel_size)
        self.slots.functions = functions
        if functions.models:
            self.histories = Histories(functions, self.serving.max_value_tokens)
        places = ", ".join(f"{', '.join(one.config.objectives)} ({_place(one)})" for one in functions.all)
        own = self._offer.config
        logger.info(
            "mavis: steering by values of %s; beta %g, top_k %s, %s, at most %d candidates; requests without "
            "mavis_ arguments are not touched",
            places, own.beta, own.top_k, own.normalize, self._offer.max_top_k,
        )  # fmt: skip

    def attach_drafts(self, speculator: Any) -> None:
        """Tilt what a draft model proposes, if the server's settings say by which values.

        Args:
            speculator: vLLM's; None where there is no speculation.

        Raises:
            ValueError: values that do not fit the draft model, or a speculator without one.
        """
        if self.serving.draft_values is None:
            return
        drafter = getattr(speculator, "model", None)
        if drafter is None:
            raise ValueError(
                "draft_values are for speculation by a draft model, and this server has none: leave them out"
            )
        self.drafts = Drafts(self.vllm_config, drafter, self.serving, self._offer, self._count, self.device)
        watch(speculator, self.drafts)

    def mark(self, layers: tuple[int, ...]) -> None:
        """Let vLLM's cache of compiled code tell a model that hands out these layers from one that does not."""
        more = self.vllm_config.additional_config
        if isinstance(more, dict):
            more[_MARK] = list(layers)

    def put(self, slot: int, sampling_params: Any) -> bool:
        """Let a request take a slot; returns whether it is steered.

        One that was admitted in spite of bad settings is ended, since an error here would end the engine.
        """
        every = [self.slots] if self.drafts is None else [self.slots, self.drafts.slots]
        try:
            given, temperature = (getattr(sampling_params, name, None) for name in ("extra_args", "temperature"))
            asked = Asked.read(given, self._offer, temperature)
            for slots in every:
                slots.put(slot, asked)
        except Exception as error:
            logger.error("mavis: a request is ended at once, since its settings are wrong: %s", error)
            for slots in every:
                slots.refuse(slot)
        return self.slots.is_steered(slot)

    def steer(self, logits: Tensor, rows: Rows, positions: Tensor | None, texts: Texts) -> Tensor:
        """Tilt the rows of steered requests, in place.

        Args:
            logits: [R, V].
            rows: whose they are.
            positions: [R] in their requests' texts; None where rows are in the order of the forward pass.
            texts: gives what has been written before rows [r], for value models.
        """

        def read(wanted: Wanted) -> Tensor:
            states = self._states(wanted.rows, rows.slots, positions) if self.layers else {}
            if self.histories is None:
                return head_values(self.slots.functions, states, wanted)
            candidates = wanted.choice.candidates
            try:
                numbers = list(range(len(logits))) if wanted.rows is None else wanted.rows.tolist()
                return self.histories.values(wanted.config, texts(numbers), states, candidates, wanted.idle)
            except Exception:  # the engine goes on; the rows without values are ended
                logger.exception("mavis: value models failed; the requests that they steer are ended")
                self.histories.forget()
                shape = (*candidates.shape, len(self.slots.functions.objectives))
                return torch.full(shape, torch.nan, device=candidates.device)

        self.slots.steer(logits, rows, read)
        self.metrics.update()
        return logits

    def _states(self, chosen: Tensor | None, slots: Tensor, positions: Tensor | None) -> dict[Layer, Tensor]:
        """The states [r, d] behind rows, by layer."""
        batch = self.batch
        if batch is None:
            raise RuntimeError("mavis: rows are to be steered, but no states of the model were seen for them")
        if chosen is None:
            return batch.of(slots, positions, self.layers)
        if batch.slots is None or batch.slots is slots:  # rows are in the order of the pass
            return BatchStates(batch.hidden, batch.tokens[chosen]).of(slots[chosen], None, self.layers)
        return batch.of(slots[chosen], None if positions is None else positions[chosen], self.layers)

    def _check_value_models(self, functions: ValueFunctions) -> None:
        if not functions.models:
            return
        config = self.vllm_config.model_config
        functions.check_vocabulary(config.get_vocab_size())
        if config.skip_tokenizer_init:
            return
        tokenizer = AutoTokenizer.from_pretrained(config.tokenizer, revision=config.tokenizer_revision)
        for model in functions.models:
            Needs.of(model.config).check_tokenizer(tokenizer)

    def _refuse_what_is_not_supported(self) -> None:
        parallel = self.vllm_config.parallel_config
        if getattr(parallel, "prefill_context_parallel_size", 1) > 1:
            raise ValueError("mavis: steering is not supported with prefill context parallelism: set it to 1")
        if self.vllm_config.lora_config is not None:
            logger.warning(
                "mavis: value heads read states of the served model, not of adapters: steer no request to one"
            )


def _place(function: Any) -> str:
    if function.reads == "tokens":
        return "a value model"
    layer = function.config.layer
    return "the state at the output" if layer is None else f"the state after layer {layer}"
