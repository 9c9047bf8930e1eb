"""Value functions by Hub id or folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..core.config import MavisConfig
from ..hub.bundle import load_bundle
from ..hub.files import Source, find_file, hub_arguments, read_json
from .checkpoints import Options
from .function import is_value_function
from .fused import fusable_groups
from .value_head import ValueHead, ValueHeadConfig
from .value_model import ValueModel
from .value_model_config import ValueModelConfig
from .value_policy import ValuePolicy, ValuePolicyConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def bundled(given: Any, loading: Mapping[str, Any]) -> tuple[Any, MavisConfig | None]:
    """What a single Hub id or folder stands for: a bundle's sources by objective and its settings, or its own source.

    Anything else is handed back, so that asking twice looks nothing up twice. Raises as `load_bundle`.
    """
    if not isinstance(given, str | Path):
        return given, None
    found = load_bundle(given, **loading)
    return (_source(given, loading), None) if found is None else found


def _source(name: Any, loading: Mapping[str, Any]) -> Source:
    return Source(str(name), loading.get("revision"), loading.get("subfolder"))


def load_value_functions(
    given: str | Path | Source | Sequence[Any] | Mapping[str, Any] | None,
    model: PreTrainedModel | None,
    device: torch.device | str | None,
    loading: Mapping[str, Any],
    fuse: bool | None = None,
) -> Any:
    """`given` with every Hub id or folder replaced by the loaded value function; each id is loaded once.

    A bundle, if it is all that is given, is replaced by its value functions by objective.

    LoRA adapters that can be fused with another are left unmerged, unless `fuse` is False; all others are merged.

    Raises:
        ValueError: a value head without its base model, something that is no value function, or a bundle among others.
        OSError: nothing there.
    """
    given, _ = bundled(given, loading)
    loaded: dict[Source, ValueModel | ValueHead | ValuePolicy] = {}

    def get(item: Any) -> Any:
        if is_value_function(item):
            return item
        source = item if isinstance(item, Source) else _source(item, loading)
        if source not in loaded:
            function = _load(source, model, loading, merge=fuse is False)
            loaded[source] = function.to(device) if device is not None else function  # type: ignore[arg-type]
        return loaded[source]

    found: Any
    if given is None:
        return None
    if isinstance(given, Mapping):
        found = {name: get(item) for name, item in given.items()}
    elif isinstance(given, Sequence):
        found = [get(item) for item in given]
    else:
        found = get(given)
    everything = found.values() if isinstance(found, Mapping) else found if isinstance(found, list) else [found]
    adapters = list(dict.fromkeys(f for f in everything if isinstance(f, ValueModel) and f.lora is not None))
    together = {model for group in fusable_groups(adapters) for model in group} if fuse is not False else set()
    for adapter in adapters:
        if adapter not in together and any(adapter is f for f in loaded.values()):
            adapter.merge_lora_if_exact()
    return found


def _load(
    source: Source, model: PreTrainedModel | None, loading: Mapping[str, Any], merge: bool
) -> ValueModel | ValueHead | ValuePolicy:
    name, arguments = source.name, source.arguments(loading)
    path = find_file(name, "config.json", hub_arguments(arguments))
    if path is None and (bundle := load_bundle(name, **arguments)) is not None:
        raise ValueError(
            f"{name} is a bundle of value functions, for {', '.join(bundle[0])}: give it alone, not among others, or "
            "the folder or repository of one of them"
        )
    config = read_json(path) if path is not None else {}  # ValueModel says what it expects in its place
    kind = config.get("model_type")
    if kind == ValueHeadConfig.model_type:
        if model is None:
            raise ValueError(f"{name} is a value head, which needs its base model's hidden states: pass model=")
        of_models = ("dtype", "torch_dtype", "attn_implementation", "quantization_config")
        return ValueHead.from_pretrained(name, **{k: v for k, v in arguments.items() if k not in of_models})
    if kind == ValuePolicyConfig.model_type:
        if model is None:
            raise ValueError(f"{name} is a policy tuned from its base model, on whose layers it lies: pass model=")
        return ValuePolicy.from_pretrained(name, model, **arguments)
    own = kind == ValueModelConfig.model_type
    return ValueModel.load(name, Options(base=model if own else None, merge=merge or not own), **arguments)
