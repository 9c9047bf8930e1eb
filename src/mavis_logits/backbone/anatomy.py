"""Where the parts of a transformers model are, found on its modules; its config is asked only what no module can tell.

This is the one file that knows how other libraries name things. What cannot be told by looking is tried (`probe`).
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import MODEL_MAPPING, PreTrainedConfig, PreTrainedModel

from .compat import CACHE_NAMES

_ATTENTION_KINDS = {"full_attention", "sliding_attention"}


class UnsupportedModel(ValueError):
    """A model that is no causal language model, or whose parts cannot be found."""


@dataclass(frozen=True)
class Arguments:
    """What a module's `forward` takes by name.

    Attributes:
        names: of its parameters.
        others: whether it takes any other name too, and hands it on to nobody knows where.
        cache: under which name it takes its cache; None if it takes none.
    """

    names: frozenset[str]
    others: bool
    cache: str | None

    def bind(self, owner: str, given: Mapping[str, Any], handed_on: bool = False) -> dict[str, Any]:
        """`given`, without what is None, under the module's own names: `cache` may be called something else.

        Args:
            owner: whose arguments these are, for messages.
            given: arguments by name.
            handed_on: whether a name that is not the module's own may go on to another (`Backbone.why_not_handed_on`).

        Raises:
            UnsupportedModel: something given would not reach the module. `use_cache=False` may be left out.
        """
        bound = {}
        for name, value in given.items():
            own = self.cache if name == "cache" else name
            if value is None:
                continue
            if own is None or (own not in self.names and not (handed_on and self.others)):
                if name == "use_cache" and not value:
                    continue
                raise UnsupportedModel(f"{owner} takes no {name}")
            bound[own] = value
        return bound


def arguments_of(module: nn.Module) -> Arguments:
    """The arguments of a module's class."""
    return _arguments_of(type(module).forward)


@lru_cache(maxsize=256)
def _arguments_of(forward: Callable[..., Any]) -> Arguments:
    parameters = inspect.signature(forward).parameters.values()
    names = frozenset(p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL))
    others = any(p.kind is p.VAR_KEYWORD for p in parameters)
    return Arguments(names, others, next((name for name in CACHE_NAMES if name in names), None))


def cache_of(output: Mapping[str, Any]) -> Any:
    """The cache in a model's output, whatever its name; None if there is none."""
    return next((output[name] for name in CACHE_NAMES if name in output), None)


def given_cache(inputs: Mapping[str, Any]) -> Any:
    """The cache among keyword arguments meant for a model, whatever its name; None if there is none."""
    return next((inputs[name] for name in CACHE_NAMES if inputs.get(name) is not None), None)


def tokens_in(cache: Any) -> int | None:
    """How many tokens a cache holds; None if it cannot tell (one of recurrent states alone)."""
    try:
        return int(cache.get_seq_length())
    except ValueError:
        return None


def holds_tokens(cache: Any) -> bool:
    """Whether a cache has been written to."""
    count = tokens_in(cache)
    if count is not None:
        return count > 0
    states = (getattr(layer, "has_previous_state", False) for layer in cache.layers)
    return any(any(state.values()) if isinstance(state, dict) else bool(np.any(state)) for state in states)


def name_of_class(decoder: PreTrainedModel) -> str | None:
    """The class of a decoder by name, where its configuration alone would make another; else None."""
    if MODEL_MAPPING.get(type(decoder.config), None) is type(decoder):
        return None
    return type(decoder).__name__


def class_of_config(config: PreTrainedConfig, name: str | None) -> type[PreTrainedModel]:
    """The class of a decoder, of its configuration and the name by `name_of_class`.

    Raises:
        ValueError: transformers has no such class beside the configuration.
    """
    if name is None:
        found = MODEL_MAPPING.get(type(config), None)
        kinds = found if isinstance(found, tuple) else (found,)
        if kinds[0] is None:
            raise ValueError(f"transformers has no bare decoder for a configuration of the type {config.model_type}")
        return kinds[0]
    home = type(config).__module__.replace(".configuration_", ".modeling_")
    kind = getattr(importlib.import_module(home), name, None) if home.startswith("transformers.") else None
    if not isinstance(kind, type) or not issubclass(kind, PreTrainedModel):
        raise ValueError(f"transformers has no decoder {name} for a configuration of the type {config.model_type}")
    return kind


def build(kind: type[PreTrainedModel], config: PreTrainedConfig, **settings: Any) -> PreTrainedModel:
    """A decoder of random weights, without a pooling layer for whole texts, which nothing here reads."""
    if "add_pooling_layer" in inspect.signature(kind.__init__).parameters:
        settings |= {"add_pooling_layer": False}
    return kind._from_config(config, **settings)


def unwrapped(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside torch.compile's, DistributedDataParallel's and PEFT's wrappers.

    Raises:
        UnsupportedModel: there is none.
    """
    inner: Any = model
    while not isinstance(inner, PreTrainedModel):
        for name in ("_orig_mod", "module", "get_base_model"):
            found = getattr(inner, name, None)
            if found is not None:
                inner = found() if name == "get_base_model" else found
                break
        else:
            raise UnsupportedModel(
                f"expected a transformers language model, got {type(model).__name__}: load one with "
                "AutoModelForCausalLM.from_pretrained"
            )
    return inner


def output_layer(model: PreTrainedModel) -> nn.Module | None:
    """The layer that makes scores of hidden states, None for a bare decoder."""
    layer = model.get_output_embeddings()
    if layer is not None:
        return layer
    # A few types do not tell: then it is the one linear layer of the size of the vocabulary outside of the decoder.
    if not model.can_generate():
        return None
    found = [
        module
        for module in model.modules()
        if isinstance(module, nn.Linear) and module.out_features == text_config(model).vocab_size
    ]
    return found[0] if len(found) == 1 else None


def text_config(model: PreTrainedModel) -> PreTrainedConfig:
    """The part of a model's configuration that is about text."""
    return model.config.get_text_config(decoder=True)


def find_decoder(model: PreTrainedModel) -> PreTrainedModel:
    """What maps token ids to hidden states and takes the cache; the model itself where it is a bare decoder.

    Raises:
        UnsupportedModel: no such part.
    """
    head = output_layer(model)
    body = model.base_model
    if text_config(model) is model.config and not model.config.is_encoder_decoder:
        # What AutoModel makes of the configuration, so that it can be made again.
        if body is not model and isinstance(body, PreTrainedModel) and name_of_class(body) is None:
            return body
        if head is None and not model.can_generate():
            return model
    decoder = _named_decoder(model)
    if isinstance(decoder, PreTrainedModel) and (head is None or not _contains(decoder, head)):
        return decoder
    inside = [
        module
        for module in model.modules()
        if module is not model and isinstance(module, PreTrainedModel) and (head is None or not _contains(module, head))
    ]
    text = [module for module in inside if type(module.config) is type(text_config(model))]
    inside = text or inside
    if inside:  # the largest; of two of one size the outer one, which comes first
        return max(inside, key=lambda module: sum(p.numel() for p in module.parameters()))
    if head is None:
        return model
    raise UnsupportedModel(f"{type(model).__name__} has no decoder beside its output layer that could be read alone")


def _named_decoder(model: PreTrainedModel) -> nn.Module | None:
    try:
        decoder = model.get_decoder()
    except (AttributeError, NotImplementedError):
        decoder = None
    if decoder is not None and decoder is not model:
        return decoder
    return model.base_model if model.base_model is not model else None


def _contains(module: nn.Module, part: nn.Module) -> bool:
    return any(inner is part for inner in module.modules())


def layer_lists(decoder: nn.Module) -> dict[str, nn.ModuleList]:
    """All lists of modules of one class in a decoder that may be its layers, by name; none inside another."""
    found: dict[str, nn.ModuleList] = {}
    for name, module in decoder.named_modules():
        if not isinstance(module, nn.ModuleList) or not len(module):
            continue
        if not any(name.startswith(outer + ".") for outer in found):
            found[name] = module
    return found


def attention_windows(config: PreTrainedConfig) -> dict[str, int | None] | None:
    """The kinds of attention layer that a decoder has, each with its window in tokens (None: unlimited).

    None instead if it has layers of which no mask is known (recurrent, chunked, compressed ones).
    """
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ())
    if not kinds:
        kinds = {"full_attention"} if window is None else {"sliding_attention"}
    if not kinds <= _ATTENTION_KINDS or ("sliding_attention" in kinds and not isinstance(window, int)):
        return None
    return {kind: window if kind == "sliding_attention" else None for kind in sorted(kinds)}


def rope_kind(parameters: Mapping[str, Any]) -> str:
    """How rotary frequencies are made."""
    return str(parameters.get("rope_type", parameters.get("type", "default")))


def frequencies_drift(config: PreTrainedConfig) -> bool:
    """Whether rotary frequencies change with every further token from some length on (dynamic NTK)."""
    parameters = field(config, "rope_parameters") or field(config, "rope_scaling") or {}
    nested = [value for value in parameters.values() if isinstance(value, Mapping)]
    return any("dynamic" in rope_kind(one) for one in [parameters, *nested])


def frequencies_change_at(config: PreTrainedConfig) -> int | None:
    """The length from which on rotary frequencies depend on it (dynamic NTK, LongRoPE), so that cached keys are off.

    None where they never do.
    """
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, Mapping)] or [parameters]
    lengths: list[int] = []
    for one in nested:
        kind = rope_kind(one)
        if "dynamic" in kind or kind == "longrope":
            names = ("original_max_position_embeddings", "max_position_embeddings")
            found = [one.get(names[0]), *(field(config, name) for name in names)]
            lengths.append(next((length for length in found if isinstance(length, int)), 0))
    return min(lengths, default=None)


def longest_sequence(config: PreTrainedConfig) -> int | None:
    """The tokens that a decoder has positions for; None if unknown or unlimited."""
    if frequencies_drift(config):
        return None  # made for longer texts than it was trained on
    for name in ("max_position_embeddings", "n_positions", "max_target_positions"):
        found = getattr(config, name, None)
        if isinstance(found, int) and found > 0:
            return found
    return None


def embedding_rows(decoder: PreTrainedModel) -> int:
    """How many token ids a decoder knows."""
    try:
        embedding = decoder.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        embedding = None
    rows = getattr(embedding, "num_embeddings", None)
    if rows is None and isinstance(getattr(embedding, "weight", None), Tensor):
        rows = embedding.weight.shape[0]  # type: ignore[union-attr]
    return int(rows if rows is not None else text_config(decoder).vocab_size)


def output_width(config: PreTrainedConfig) -> int:
    """The width of a decoder's last hidden states."""
    if config.model_type == "reformer":
        return 2 * int(config.hidden_size)  # reversible layers: both halves
    return int(getattr(config, "word_embed_proj_dim", None) or config.hidden_size)


def field(config: PreTrainedConfig, name: str) -> Any:
    """A field of a configuration; None if it has none of this name, or another one for every layer."""
    try:
        return getattr(config, name, None)
    except Exception:  # transformers raises an error of its own for fields that differ by layer
        return None


def per_layer_settings(config: PreTrainedConfig, count: int) -> dict[str, list[Any]]:
    """The fields of a config that are lists of one entry for each of `count` layers."""
    fields = {name: field(config, name) for name in {*vars(config), "layer_types"}}
    return {name: value for name, value in fields.items() if isinstance(value, list) and len(value) == count}


def layer_count_fields(config: PreTrainedConfig, count: int) -> list[str]:
    """The fields of a config that say `count` layers."""
    mapped = getattr(config, "attribute_map", {}).get("num_hidden_layers", "num_hidden_layers")
    names = [mapped, "decoder_layers", "num_decoder_layers"]
    return [name for name in dict.fromkeys(names) if vars(config).get(name) == count]


def cut_config(config: PreTrainedConfig, layers: int, keep: int) -> None:
    """Make a configuration of `layers` layers one of the first `keep`.

    Raises:
        ValueError: it does not say how many layers there are.
    """
    counts = layer_count_fields(config, layers)
    if not counts:
        raise ValueError(f"the configuration of {config.model_type} names no number of {layers} layers to be cut")
    settings = per_layer_settings(config, layers)
    for name in counts:
        setattr(config, name, keep)
    for name, values in settings.items():
        try:
            setattr(config, name, values[:keep])
        except AttributeError:
            continue  # derived from the count
    shared = field(config, "num_kv_shared_layers")
    if shared:  # the last layers, counted from the end, use keys of earlier ones
        config.num_kv_shared_layers = max(0, keep - (layers - shared))


def states_of(output: Any) -> Tensor:
    """What a layer gave, without what else it returns."""
    while isinstance(output, tuple | list):
        output = output[0]
    return output if isinstance(output, Tensor) else next(iter(output.values()))


def is_quantized(module: nn.Module) -> bool:
    """Whether some weight is no plain floating-point tensor."""
    return any(not p.is_floating_point() or type(p.data) is not torch.Tensor for p in module.parameters())
