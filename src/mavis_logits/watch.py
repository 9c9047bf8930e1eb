"""Whether a model still computes what it did: its states may be cached only for as long as it does."""

from __future__ import annotations

import weakref
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn

_SAMPLES = 32  # elements of every tensor that are compared


class Watch:
    """Remembers what a model is made of, and tells when that has changed. It keeps none of it alive.

    Noticed at every look are autocast coming or going, and tensors changed in place, cast or moved; at a thorough one
    also those changed behind autograd's back (`weight.data`, or weights that came into being under `inference_mode`, of
    which a sample is compared), replaced modules and parameters, and adapters that were switched.

    Args:
        model: what to watch.
        autocast: whether to mind it.
    """

    def __init__(self, model: nn.Module, autocast: bool = True) -> None:
        self._model = weakref.ref(model)
        self._minds_autocast = autocast
        tensors, self._adapters = _parts(model)
        self._tensors = [weakref.ref(tensor) for tensor in tensors]
        self._counting = [weakref.ref(tensor) for tensor in tensors if not tensor.is_inference()]
        self._state = self._quick()
        self._samples = _samples(tensors)

    def changed(self, thorough: bool = True) -> bool:
        """Whether the model is another than at first. A thorough look waits for the device."""
        if self._quick() != self._state:
            return True
        model = self._model()
        if not thorough or model is None:
            return False
        tensors, adapters = _parts(model)
        same = len(tensors) == len(self._tensors) and all(a is b() for a, b in zip(tensors, self._tensors, strict=True))
        return not same or adapters != self._adapters or not _equal(_samples(tensors), self._samples)

    def _quick(self) -> tuple[Any, ...] | None:
        try:
            versions = sum([reference()._version for reference in self._counting])  # type: ignore[union-attr]
        except AttributeError:  # one is gone
            return None
        ends = [reference() for reference in (*self._tensors[:1], *self._tensors[-1:])]
        kind = ends[0].device.type if ends else "cpu"  # type: ignore[union-attr]
        casts = self._minds_autocast and kind != "meta" and torch.is_autocast_enabled(kind)
        autocast = torch.get_autocast_dtype(kind) if casts else None
        return versions, autocast, [(end.dtype, end.device) for end in ends]  # type: ignore[union-attr]


def _parts(model: nn.Module) -> tuple[list[Tensor], list[Any]]:
    """All parameters and buffers; and of PEFT's layers which adapters are active, and what they are multiplied by."""
    tensors, adapters = [], []
    for module in model.modules():
        own = vars(module)
        tensors += [tensor for tensor in own["_parameters"].values() if tensor is not None]
        tensors += [tensor for tensor in own["_buffers"].values() if tensor is not None]
        if "_active_adapter" in own:
            adapters.append((copy(own["_active_adapter"]), own.get("_disable_adapters"), dict(own.get("scaling", {}))))
    return tensors, adapters


@torch.inference_mode(False)
@torch.no_grad()
def _samples(tensors: list[Tensor]) -> dict[Any, Tensor]:
    """A few elements of every plain tensor, by dtype and device."""
    found: dict[Any, list[Tensor]] = {}
    for tensor in tensors:
        # Quantised ones of other classes have no elements to be taken out; they are not changed in place either.
        if type(tensor) in (Tensor, nn.Parameter) and tensor.device.type != "meta" and tensor.is_contiguous():
            count = tensor.numel()
            step = max(1, count // _SAMPLES)
            part = tensor.as_strided((min(count, _SAMPLES),), (step,))
            found.setdefault((tensor.dtype, tensor.device), []).append(part)
    return {kind: torch.cat(parts) for kind, parts in found.items()}


def _equal(one: dict[Any, Tensor], other: dict[Any, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[kind], other[kind]) for kind in one)
