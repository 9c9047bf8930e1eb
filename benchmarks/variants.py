"""What is compared: ways to steer the same objectives, each as arguments of `generate` and as work to be bounded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from mavis_logits import MavisLogitsProcessor
from mavis_logits.decoding.strategies import MavisSampling
from measuring import PLAIN, Setting, decode
from roofline import Ceilings, Cost, adapters_cost, forward_cost, head_cost, logits_cost
from schemes import RecomputedQueries, RecomputedRows, RepeatedCache, Scheme, SlowTwin
from setups import Setup, names

BETA = 5.0
WIDE = 200
TRACED_TOKENS = 16
PROCESSOR, STRATEGY = "processor", "strategy"


@dataclass(frozen=True)
class Variant:
    """One way to steer.

    Attributes:
        arguments: makes the arguments of `generate`; further settings of the processor or strategy may be added.
        work: (setup, setting, candidates a row) -> what a step takes beyond the base model's forward.
        settings: of the processor or strategy, in which this way differs from others.
        rounds: takes part in at most so many, because it is slow.
    """

    arguments: Callable[..., dict[str, Any]]
    work: Callable[[Setup, Setting, float], list[Cost]]
    settings: Mapping[str, Any] = field(default_factory=dict)
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
    """One value head with all outputs."""

    def arguments(setup: Setup, setting: Setting, **more: Any) -> dict[str, Any]:
        return steered(setup.head(setting.objectives), setup, setting, by, **settings, **more)

    def work(setup: Setup, setting: Setting, candidates: float) -> list[Cost]:
        width = setup.head(setting.objectives).config.width
        return [head_cost(setup.model.config.hidden_size, width, setting.batch, candidates)]

    return Variant(arguments, work, settings)


def shared(by: str, **settings: Any) -> Variant:
    """One value model with all outputs."""

    def arguments(setup: Setup, setting: Setting, **more: Any) -> dict[str, Any]:
        model = setup.shared_model(setting.objectives, setting.dtype)
        return steered(model, setup, setting, by, **settings, **more)

    return Variant(arguments, lambda setup, setting, k: [model_cost(setup, setting, k)], settings)


def separate(by: str) -> Variant:
    """One value model for each objective."""

    def arguments(setup: Setup, setting: Setting, **more: Any) -> dict[str, Any]:
        # Trained models differ in all weights; these random ones share theirs, and would be run as one.
        models = setup.separate_models(setting.objectives, setting.dtype)
        return steered(models, setup, setting, by, fuse=False, **more)

    return Variant(arguments, separate_work)


def fused(by: str, **settings: Any) -> Variant:
    """A LoRA adapter for each objective on one backbone, all in one forward pass."""

    def arguments(setup: Setup, setting: Setting, **more: Any) -> dict[str, Any]:
        adapters = setup.adapters(setting.objectives, setting.dtype)
        return steered(adapters, setup, setting, by, fuse=True, **settings, **more)

    def work(setup: Setup, setting: Setting, candidates: float) -> list[Cost]:
        count = setting.objectives
        tokens = count * setting.batch * candidates
        updates = adapters_cost(setup.value_config, setting.dtype, setup.rank, count, tokens)
        return [model_cost(setup, setting, candidates, copies=count), updates]

    return Variant(arguments, work, settings)


def baseline(scheme: type[Scheme], rounds: int | None = None) -> Variant:
    """One value model for each objective, under a plain scheme."""

    def arguments(setup: Setup, setting: Setting) -> dict[str, Any]:
        models = setup.baseline_models(setting.objectives, setting.dtype)
        processor = scheme(models, equal_weights(setting), BETA, setting.top_k, setup.pad_token_id)
        return {"logits_processor": [processor]}

    return Variant(arguments, separate_work, rounds=rounds)


def separate_work(setup: Setup, setting: Setting, candidates: float) -> list[Cost]:
    """The least work of a value model for each objective."""
    return [model_cost(setup, setting, candidates)] * setting.objectives


def model_cost(setup: Setup, setting: Setting, candidates: float, copies: int = 1) -> Cost:
    """Every row's candidates through a value model, the rows `copies` times."""
    rows = copies * setting.batch
    return forward_cost(setup.value_config, setting.dtype, rows, candidates, setting.middle, causal=False)


def roofline(setup: Setup, setting: Setting, name: str, candidates: float, ceilings: Ceilings) -> float:
    """The least seconds of one step of a variant, half-way through decoding."""
    config, dtype = setup.model.config, setup.model.dtype
    base = [forward_cost(config, dtype, setting.batch, 1, setting.middle), logits_cost(config, dtype, setting.batch)]
    work = [] if name == PLAIN else VARIANTS[name].work(setup, setting, candidates)
    return sum(ceilings.seconds(cost) for cost in base + work)


def mean_candidates(setup: Setup, setting: Setting, name: str) -> float:
    """Candidates a row and step: as set; with min-p, the mean of a short traced run; 0 for plain `generate`."""
    if name == PLAIN:
        return 0
    settings = VARIANTS[name].settings
    if "candidate_min_p" not in settings:
        return settings.get("top_k", setting.top_k) or setup.model.config.vocab_size
    arguments = VARIANTS[name].arguments(setup, setting, trace=True)
    inputs = setup.prompts(0, setting.batch, setting.context, setting.different_lengths)
    decode(setup, setting, inputs, arguments, min(setting.new_tokens, TRACED_TOKENS), seed=0)
    steps = arguments["custom_generate"].trace.steps
    return float(torch.stack([step.reference.isfinite().sum(dim=1).float().mean() for step in steps]).mean())


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
