"""`pipeline("mavis-text-generation", model=..., value_models=...)`: importing this module registers the task.

It is the pipeline of `"text-generation"` with steering: strings, chats, lists of them, batches and streamers, and
weights that may differ from call to call and from input to input.

Clients that are given a pipeline (LangChain, Haystack) ask its `task` what it takes and returns: it answers
`"text-generation"`, which is what it does. One that builds the pipeline itself takes the class:
`pipeline("text-generation", pipeline_class=MavisTextGenerationPipeline, model=..., value_models=...)`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, TextGenerationPipeline
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.pipelines.text_generation import Chat

from ..core.config import MavisConfig
from ..decoding.strategies import MavisSampling, MavisStrategy

TASK = "mavis-text-generation"
_TASK_OF_KIND = "text-generation"  # what its inputs and outputs are those of, for whoever switches on `pipe.task`


@dataclass(frozen=True)
class _Request:
    """An input with weights [1, M] or a beta [1] of its own."""

    prompt: Any
    weights: Tensor | None
    beta: Tensor | None


class MavisTextGenerationPipeline(TextGenerationPipeline):
    """Text generation steered by value functions; arguments as for `TextGenerationPipeline`, and:

    Args:
        value_models: what `MavisSampling.from_pretrained` takes: a bundle's or a value function's id or folder, several
            of them, a mapping from objective to one, or loaded objects.
        weights, beta: defaults; those of a bundle or of `settings` otherwise.
        settings: further fields of `MavisConfig`. (`top_k=` and the like, given to the pipeline, are `generate`'s own.)
        load: arguments for loading the value models, such as `token` or `revision`.
        strategy: a ready `MavisStrategy`, in place of all of these.

    A call takes `weights=` and `beta=`, for all of its inputs or in a list with one for each:
    `pipe(["one", "two"], weights=[{"kind": 1.0}, {"funny": 1.0}], batch_size=2)`.

    The reference that is tilted is what the unsteered pipeline would sample from, pipelines' default `temperature=0.7`
    and generate's default top-k of 50 included: temperature sharpens the reference once, and leaves beta alone. Give
    `temperature=1.0, top_k=0` to tilt the model's own distribution. (A processor, passed to an ordinary pipeline as
    `logits_processor=[mavis]`, comes before temperature instead: there 0.7 makes every beta act as beta / 0.7.)

    Raises:
        ValueError, OSError: as for `MavisSampling.from_pretrained`; not exactly one of `value_models` and `strategy`.
    """

    def __init__(
        self,
        *args: Any,
        value_models: Any = None,
        weights: Any = None,
        beta: Any = None,
        settings: MavisConfig | Mapping[str, Any] | None = None,
        load: Mapping[str, Any] | None = None,
        strategy: MavisStrategy | None = None,
        **kwargs: Any,
    ) -> None:
        if (value_models is None) == (strategy is None):
            raise ValueError(
                f'pipeline("{TASK}") steers by value_models= (an id, a folder, several, or a bundle) or by strategy= '
                "(a MavisStrategy): give one of the two"
            )
        super().__init__(*args, **kwargs | {"task": _TASK_OF_KIND})
        if strategy is None:
            settings = {"config": settings} if isinstance(settings, MavisConfig) else dict(settings or {})
            settings |= {"model": self.model, "tokenizer": self.tokenizer, "load": load}
            strategy = MavisSampling.from_pretrained(value_models, weights, beta, **settings)
        self.strategy = strategy

    def __call__(self, text_inputs: Any, *, weights: Any = None, beta: Any = None, **kwargs: Any) -> Any:
        """Complete the inputs; `weights` and `beta` for all of them, or in a list with one for each.

        Args:
            text_inputs: a string, a chat (list of messages), or a list of either.
            weights: by objective, [M], or a list or tensor [R, M] with one for each of R inputs.
            beta: a number, or R numbers.
            kwargs: of `TextGenerationPipeline` and `generate`.

        Raises:
            ValueError: unknown objectives, numbers out of range, or another number of weights than inputs.
        """
        rows = self._rows(text_inputs, weights, 1, "weights"), self._rows(text_inputs, beta, 0, "beta")
        if rows == (None, None):
            return super().__call__(text_inputs, mavis=(weights, beta), **kwargs)
        shared = (weights if rows[0] is None else None, beta if rows[1] is None else None)
        requests = [
            _Request(
                Chat(prompt) if _is_chat(prompt) else prompt,
                None if rows[0] is None else rows[0][i],
                None if rows[1] is None else rows[1][i],
            )
            for i, prompt in enumerate(text_inputs)
        ]
        return super().__call__(requests, mavis=shared, **kwargs)

    def _rows(self, inputs: Any, given: Any, shared_dims: int, name: str) -> list[Tensor] | None:
        """One setting, [1, ...], for each input; None if all of them share one."""
        if given is None or isinstance(given, Mapping) or not _one_for_each(given, shared_dims):
            return None
        if not isinstance(inputs, list) or _is_chat(inputs):
            raise ValueError(f"{name} for each input need a list of inputs, got {type(inputs).__name__}")
        if len(given) != len(inputs):
            raise ValueError(f"{name} are given for {len(given)} inputs, but there are {len(inputs)}")
        return [getattr(self._with(**{name: one}), name)[None] for one in given]

    def _with(self, weights: Any = None, beta: Any = None) -> MavisStrategy:
        """The strategy with settings of one call; what it reads and counts stays shared."""
        strategy = copy.copy(self.strategy)
        if weights is not None:
            strategy.weights = weights
        if beta is not None:
            strategy.beta = beta
        return strategy

    def _sanitize_parameters(self, mavis: Any = None, **kwargs: Any) -> Any:
        preprocess, forward, postprocess = super()._sanitize_parameters(**kwargs)
        if mavis is not None:
            forward["mavis"] = mavis
        return preprocess, forward, postprocess

    def preprocess(self, prompt_text: Any, **kwargs: Any) -> Any:
        """Tokens of one input, with its own weights and beta beside them."""
        if not isinstance(prompt_text, _Request):
            return super().preprocess(prompt_text, **kwargs)
        inputs = super().preprocess(prompt_text.prompt, **kwargs)
        for name in ("weights", "beta"):
            if getattr(prompt_text, name) is not None:
                inputs[f"mavis_{name}"] = getattr(prompt_text, name)
        return inputs

    def _forward(self, model_inputs: Any, mavis: Any = (None, None), **generate: Any) -> Any:
        own = [model_inputs.pop(f"mavis_{name}", None) for name in ("weights", "beta")]
        strategy = self._with(*(one if one is not None else shared for one, shared in zip(own, mavis, strict=True)))
        if generate.get("streamer") is not None and not strategy.streams:
            name = type(strategy).__name__
            raise ValueError(f"{name} knows the text only at its end and cannot stream: leave streamer out")
        for name in ("streamer", "stop_strings"):  # generate does not pass these on to a strategy
            if generate.get(name) is not None:
                setattr(strategy, name, generate[name])
            generate.pop(name, None)
        generate.pop("tokenizer", None)  # the strategy has it
        outputs = super()._forward(model_inputs, custom_generate=strategy, **generate)
        self.strategy.trace = strategy.trace
        return outputs


def _one_for_each(given: Any, shared_dims: int) -> bool:
    """Whether a setting is one for each input, and not one of `shared_dims` dimensions for all."""
    if isinstance(given, Sequence) and len(given) > 0 and isinstance(given[0], Mapping):
        return True
    try:
        return torch.as_tensor(given).ndim > shared_dims
    except (TypeError, ValueError):  # no numbers: the strategy says what it expects
        return False


def _is_chat(inputs: Any) -> bool:
    return isinstance(inputs, list | tuple) and bool(inputs) and isinstance(inputs[0], Mapping) and "role" in inputs[0]


PIPELINE_REGISTRY.register_pipeline(
    TASK, pipeline_class=MavisTextGenerationPipeline, pt_model=AutoModelForCausalLM, type="text"
)
# `save_pretrained` would copy this file into the folder, without the package that it is a part of, and write the task
# into the model's config.
del MavisTextGenerationPipeline._registered_impl  # type: ignore[attr-defined]
