"""Whether a model still computes what it did: its states may be cached only for as long as it does."""

from __future__ import annotations

import weakref
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn

_SAMPLES = 32  # elements of a tensor that are compared


class Watch:
    """Remembers what a model is made of, and tells when that has changed. It keeps none of it alive.

    Noticed at every look are autocast, adapters switched, and tensors changed in place, cast or moved. A thorough look
    compares samples of all tensors, and so finds changes behind autograd's back (through `weight.data`, or of weights
    that came into being under `inference_mode`), and replaced modules and parameters.

    Args:
        model: what to watch.
        autocast: whether to mind it.
    """

    def __init__(self, model: nn.Module, autocast: bool = True) -> None:
        self._model = weakref.ref(model)
        self._minds_autocast = autocast
        tensors, adapted = _parts(model)
        self._tensors = [weakref.ref(tensor) for tensor in tensors]
        self._counting = [weakref.ref(tensor) for tensor in tensors if not tensor.is_inference()]
        self._adapted = [weakref.ref(layer) for layer in adapted]
        self._state, self._all = self._quick(), _samples(tensors)

    def changed(self, thorough: bool = True) -> bool:
        """Whether the model is another than at first; a `thorough` look waits for the device."""
        if self._quick() != self._state:
            return True
        model = self._model()
        if not thorough or model is None:
            return False
        tensors, _ = _parts(model)
        same = len(tensors) == len(self._tensors) and all(a is b() for a, b in zip(tensors, self._tensors, strict=True))
        return not same or not _equal(_samples(tensors), self._all)

    def _quick(self) -> tuple[Any, ...]:
        ends = _present([*self._tensors[:1], *self._tensors[-1:]])
        kind = ends[0].device.type if ends else "cpu"
        casts = self._minds_autocast and kind != "meta" and torch.is_autocast_enabled(kind)
        counting = _present(self._counting)
        return (
            sum([tensor._version for tensor in counting]),
            len(counting),
            torch.get_autocast_dtype(kind) if casts else None,
            [(end.dtype, end.device) for end in ends],
            [_adapters(layer) for layer in _present(self._adapted)],
        )


def _present(references: list[weakref.ref[Any]]) -> list[Any]:
    return [found for reference in references if (found := reference()) is not None]


def _parts(model: nn.Module) -> tuple[list[Tensor], list[nn.Module]]:
    """All parameters and buffers, and the layers that PEFT has put adapters on."""
    tensors, adapted = [], []
    for module in model.modules():
        own = vars(module)
        tensors += [tensor for tensor in own["_parameters"].values() if tensor is not None]
        tensors += [tensor for tensor in own["_buffers"].values() if tensor is not None]
        if "_active_adapter" in own:
            adapted.append(module)
    return tensors, adapted


def _adapters(layer: nn.Module) -> tuple[Any, ...]:
    """Which adapters of a layer are active, and what they are multiplied by."""
    own = vars(layer)
    return copy(own["_active_adapter"]), own.get("_disable_adapters"), tuple(own.get("scaling", {}).values())


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
