"""`model.generate(custom_generate="org/bundle", trust_remote_code=True)`: what a bundle's `custom_generate/` holds.

It is thin: the repository's name, and a call of `steered_generate` below. transformers hands a Hub-hosted `generate`
everything that the caller gave, with `model` in place of `self`, but not the repository's id.
"""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from ..core.config import MavisConfig
from ..hub.files import hub_arguments

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..decoding.strategies import MavisSampling

_PREFIX = "mavis_"
_HUB = ("revision", "token", "cache_dir", "local_files_only", "force_download", "code_revision", "proxies")
_strategies: WeakKeyDictionary[Any, dict[Any, Any]] = WeakKeyDictionary()


def steered_generate(model: PreTrainedModel, repository: str, file: str, **arguments: Any) -> Any:
    """`model.generate(**arguments)`, steered by the bundle in `repository`.

    Args:
        model: the language model.
        repository: Hub id of the bundle.
        file: path of the `generate.py` that calls; in the cache of transformers it bears the commit, and the bundle is
            read from the same one.
        arguments: of `generate`. `mavis_weights`, `mavis_beta` and every field of `MavisConfig` after `mavis_` override
            the bundle's settings; `mavis_bundle` names another bundle, for copies of the code. `token`, `cache_dir` and
            `local_files_only` serve to load it. The value functions are loaded by the first call with a model.

    Returns:
        What `generate` returns.

    Raises:
        ValueError, OSError: as for `MavisSampling.from_pretrained`.
    """
    settings = {key.removeprefix(_PREFIX): arguments.pop(key) for key in list(arguments) if key.startswith(_PREFIX)}
    hub = {key: arguments.pop(key) for key in _HUB if key in arguments}
    bundle = settings.pop("bundle", None)
    commit = Path(file).parents[1].name
    if bundle is None:
        bundle = repository
        hub["revision"] = commit if re.fullmatch("[0-9a-f]{40}", commit) else hub.get("revision")
    strategy = copy.copy(_loaded(model, str(bundle), hub_arguments(hub)))
    strategy.reset()
    for name in ("weights", "beta"):
        if settings.get(name) is not None:
            setattr(strategy, name, settings[name])
        settings.pop(name, None)
    strategy.config = MavisConfig.from_dict({**vars(strategy.config), **settings})
    for name in ("streamer", "tokenizer", "stop_strings"):  # generate does not pass these on to a strategy
        setattr(strategy, name, arguments.pop(name, None))
    if strategy.stop_strings is not None and strategy.tokenizer is None:
        raise ValueError("stop_strings need the tokenizer: pass tokenizer= to generate")
    return model.generate(custom_generate=strategy, **arguments)  # type: ignore[operator]


def _loaded(model: PreTrainedModel, bundle: str, hub: dict[str, Any]) -> MavisSampling:
    """The strategy for a model and a bundle, loaded once."""
    from ..decoding.strategies import MavisSampling

    kept = _strategies.setdefault(model, {})
    key = (bundle, *(str(hub.get(name)) for name in ("revision", "cache_dir")))
    if key not in kept:
        kept[key] = MavisSampling.from_pretrained(bundle, model=model, load=hub)
    return kept[key]
