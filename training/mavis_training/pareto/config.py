"""Which methods are compared, at which weightings, under one protocol."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from mavis_logits.core.chat import ChatTemplate
from mavis_logits.models import DEFAULT_MODEL

from ..evaluate import EvaluateConfig
from ..measure.settings import check_setting
from ..measure.win_rate import JudgeSettings
from ..rivals.decoding import KEYS

BY_OBJECTIVE = ("adapters", "mixture", "token_rewards", "partial_rewards", "directions")
_SCALED = ("token_rewards", "partial_rewards", "directions")
UNSTEERED = "unsteered"


@dataclass(frozen=True)
class ParetoConfig:
    """What to compare.

    A method is a setting of `mavis evaluate` with a place for lambda, given by what it has:

    - value functions (`beta`, `top_k`, `value_functions`, ...): `weights` are lambda;
    - `adapters`, `mixture`: a folder by objective, which gets lambda's share;
    - `token_rewards`, `partial_rewards`, `directions`: a folder or reward by objective, which gets `strength` times it;
    - `system`: a text by objective, or by lambda; where lambda has no text of its own, those of the objectives that
      have a share, the largest first;
    - `by_weights`: further keys by lambda, for what was tuned for one weighting (MORLHF).

    Lambda is written with names, `"helpful 0.4, humour 0.6"`, or as `"0.4,0.6"` in the order of the objectives, which
    is that of `rewards` where nothing else is said: a tool that sorts keys changes what the latter means.

    Every other value that is a list is tried value by value: `beta: [2, 4]` makes two points at each lambda.

    Attributes:
        prompts, rewards, value_functions, completions, limit, seeds, max_new_tokens, temperature, top_p, model,
            chat_template, dtype, batch_size, device, perplexity, judge, fresh: as for `mavis evaluate`: the protocol,
            which all methods share; completions are kept a file a cell.
        output: JSON file of the results; a table (.md), figures (.png) and a page (.html) are written beside it.
        methods: by name.
        objectives: two or three of the rewards that are traded off; None for all.
        steps: lambda goes from 0 to 1 in so many steps.
        most_kl: nats beyond which a point does not count, so that no method buys reward by leaving the model; None for
            no such bound.
        worst: standard deviations below the unsteered model at which the hypervolume's corner is, in every objective.
        beside: results of other runs under the same protocol, whose methods are compared too.
        against: the method that all others are compared with; None for the first.
        resamples: of the bootstrap over prompts.
        level: of the intervals.
    """

    prompts: str
    output: str
    completions: str
    rewards: dict[str, str | dict[str, Any]]
    methods: dict[str, dict[str, Any]]
    value_functions: str | dict[str, str] | None = None
    objectives: list[str] | None = None
    steps: int = 5
    most_kl: float | None = None
    worst: float = 1.0
    beside: list[str] = field(default_factory=list)
    against: str | None = None
    resamples: int = 1000
    level: float = 0.95
    limit: int | None = 100
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    max_new_tokens: int = 48
    temperature: float = 1.0
    top_p: float = 1.0
    model: str = DEFAULT_MODEL
    chat_template: ChatTemplate = "auto"
    dtype: str = "float32"
    batch_size: int = 50
    device: str | None = None
    perplexity: bool = False
    judge: JudgeSettings | None = field(default=None, kw_only=True)
    fresh: bool = False

    def __post_init__(self) -> None:
        unknown = [name for name in self.traded if name not in self.rewards]
        if unknown or not 2 <= len(self.traded) <= 3 or len(set(self.traded)) != len(self.traded):
            raise ValueError(
                f"objectives must be two or three of the rewards {', '.join(self.rewards)}, got {list(self.traded)}"
            )
        if not self.methods or UNSTEERED in self.methods:
            raise ValueError(
                f"methods must name what is compared, and none of them {UNSTEERED!r}, which is there anyway"
            )
        for name, low in (("steps", 1), ("resamples", 1)):
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be at least {low}, got {getattr(self, name)}")
        if not 0.5 <= self.level < 1:
            raise ValueError(f"level must be from 0.5 to below 1, got {self.level}")
        if not 0 <= self.worst < math.inf or (self.most_kl is not None and not self.most_kl > 0):
            raise ValueError(f"worst must be 0 or more, most_kl above 0; got {self.worst} and {self.most_kl}")
        if self.against is not None and self.against not in self.methods:
            raise ValueError(f"against must be one of {', '.join(self.methods)}, got {self.against!r}")
        there = {cell.method for cell in self.cells()}  # every setting is looked at
        empty = [name for name in self.methods if name not in there]
        if empty:
            raise ValueError(f"{', '.join(empty)}: by_weights has none of the weightings {'; '.join(self.keys())}")

    @property
    def traded(self) -> Sequence[str]:
        """The objectives that are traded off."""
        return list(self.rewards) if self.objectives is None else self.objectives

    def lambdas(self) -> list[dict[str, float]]:
        """All weightings in equal steps that sum to 1."""
        grid = itertools.product(range(self.steps + 1), repeat=len(self.traded) - 1)
        found = []
        for first in grid:
            rest = self.steps - sum(first)
            if rest >= 0:
                found.append({n: x / self.steps for n, x in zip(self.traded, (*first, rest), strict=True)})
        return found

    def keys(self) -> list[str]:
        """The weightings as `by_weights` and `system` name them."""
        return [_key(weights) for weights in self.lambdas()]

    def missing(self) -> list[str]:
        """What a method has no setting for: a gap in its trade-off."""
        return [
            f"{method} - {key}"
            for method, template in self.methods.items()
            for weights, key in zip(self.lambdas(), self.keys(), strict=True)
            if "by_weights" in template and _at(template["by_weights"], weights) is None
        ]

    def cells(self) -> Iterator[Cell]:
        """Every method at every lambda and strength.

        Raises:
            ValueError: a method that cannot be read; the message names it.
        """
        for method, template in self.methods.items():
            for weights in self.lambdas():
                try:
                    for setting, swept in settings_at(template, weights):
                        check_setting(setting)
                        yield Cell(method, weights, swept, setting)
                except ValueError as error:
                    raise ValueError(f"the method {method!r}: {error}") from error

    def evaluation(self) -> EvaluateConfig:
        """All cells as settings of one evaluation."""
        settings: dict[str, dict[str, Any]] = {UNSTEERED: {}}
        for cell in self.cells():
            settings[cell.name] = cell.setting
        names = (
            "prompts", "completions", "value_functions", "rewards", "limit", "seeds", "max_new_tokens", "temperature",
            "top_p", "model", "chat_template", "dtype", "batch_size", "device", "perplexity", "fresh",
        )  # fmt: skip
        return EvaluateConfig(output=self.output, settings=settings, **{name: getattr(self, name) for name in names})


@dataclass(frozen=True)
class Cell:
    """One point of a method.

    Attributes:
        method: its name.
        weights: lambda by objective.
        swept: what else is varied, by key.
        setting: of `mavis evaluate`.
    """

    method: str
    weights: dict[str, float]
    swept: dict[str, Any]
    setting: dict[str, Any]

    @property
    def name(self) -> str:
        """As its files are called."""
        parts = [self.method, ", ".join(f"{name} {share:g}" for name, share in self.weights.items())]
        parts += [", ".join(f"{key} {value}" for key, value in self.swept.items())] if self.swept else []
        return " - ".join(parts)


def settings_at(
    template: Mapping[str, Any], weights: Mapping[str, float]
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """The settings of a method at one lambda, each with what is varied beside it.

    Args:
        template: of the method.
        weights: lambda by objective.

    Raises:
        ValueError: an objective without a folder, a text or a setting of its own.
    """
    given = {key: value for key, value in template.items() if key not in ("by_weights", "strength")}
    if "by_weights" in template:
        own = _at(template["by_weights"], weights)
        if own is None:
            return  # a gap
        given |= own
    examples = given.pop("examples", None)  # a list, but none of values to try
    strengths = template.get("strength", [1.0])
    strengths = strengths if isinstance(strengths, list) else [strengths]
    swept = {name: value for name, value in given.items() if isinstance(value, list)}
    if len(strengths) > 1:
        swept = {"strength": strengths} | swept
    for values in itertools.product(*swept.values()):
        chosen = dict(zip(swept, values, strict=True))
        strength = cast(float, chosen.get("strength", strengths[0]))
        setting = {**given, **{name: value for name, value in chosen.items() if name != "strength"}}
        if examples is not None:
            setting["examples"] = examples
        for name in BY_OBJECTIVE:
            if name in given and "by_weights" not in template:
                scale = strength if name in _SCALED else 1.0
                setting[name] = {
                    _of(given[name], objective, name): scale * share
                    for objective, share in weights.items()
                    if share or name in ("adapters", "mixture")
                }
        if isinstance(given.get("system"), Mapping):
            setting["system"] = _system(given["system"], weights)
        if setting.keys() - set(KEYS) and "weights" not in setting:
            setting["weights"] = dict(weights)
        if not setting:
            raise ValueError("it says nothing: give it value functions' settings, adapters, a system prompt, ...")
        yield setting, chosen


def _key(weights: Mapping[str, float]) -> str:
    return ",".join(f"{round(share, 3):g}" for share in weights.values())


def _of(by_objective: Mapping[str, Any], objective: str, key: str) -> str:
    if not isinstance(by_objective, Mapping) or objective not in by_objective:
        known = ", ".join(by_objective) if isinstance(by_objective, Mapping) else repr(by_objective)
        raise ValueError(f"{key} must have an entry for the objective {objective!r}, got {known}")
    return str(by_objective[objective])


def _at(given: Mapping[str, Any], weights: Mapping[str, float]) -> Any | None:
    """What is given for lambda, if anything is: by names and shares, or by shares in the objectives' order."""
    wanted = {name: round(share, 3) for name, share in weights.items()}
    for key, value in given.items():
        parts = [part.strip().rpartition(" ") for part in key.split(",")]
        try:
            shares = [round(float(share), 3) for _, _, share in parts]
        except ValueError:
            continue  # an objective's own text
        names = [name.strip() for name, _, _ in parts]
        if any(names):
            named = dict(zip(names, shares, strict=True))
            if named.keys() - wanted.keys():
                raise ValueError(f"{key!r} names {', '.join(named)}; the objectives are {', '.join(wanted)}")
            found = dict.fromkeys(wanted, 0.0) | named
        else:
            found = dict(zip(wanted, shares, strict=False)) if len(shares) == len(wanted) else {}
        if found == wanted:
            return value
    return None


def _system(texts: Mapping[str, str], weights: Mapping[str, float]) -> str:
    own = _at(texts, weights)
    if own is not None:
        return str(own)
    shares = sorted(((share, name) for name, share in weights.items() if share), key=lambda x: -x[0])
    return " ".join(_of(texts, name, "system") for _, name in shares)
