"""What is compared: ways to steer the same objectives, each as arguments of `generate` and as work to be bounded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mavis_logits import MavisLogitsProcessor
from mavis_logits.strategies import MavisSampling
from measuring import PLAIN, Setting
from roofline import Ceilings, Cost, adapters_cost, forward_cost, head_cost, logits_cost
from schemes import RecomputedQueries, RecomputedRows, RepeatedCache, Scheme, SlowTwin
from setups import Setup, names

BETA = 5.0
WIDE = 200
PROCESSOR, STRATEGY = "processor", "strategy"


@dataclass(frozen=True)
class Variant:
    """One way to steer.

    Attributes:
        arguments: makes the arguments of `generate`.
        work: what a step takes beyond the base model's forward; None where that depends on the text.
        rounds: takes part in at most so many, because it is slow.
    """

    arguments: Callable[[Setup, Setting], dict[str, Any]]
    work: Callable[[Setup, Setting], list[Cost]] | None
    rounds: int | None = None


def steered(functions: Any, setup: Setup, setting: Setting, by: str, **settings: Any) -> dict[str, Any]:
    """Arguments of `generate` for value functions, used by the processor or by the sampling strategy."""
    settings = {"top_k": setting.top_k, "pad_token_id": setup.pad_token_id} | settings
    kind = MavisLogitsProcessor if by == PROCESSOR else MavisSampling
    steering = kind.from_pretrained(functions, equal_weights(setting), BETA, model=setup.model, **settings)
    return {"logits_processor": [steering]} if by == PROCESSOR else {"custom_generate": steering}


def equal_weights(setting: Setting) -> dict[str, float]:
    """The same weight for every objective."""
    return dict.fromkeys(names(setting.objectives), 1 / setting.objectives)


def head(by: str, **settings: Any) -> Variant:
    """One value head with all outputs; `settings` may say another `top_k`."""

    def work(setup: Setup, setting: Setting) -> list[Cost]:
        config = setup.model.config
        k = settings.get("top_k", setting.top_k) or config.vocab_size
        return [head_cost(config.hidden_size, setup.head(setting.objectives).config.width, setting.batch, k)]

    return Variant(lambda s, t: steered(s.head(t.objectives), s, t, by, **settings), work)


def shared(by: str, **settings: Any) -> Variant:
    """One value model with all outputs."""

    def arguments(setup: Setup, setting: Setting) -> dict[str, Any]:
        return steered(setup.shared_model(setting.objectives, setting.dtype), setup, setting, by, **settings)

    return Variant(arguments, None if settings else lambda setup, setting: models_work(setup, setting, 1))


def separate(by: str) -> Variant:
    """One value model for each objective."""

    def arguments(setup: Setup, setting: Setting) -> dict[str, Any]:
        # Trained models differ in all weights; these random ones share theirs, and would be run as one.
        return steered(setup.separate_models(setting.objectives, setting.dtype), setup, setting, by, fuse=False)

    return Variant(arguments, separate_work)


def fused(by: str, **settings: Any) -> Variant:
    """A LoRA adapter for each objective on one backbone, all in one forward pass."""

    def arguments(setup: Setup, setting: Setting) -> dict[str, Any]:
        adapters = setup.adapters(setting.objectives, setting.dtype)
        return steered(adapters, setup, setting, by, fuse=True, **settings)

    def work(setup: Setup, setting: Setting) -> list[Cost]:
        config, rows = setup.value_config, setting.batch * setting.objectives
        updates = adapters_cost(config, setting.dtype, setup.rank, setting.objectives, rows * setting.top_k)
        return [forward_cost(config, setting.dtype, rows, setting.top_k, setting.middle, causal=False), updates]

    return Variant(arguments, None if settings else work)


def baseline(scheme: type[Scheme], rounds: int | None = None) -> Variant:
    """One value model for each objective, under a plain scheme."""

    def arguments(setup: Setup, setting: Setting) -> dict[str, Any]:
        models = setup.baseline_models(setting.objectives, setting.dtype)
        processor = scheme(models, equal_weights(setting), BETA, setting.top_k, setup.pad_token_id)
        return {"logits_processor": [processor]}

    return Variant(arguments, separate_work, rounds)


def separate_work(setup: Setup, setting: Setting) -> list[Cost]:
    """The least work of a value model for each objective."""
    return models_work(setup, setting, setting.objectives)


def models_work(setup: Setup, setting: Setting, count: int) -> list[Cost]:
    """k candidates a row through so many value models."""
    one = forward_cost(setup.value_config, setting.dtype, setting.batch, setting.top_k, setting.middle, causal=False)
    return [one] * count


def bound(setup: Setup, setting: Setting, name: str, ceilings: Ceilings) -> float | None:
    """The least seconds of one step of a variant, half-way through decoding."""
    config, dtype = setup.model.config, setup.model.dtype
    base = [forward_cost(config, dtype, setting.batch, 1, setting.middle), logits_cost(config, dtype, setting.batch)]
    if name == PLAIN:
        work: list[Cost] = []
    elif (own := VARIANTS[name].work) is not None:
        work = own(setup, setting)
    else:
        return None
    return sum(ceilings.seconds(cost) for cost in base + work)


VARIANTS: dict[str, Variant] = {
    "value head, processor": head(PROCESSOR),
    "value head, strategy": head(STRATEGY),
    f"value head, k {WIDE}, processor": head(PROCESSOR, top_k=WIDE),
    f"value head, k {WIDE}, strategy": head(STRATEGY, top_k=WIDE),
    "value head, whole vocabulary, processor": head(PROCESSOR, top_k=None),
    "value head, whole vocabulary, strategy": head(STRATEGY, top_k=None),
    "one value model, processor": shared(PROCESSOR),
    "one value model, strategy": shared(STRATEGY),
    "one value model, strategy, min-p 0.05": shared(STRATEGY, candidate_min_p=0.05),
    "one value model, strategy, min-p 0.1": shared(STRATEGY, candidate_min_p=0.1),
    "separate value models, processor": separate(PROCESSOR),
    "separate value models, strategy": separate(STRATEGY),
    "fused adapters, processor": fused(PROCESSOR),
    "fused adapters, strategy": fused(STRATEGY),
    "fused adapters, strategy, min-p 0.05": fused(STRATEGY, candidate_min_p=0.05),
    "fused adapters, strategy, min-p 0.1": fused(STRATEGY, candidate_min_p=0.1),
    "repeated cache": baseline(RepeatedCache),
    "recomputed token, k rows": baseline(RecomputedRows),
    "recomputed token, one sequence": baseline(RecomputedQueries),
    "slow twin": baseline(SlowTwin, rounds=1),
}
