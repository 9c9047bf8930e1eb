"""Keyword arguments that many classes take: written down once, checked by name, and shown by `help`."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from types import FunctionType
from typing import TYPE_CHECKING, Any, TypedDict

from ..core.config import MavisConfig, Unscored
from ..core.known import meant
from ..core.tilting import Normalization
from ..scoring.scorer import WantedReading
from .regions import Regions

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from transformers.generation.streamers import BaseStreamer


class Settings(TypedDict, total=False):
    """Fields of `MavisConfig` that may be given by name; `weights` and `beta` are arguments of their own."""

    top_k: int | None
    candidate_min_p: float | None
    normalize: Normalization
    unscored: Unscored
    kl_budget: float | None
    reference_temperature: float
    gap_floor: float


class SteeringOptions(Settings, total=False):
    """Keyword arguments of `Steering`."""

    objectives: Mapping[str, str] | None
    model: PreTrainedModel | None
    tokenizer: PreTrainedTokenizerBase | None
    pad_token_id: int | None
    eos_token_id: int | Iterable[int] | None
    trace: bool
    fuse: bool | None
    compile: bool
    reading: WantedReading
    regions: Regions | Sequence[Regions | None] | None
    config: MavisConfig | None


class StrategyOptions(SteeringOptions, total=False):
    """Keyword arguments of `MavisStrategy`."""

    streamer: BaseStreamer | None
    stop_strings: str | Sequence[str] | None


_DEFAULTS: dict[str, Any] = {field.name: field.default for field in fields(MavisConfig)} | {
    "trace": False,
    "compile": False,
    "reading": "auto",
}  # of all others: None


def signature(function: Callable[..., Any], others: Mapping[str, inspect.Parameter] | None = None) -> inspect.Signature:
    """That of `function`, with the options that its `**kwargs` stand for named one by one.

    Args:
        function: its `**kwargs` are annotated as `Unpack` of a `TypedDict`, or stand for `others`.
        others: parameters that `**kwargs` are handed on to.
    """
    own = inspect.signature(function)
    *_, last = own.parameters.values()
    if last.kind is not inspect.Parameter.VAR_KEYWORD:
        return own
    if others is None:
        options = _unpacked(function, last.annotation)
        if options is None:
            return own
        others = {
            name: inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=_DEFAULTS.get(name),
                annotation=getattr(annotation, "__forward_arg__", annotation),
            )
            for name, annotation in options.__annotations__.items()
        }
    named = {name: parameter for name, parameter in own.parameters.items() if name != last.name}
    added = [other.replace(kind=inspect.Parameter.KEYWORD_ONLY) for name, other in others.items() if name not in named]
    return own.replace(parameters=[*named.values(), *added])


class OfClass:
    """A class's `__signature__`, which its instances, being callable themselves, have not.

    Raises:
        AttributeError: it is looked for on an instance.
    """

    def __init__(self, signature: inspect.Signature) -> None:
        self._signature = signature

    def __get__(self, instance: object, owner: type) -> inspect.Signature:
        if instance is not None:
            raise AttributeError("__signature__")
        return self._signature


def shown(method: FunctionType, signature: inspect.Signature) -> FunctionType:
    """`method` again, to be shown by `help` with another signature."""
    twin = FunctionType(method.__code__, method.__globals__, method.__name__, method.__defaults__, method.__closure__)
    twin.__kwdefaults__, twin.__doc__, twin.__qualname__ = method.__kwdefaults__, method.__doc__, method.__qualname__
    twin.__annotations__, twin.__module__ = method.__annotations__, method.__module__
    twin.__signature__ = signature  # type: ignore[attr-defined]
    return twin


def require_known(owner: type, given: Iterable[str], known: Iterable[str]) -> None:
    """Raise `ValueError` if one of the keyword arguments `given` is not `known`; the nearest of `owner`'s is told."""
    for name in given:
        if name not in known:
            every = inspect.signature(owner).parameters
            raise ValueError(f"unknown setting {name!r} of {owner.__name__}; {meant(name, every)}")


def _unpacked(function: Callable[..., Any], annotation: Any) -> Any:
    """The `TypedDict` that `annotation`, as it is written, is an `Unpack` of; None if it is something else."""
    found = re.fullmatch(r"Unpack\[(\w+)\]", annotation) if isinstance(annotation, str) else None
    return None if found is None else inspect.unwrap(function).__globals__.get(found[1])  # type: ignore[attr-defined]
