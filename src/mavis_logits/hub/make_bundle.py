"""Writing a bundle: folders are copied into it, repositories are named in it and pinned."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from ..core.config import MavisConfig, recommended, settled
from .bundle import BUNDLE_FILE, Bundle, BundleEntry
from .cards import CARD, render_bundle_card
from .files import Source, find_file, hub_errors, read_json
from .publish import bundle_details, checked_files
from .quality import require_foresight


def make_bundle(
    folder: str | Path,
    value_functions: Sequence[str] | Mapping[str, str],
    config: MavisConfig | Mapping[str, Any] | None = None,
    base_model: str | None = None,
    *,
    token: str | bool | None = None,
    allow_weak: bool = False,
) -> Path:
    """Write a bundle into a new folder, which appears when it is whole.

    Args:
        folder: must not exist.
        value_functions: folders and Hub ids, `org/name` or `org/name@revision`; by objective, or in a list to stand
            under all the objectives that their configs name.
        config: default settings, or those of them that differ from what the value functions recommend.
        base_model: Hub id of the language model; by default the one that the value functions name, if they agree.
        token: for private repositories.
        allow_weak: take folders also whose metrics say that they foresee nothing.

    Returns:
        `folder`.

    Raises:
        ValueError: something that is no value function, one that foresees nothing, an objective twice or unknown, or
            weights for absent ones.
        OSError: `folder` exists, or a value function is missing, damaged or not to be had from the Hub.
    """
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"{folder} exists: give the name of a folder that is to be made")
    pairs = value_functions.items() if isinstance(value_functions, Mapping) else ((None, v) for v in value_functions)
    entries: dict[str, BundleEntry] = {}
    copies: dict[str, Path] = {}
    bases: list[str | None] = []
    settings: list[Mapping[str, Any]] = []
    for objective, given in pairs:
        entry, values = _local(Path(given), copies) if Path(given).is_dir() else _remote(given, token)
        if not allow_weak and Path(given).is_dir():
            require_foresight(Path(given))
        bases.append(values.get("base_model"))
        settings.append(values.get("settings") or {})
        for name in _objectives(given, values, objective):
            if name in entries:
                raise ValueError(f"several value functions predict {name!r}: name them, as in kind={given}")
            entries[name] = entry
    if base_model is None and len(set(bases)) == 1:
        base_model = bases[0]
    if not isinstance(config, MavisConfig):
        config = settled(recommended(settings), config or {})
    bundle = Bundle(entries, config, base_model)

    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        unfinished = Path(temporary) / "bundle"
        unfinished.mkdir()
        for subfolder, source in copies.items():
            for inside, path in checked_files(source, goes_out=False).items():
                target = unfinished / subfolder / inside
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)
        (unfinished / BUNDLE_FILE).write_text(bundle.to_json(), encoding="utf-8")
        card = render_bundle_card(folder.resolve().name, bundle, bundle_details(unfinished, bundle))
        (unfinished / CARD).write_text(card, encoding="utf-8")
        unfinished.rename(folder)
    return folder


def _local(source: Path, copies: dict[str, Path]) -> tuple[BundleEntry, dict[str, Any]]:
    """The entry of a folder that is to be copied, and its config."""
    checked_files(source, goes_out=False)
    same = [name for name, path in copies.items() if path.resolve() == source.resolve()]
    subfolder = same[0] if same else source.resolve().name
    if not same and subfolder in copies:
        raise ValueError(f"two folders are called {subfolder!r}, and both go into the bundle: rename one of them")
    copies[subfolder] = source
    return BundleEntry(subfolder=subfolder), read_json(source / "config.json")


def _remote(given: str, token: str | bool | None) -> tuple[BundleEntry, dict[str, Any]]:
    """The entry of a Hub repository, pinned to the commit that it is at, and its config."""
    name, _, revision = given.partition("@")
    source = Source(name, revision or None)
    hub = source.arguments({} if token is None else {"token": token})
    with hub_errors(name, hub):
        commit = HfApi(token=token, library_name="mavis-logits").model_info(name, revision=source.revision).sha
    path = find_file(name, "config.json", hub | {"revision": commit})
    if path is None and find_file(name, "adapter_config.json", hub | {"revision": commit}) is None:
        raise ValueError(f"{given} holds no value function: there is neither a config.json nor an adapter_config.json")
    return BundleEntry(repo=name, revision=commit), read_json(path) if path is not None else {}


def _objectives(given: str, config: Mapping[str, Any], objective: str | None) -> list[str]:
    """The names under which a value function stands in the bundle."""
    own = config.get("objectives")
    if objective is None:
        if not own:
            raise ValueError(f"{given} does not name its objectives: name one, as in helpful={given}")
        return list(own)
    if own and len(own) > 1 and objective not in own:
        raise ValueError(f"{objective!r} is none of the objectives {own} of {given}: use these names")
    return [objective]
