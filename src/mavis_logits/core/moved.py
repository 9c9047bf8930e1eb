"""Modules under the names that they had before: files on the Hub and people's code import them.

A name goes from these tables with the first release in which nothing that was published before imports it;
`mavis_logits.hub.remote` stays, since every `custom_generate/generate.py` on the Hub imports it, and so does
`mavis_logits.pipeline`, which users import to register the task.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType

# Of this package.
MOVED = {
    "config": "core.config",
    "tilting": "core.tilting",
    "objectives": "core.objectives",
    "holds": "core.holds",
    "demo.chat": "core.chat",
    "cache": "backbone.cache",
    "attention": "backbone.attention",
    "hidden": "backbone.hidden",
    "hooks": "backbone.hooks",
    "fingerprint": "backbone.fingerprint",
    "watch": "backbone.watch",
    "needs": "backbone.needs",
    "loading": "hub.files",
    "bundle": "hub.bundle",
    "value_model_config": "values.value_model_config",
    "checkpoints": "values.checkpoints",
    "adapters": "values.adapters",
    "value_model": "values.value_model",
    "value_head": "values.value_head",
    "fused": "values.fused",
    "functions": "values.ensemble",
    "scorer": "scoring.scorer",
    "rows": "scoring.rows",
    "step": "steering.step",
    "trace": "steering.trace",
    "trace_html": "steering.trace_html",
    "copies": "steering.copies",
    "processor": "decoding.processor",
    "given": "decoding.given",
    "strategies.arguments": "decoding.strategies.arguments",
    "strategies.base": "decoding.strategies.base",
    "strategies.beam_search": "decoding.strategies.beam_search",
    "strategies.beams": "decoding.strategies.beams",
    "strategies.best_of_n": "decoding.strategies.best_of_n",
    "strategies.blockwise": "decoding.strategies.blockwise",
    "strategies.processors": "decoding.strategies.processors",
    "strategies.reader": "decoding.strategies.base_reader",
    "strategies.sampling": "decoding.strategies.sampling",
    "strategies.search": "decoding.strategies.search",
    "strategies.session": "decoding.strategies.session",
    "strategies.tree": "decoding.strategies.tree",
    "strategies.tree_search": "decoding.strategies.tree_search",
    "strategies.worst_case": "decoding.strategies.worst_case",
    "strategies": "decoding.strategies",
    "pipeline": "plugs.pipeline",
    "hub.remote": "plugs.custom_generate",
    "generate_command": "commands.generate",
    "doctor": "commands.doctor",
    "hub.commands": "commands.hub",
}


class _Moved:  # not by importlib.abc's classes, which take longer to import than all else here
    """Finds and loads the modules of a package under old names: the module itself, not a copy.

    Args:
        package: its name.
        places: new place within the package by old one.
    """

    def __init__(self, package: str, places: Mapping[str, str]) -> None:
        self.places = {f"{package}.{old}": f"{package}.{new}" for old, new in places.items()}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The module's spec, if it is one that has moved."""
        return ModuleSpec(fullname, self) if fullname in self.places else None  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """The module in its new place."""
        module = import_module(self.places[spec.name])
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """It has run. Importing has given it the old name's spec: it gets its own back."""
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state


def moved(package: str, places: Mapping[str, str]) -> None:
    """Let modules of a package be imported under old names, too."""
    sys.meta_path.insert(0, _Moved(package, places))  # before what would find a moved package's files anew
