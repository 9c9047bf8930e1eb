"""What all adapters have in common: settings, tensors that must be complete, and folding that must change nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..hub.files import HUB_ARGUMENTS

_ADAPTER_ARGUMENTS = (
    *HUB_ARGUMENTS, "dtype", "torch_dtype", "attn_implementation", "device_map", "trust_remote_code", "use_safetensors",
    "low_cpu_mem_usage", "config", "adapter_kwargs",
)  # fmt: skip


def adapter_settings(name: str, kwargs: Mapping[str, Any]) -> tuple[torch.dtype | None, str | None, Any]:
    """dtype, kind of attention and device for the backbone of an adapter; None for each that is not given.

    Raises:
        ValueError: an argument that an adapter repo does not take.
    """
    for key, value in kwargs.items():
        if key not in _ADAPTER_ARGUMENTS and value is not None:
            raise ValueError(
                f"{name} is an adapter repo, which is read without {key}: ValueModel.from_pretrained({name!r})"
                f".save_pretrained(FOLDER) makes a whole value model of it; give {key} when you load that"
            )
    dtype = kwargs.get("dtype", kwargs.get("torch_dtype"))
    if isinstance(dtype, str):
        named = None if dtype == "auto" else getattr(torch, dtype, None)
        if dtype != "auto" and not isinstance(named, torch.dtype):
            raise ValueError(f"dtype must be a torch.dtype, the name of one or 'auto', got {dtype!r}")
        dtype = named
    return dtype, kwargs.get("attn_implementation"), _one_device(name, kwargs.get("device_map"))


def _one_device(name: str, device_map: Any) -> Any:
    """The device that a `device_map` means for a small model; None for where it is."""
    if isinstance(device_map, Mapping):
        if list(device_map) != [""]:
            raise ValueError(f"{name} is an adapter repo, which is put on one device: got device_map={device_map!r}")
        return device_map[""]
    if device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
        return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return device_map


def put_on(peft: PeftModel, folder: Path | str, found: Mapping[str, Tensor]) -> None:
    """Give an adapter its tensors, by the names under which PEFT saves them.

    Raises:
        OSError, ValueError: as `check_tensors`.
    """
    check_tensors(folder, found, get_peft_model_state_dict(peft, save_embedding_layers=False))  # type: ignore[arg-type]
    set_peft_model_state_dict(peft, dict(found))  # type: ignore[arg-type]
    # PEFT renames tensors after conversions of transformers' weights, and drops in silence those that it renames in
    # vain: what has not arrived is put into its place.
    with torch.no_grad():
        for name, place in get_peft_model_state_dict(peft, save_embedding_layers=False).items():  # type: ignore[arg-type]
            if not torch.equal(place, found[name].to(place)):
                place.copy_(found[name])


@torch.no_grad()
def fold(peft: PeftModel, run: Callable[[], Tensor]) -> nn.Module:
    """The model with its adapter folded into the weights, if it computes the same then.

    Some models use the weight of a layer without running the layer (the projections of Mamba's step sizes): there an
    adapter has no effect while it is apart, in training too, and would have one once it is folded.

    Args:
        peft: the model; after an error it is as it was.
        run: what is computed with it, for a short text.

    Raises:
        ValueError: folding would change what it computes.
    """
    layers = [module for module in peft.modules() if isinstance(module, BaseTunerLayer)]
    before = [(p, p.detach().cpu().clone()) for layer in layers for p in layer.get_base_layer().parameters()]
    apart = run().float()
    with peft.disable_adapter():
        without = run().float()
    peft.merge_adapter()  # type: ignore[operator]
    folded = run().float()
    rounding = 8 * torch.finfo(next(peft.parameters()).dtype).eps * float(apart.abs().max())
    error, effect = float((folded - apart).abs().max()), float((apart - without).abs().max())
    if not error <= 0.02 * effect + rounding:
        peft.unmerge_adapter()  # type: ignore[operator]
        for parameter, value in before:
            parameter.copy_(value)
        raise ValueError(
            f"the adapter cannot be folded into the weights: that would change what the model computes by {error:.2g}, "
            f"where the adapter itself changes {effect:.2g}. The model uses weights of layers with an adapter in other "
            "ways than by running them: leave those out of target_modules, or use the adapter unmerged (merge=False)"
        )
    return peft.unload()  # type: ignore[operator, no-any-return]


def folded(peft: PeftModel, vocabulary: int) -> nn.Module:
    """`fold` by the logits of a causal model or classifier.

    Raises:
        ValueError: as `fold`.
    """
    ids = some_ids(vocabulary, peft.device)  # one row, so that no padding matters
    mode = peft.training
    peft.eval()
    try:
        return fold(peft, lambda: peft(input_ids=ids).logits)
    finally:
        peft.train(mode)


def some_ids(vocabulary: int, device: torch.device) -> Tensor:
    """[1, 8] token ids to try a model with."""
    return (torch.arange(1, 9, device=device) * 7919 % vocabulary)[None]


def check_tensors(folder: Path | str, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Refuse tensors of an adapter or head that are too few, too many or of another shape.

    Raises:
        OSError: some are lost.
        ValueError: there is no place for some, or another one.
    """
    misshaped = [name for name in sorted(found.keys() & expected.keys()) if found[name].shape != expected[name].shape]
    if misshaped:
        name = misshaped[0]
        raise ValueError(
            f"the adapter in {folder} does not fit the backbone given: {name} is {list(found[name].shape)}, expected "
            f"{list(expected[name].shape)}"
        )
    extra = sorted(name for name in found.keys() - expected.keys() if ".base_layer." not in name)
    if extra:
        raise ValueError(f"the adapter in {folder} does not fit the backbone given: it has no {extra[0]}")
    lost = sorted(expected.keys() - found.keys())
    if lost:
        raise OSError(f"{folder} lacks {len(lost)} weights, {lost[0]} among them: download or save it again")
