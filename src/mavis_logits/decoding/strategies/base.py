"""What all decoding strategies have in common: `model.generate(custom_generate=strategy)`."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Unpack

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation import GenerateDecoderOnlyOutput, StopStringCriteria

from ...backbone import Backbone
from ...backbone.anatomy import given_cache, holds_tokens
from ...backbone.compat import CACHE_NAMES
from ...steering.signatures import SteeringOptions
from ...steering.steering import Steering
from ...values.function import ValueFunction
from ..calls import encoder_prompts
from ..given import says_something, unreadable
from .arguments import arguments_of_call, check_call, check_config
from .base_reader import taken
from .processors import RowProcessors
from .session import Session

if TYPE_CHECKING:
    from transformers.generation.streamers import BaseStreamer

    from ...steering.trace import MavisTrace

# What `generate` prepares for every decoder-only model; a strategy keeps caches and positions of its own.
_PREPARED = {
    "attention_mask", "position_ids", "logits_to_keep", *CACHE_NAMES, "use_cache", "cache_position",
}  # fmt: skip


@dataclass
class MavisOutput(GenerateDecoderOnlyOutput):
    """What `generate(return_dict_in_generate=True)` returns with a strategy.

    Attributes:
        sequences: [R, T] prompts and completions, as `generate` returns them.
        scores: with `output_scores`, one [R, V] a step: log pi (`MavisSampling` only).
        logits: with `output_logits`, one [R, V] a step: the reference's scores (`MavisSampling` only).
        values: [R, M] value of every finished sequence by objective, in reward units; NaN where it was not computed
            (its last token was no candidate).
        sequences_scores: [R] what the sequences were ranked by; None where nothing was ranked.
    """

    values: Tensor | None = None
    sequences_scores: Tensor | None = None


@dataclass(frozen=True)
class Call:
    """What `generate` hands to a strategy.

    Attributes:
        model: the base model.
        input_ids: [R, T] prompts, padded on the left, each as often as it has `num_return_sequences`.
        processors: what `generate` would apply to the scores, its temperature, top-k and top-p included.
        config: of this call.
        inputs: all other keyword arguments for the model.
    """

    model: PreTrainedModel
    input_ids: Tensor
    processors: LogitsProcessorList
    config: GenerationConfig
    inputs: dict[str, Any]


class MavisStrategy(Steering):
    """A way of decoding, passed as `model.generate(..., custom_generate=strategy)`; arguments as for `Steering`, and:

    Args:
        streamer: receives prompts and tokens as they come, as one given to `generate` does.
        stop_strings: as for `generate`, which cannot pass them on to a strategy; they need `tokenizer`.

    The reference that is tilted is what `generate` would have sampled from: the base model's distribution after all
    logits processors, generate's own temperature, top-k and top-p included (its default top-k is 50: pass `top_k=0` for
    the whole distribution). So temperature T is applied once, to the reference, as in the paper.
    """

    streams = True  # whether tokens are final as they come
    keeps_rows = False  # whether every row is written to its end, without others taking its place
    shows_steps = True  # whether what it returns was written step by step, so that there are scores and a trace of them

    def __init__(
        self,
        value_functions: ValueFunction | Sequence[ValueFunction] | Mapping[str, ValueFunction] | None = None,
        weights: Mapping[str, float] | Sequence[float] | Tensor | None = None,
        beta: float | Tensor | None = None,
        *,
        streamer: BaseStreamer | None = None,
        stop_strings: str | Sequence[str] | None = None,
        **kwargs: Unpack[SteeringOptions],
    ) -> None:
        super().__init__(value_functions, weights, beta, **kwargs)
        name = type(self).__name__
        if self.regions is not None:
            raise ValueError(f"{name} steers whole answers: leave regions out, or use MavisLogitsProcessor")
        self._check_streams(streamer)
        if self.trace is not None and not self.shows_steps:
            raise ValueError(
                f"{name} writes many sequences and drops most, which no trace can show: leave trace out, or use "
                "MavisSampling"
            )
        if stop_strings is not None and self.tokenizer is None:
            raise ValueError(f"stop_strings need the tokenizer: pass tokenizer= to {name}")
        self.streamer, self.stop_strings = streamer, stop_strings

    @abstractmethod
    def decode(
        self, session: Session, stopping_criteria: StoppingCriteriaList, config: GenerationConfig
    ) -> MavisOutput:
        """Write all rows of `session` to their ends."""

    @torch.no_grad()
    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        generation_config: GenerationConfig | None = None,
        **model_kwargs: Any,
    ) -> MavisOutput | Tensor:
        """Called by `generate` with all that it has prepared.

        Returns:
            ids [R, T], or with `return_dict_in_generate` a `MavisOutput`.

        Raises:
            ValueError: an argument of `generate` that this strategy cannot honour.
        """
        config = generation_config if generation_config is not None else model.generation_config
        processors = logits_processor if logits_processor is not None else LogitsProcessorList()
        criteria = StoppingCriteriaList(stopping_criteria or [])
        given = arguments_of_call(model)
        check_call(type(self).__name__, model, given)
        call = Call(model, input_ids, processors, config, model_kwargs)
        self.check(call)
        if self.base is not model:
            self.attach(model)
        else:
            self.follow_base()
        self.check_devices(input_ids[:, :1])
        if self.stop_strings is not None:
            criteria.append(StopStringCriteria(self.tokenizer, self.stop_strings))
        streamer = self._streamer(given.get("streamer"))
        if streamer is not None and "streamer" not in given:  # else generate has given it the prompts already
            streamer.put(input_ids.cpu())
        trace = None if self.trace is None else type(self.trace)(self.objectives, self.special.eos)
        self.trace = trace
        output = self._decode(call, criteria, streamer, trace)
        self.trace = trace  # other calls may have come between
        return output

    def _streamer(self, given: BaseStreamer | None) -> BaseStreamer | None:
        """Whom a call tells its tokens: who was given to `generate`, or to this strategy."""
        if given is None or given is self.streamer:
            return self.streamer
        self._check_streams(given)
        if self.streamer is not None:
            raise ValueError(f"generate was given a streamer and {type(self).__name__} another: leave one of them out")
        return given

    def _check_streams(self, streamer: BaseStreamer | None) -> None:
        if streamer is not None and not self.streams:
            raise ValueError(
                f"{type(self).__name__} knows the text only at its end and cannot stream: leave streamer out"
            )

    def _decode(
        self, call: Call, criteria: StoppingCriteriaList, streamer: BaseStreamer | None, trace: MavisTrace | None
    ) -> MavisOutput | Tensor:
        model, input_ids, config = call.model, call.input_ids, call.config
        backbone = Backbone.of(model)
        prompts = self.prompts(input_ids, config)
        rows = self.prompts(torch.arange(len(input_ids), device=input_ids.device), config)
        inputs = call.inputs if len(rows) == len(input_ids) else taken(call.inputs, rows, len(input_ids))
        mask = inputs.get("decoder_attention_mask" if backbone.is_encoder_decoder else "attention_mask")
        special = any(says_something(value) for name, value in inputs.items() if name not in _PREPARED)
        special = special or inputs.get("use_cache") is False
        every = RowProcessors(
            call.processors, len(prompts), len(input_ids) // len(prompts), pad_token(config, self),
            search=None if self.keeps_rows else type(self).__name__,
        )  # fmt: skip
        sources = None
        if backbone.is_encoder_decoder and self.functions.words:
            sources = encoder_prompts(model, len(input_ids))[rows]
        with Session(self, model, prompts, mask, every, inputs, as_generate=special, sources=sources) as session:
            session.streamer, session.trace = streamer, trace
            output = self.decode(session, criteria, config)
        if output.values is not None and any(self.idle):
            output.values[:, self.idle] = torch.nan
        if streamer is not None:
            streamer.end()
        return output if config.return_dict_in_generate else output.sequences

    def prompts(self, rows: Tensor, config: GenerationConfig) -> Tensor:
        """The rows that a session begins with, from those that generate has repeated `num_return_sequences` times."""
        return rows

    def check(self, call: Call) -> None:
        """Raise `ValueError` for what this strategy cannot honour."""
        name, config, inputs = type(self).__name__, call.config, call.inputs
        if call.input_ids.shape[1] == 0:
            raise ValueError(
                "the prompt is empty: give generate at least one token to go on from. A prompt in inputs_embeds can be "
                "steered by value heads in a MavisLogitsProcessor alone"
            )
        kind = unreadable(inputs) or ("inputs_embeds" if inputs.get("inputs_embeds") is not None else None)
        if kind is not None and self.functions.models:
            names = [value_model.config.objectives for value_model in self.functions.models]
            raise ValueError(
                f"{kind} is for the base model, and the value models for {names} cannot read it: use value heads, or "
                "leave it out"
            )
        cache = given_cache(inputs)
        if cache is not None and holds_tokens(cache):
            raise ValueError(
                f"{name} keeps caches of its own and cannot go on from past_key_values: give it the whole text so far"
            )
        check_config(name, config, call.model.generation_config)
        for flag in () if self.shows_steps else ("output_scores", "output_logits"):
            if getattr(config, flag, None):
                raise ValueError(f"{name} returns no scores of single steps: leave {flag} out")
        if any(isinstance(processor, Steering) for processor in call.processors):
            raise ValueError(f"{name} steers by itself: leave the MavisLogitsProcessor out of logits_processor")
        rows = len(call.input_ids)
        for what, setting in self.policy.by_request.items():
            if rows % len(setting):
                raise ValueError(f"{what} are given for {len(setting)} requests, but the batch has {rows} rows")


def pad_token(config: GenerationConfig, strategy: MavisStrategy) -> int:
    """The token that fills up finished rows: generate's own, else the strategy's, else 0."""
    given = getattr(config, "_pad_token_tensor", None)
    if given is not None:
        return int(given)
    return next((token for token in (config.pad_token_id, strategy.pad_token_id) if token is not None), 0)
