"""What a setting of steered decoding is, and the processor or strategy that it stands for.

A setting is a mapping of fields of `MavisConfig` (what it does not say is as the value functions or their bundle
recommend, as everywhere), of `value_functions` where they are not those of all settings, of
`objectives` in words beside them, of `strategy` with that strategy's own arguments where it is not to be a logits
processor, and of what rivals of value functions are given (`rivals.decoding`). An empty one is the base model left
alone. In words, beta 1 over all candidates is a system prompt, measured like everything else.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mavis_logits import MavisConfig, MavisLogitsProcessor
from mavis_logits.core.known import meant
from mavis_logits.decoding import strategies
from mavis_logits.decoding.strategies import MavisSampling, MavisStrategy
from mavis_logits.steering.steering import Steering
from mavis_logits.values.loading import bundled, load_value_functions

from ..rivals.decoding import KEYS, Decoding

STRATEGIES: dict[str, type[MavisStrategy]] = {
    "sampling": MavisSampling,
    "beam_search": strategies.MavisBeamSearch,
    "best_of_n": strategies.MavisBestOfN,
    "blockwise": strategies.MavisBlockwise,
    "tree_search": strategies.MavisTreeSearch,
}
_RETURNED = "num_return_sequences"
OWN_FUNCTIONS = "value_functions"
_IN_WORDS = "objectives"
_NO_SETTINGS = {"reward_functions", "reward_weights", "reward_columns"}  # functions, and what goes with them


def check_setting(setting: Mapping[str, Any]) -> None:
    """Raise `ValueError` if `setting` names an unknown strategy or has an unknown key."""
    kind, config, own, returned = parts(setting)
    words = setting.get(_IN_WORDS, {})
    if not isinstance(words, Mapping) or not all(isinstance(x, str) and x.strip() for x in words.values()):
        raise ValueError(
            f"{_IN_WORDS} are instructions in words by name, such as {{joke: Answer with a joke.}}, got {words!r}"
        )
    decoding = Decoding.of(setting)
    if decoding is not None and kind is not None:
        raise ValueError(
            f"{', '.join(sorted(setting.keys() & set(KEYS)))} goes with the logits processor or with nothing that "
            "steers: leave strategy out"
        )
    if kind is None:
        MavisConfig.from_dict({**config, **own})  # everything must be a field of it
        if returned != 1:
            raise ValueError(f"{_RETURNED}={returned} needs a strategy that ranks what it writes: add strategy: ...")
        return
    MavisConfig.from_dict(config)
    own_ones = inspect.signature(kind).parameters.keys() - inspect.signature(MavisStrategy).parameters.keys()
    known = own_ones - _NO_SETTINGS
    for key in own:
        if key not in known:
            every = sorted(known | {field.name for field in fields(MavisConfig)} | {_RETURNED, _IN_WORDS})
            raise ValueError(f"the strategy {setting['strategy']!r} has no setting {key!r}: {meant(key, every)}")


def parts(setting: Mapping[str, Any]) -> tuple[type[MavisStrategy] | None, dict[str, Any], dict[str, Any], int]:
    """A setting as strategy (None: the processor), fields of `MavisConfig`, the strategy's own arguments, and n."""
    rest = {key: value for key, value in setting.items() if key not in (OWN_FUNCTIONS, _IN_WORDS, *KEYS)}
    name = rest.pop("strategy", None)
    if name is not None and name not in STRATEGIES:
        raise ValueError(f"unknown strategy {name!r}: expected one of {', '.join(STRATEGIES)}")
    returned = rest.pop(_RETURNED, 1)
    config = {field.name: rest.pop(field.name) for field in fields(MavisConfig) if field.name in rest}
    return STRATEGIES[name] if name is not None else None, config, rest, returned


def steerings(
    settings: Mapping[str, Mapping[str, Any]],
    value_functions: str | Mapping[str, str] | None,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    plain: bool = True,
) -> dict[str, Steering | None]:
    """A processor or strategy for every setting, None where nothing steers; value functions are loaded once.

    Args:
        settings: by name.
        value_functions: of those that name none of their own; None where all objectives are in words.
        model, tokenizer: of the base model.
        plain: whether the reference is the model's own distribution; at another temperature or nucleus a strategy
            stands in for the processor, which sees scores before these are applied.

    Raises:
        ValueError: an unknown objective, or settings that the strategy refuses.
    """
    loaded: dict[str, tuple[Any, MavisConfig | None]] = {}
    made: dict[str, Steering | None] = {}
    for name, setting in settings.items():
        kind, config, own, _ = parts(setting)
        rival = Decoding.of(setting) is not None  # then a processor sees what another temperature leaves
        if kind is None and not plain and not rival:
            kind, own = MavisSampling, {}
        common: dict[str, Any] = {"model": model, "tokenizer": tokenizer, **config}
        if _IN_WORDS in setting:
            common["objectives"] = setting[_IN_WORDS]
        if not setting.keys() - set(KEYS):
            made[name] = None
            continue
        source = setting.get(OWN_FUNCTIONS, value_functions)
        if str(source) not in loaded:
            sources, of_bundle = bundled(source, {})
            loaded[str(source)] = load_value_functions(sources, model, model.device, {}), of_bundle
        functions, common["config"] = loaded[str(source)]
        if kind is None or kind is MavisSampling:
            made[name] = (kind or MavisLogitsProcessor)(functions, **common, trace=True, **own)
        else:
            made[name] = kind(functions, **common, **own)
    return made
