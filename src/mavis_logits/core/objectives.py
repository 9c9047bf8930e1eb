"""What every value function's config records: what its outputs mean and what they were made for."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def check_objectives(objectives: Sequence[str]) -> None:
    """Raise `ValueError` unless `objectives` is a non-empty list of distinct names."""
    names = list(objectives) if not isinstance(objectives, str) else []
    if not names or len(set(names)) != len(names) or not all(isinstance(n, str) and n for n in names):
        raise ValueError(
            f"objectives must be a list of distinct names such as ['helpful', 'harmless'], got {objectives!r}"
        )


def _log_prob_weight(given: Any) -> list[float] | dict[str, list[float]] | None:
    """As `ObjectivesMixin` keeps it; JSON has text for the keys of an object."""
    if given is None:
        return None
    if not isinstance(given, Mapping):
        return _finite(given)
    try:
        temperatures = [float(key) for key in given]
    except ValueError:
        temperatures = []
    if not temperatures or not all(0 < one < math.inf for one in temperatures):
        raise ValueError(
            f"log_prob_weight must be numbers, or a dictionary of them by temperatures above 0, got {dict(given)}"
        )
    names = [f"{at:g}" for at in temperatures]
    if len(set(names)) != len(names):
        raise ValueError(f"log_prob_weight has a temperature twice: {sorted(map(str, given))}")
    return {name: _finite(own) for name, own in zip(names, given.values(), strict=True)}


def _finite(given: Any) -> list[float]:
    """The numbers of one temperature, or of all."""
    own = [float(x) for x in given] if isinstance(given, list | tuple) else []
    if not own or not all(map(math.isfinite, own)):
        raise ValueError(f"log_prob_weight must be finite numbers, got {given}")
    return own


def log_prob_weight_of(outputs: Iterable[tuple[ObjectivesMixin, int]]) -> list[float] | dict[str, list[float]] | None:
    """`ObjectivesMixin.log_prob_weight` of a value function that says what single outputs of others say."""
    every = list(outputs)
    given = [config.log_prob_weight for config, _ in every if config.log_prob_weight is not None]
    temperatures = {at for own in given if isinstance(own, dict) for at in own}

    def at(temperature: float) -> list[float]:
        return [config.log_prob_weight_at(temperature)[output] for config, output in every]

    if not given:
        return None
    return {key: at(float(key)) for key in sorted(temperatures, key=float)} or at(1.0)


class ObjectivesMixin:
    """Fields shared by the configs of `ValueModel` and `ValueHead`.

    Attributes:
        objectives: names of the M outputs.
        reward_mean, reward_scale: [M] each; training regresses (reward - mean) / scale.
        tilt_scale: [M] or None, the differences of value that `normalize="standard"` counts as one; None for
            `reward_scale`. `mavis calibrate` sets it so that one beta tilts equally far towards every objective.
        log_prob_weight: [M] or None, what a nat of the reference's own log pi_ref(a | s) counts for beside a token's
            value, in reward units: Q_m(s, a) = V_m(s + a) + log_prob_weight_m log pi_ref(a | s). Above 0 the tilt
            sharpens the reference as a lower temperature would, in proportion to beta and the weights; None for 0. A
            colder reference has less to gain by it: a dictionary has one such list for each of several temperatures,
            such as {"0.7": [0.0], "1": [0.2]}, between which it is interpolated.
        tokenizer_fingerprint: of the tokenizer whose ids the value function reads; None when unknown.
        base_model, base_revision: the model whose rollouts it was trained on.
        recipe: how it was trained, as a JSON-able dictionary.
        iteration: 0 for values of the reference policy, i for those of the i-th guided policy (Algorithm 1).
        settings: how it is best used: fields of `MavisConfig` (`beta`, `top_k`, `normalize`, ...), which are the
            defaults of what it steers, and `temperature`, that of the base model that they were chosen at.
    """

    objectives: list[str]
    reward_mean: list[float]
    reward_scale: list[float]
    tilt_scale: list[float] | None
    log_prob_weight: list[float] | dict[str, list[float]] | None
    settings: dict[str, Any]

    def _take_objectives(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Set the fields from `kwargs`; return the rest."""
        rest = dict(kwargs)
        self.objectives = list(rest.pop("objectives", None) or ["reward"])
        check_objectives(self.objectives)
        count = len(self.objectives)
        self.reward_mean = [float(x) for x in rest.pop("reward_mean", None) or [0.0] * count]
        self.reward_scale = [float(x) for x in rest.pop("reward_scale", None) or [1.0] * count]
        scale = rest.pop("tilt_scale", None)
        self.tilt_scale = None if scale is None else [float(x) for x in scale]
        self.log_prob_weight = _log_prob_weight(rest.pop("log_prob_weight", None))
        weight = self.log_prob_weight
        of_temperatures = [weight] if not isinstance(weight, dict) else list(weight.values())
        lists = [(name, getattr(self, name)) for name in ("reward_mean", "reward_scale", "tilt_scale")]
        for name, given in [*lists, *(("log_prob_weight", own) for own in of_temperatures)]:
            if given is not None and len(given) != count:
                raise ValueError(f"{name} has {len(given)} numbers for {count} objectives {self.objectives}")
        if not all(0 < x < float("inf") for x in self.tilt_scale or ()):
            raise ValueError(f"tilt_scale must be positive numbers, got {self.tilt_scale}")
        self.tokenizer_fingerprint: str | None = rest.pop("tokenizer_fingerprint", None)
        self.base_model: str | None = rest.pop("base_model", None)
        self.base_revision: str | None = rest.pop("base_revision", None)
        self.recipe: dict[str, Any] = rest.pop("recipe", None) or {}
        self.iteration: int = rest.pop("iteration", 0)
        self.settings = dict(rest.pop("settings", None) or {})
        return rest

    def log_prob_weight_at(self, temperature: float) -> list[float]:
        """[M] what a nat of log pi_ref counts for where the reference is sampled at a temperature."""
        given = self.log_prob_weight
        if given is None:
            return [0.0] * len(self.objectives)
        if not isinstance(given, dict):
            return list(given)
        at = sorted(given, key=float)
        known = np.array([given[key] for key in at])
        return [float(np.interp(temperature, [float(key) for key in at], column)) for column in known.T]

    def units(self) -> Tensor:
        """`reward_mean`, `reward_scale` and what stands for `tilt_scale`, [3, M] on the CPU."""
        return torch.tensor([self.reward_mean, self.reward_scale, self.tilt_scale or self.reward_scale])

    def reward_units(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """`reward_mean` and `reward_scale` as float32 [M] tensors on `device`, kept between calls."""
        kept = self.__dict__.get("_reward_units")
        key = (device, tuple(self.reward_mean), tuple(self.reward_scale))
        if kept is None or kept[0] != key:
            with torch.inference_mode(False):  # kept for all modes: training saves them for its backward pass
                mean, scale = (torch.tensor(x, dtype=torch.float32, device=device) for x in key[1:])
            kept = self.__dict__["_reward_units"] = (key, mean, scale)
        return kept[1], kept[2]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_reward_units"}

    def to_dict(self) -> dict[str, Any]:
        """The config as a JSON-able dictionary."""
        content = super().to_dict()  # type: ignore[misc]
        content.pop("_reward_units", None)
        return content
