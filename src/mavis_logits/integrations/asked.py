"""What one request asks for: `mavis_...` arguments beside its sampling parameters, read and checked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import Tensor

from ..core.config import MavisConfig
from ..core.known import meant
from ..core.tilting import MAX_BETA
from ..core.weights import parse_weights
from .serving import Offer

PREFIX = "mavis_"
EVERYTHING = "all"  # for mavis_top_k: JSON of some servers has no null
_OTHER_NAMES = {"min_p": "candidate_min_p"}
_COLDEST, _HOTTEST = 0.01, 100.0  # reference temperatures at which no logit overflows
_FIELDS = {f.name for f in fields(MavisConfig)}


def arguments() -> list[str]:
    """The names of all arguments that a request may have."""
    return sorted(PREFIX + name for name in _FIELDS | _OTHER_NAMES.keys())


@dataclass(frozen=True)
class Asked:
    """How one request is steered.

    Attributes:
        config: its settings; `weights` and `beta` of it are the defaults of the class, so that requests that differ in
            them alone are steered together.
        weights: lambda, [M].
        beta: strength of the tilt.
        temperature: that the engine samples at after it.
    """

    config: MavisConfig
    weights: Tensor
    beta: float
    temperature: float = 1.0

    @classmethod
    def read(cls, given: Mapping[str, Any] | None, offer: Offer, temperature: float | None = None) -> Asked | None:
        """The settings that a request's extra arguments ask for.

        Args:
            given: extra arguments; those whose names do not begin with `mavis_` are another's.
            offer: what there is to ask for.
            temperature: that the engine samples at; 0 if it takes the likeliest, None if it is not known.

        Returns:
            None if none of them is ours: the request is not steered.

        Raises:
            ValueError: an unknown argument or objective, a wrong type, a number out of range or not finite, more
                candidates than the server allows.
        """
        ours = {str(key): value for key, value in (given or {}).items() if str(key).startswith(PREFIX)}
        if not ours:
            return None
        settings: dict[str, Any] = {}
        for key, value in ours.items():
            name = _OTHER_NAMES.get(key.removeprefix(PREFIX), key.removeprefix(PREFIX))
            if name not in _FIELDS:
                raise ValueError(f"unknown argument {key!r}; {meant(key, arguments())}")
            if name in settings:
                raise ValueError(f"{PREFIX}{name} is given twice, under two names")
            settings[name] = value
        if settings.get("beta") is not None and settings.get("kl_budget") is not None:
            raise ValueError("mavis_beta and mavis_kl_budget exclude each other: the budget decides the strength")
        if "beta" in settings:
            settings["kl_budget"] = None
        if settings.get("top_k") == EVERYTHING:
            settings["top_k"] = None
        weights = offer.weights
        if "weights" in settings:
            weights = offer.functions.weights(_weights(settings.pop("weights")))
            if weights.ndim != 1:
                raise ValueError(f"mavis_weights must be one number for each of {offer.objectives}")
        config = _config(offer.config, settings)
        if (config.top_k is None or config.top_k > offer.max_top_k) and config.top_k != offer.config.top_k:
            asked = EVERYTHING if config.top_k is None else config.top_k
            raise ValueError(f"mavis_top_k must be at most {offer.max_top_k} on this server, got {asked}")
        if config.top_k is None and offer.functions.models:
            raise ValueError("mavis_top_k must be a number: value models cannot score the whole vocabulary")
        beta = float(config.beta)
        if beta > MAX_BETA or weights.abs().max() > MAX_BETA:
            raise ValueError(f"mavis_beta and mavis_weights must be at most {MAX_BETA:g} in size")
        if not _COLDEST <= config.reference_temperature <= _HOTTEST:
            raise ValueError(f"mavis_reference_temperature must lie between {_COLDEST:g} and {_HOTTEST:g}")
        return cls(replace(config, weights=None, beta=MavisConfig.beta), weights, beta, float(temperature or 1.0))


def _config(base: MavisConfig, settings: Mapping[str, Any]) -> MavisConfig:
    try:
        return replace(base, **settings)
    except ValueError as error:
        raise ValueError(f"{PREFIX}{error}") from error


def _weights(given: Any) -> Any:
    if isinstance(given, str):
        if not given.lstrip().startswith("{"):
            return parse_weights(given, f"{PREFIX}weights")
        try:
            given = json.loads(given)
        except ValueError as error:
            raise ValueError(f"mavis_weights is no JSON object: {error}") from error
    numbers = given.values() if isinstance(given, Mapping) else given if isinstance(given, list | tuple) else None
    if numbers is None or not all(isinstance(x, int | float) and not isinstance(x, bool) for x in numbers):
        raise ValueError(
            'mavis_weights must be "helpful=0.7,humour=0.3", the same as a JSON object, or a list of numbers, got '
            f"{given!r}"
        )
    return given
