"""What all repositories of adapters have in common: the settings that they take, and tensors that must be complete."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .loading import HUB_ARGUMENTS

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
