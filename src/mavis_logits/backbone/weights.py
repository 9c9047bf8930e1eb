"""A model's weights as they compute: read through wrappers, adapters, quantisation and offloading.

Names are canonical. What torch.compile, DistributedDataParallel, PEFT and checkpointing put around a module leaves no
trace in them, and a LoRA adapter that is active counts as part of the weight that it changes, merged or not.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

_SEE_THROUGH = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_LOOKED_AT = 64  # parameters of one element each
_SCALES = (
    "weight_scale", "weight_scale_inv", "activation_scale", "input_scale", "output_scale", "weight_zero_point",
)  # fmt: skip


@dataclass(frozen=True)
class Weight:
    """One tensor that a model computes with.

    Attributes:
        name: canonical.
        module: that holds it.
        attribute: of the module.
        changes: what active adapters make of it, one after another.
        is_parameter: whether it is one; else it is a buffer.
    """

    name: str
    module: nn.Module
    attribute: str
    changes: tuple[Callable[[Tensor], Tensor], ...] = field(default=(), compare=False)
    is_parameter: bool = True

    @property
    def raw(self) -> Tensor:
        """The tensor as it lies in the module: perhaps packed, perhaps on the meta device."""
        return getattr(self.module, self.attribute)  # type: ignore[no-any-return]

    def read(self) -> tuple[Tensor | None, Tensor | None]:
        """The weight as a plain floating-point tensor, and what was quantised of it (None: nothing).

        None also for the first where it cannot be told.
        """
        tensor, quantised = plain(self.module, self.attribute)
        before = tensor if quantised else None
        for change in self.changes:
            if tensor is not None:
                tensor = change(tensor)
        return tensor, before


def named_weights(model: nn.Module, adapters: bool = True) -> Iterator[Weight]:
    """Every weight of a model: its parameters, and the buffers that are saved with it.

    Args:
        model: wrapped or not.
        adapters: whether those that are active count; without them the weights are those that they were put on.
    """
    yield from _walk(model, "", adapters, ())


def weight_of(layer: nn.Module) -> Tensor | None:
    """The weight that a layer computes with, as a plain floating-point tensor; None if it cannot be told."""
    return next((weight.read()[0] for weight in named_weights(layer) if weight.name == "weight"), None)


def active_adapters(model: nn.Module) -> list[str]:
    """The names of all PEFT adapters that take part in the model's forward, in alphabetical order."""
    names = set(_soft_prompts(model))
    for module in model.modules():
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            names |= set(_taking_part(module))
    return sorted(names)


def loaded_adapters(model: nn.Module) -> list[str]:
    """The names of all PEFT adapters that are there, active or not, in alphabetical order."""
    layers = (module for module in model.modules() if isinstance(module, BaseTunerLayer))
    return sorted({name for layer in layers for name in layer._get_available_adapters()})


def adapter_state(model: nn.Module) -> tuple[Any, ...]:
    """What tells whether other adapters are active than before, or the same with another strength."""
    state: list[Any] = list(_soft_prompts(model))
    for module in model.modules():
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            active = tuple(_taking_part(module))
            scaling = getattr(module, "scaling", {})
            state.append((active, tuple(module.merged_adapters), tuple(scaling.get(name) for name in active)))
    return tuple(state)


def state_of(model: nn.Module) -> int:
    """A number that is another one when weights have changed, moved or been cast, or other adapters are active.

    It is quick, and says nothing of which model it is. What was written behind autograd's back is seen by the elements
    that it looks at.
    """
    state, seen = list[Any](adapter_state(model)), dict[torch.device, list[Tensor]]()
    parameters = list(model.parameters())
    looked_at = set(spread(_LOOKED_AT, len(parameters)))
    for number, parameter in enumerate(parameters):
        version = 0 if parameter.is_inference() else parameter._version
        place = None if parameter.device.type == "meta" else id(parameter)  # accelerate makes new ones at every forward
        state.append((place, parameter.dtype, parameter.device, version))
        if number in looked_at and type(parameter) is nn.Parameter and parameter.is_floating_point() and place:
            middle = parameter.detach()[tuple(size // 2 for size in parameter.shape)] if parameter.numel() else None
            if middle is not None:
                seen.setdefault(parameter.device, []).append(middle.float())
    return hash((*state, *(tuple(torch.stack(values).tolist()) for values in seen.values())))


def spread(places: int, count: int) -> list[int]:
    """Some numbers below `count`, spread by the golden ratio, any first few of them as well as all."""
    return [(((i * 2654435769 + 0x80000000) & 0xFFFFFFFF) * count) >> 32 for i in range(places)]


@contextmanager
def twin(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """A second model whose weights are those of `model`, the same tensors: what is put around them is its own.

    What of them is trainable is afterwards as it was: PEFT freezes what it puts an adapter on.
    """
    trained = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        yield copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})
    finally:
        for parameter, mode in trained.items():
            parameter.requires_grad_(mode)


class WeakModel:
    """A model, if it is still there."""

    def __init__(self, model: nn.Module | None = None) -> None:
        self._reference = None if model is None else weakref.ref(model)

    def __call__(self) -> Any:
        return None if self._reference is None else self._reference()

    def __deepcopy__(self, memo: dict[int, Any]) -> WeakModel:
        model = self()
        return WeakModel(memo.get(id(model), model))


def plain(module: nn.Module, attribute: str = "weight") -> tuple[Tensor | None, bool]:
    """A weight as a plain floating-point tensor, wherever it lies and however it is packed.

    Args:
        module: that holds it.
        attribute: its name there.

    Returns:
        The tensor, not always on the device that it computes on, and whether it has been quantised; None if it is not
        at hand (no weights loaded, or packed in a way that is not known).
    """
    raw = getattr(module, attribute)
    tensor = raw if raw.device.type != "meta" else _offloaded(module, attribute)
    if tensor is None:
        return None, False
    tensor = tensor.detach()
    if hasattr(tensor, "full_tensor"):  # torch's DTensor
        tensor = tensor.full_tensor()
    if type(raw).__name__ in ("Params4bit", "Int8Params"):
        return _of_bitsandbytes(module, raw, tensor), True
    if type(tensor).dequantize is not Tensor.dequantize:  # torchao, quanto
        return tensor.dequantize(), True
    if attribute == "W_q":  # HQQ
        return module.dequantize(), True  # type: ignore[operator]
    if tensor.is_floating_point() and tensor.element_size() == 1:
        return _of_float8(module, tensor), True
    return (tensor, False) if tensor.is_floating_point() else (None, True)


@torch.no_grad()
def copy_weights(source: nn.Module, target: nn.Module) -> None:
    """Weights and buffers of `target`, a plain model, become those of the same name in `source`, without adapters.

    Where `target` has fewer layers, a weight that has a part for every layer is cut to the first parts.

    Raises:
        ValueError: `source` lacks one or has it in another shape, or it cannot be read.
    """
    given = {weight.name: weight for weight in named_weights(source, adapters=False)}
    for own in named_weights(target):
        there = own.name in given
        found = given[own.name].read()[0] if there else None
        if found is not None and found.ndim == own.raw.ndim:
            found = found[tuple(slice(size) for size in own.raw.shape)]
        if found is None or found.shape != own.raw.shape:
            what = "is not there" if not there else "is packed in a way that is not known, or not loaded"
            if found is not None:
                what = f"is {list(found.shape)}, and would be {list(own.raw.shape)}"
            raise ValueError(f"its {own.name} {what}")
        own.raw.data.copy_(found)
    # Other buffers are made anew by the class; those that were changed since are not those of it.
    buffers = {canonical(name): buffer for name, buffer in source.named_buffers()}
    for name, buffer in target.named_buffers():
        kept = buffers.get(name)
        if name not in given and kept is not None and kept.shape == buffer.shape and kept.device.type != "meta":
            buffer.data.copy_(kept)


def execution_device(layer: nn.Module) -> torch.device:
    """The device that a layer computes on, also while its weights are offloaded."""
    for module in layer.modules():
        for hook in _hooks(module):
            device = getattr(hook, "execution_device", None)
            if device is not None:
                return torch.device(device)
    return next(parameter.device for parameter in layer.parameters())


def canonical(name: str) -> str:
    """A module's name without what torch.compile and the like put into it."""
    return ".".join(part for part in name.split(".") if part not in _SEE_THROUGH)


def _walk(module: nn.Module, prefix: str, adapters: bool, changes: tuple[Any, ...]) -> Iterator[Weight]:
    inner = _inside(module)
    if inner is not None:
        for name in _soft_prompts(module) if adapters else ():
            encoder: Any = module.prompt_encoder
            yield from _walk(encoder[name], f"{prefix}prompt_encoder.", False, ())
        yield from _walk(inner, prefix, adapters, changes)
    elif isinstance(module, TrainableTokensWrapper):
        yield from _walk(module.token_adapter, prefix, adapters, changes)
    elif isinstance(module, AuxiliaryTrainingWrapper):
        names = _taking_part(module) if adapters else []
        if isinstance(module, ModulesToSaveWrapper):
            module = module.modules_to_save[names[0]] if names else module.original_module
            yield from _walk(module, prefix, adapters, changes)
        else:
            yield from _walk(module.original_module, prefix, adapters, changes)
            yield from _adapter_weights(module, prefix, names)
    elif isinstance(module, BaseTunerLayer):
        yield from _tuned(module, prefix, adapters, changes)
    else:
        yield from _own(module, prefix, changes)
        for name, child in module.named_children():
            yield from _walk(child, f"{prefix}{name}.", adapters, ())


def _own(module: nn.Module, prefix: str, changes: tuple[Any, ...]) -> Iterator[Weight]:
    """A module's own tensors. `changes` are to its weight, or to the only parameter that they name."""
    packed = {"W_q", "qweight", "weight_packed"} & {*module._parameters, *module._buffers}
    if packed:  # HQQ, GPTQ, AWQ, compressed-tensors
        yield Weight(f"{prefix}weight", module, next(iter(packed)), tuple(change for _, change in changes))
    for name, parameter in module._parameters.items():
        if parameter is not None and name not in _SCALES and not packed:
            mine = tuple(change for target, change in changes if target == name)
            yield Weight(prefix + name, module, name, mine)
    for name, buffer in module._buffers.items():
        if buffer is None or name in module._non_persistent_buffers_set:
            continue
        if buffer.is_floating_point() and name not in _SCALES and not packed:
            yield Weight(prefix + name, module, name, is_parameter=False)


def _tuned(module: Any, prefix: str, adapters: bool, changes: tuple[Any, ...]) -> Iterator[Weight]:
    """What an adapted layer computes with: its base layer's weights, changed by the adapters that take part."""
    wanted = _taking_part(module) if adapters else []
    merged = list(module.merged_adapters)
    added = [name for name in wanted if name not in merged]
    removed = [name for name in merged if name not in wanted]
    target = getattr(module, "parameter_name", "weight")
    separate = [name for name in [*added, *removed] if not _adds_up(module, name)]
    for name in added:
        if name not in separate:
            changes = (*changes, (target, lambda weight, name=name: weight + _delta(module, name, weight)))
    for name in removed:
        if name not in separate:
            changes = (*changes, (target, lambda weight, name=name: weight - _delta(module, name, weight)))
    yield from _walk(module.base_layer, prefix, adapters, changes)
    yield from _adapter_weights(module, prefix, [name for name in separate if name in added])


def _adds_up(module: nn.Module, adapter: str) -> bool:
    """Whether an adapter does no more than add to a weight."""
    if not isinstance(module, LoraLayer) or not hasattr(module, "get_delta_weight"):
        return False
    if getattr(module, "lora_variant", {}).get(adapter) is not None or getattr(module, "lora_bias", {}).get(adapter):
        return False
    return not getattr(module, "use_dora", {}).get(adapter, False)


def _delta(module: Any, adapter: str, weight: Tensor) -> Tensor:
    return module.get_delta_weight(adapter).detach().to(weight)  # type: ignore[no-any-return]


def _adapter_weights(module: nn.Module, prefix: str, adapters: Sequence[str]) -> Iterator[Weight]:
    """The tensors of adapters that do something else than adding to a weight."""
    for number, adapter in enumerate(adapters):
        for kind in (*module.adapter_layer_names, *module.other_param_names):  # type: ignore[misc]
            group: Any = module
            for part in kind.split("."):
                group = getattr(group, part, None)
            if not isinstance(group, nn.ModuleDict | nn.ParameterDict) or adapter not in group:
                continue
            name = f"{prefix}{kind}.{number}"
            if isinstance(group, nn.ParameterDict):
                yield Weight(name, group, adapter)
            else:
                yield from _walk(group[adapter], f"{name}.", False, ())


def _taking_part(module: Any) -> list[str]:
    """The adapters of a layer that change what it computes."""
    if module.disable_adapters:
        return []
    if isinstance(module, BaseTunerLayer):
        there = module._get_available_adapters()
        return list(module.merged_adapters or [name for name in module.active_adapters if name in there])
    if all(name in module._adapters for name in module.active_adapters):
        return list(module.active_adapters)
    return []


def _soft_prompts(model: Any) -> list[str]:
    """The soft prompts that a PEFT model puts before its input."""
    if not isinstance(model, PeftModel) or not model.active_peft_config.is_prompt_learning:
        return []
    return [] if getattr(model, "_adapters_disabled", False) else [model.active_adapter]


def _inside(module: nn.Module) -> nn.Module | None:
    """What a wrapper stands around."""
    for name in _SEE_THROUGH:
        if name in module._modules:
            return module._modules[name]
    if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return module.module  # type: ignore[no-any-return]
    return module.get_base_model() if isinstance(module, PeftModel) else None


def _hooks(module: nn.Module) -> list[Any]:
    """accelerate's hooks on a module."""
    hook = getattr(module, "_hf_hook", None)
    return [] if hook is None else list(getattr(hook, "hooks", [hook]))


def _offloaded(module: nn.Module, attribute: str) -> Tensor | None:
    """A weight that accelerate keeps elsewhere while it is not needed."""
    for hook in _hooks(module):
        kept = getattr(hook, "weights_map", None)
        if kept is not None:
            try:
                return kept[attribute]  # type: ignore[no-any-return]
            except KeyError:
                continue
    return None


def _of_bitsandbytes(module: Any, weight: Any, data: Tensor) -> Tensor | None:
    """The values of a weight of bitsandbytes, before and after its first forward, which packs it anew."""
    import bitsandbytes

    if type(weight).__name__ == "Params4bit":
        state = weight.quant_state
        if state is None:
            return data if data.is_floating_point() else None
        if getattr(state, "packing_format_for_cpu", False):
            from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

            data, state = _convert_weight_packed_for_cpu_inverse(data, copy.copy(state))
        return bitsandbytes.functional.dequantize_4bit(data, state)  # type: ignore[no-any-return]
    scales = weight.SCB if weight.SCB is not None else module.state.SCB
    if scales is None:
        return data if data.is_floating_point() else None
    return data.float() * scales.view(-1, 1).to(data.device) / 127


def _of_float8(module: nn.Module, weight: Tensor) -> Tensor | None:
    """The values of a weight in float8 with a scale for each block, as transformers has them."""
    scale: Any = getattr(module, "weight_scale_inv", None)
    if scale is None:
        return weight.float()
    if scale.ndim == 2:
        rows, columns = (-(-n // m) for n, m in zip(weight.shape, scale.shape, strict=True))
        scale = scale.repeat_interleave(rows, 0)[: weight.shape[0]].repeat_interleave(columns, 1)[:, : weight.shape[1]]
    return weight.float() * scale.float()
