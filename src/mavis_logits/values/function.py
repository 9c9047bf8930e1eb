"""What every value function is to those who read values: value models, value models run as one, and value heads."""

from __future__ import annotations

import inspect
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class ValueFunction(Protocol):
    """V_m(s + a) of candidate tokens a after texts s, for one or more objectives m.

    Attributes:
        reads: what it is given: "states", the base model's hidden states after `config.layer` of its layers, [R, d],
            with candidates [R, k] or None for all tokens; "tokens", which it reads by itself, with a cache
            (`scoring.scorer`).
        config: its `objectives`, and what it needs of a base model (`backbone.needs`).
    """

    reads: Literal["states", "tokens"]
    config: Any

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        ...

    @property
    def units(self) -> Tensor:
        """Mean and scale of the rewards that it was trained on, and what counts as one in a tilt, [3, M] on the CPU."""
        ...

    def refresh(self, thorough: bool = True) -> None:
        """Notice weights that have been changed behind its back.

        Args:
            thorough: look closely, which waits for the device: where a text begins.

        Raises:
            ValueError: it cannot follow such a change.
        """
        ...


def is_value_function(thing: Any) -> bool:
    """Whether `thing` has what a `ValueFunction` has. Nothing is computed: one that waits for its base model, to have a
    device, is one too."""
    names = ("reads", "config", "device", "units", "refresh")
    return all(inspect.getattr_static(thing, name, None) is not None for name in names)
