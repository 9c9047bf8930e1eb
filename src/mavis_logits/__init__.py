"""Steer any Hugging Face language model at decode time between conflicting objectives (MAVIS)."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import MavisConfig
    from .processor import MavisLogitsProcessor
    from .strategies import (
        MavisBeamSearch,
        MavisBestOfN,
        MavisBlockwise,
        MavisOutput,
        MavisSampling,
        MavisStrategy,
        MavisTreeSearch,
    )
    from .value_head import ValueHead, ValueHeadConfig
    from .value_model import ValueModel, ValueModelConfig, ValueModelOutput

_MODULES = {
    "MavisBeamSearch": "strategies",
    "MavisBestOfN": "strategies",
    "MavisBlockwise": "strategies",
    "MavisConfig": "config",
    "MavisLogitsProcessor": "processor",
    "MavisOutput": "strategies",
    "MavisSampling": "strategies",
    "MavisStrategy": "strategies",
    "MavisTreeSearch": "strategies",
    "ValueHead": "value_head",
    "ValueHeadConfig": "value_head",
    "ValueModel": "value_model",
    "ValueModelConfig": "value_model",
    "ValueModelOutput": "value_model",
}
__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
