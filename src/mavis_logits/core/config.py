"""The settings of MAVIS decoding as one frozen, validated, JSON-able object."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from .known import meant
from .tilting import DEFAULT_GAP_FLOOR, Normalization

Unscored = Literal["drop", "keep", "expected"]


@dataclass(frozen=True)
class MavisConfig:
    """How the values tilt the reference (Algorithm 2, section F.5). The defaults are the paper's.

    Attributes:
        weights: lambda, by objective; None for equal weights.
        beta: strength of the tilt, 1 / eta of equation 1 for values normalised to [0, 1].
        top_k: candidates per step; None for the whole vocabulary (value heads only).
        candidate_min_p: of these, only those whose reference probability is at least this share of the best one's
            (0 to 1). Algorithm 2 then runs over fewer candidates: the same distribution as over a smaller k, chosen
            anew at every step. None keeps all k.
        normalize: `"minmax"` (equation 14), `"gap"`, `"center"`, `"none"`, or `"standard"`: every objective in its own
            unit, `tilt_scale` of its value function, so that beta and weights mean the same for all; see
            `mavis_logits.core.tilting.normalize`.
        unscored: what becomes of the other tokens: `"drop"` (the paper: no probability, which at temperature 1 may cost
            more divergence than the tilt), `"keep"` (their own score, as if their value were 0) or `"expected"` (as if
            their value were what the reference expects of the candidates).
        kl_budget: in place of `beta`: the divergence from the reference per step, in nats.
        reference_temperature: T that the reference is sampled at; its logits are divided by T before the tilt.
        gap_floor: smallest divisor of `normalize="gap"`, in reward units.
    """

    weights: Mapping[str, float] | None = None
    beta: float = 5.0
    top_k: int | None = 15
    candidate_min_p: float | None = None
    normalize: Normalization = "minmax"
    unscored: Unscored = "drop"
    kl_budget: float | None = None
    reference_temperature: float = 1.0
    gap_floor: float = DEFAULT_GAP_FLOOR

    def __post_init__(self) -> None:
        if self.weights is not None:
            mapping = isinstance(self.weights, Mapping)
            _require(mapping, "weights", "a mapping from objective to number", self.weights)
            for name, weight in self.weights.items():
                _require(_is_number(weight), f"weights[{name!r}]", "a finite number", weight)
        _require(_is_number(self.beta) and self.beta >= 0, "beta", "a finite number of at least 0", self.beta)
        whole = isinstance(self.top_k, int) and not isinstance(self.top_k, bool) and self.top_k >= 1
        _require(
            self.top_k is None or whole, "top_k", "a whole number of at least 1, or None for all tokens", self.top_k
        )
        share = self.candidate_min_p
        _require(
            share is None or (_is_number(share) and 0 < share <= 1), "candidate_min_p", "above 0 and at most 1", share
        )
        for name, kind in (("normalize", Normalization), ("unscored", Unscored)):
            choices = get_args(kind)
            _require(
                getattr(self, name) in choices, name, f"one of {', '.join(map(repr, choices))}", getattr(self, name)
            )
        budget = self.kl_budget
        _require(budget is None or (_is_number(budget) and budget > 0), "kl_budget", "a number of nats above 0", budget)
        for name in ("reference_temperature", "gap_floor"):
            value = getattr(self, name)
            _require(_is_number(value) and value > 0, name, "a finite number above 0", value)

    @property
    def keeps_unscored(self) -> bool:
        """Whether tokens that are no candidates may be sampled."""
        return self.unscored != "drop"

    def to_json(self) -> str:
        """The settings as JSON text."""
        return json.dumps(asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> MavisConfig:
        """Read `to_json`'s text.

        Raises:
            ValueError: no JSON object, an unknown key (the message names the nearest known one) or a bad value.
        """
        try:
            content = json.loads(text)
        except ValueError as error:
            raise ValueError(f"MavisConfig expects a JSON object: {error}") from error
        return cls.from_dict(content)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> MavisConfig:
        """Settings from a dictionary; errors as in `from_json`."""
        if not isinstance(content, Mapping):
            raise ValueError(f"MavisConfig expects a JSON object, got {type(content).__name__}")
        known = [f.name for f in fields(cls)]
        for key in content:
            if key not in known:
                raise ValueError(f"unknown setting {key!r}; {meant(key, known)}")
        return cls(**content)


def settled(base: Mapping[str, Any], named: Mapping[str, Any], beta: Any = None) -> MavisConfig:
    """The settings that are named, and those of `base` for the rest.

    Args:
        base: what value functions or their bundle recommend.
        named: fields of `MavisConfig` that are asked for.
        beta: a strength that is asked for apart from them, which is not put into the settings.

    A strength that is asked for is not left to a `kl_budget` of `base`.
    """
    if beta is not None or named.get("beta") is not None:
        named = {"kl_budget": None, **named}
    return MavisConfig.from_dict({**base, **named})


def recommended(given: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """What value functions that are used together recommend, as fields of `MavisConfig`.

    Args:
        given: of each, its own recommendation (`ObjectivesMixin.settings`); empty if it has none.

    Returns:
        Empty if they normalise in different ways: a strength means another thing then. Else the widest cut of them, and
        the mean of their strengths.
    """
    known = {field.name for field in fields(MavisConfig)} - {"weights", "reference_temperature"}
    every = [{name: value for name, value in own.items() if name in known} for own in given]
    if not all(every) or len({own.get("normalize", MavisConfig.normalize) for own in every}) != 1:
        return {}
    found: dict[str, Any] = {}
    for name in set().union(*every):
        values = [own.get(name, getattr(MavisConfig, name)) for own in every]
        if all(value == values[0] for value in values):
            found[name] = values[0]
        elif name == "beta":
            found[name] = sum(values) / len(values)
        elif name in ("top_k", "candidate_min_p"):  # None cuts nothing
            widest = max if name == "top_k" else min
            found[name] = None if None in values else widest(values)
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _require(condition: bool, name: str, expected: str, given: Any) -> None:
    if not condition:
        raise ValueError(f"{name} must be {expected}, got {given!r}")
