"""A small copy of a decoder: same class, same structure, fresh weights. What a model does is tried on it, in float32.

Trying it on the model itself would let the verdict hang on its weights, its dtype, its device and on how long its
windows are: a window of 4,096 tokens is not left by a trial of twenty.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from .anatomy import (
    arguments_of,
    build,
    cut_config,
    field,
    layer_count_fields,
    layer_lists,
    per_layer_settings,
    text_config,
)

VOCABULARY = 97
WINDOW = 6  # shorter than the sequences of every trial
_FIRST_TOKEN = 5  # those below stand for padding, beginning and end
_INNER_SIZES = (
    "intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size", "ffn_dim", "decoder_ffn_dim",
    "d_ff", "n_inner", "ffn_hidden_size", "mlp_hidden_size", "dense_intermediate_size", "intermediate_size_mlp",
)  # fmt: skip
_WINDOWS = ("sliding_window", "window_size", "attention_window", "local_attention", "attention_chunk_size")
_VOCABULARIES = ("vocab_size", "vocab_size_per_layer_input")
_SPECIAL_TOKENS = {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3, "decoder_start_token_id": 2}
_FEW_PARAMETERS = 60_000_000  # a copy of more takes longer than it saves


class Specimen:
    """A small copy of a decoder, and what it gives.

    Attributes:
        decoder: the copy, on the CPU in float32.
        config: of its text side.
    """

    def __init__(self, decoder: PreTrainedModel) -> None:
        self.decoder = decoder
        self.config = text_config(decoder)

    @torch.no_grad()
    def states(self, tokens: Tensor, **inputs: Any) -> Tensor:
        """Last hidden states [R, T, d] after reading `tokens` [R, T]."""
        given = arguments_of(self.decoder).bind("", {"use_cache": False} if "use_cache" not in inputs else {})
        return self.decoder(input_ids=tokens, **given, **inputs).last_hidden_state.float()

    @torch.no_grad()
    def shown(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """The hidden states that the decoder itself shows; none if it shows none."""
        try:
            given = arguments_of(self.decoder).bind("", {"use_cache": False})
            output = self.decoder(input_ids=tokens, output_hidden_states=True, **given)
        except (TypeError, ValueError, AttributeError):
            return ()
        return tuple(state for state in output.get("hidden_states") or () if isinstance(state, Tensor))

    def tokens(self, rows: int, length: int, seed: int = 0) -> Tensor:
        """[rows, length] random token ids, none of them special."""
        generator = torch.Generator().manual_seed(seed)
        size = min(VOCABULARY, self.config.vocab_size)
        return torch.randint(_FIRST_TOKEN, size, (rows, length), generator=generator)


def take_specimen(decoder: PreTrainedModel, whole: bool = False) -> Specimen | str:
    """A small copy of `decoder` that reads plain text, of all its layers if it is to be `whole`; or why there is none.

    Nothing of the process changes: not the random state, the default dtype, the default device or gradient mode.
    """
    error = "no small copy of it can be built"
    implementation = "eager" if decoder.config._attn_implementation == "eager" else "sdpa"
    for config in _configs(decoder, whole):
        try:
            found = Specimen(_build(type(decoder), config, implementation))
            if torch.isfinite(found.states(found.tokens(2, 4))).all():
                return found
            error = "a small copy of it gives no finite states"
        except Exception as problem:  # any class of any library may fail in its own way
            error = f"no small copy of it could be made ({type(problem).__name__}: {str(problem)[:120]})"
    return error


def _configs(decoder: PreTrainedModel, whole: bool) -> Iterator[PreTrainedConfig]:
    """Ever less shrunk configurations."""
    layers = max((len(found) for found in layer_lists(decoder).values()), default=0)
    for narrow, short, inner in ((True, True, True), (False, True, True), (False, False, True), (False, False, False)):
        config = copy.deepcopy(decoder.config)
        for name in ("quantization_config", "compression_config"):
            if hasattr(config, name):
                delattr(config, name)
        text = config.get_text_config(decoder=True)
        _set(text, dict.fromkeys(_WINDOWS, WINDOW), only_int=True)
        _set(text, _SPECIAL_TOKENS)
        if inner:
            _set(text, dict.fromkeys(_VOCABULARIES, VOCABULARY), only_int=True)
            _set(text, dict.fromkeys(_INNER_SIZES, 48), only_int=True)
        if narrow:
            _set(text, _narrow(text))
        _lift_rope_limits(text)
        if short and not whole:
            _cut(text, layers)
        yield config


def _set(config: PreTrainedConfig, values: Mapping[str, Any], only_int: bool = False) -> None:
    """Set the fields that the config has (with a whole number, if asked for)."""
    for name, value in values.items():
        found = field(config, name)
        if found is None or (only_int and not (isinstance(found, int) and found > value)):
            continue
        setattr(config, name, value)


def _narrow(config: PreTrainedConfig) -> dict[str, int]:
    """Fewer heads of the same size, as many to each key."""
    heads, width = field(config, "num_attention_heads"), field(config, "hidden_size")
    if not isinstance(heads, int) or not isinstance(width, int) or width <= 256:
        return {}
    keys = field(config, "num_key_value_heads")
    keys = keys if isinstance(keys, int) and keys else heads
    few = min(keys, 2)
    new = heads // keys * few
    if heads % keys or (width * new) % heads:
        return {}
    return {"hidden_size": width * new // heads, "num_attention_heads": new, "num_key_value_heads": few}


def _lift_rope_limits(config: PreTrainedConfig) -> None:
    """Lengths from which rotary frequencies change are beyond every trial: `Backbone` knows them by name."""
    parameters = getattr(config, "rope_parameters", None) or {}
    for one in [parameters, *parameters.values()]:
        if isinstance(one, dict) and "original_max_position_embeddings" in one:
            one["original_max_position_embeddings"] = max(4096, one["original_max_position_embeddings"])
    _set(config, {"original_max_position_embeddings": 4096})
    kinds = {str(one.get("rope_type")) for one in [parameters, *parameters.values()] if isinstance(one, dict)}
    if any("dynamic" in kind for kind in kinds):
        _set(config, {"max_position_embeddings": 4096})


def _cut(config: PreTrainedConfig, layers: int) -> None:
    """Keep the fewest first layers among which is every kind, at least two."""
    counts = layer_count_fields(config, layers)
    if not counts or field(config, "num_kv_shared_layers"):
        return  # keys of the last layers are those of earlier ones, counted from the end
    settings = per_layer_settings(config, layers)
    kinds = [tuple(str(values[i]) for values in settings.values()) for i in range(layers)]
    keep = max([2, *(kinds.index(kind) + 1 for kind in kinds)]) if layers else layers
    if keep >= layers:
        return
    cut_config(config, layers, keep)


def _build(kind: type[PreTrainedModel], config: PreTrainedConfig, implementation: str) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        if implementation == "sdpa" and not kind._supports_sdpa:
            implementation = "eager"
        as_asked = {"attn_implementation": implementation, "dtype": torch.float32}
        with torch.device("meta"):
            size = sum(p.numel() for p in build(kind, copy.deepcopy(config), **as_asked).parameters())
        if size > _FEW_PARAMETERS:
            raise ValueError(f"it has {size} parameters")
        model = build(kind, config, **as_asked)
        _enliven(model)
    return model.eval().requires_grad_(False)


def _enliven(model: nn.Module) -> None:
    """Weights so large that attention matters to the result; with the usual 0.02 nothing would."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            scale = min(0.3, 2.4 * parameter.shape[-1] ** -0.5)
            parameter.normal_(std=scale, generator=generator)
