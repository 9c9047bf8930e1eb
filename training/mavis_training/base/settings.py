"""Settings given as plain mappings (a recipe, overrides within one) as the frozen dataclasses that commands read,
and what their names stand for."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar, Union, get_args, get_origin, get_type_hints

from jsonargparse import ArgumentError, ArgumentParser

from mavis_logits.core.known import meant

if TYPE_CHECKING:
    import torch

Config = TypeVar("Config")


def from_mapping(kind: type[Config], content: Mapping[str, Any], where: str) -> Config:
    """`content` as an instance of the dataclass `kind`, nested dataclasses too; types are checked.

    Args:
        kind: a dataclass.
        content: its fields by name; absent ones have their defaults.
        where: what the settings are, for errors, e.g. `"iterations[1].collect"`.

    Raises:
        ValueError: an unknown key (the message names the nearest known one), an ill-typed or refused value.
    """
    check_keys(content, kind, where)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind)
    try:
        values = parser.parse_object(dict(content)).as_dict()
        return kind(**nested(kind, values))
    except (ArgumentError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error


def torch_dtype(name: str) -> torch.dtype:
    """The dtype that the setting `dtype` names.

    Raises:
        ValueError: it names none.
    """
    import torch  # not before: not every command needs it

    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"dtype must name a torch dtype such as 'float32' or 'bfloat16', got {name!r}")
    return dtype


def check_sampling(temperature: float, top_p: float) -> None:
    """Raise `ValueError` for a temperature or a nucleus that nothing can be sampled at."""
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}")


def check_keys(content: Mapping[str, Any], kind: type, where: str) -> None:
    """Raise `ValueError` for a key that the dataclass `kind`, or one nested in it, does not have."""
    hints = get_type_hints(kind)
    for key, value in content.items():
        if key not in hints:
            raise ValueError(f"{where} has the unknown key {key!r}: {meant(key, names_of(kind))}")
        inner = _dataclass_in(hints[key])
        if inner is not None:
            for place, part in _mappings(value, f"{where}, {key}"):
                check_keys(part, inner, place)


def names_of(kind: type) -> list[str]:
    """Fields of a dataclass, its own before those of groups that it shares with others."""
    own = [name for owner in kind.__mro__ for name in vars(owner).get("__annotations__", {})]
    return list(dict.fromkeys(own))


def nested(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with the mappings for fields of a dataclass type (or lists of one, or one or None) as such."""
    hints = get_type_hints(kind)
    return {name: _instance(hints[name], value) for name, value in values.items()}


def _instance(hint: Any, value: Any) -> Any:
    inner = _dataclass_in(hint)
    if inner is None:
        return value
    if isinstance(value, list):
        return [_instance(inner, item) for item in value]
    return inner(**nested(inner, value)) if isinstance(value, Mapping) else value


def _dataclass_in(hint: Any) -> type | None:
    """The dataclass D of a field's type: D, D | None or list[D]; else None."""
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return hint
    inner = get_args(hint) if get_origin(hint) in (list, Union, types.UnionType) else ()
    return next((found for found in map(_dataclass_in, inner) if found is not None), None)


def _mappings(value: Any, place: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if isinstance(value, Mapping):
        yield place, value
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from _mappings(item, f"{place}[{i}]")
