"""Value heads and vLLM's models: whether they belong together, and where the states are that a head reads."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from ...backbone.fingerprint import weights_difference
from ...backbone.hidden import Layer
from ...backbone.needs import Needs
from ...values.ensemble import ValueFunctions

logger = logging.getLogger(__name__)

_PACKED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def bind(functions: ValueFunctions, model: nn.Module, check_weights: bool, tensor_parallel: int = 1) -> None:
    """Give value heads the served model's output embedding.

    Args:
        functions: the value functions.
        model: as vLLM has loaded it.
        check_weights: refuse a head that was trained on other weights.
        tensor_parallel: over how many devices the model's weights are spread.

    Raises:
        ValueError: other widths, another vocabulary or (with `check_weights`) other weights.
    """
    if not functions.heads:
        return
    embedding = output_embedding(model)
    for head in functions.heads:
        head.bind_embedding(embedding)
        needs = Needs.of(head.config)
        if not check_weights:
            continue
        compared, difference = weights_difference(dict(weights(model, tensor_parallel)), needs.sketch)
        if difference is not None:
            raise ValueError(
                f"the value head for {needs.objectives} was trained on the hidden states of {needs.base_model}, and "
                f"the served model has other weights ({difference}): serve that model, train a new head, or set "
                "check_weights to false if you know that the states are the same"
            )
        if not compared:
            logger.warning("mavis: none of the served model's weights can be compared with those of the value head")


def output_embedding(model: nn.Module) -> Tensor:
    """[V, d] of the served model, gathered where it is spread over devices.

    Raises:
        ValueError: it is quantised, or cannot be found.
    """
    part = language_model(model)
    layer = next((found for module in (model, part) if (found := getattr(module, "lm_head", None)) is not None), None)
    if not isinstance(getattr(layer, "weight", None), Tensor):
        inner = getattr(part, "model", part)
        layer = getattr(inner, "embed_tokens", None)
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.element_size() < 2:
        raise ValueError(
            f"{type(model).__name__} has no output embedding that value heads can read (it is quantised, or has "
            "another name than lm_head and embed_tokens): use value models"
        )
    full = weight.detach()
    vocabulary = getattr(layer, "org_vocab_size", len(full))
    if getattr(layer, "tp_size", 1) > 1:
        from vllm.distributed import tensor_model_parallel_all_gather

        full = tensor_model_parallel_all_gather(full.contiguous(), dim=0)
    return full[:vocabulary]


def language_model(model: nn.Module) -> nn.Module:
    """The part of a model of several modalities that writes text; any other model as it is."""
    given: Any = model
    found: nn.Module = (
        given.get_language_model() if hasattr(given, "get_language_model") else getattr(given, "language_model", model)
    )
    return found


def weights(model: nn.Module, tensor_parallel: int = 1) -> Iterator[tuple[str, Tensor]]:
    """The weights that are here as they are in the model's checkpoint, under canonical names.

    Projections that vLLM packs into one are taken apart. What is quantised, fused in another way or spread over devices
    is left out, and so is what a processor's own kernels have taken away.
    """
    part = language_model(model)
    for path, module in part.named_modules():
        for name, tensor in module.named_parameters(recurse=False):
            sharded = tensor_parallel > 1 and any(hasattr(tensor, mark) for mark in ("output_dim", "input_dim"))
            if not tensor.is_floating_point() or tensor.element_size() < 2 or sharded or not tensor.numel():
                continue
            parent, _, last = path.removeprefix("model.").rpartition(".")
            names, sizes = _PACKED.get(last), getattr(module, "output_sizes", None)
            if names is None:
                rows = getattr(module, "org_vocab_size", len(tensor) if tensor.ndim else 0)
                yield ".".join(filter(None, (parent, last, name))), tensor.detach()[:rows] if rows else tensor.detach()
            elif sizes is not None and len(sizes) == len(names) and sum(sizes) == len(tensor):
                for own, piece in zip(names, tensor.detach().split(list(sizes)), strict=True):
                    yield ".".join(filter(None, (parent, own, name))), piece


def ask_for_layers(model: nn.Module, layers: set[Layer]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Have vLLM's model hand out the states after inner layers, beside those that a drafter reads already.

    This is the way that EAGLE-3 drafters read: the states are outputs of the forward pass, so that they are there in
    compiled code and in CUDA graphs too.

    Returns:
        all layers that are handed out from now on, in order; and those that were before.

    Raises:
        ValueError: the architecture does not hand out its layers, or has fewer.
    """
    wanted = sorted(layer for layer in layers if isinstance(layer, int))
    holder: Any = next((m for m in model.modules() if hasattr(m, "aux_hidden_state_layers")), None)
    if holder is None or not hasattr(model, "set_aux_hidden_state_layers"):
        raise ValueError(
            f"the value head reads the state after layer {wanted[-1]}, but vLLM's {type(model).__name__} does not hand "
            "out the states of its layers (only architectures that support EAGLE-3 do): use a head that reads the last "
            "layer (`mavis train-head --layer output`), or value models"
        )
    count = len(holder.layers)
    if not 1 <= wanted[0] <= wanted[-1] <= count:
        raise ValueError(f"the value head reads the state after layer {wanted[-1]}, but the served model has {count}")
    before = tuple(holder.aux_hidden_state_layers)
    every = tuple(sorted({*before, *wanted}))
    model.set_aux_hidden_state_layers(every)  # type: ignore[operator]
    return every, before


def check_shapes(functions: ValueFunctions, width: int, vocabulary: int) -> None:
    """Raise `ValueError` if a value head is for states of another width than the served model's, or other tokens."""
    for head in functions.heads:
        config = head.config
        if (config.hidden_size, config.vocab_size) != (width, vocabulary):
            raise ValueError(
                f"the value head for {config.objectives} is for states of width {config.hidden_size} and "
                f"{config.vocab_size} tokens, but the served model has {width} and {vocabulary}: use a head trained on "
                f"it ({config.base_model} is what this one was trained on)"
            )


def end_tokens(vllm_config: Any) -> set[int]:
    """The tokens that end a text of the served model."""
    model_config = vllm_config.model_config
    generation = model_config.try_get_generation_config() or {}
    text = getattr(model_config, "hf_text_config", None) or model_config.hf_config
    found: set[int] = set()
    for given in (generation.get("eos_token_id"), getattr(text, "eos_token_id", None)):
        found |= {given} if isinstance(given, int) else set(given or ())
    return found
