"""Arguments of `generate`: those that a strategy honours, those that it refuses, those that it is not handed.

`tests/decoding/test_generate_arguments.py` holds every one of them against this, in `docs/generate.md`.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.integrations.fsdp import is_fsdp_managed_module

from ...backbone.anatomy import given_cache, holds_tokens
from ..calls import call_of

_OWN_CACHE = "a strategy keeps caches of its own"
_NO_ASSISTANT = "a strategy decodes without an assistant: use generate with a MavisLogitsProcessor"
_RANKS = "the search strategies rank by values"

# Fields of GenerationConfig that a strategy cannot honour, with what to do.
REFUSED = {
    "num_beams": (
        "asks for generate's own beam search: use MavisBeamSearch(num_beams=...), or generate's with a "
        "MavisLogitsProcessor"
    ),
    "num_beam_groups": _RANKS,
    "diversity_penalty": _RANKS,
    "length_penalty": _RANKS,
    "early_stopping": _RANKS,
    "penalty_alpha": "contrastive search is another way of decoding",
    "dola_layers": "DoLa is another way of decoding",
    "low_memory": "it is of contrastive search, another way of decoding",
    "constraints": "constrained beam search is another way of decoding",
    "force_words_ids": "constrained beam search is another way of decoding",
    "prompt_lookup_num_tokens": _NO_ASSISTANT,
    "assistant_early_exit": _NO_ASSISTANT,
    "use_mtp": _NO_ASSISTANT,
    "speculation_type": _NO_ASSISTANT,
    "is_assistant": "a strategy drafts for no other model",
    "cache_implementation": _OWN_CACHE,
    "cache_config": _OWN_CACHE,
    "max_cache_len": _OWN_CACHE,
    "prefill_chunk_size": "prompts are read in one piece: use generate with a MavisLogitsProcessor",
    "compile_config": "the base model's steps are not compiled: use generate with a MavisLogitsProcessor",
    "output_attentions": "no attentions are kept: use generate with a MavisLogitsProcessor",
    "output_hidden_states": "no hidden states are kept: use generate with a MavisLogitsProcessor",
}
# Those of them that a model's own generation config may well have, and that change nothing of what is written.
_HARMLESS = {
    "length_penalty", "early_stopping", "low_memory", "cache_implementation", "cache_config", "max_cache_len",
    "prefill_chunk_size", "compile_config",
}  # fmt: skip
_OFF: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,), "num_beam_groups": (1,), "length_penalty": (1.0,), "cache_implementation": ("dynamic",),
}  # fmt: skip

# Fields that a strategy honours, or `generate` before it, or that say nothing without one that is refused.
HONOURED = frozenset({
    "max_length", "max_new_tokens", "min_length", "min_new_tokens", "max_time", "stop_strings", "do_sample",
    "use_cache", "disable_compile", "temperature", "top_h", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff",
    "eta_cutoff", "repetition_penalty", "encoder_repetition_penalty", "no_repeat_ngram_size", "bad_words_ids",
    "encoder_no_repeat_ngram_size", "renormalize_logits", "forced_bos_token_id", "forced_eos_token_id",
    "remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens",
    "sequence_bias", "token_healing", "guidance_scale", "watermarking_config", "num_return_sequences",
    "output_scores", "output_logits", "return_dict_in_generate", "pad_token_id", "bos_token_id", "eos_token_id",
    "decoder_start_token_id", "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_ensemble_weight",
    "assistant_confidence_threshold", "max_matching_ngram_size", "assistant_lookbehind", "target_lookbehind",
    "continuous_batching_config", "transformers_version",
})  # fmt: skip


def check_config(name: str, config: GenerationConfig, own: GenerationConfig | None) -> None:
    """Raise `ValueError` if a field is set that no strategy can honour, or that is not known.

    Args:
        name: the strategy's.
        config: of the call.
        own: the model's.
    """
    defaults = GenerationConfig._get_default_generation_params()
    for field in vars(GenerationConfig()):
        value = getattr(config, field, None)
        if field.startswith("_") or field in HONOURED or not value or value in _OFF.get(field, ()):
            continue
        if field in REFUSED:
            if field not in _HARMLESS or value != getattr(own, field, None):
                raise ValueError(f"{name} does not support {field}={value!r} ({REFUSED[field]}): leave it out")
        elif value != defaults.get(field):
            raise ValueError(
                f"{name} does not know {field}={value!r}, which is newer than it: leave it out, or use generate with a "
                "MavisLogitsProcessor"
            )


def arguments_of_call(model: PreTrainedModel) -> dict[str, Any]:
    """`streamer`, `assistant_model`, `synced_gpus` and a cache of the `generate` call of `model` that runs what asks.

    `generate` hands them to none that decodes in its place, nor anything else that tells of them. To ignore them would
    leave whoever reads the streamer waiting for ever, so they are looked up where they stand: they are arguments of a
    public function. Empty if there is no such call.
    """
    call = call_of(model)
    given = {name: call.get(name) for name in ("streamer", "assistant_model", "synced_gpus")}
    given["cache"] = given_cache(call.get("kwargs") or {})  # what generate prepares looks alike
    return {key: value for key, value in given.items() if value is not None}


def check_call(name: str, model: PreTrainedModel, given: dict[str, Any]) -> None:
    """Raise `ValueError` if arguments of the call cannot be honoured.

    Args:
        name: the strategy's.
        model: the base model.
        given: as from `arguments_of_call`.
    """
    if given.get("assistant_model") is not None:
        raise ValueError(f"{name} does not support assistant_model ({_NO_ASSISTANT}): leave it out")
    if (cache := given.get("cache")) is not None:
        if holds_tokens(cache):
            raise ValueError(
                f"{name} keeps caches of its own and cannot go on from past_key_values: give it the whole text so far"
            )
        raise ValueError(f"{name} keeps caches of its own and fills none that it is given: leave it out")
    ranks = torch.distributed.is_available() and torch.distributed.is_initialized()
    if ranks and torch.distributed.get_world_size() > 1 and given.get("synced_gpus") is None:
        sharded = is_deepspeed_zero3_enabled() or is_fsdp_managed_module(model)
    else:
        sharded = bool(given.get("synced_gpus"))
    if sharded:
        raise ValueError(
            f"{name} does not support synced_gpus (every rank stops when its own rows have ended, and the others would "
            "wait for it): use generate with a MavisLogitsProcessor"
        )
