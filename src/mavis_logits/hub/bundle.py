"""Bundles: several value functions with their default settings under one id.

A bundle is a folder or Hub repository with a file `mavis_bundle.json`:

    {
      "format_version": 1,
      "base_model": "org/chat-model",
      "value_functions": {
        "helpful": {"repo": "org/value-helpful", "revision": "0f3c..."},
        "humour": {"subfolder": "value-humour"}
      },
      "settings": {"weights": {"helpful": 0.7, "humour": 0.3}, "beta": 5.0}
    }

A value function lies in a repository of its own or in a subfolder of the bundle. One with several outputs stands under
each of its objectives, and is loaded once.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..core.config import MavisConfig
from ..core.known import meant
from .files import Source, check_inside, commit_of, find_file, hub_arguments, read_json

BUNDLE_FILE = "mavis_bundle.json"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class BundleEntry:
    """Where a bundle's value function lies.

    Attributes:
        repo: Hub id; None for the bundle itself.
        revision: of that repository.
        subfolder: of that repository, or of the bundle.
    """

    repo: str | None = None
    revision: str | None = None
    subfolder: str | None = None


@dataclass(frozen=True)
class Bundle:
    """What a bundle's file says.

    Attributes:
        value_functions: by objective.
        config: default settings.
        base_model: Hub id of the language model that the value functions were made for.

    Raises:
        ValueError: no value function, one in no place, paths that leave the bundle, ids that are none, or weights for
            objectives that the bundle does not have.
    """

    value_functions: Mapping[str, BundleEntry]
    config: MavisConfig = field(default_factory=MavisConfig)
    base_model: str | None = None

    def __post_init__(self) -> None:
        if not self.value_functions:
            raise ValueError("a bundle needs at least one value function, by objective")
        for objective, entry in self.value_functions.items():
            _check_entry(objective, entry)
        for objective in self.config.weights or {}:
            if objective not in self.value_functions:
                hint = meant(objective, self.value_functions, "")
                raise ValueError(
                    f"weights name the objective {objective!r}{hint and f' ({hint})'}; the bundle has "
                    f"value functions for {list(self.value_functions)}"
                )

    def to_json(self) -> str:
        """The text of the bundle's file; settings at their defaults are left out."""
        plain, defaults = asdict(self.config), asdict(MavisConfig())
        content = {
            "format_version": FORMAT_VERSION,
            "base_model": self.base_model,
            "value_functions": {name: _present(asdict(entry)) for name, entry in self.value_functions.items()},
            "settings": {key: value for key, value in plain.items() if value != defaults[key]},
        }
        return json.dumps(content, indent=2) + "\n"

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Bundle:
        """What `to_json` wrote.

        Raises:
            ValueError: a newer format, an unknown key (the message names the nearest known one) or a bad value.
        """
        version = content.get("format_version")
        if not isinstance(version, int) or isinstance(version, bool) or version < 1:
            raise ValueError(f"format_version must be a whole number of at least 1, got {version!r}")
        if version > FORMAT_VERSION:
            raise ValueError(
                f"this bundle has format {version}, but this mavis-logits reads formats up to {FORMAT_VERSION}: "
                "pip install -U mavis-logits"
            )
        _check_keys(content, ("format_version", "base_model", "value_functions", "settings"), "the bundle")
        given = content.get("value_functions")
        if not isinstance(given, Mapping):
            raise ValueError(f"value_functions must be an object by objective, got {type(given).__name__}")
        entries = {}
        for objective, entry in given.items():
            if not isinstance(entry, Mapping):
                raise ValueError(f"value function {objective!r} must be an object, got {entry!r}")
            _check_keys(entry, ("repo", "revision", "subfolder"), f"value function {objective!r}")
            entries[objective] = BundleEntry(**entry)
        base = content.get("base_model")
        if base is not None and not isinstance(base, str):
            raise ValueError(f"base_model must be a Hub id, got {base!r}")
        return cls(entries, MavisConfig.from_dict(content.get("settings") or {}), base)

    def sources(self, name: str, revision: str | None = None, subfolder: str | None = None) -> dict[str, Source]:
        """Where the value functions lie, by objective, for the bundle in the folder or repository `name`."""

        def source(entry: BundleEntry) -> Source:
            if entry.repo is not None:
                return Source(entry.repo, entry.revision, entry.subfolder)
            return Source(name, revision, "/".join(part for part in (subfolder, entry.subfolder) if part))

        return {objective: source(entry) for objective, entry in self.value_functions.items()}


def load_bundle(name: str | Path, **hub: Any) -> tuple[dict[str, Source], MavisConfig] | None:
    """The value functions and the settings that a bundle names.

    Args:
        name: Hub id or folder.
        hub: `revision`, `token`, `cache_dir`, `local_files_only`, `subfolder`, `force_download` as for transformers.

    Returns:
        Sources by objective, those in a Hub bundle itself pinned to the commit that its file was read from, and the
        default settings; None if there is no bundle in that place.

    Raises:
        OSError: no such repository or revision, no permission, no connection, or a file that is no JSON object.
        ValueError: an unknown key, a newer format, or another mistake in the file; the message names it.
    """
    read = read_bundle(name, **hub)
    if read is None:
        return None
    bundle, path = read
    subfolder = hub.get("subfolder")
    sources = bundle.sources(str(name), commit_of(path), subfolder)
    if Path(name).is_dir():
        for source in sources.values():
            _check_link(Path(name), source)
    return sources, bundle.config


def read_bundle(name: str | Path, **hub: Any) -> tuple[Bundle, Path] | None:
    """A bundle and the path of its file; None if there is none. Arguments and errors as for `load_bundle`."""
    path = find_file(str(name), BUNDLE_FILE, hub_arguments(hub))
    if path is None:
        return None
    try:
        return Bundle.from_dict(read_json(path)), path
    except ValueError as error:
        raise ValueError(f"{name}, {BUNDLE_FILE}: {error}") from error


def _check_entry(objective: Any, entry: BundleEntry) -> None:
    if not isinstance(objective, str) or not objective:
        raise ValueError(f"objectives must be named, got {objective!r}")
    for key, value in vars(entry).items():
        if value is not None and (not isinstance(value, str) or not value):
            raise ValueError(f"value function {objective!r}: {key} must be text, got {value!r}")
    if entry.repo is None and entry.subfolder is None:
        raise ValueError(f"value function {objective!r} needs a repo (a Hub id) or a subfolder of the bundle")
    if entry.repo is None and entry.revision is not None:
        raise ValueError(f"value function {objective!r} has a revision but no repo: a subfolder has the bundle's own")
    try:
        check_inside(entry.subfolder or "")
        if entry.repo is not None:
            validate_repo_id(entry.repo)
    except HFValidationError as error:
        raise ValueError(f"value function {objective!r}: {entry.repo!r} is no Hub id ({error})") from error
    except ValueError as error:
        raise ValueError(f"value function {objective!r}: {error}") from error


def _check_link(folder: Path, source: Source) -> None:
    """Refuse a subfolder that is a link to somewhere outside a bundle's folder."""
    if source.name == str(folder) and source.subfolder:
        real = (folder / source.subfolder).resolve()
        if not real.is_relative_to(folder.resolve()):
            raise ValueError(f"{folder / source.subfolder} is a link out of the bundle: put the files themselves there")


def _check_keys(content: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    for key in content:
        if key not in known:
            raise ValueError(f"{where} has the unknown key {key!r}; {meant(key, known)}")


def _present(content: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in content.items() if value is not None}
