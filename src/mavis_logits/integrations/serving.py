"""What a server steers by: which value functions, with which defaults and limits. Read from JSON, before weights are.

The process that admits requests knows objectives and limits from the value functions' configs alone (`Offer`); the one
that computes loads them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from ..core.config import MavisConfig, settled
from ..core.known import meant
from ..hub.files import Source
from ..steering.policy import Policy
from ..values.ensemble import ValueFunctions
from ..values.loading import bundled, load_value_functions
from ..values.value_head import ValueHeadConfig
from ..values.value_model_config import ValueModelConfig
from ..values.value_policy import ValuePolicyConfig

ENVIRONMENT = "MAVIS_SERVE"
DEFAULT_MAX_TOP_K = 1024
_KINDS = {ValueHeadConfig.model_type: "states", ValueModelConfig.model_type: "tokens"}


@dataclass(frozen=True)
class Serving:
    """The settings of a server.

    Attributes:
        values: a Hub id or folder (of a value function or a bundle), several, or a mapping from objective to one.
        defaults: fields of `MavisConfig` for requests that do not say; by default what the bundle or the value
            functions recommend.
        max_top_k: most candidates that a request may ask for.
        max_value_tokens: most tokens whose keys and values are kept for value models, over all requests.
        draft_values: value heads of the draft model, likewise, by which its drafts are tilted as well; None: they are
            as the draft model has them.
        check_weights: whether a head is refused where the served model's weights are not those it was trained on.
    """

    values: str | list[str] | dict[str, str]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    max_top_k: int = DEFAULT_MAX_TOP_K
    max_value_tokens: int = 1 << 18
    draft_values: str | list[str] | dict[str, str] | None = None
    check_weights: bool = True

    def __post_init__(self) -> None:
        _check_sources("values", self.values)
        if self.draft_values is not None:
            _check_sources("draft_values", self.draft_values)
        for name in ("max_top_k", "max_value_tokens"):
            limit = getattr(self, name)
            if not isinstance(limit, int) or isinstance(limit, bool) or limit < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {limit!r}")
        if not isinstance(self.check_weights, bool):
            raise ValueError(f"check_weights must be true or false, got {self.check_weights!r}")
        MavisConfig.from_dict(self.defaults)

    @classmethod
    def read(cls, given: str | Mapping[str, Any]) -> Serving:
        """Settings from an object, its JSON text, or a lone folder or Hub id.

        Fields of `MavisConfig` stand beside those of this class.

        Raises:
            ValueError: an unknown key (the message names the nearest), a bad value, or no `values`.
        """
        if isinstance(given, str):
            text = given.strip()
            if not text.startswith("{"):
                return cls(text)
            try:
                given = json.loads(text)
            except ValueError as error:
                raise ValueError(f"{ENVIRONMENT} expects a folder, a Hub id or a JSON object: {error}") from error
        if not isinstance(given, Mapping):
            raise ValueError(f"expected a folder, a Hub id or an object, got {given!r}")
        own = {f.name for f in fields(cls)} - {"defaults"}
        settings = {f.name for f in fields(MavisConfig)}
        for key in given:
            if key not in own | settings:
                raise ValueError(f"unknown setting {key!r}; {meant(key, sorted(own | settings))}")
        if "values" not in given:
            raise ValueError('say which value functions steer: {"values": "folder or Hub id", ...}')
        return cls(
            **{key: value for key, value in given.items() if key in own},
            defaults={key: value for key, value in given.items() if key in settings},
        )

    @classmethod
    def find(cls, given: Any = None) -> Serving:
        """Settings that an engine was given, or else those of the environment variable `MAVIS_SERVE`.

        Raises:
            ValueError: there are none, or bad ones.
        """
        found = given if given is not None else os.environ.get(ENVIRONMENT)
        if not found:
            raise ValueError(
                f"nothing says which value functions steer: set {ENVIRONMENT} to a folder or Hub id, or to a JSON "
                'object such as {"values": "org/value-head", "beta": 5}'
            )
        return cls.read(found)

    def to_json(self) -> str:
        """The text that `read` reads."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "defaults"}
        return json.dumps({**own, **self.defaults})

    def for_drafts(self, objectives: Sequence[str]) -> Serving:
        """The settings by which drafts are steered: `draft_values` in the order of the served objectives.

        Raises:
            ValueError: an objective of which they have no value, or one that is not read off the last state.
        """
        given: Any = self.draft_values
        if not isinstance(given, dict):
            many = [given] if isinstance(given, str) else given
            given = {name: one for one in many for name in _described(one).config.objectives}
        missing = [name for name in objectives if name not in given]
        if missing:
            raise ValueError(
                f"draft_values have no value of {', '.join(missing)}, which requests may be steered by: they have "
                f"{', '.join(given)}"
            )
        own = {name: given[name] for name in objectives}
        functions = ValueFunctions(_described(own))
        if functions.models or functions.layers != {None}:
            raise ValueError(
                "draft_values must be value heads that read what enters the draft model's output embedding, which is "
                "all that vLLM hands out of it: train them with `mavis train-head --layer output`"
            )
        return replace(self, values=own, draft_values=None)

    def load(self, model: Any, device: torch.device, served: str | None = None) -> ValueFunctions:
        """The value functions with their weights; heads are not bound yet.

        Args:
            model: the served model, or anything in its place: nothing is done with it but to tell that there is one.
            device: of the value functions.
            served: folder that the served model was loaded from. Value models that are adapters on the first layers of
                a model which cannot be loaded by its name take them from there, if they are the same.
        """
        sources, _ = _sources(self.values)
        model = model if model is not None else object()
        try:
            found = load_value_functions(sources, model, device, {})
        except OSError:
            if served is None or not Path(served, "config.json").is_file():
                raise
            found = load_value_functions(sources, AutoModelForCausalLM.from_pretrained(served), device, {})
        functions = ValueFunctions(found)
        for function in functions.all:
            if isinstance(function, torch.nn.Module):
                function.eval()
        return functions


class Offer:
    """What requests may ask for: objectives, defaults and limits.

    Args:
        functions: the value functions as their configs describe them, or themselves.
        config: the defaults; its `weights` and `beta` too.
        max_top_k: most candidates that a request may ask for, beyond those of `config`.

    Attributes:
        weights: [M] the default lambda.
    """

    def __init__(self, functions: ValueFunctions, config: MavisConfig, max_top_k: int = DEFAULT_MAX_TOP_K) -> None:
        self.functions, self.config = functions, config
        self.weights = functions.weights(config.weights)
        self.max_top_k = max(max_top_k, config.top_k or 0)

    @classmethod
    def of(cls, serving: Serving) -> Offer:
        """The offer of a server, from the value functions' configs alone.

        Raises:
            ValueError: a value function that cannot be served, or settings that do not fit them.
            OSError: one that cannot be read.
        """
        sources, bundled = _sources(serving.values)
        functions = ValueFunctions(_described(sources))
        if serving.draft_values is not None:
            serving.for_drafts(functions.objectives)
        base = vars(bundled) if bundled is not None else functions.recommended
        return cls(functions, settled(base, serving.defaults), serving.max_top_k)

    @property
    def objectives(self) -> list[str]:
        """Names of the M objectives."""
        return self.functions.objectives

    @property
    def scale(self) -> Tensor:
        """[M] units of the objectives, for `normalize="standard"`."""
        return self.functions.units()[2]

    def policy(self, config: MavisConfig, weights: Tensor, beta: Tensor, log_prob_weight: Tensor) -> Policy:
        """That of requests under `config`, weighted [N, M] and tilted [N] as these say; `log_prob_weight` [N, M]."""
        return Policy(config, weights, beta, self.scale, log_prob_weight)


@lru_cache(maxsize=8)
def offer_of(text: str) -> Offer:
    """The offer of a server's settings, as JSON text, from the value functions' configs alone."""
    return Offer.of(Serving.read(text))


def _check_sources(key: str, given: Any) -> None:
    """Raise `ValueError` if no value functions can be meant."""
    names = given.values() if isinstance(given, Mapping) else given
    many = [names] if isinstance(names, str) else list(names) if isinstance(given, list | dict) else []
    if not many or not all(isinstance(name, str) and name for name in many):
        raise ValueError(f"{key} must be a folder or Hub id, a list of them, or an object by objective, got {given!r}")


class _Described:
    """A value function without its weights."""

    reads: Literal["states", "tokens"]

    def __init__(self, config: Any) -> None:
        self.config = config
        self.reads = _KINDS[config.model_type]  # type: ignore[assignment]

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def units(self) -> Tensor:
        units: Tensor = self.config.units()
        return units

    def refresh(self, thorough: bool = True) -> None:
        """Nothing to notice."""


def _sources(values: Any) -> tuple[Any, MavisConfig | None]:
    """Where the value functions lie, and the settings of their bundle if they are one."""
    if isinstance(values, list) and len(values) == 1:
        values = values[0]
    return bundled(values, {})


def _described(sources: Any) -> Any:
    known: dict[Source, _Described] = {}

    def get(item: Any) -> _Described:
        source = item if isinstance(item, Source) else Source(str(item))
        if source not in known:
            config = AutoConfig.from_pretrained(source.name, **source.arguments({}))
            if config.model_type not in _KINDS:
                kind = "a tuned policy" if config.model_type == ValuePolicyConfig.model_type else config.model_type
                raise ValueError(
                    f"{source.name} is {kind}, which cannot steer a server: use value heads or value models "
                    "(`mavis train-head`, `mavis train-model`, or `mavis distil`)"
                )
            known[source] = _Described(config)
        return known[source]

    if isinstance(sources, Mapping):
        return {name: get(item) for name, item in sources.items()}
    return [get(item) for item in sources] if isinstance(sources, list) else get(sources)
