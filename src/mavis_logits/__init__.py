"""Steer any Hugging Face language model at decode time between conflicting objectives (MAVIS).

A step of the method, Algorithm 2 of the paper, is `steering/policy.py`; docs/architecture.md shows who calls it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .core.moved import MOVED, moved

if TYPE_CHECKING:
    from .core.config import MavisConfig
    from .decoding.processor import MavisLogitsProcessor
    from .decoding.strategies import (
        MavisBeamSearch,
        MavisBestOfN,
        MavisBlockwise,
        MavisSampling,
        MavisTreeSearch,
    )
    from .decoding.strategies import (
        MavisOutput as MavisOutput,
    )
    from .decoding.strategies import (
        MavisStrategy as MavisStrategy,
    )
    from .values.value_head import ValueHead
    from .values.value_head import ValueHeadConfig as ValueHeadConfig
    from .values.value_model import ValueModel
    from .values.value_model import ValueModelConfig as ValueModelConfig
    from .values.value_model import ValueModelOutput as ValueModelOutput
    from .values.value_policy import ValuePolicy as ValuePolicy
    from .values.value_policy import ValuePolicyConfig as ValuePolicyConfig

_MODULES = {
    "MavisBeamSearch": "decoding.strategies",
    "MavisBestOfN": "decoding.strategies",
    "MavisBlockwise": "decoding.strategies",
    "MavisConfig": "core.config",
    "MavisLogitsProcessor": "decoding.processor",
    "MavisOutput": "decoding.strategies",
    "MavisSampling": "decoding.strategies",
    "MavisStrategy": "decoding.strategies",
    "MavisTreeSearch": "decoding.strategies",
    "ValueHead": "values.value_head",
    "ValueHeadConfig": "values.value_head",
    "ValueModel": "values.value_model",
    "ValueModelConfig": "values.value_model",
    "ValueModelOutput": "values.value_model",
    "ValuePolicy": "values.value_policy",
    "ValuePolicyConfig": "values.value_policy",
}
# What users need; the others are for whoever writes strategies or reads results, and can be had in the same way.
__all__ = [
    "MavisLogitsProcessor", "MavisSampling", "MavisBeamSearch", "MavisBestOfN", "MavisBlockwise", "MavisTreeSearch",
    "MavisConfig", "ValueModel", "ValueHead",
]  # fmt: skip
moved(__name__, MOVED)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(_MODULES)
