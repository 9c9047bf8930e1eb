"""Which variants are compared under which settings, in sections of the report and suites to run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from measuring import Setting
from variants import VARIANTS, WIDE

RECOMPUTED = ["recomputed token, k rows", "recomputed token, one sequence"]
BASELINES = ["repeated cache", *RECOMPUTED]
HEADS = ["value head, processor", "value head, strategy"]
MODELS = ["one value model, strategy", "separate value models, strategy", "fused adapters, strategy"]
ONE = ["value head, strategy", "one value model, strategy"]
ADAPTIVE = [name for name in VARIANTS if "min-p" in name]
STEERED = HEADS + [name for name in VARIANTS if name.startswith(("one", "separate", "fused"))]
PROCESSORS = [name for name in STEERED if name.endswith("processor")]
WIDE_HEADS = [name for name in VARIANTS if f"k {WIDE}" in name]
WHOLE = [name for name in VARIANTS if "vocabulary" in name]


@dataclass(frozen=True)
class Case:
    """Variants to be compared with plain `generate` and each other under one setting."""

    setting: Setting
    variants: Sequence[str]
    rounds: int


@dataclass(frozen=True)
class Section:
    """A table of the report: its title, and what it is about."""

    title: str
    about: str


SECTIONS = {
    "main": Section(
        "Ways to steer",
        "*Processor* and *strategy* are this library's `MavisLogitsProcessor` and `MavisSampling`; "
        "below them the same distribution by plain schemes, as they are found elsewhere.",
    ),
    "batch32": Section("Large batches", "As above, more prompts at once."),
    "head": Section("Value heads by number of candidates", "One head with two outputs."),
    "candidates": Section("More candidates", "Twice as many as above."),
    "objectives": Section("One and three objectives", "Plain schemes run a value model for each."),
    "context": Section("Long prompts", "*Per token* tells what context costs, beside the sections above."),
    "lengths": Section(
        "Prompts of different lengths",
        "From a quarter of the length given to all of it, padded on the left; plain schemes carry the padding along.",
    ),
    "dtype": Section("Value models in bfloat16", "The base model stays as it is."),
    "compiled": Section("Beside a compiled base model", "With a static cache; a strategy has one of its own."),
    "twin": Section("The slow twin", "Every candidate re-forwarded from its first token."),
}  # fmt: skip
SUITES = {"quick": ["main"], "full": list(SECTIONS)} | {name: [name] for name in SECTIONS}


def cpu_cases() -> list[Case]:
    """For SmolLM2 on a CPU: `quick` takes about 15 minutes on two cores, `full` about 40 more."""
    some = ["value head, strategy", *MODELS]
    return [
        Case(Setting("main", batch=1), [*STEERED, *BASELINES], rounds=4),
        Case(Setting("main", batch=8), [*STEERED, *BASELINES], rounds=3),
        Case(Setting("twin", batch=1), ["slow twin"], rounds=1),
        Case(Setting("twin", batch=8, new_tokens=24), ["slow twin"], rounds=1),
        Case(Setting("head", batch=1), [*HEADS, *WIDE_HEADS, *WHOLE], rounds=4),
        Case(Setting("head", batch=8), [*HEADS, *WIDE_HEADS], rounds=3),
        Case(Setting("head", batch=8, new_tokens=16), WHOLE, rounds=1),
        Case(Setting("head", batch=32, new_tokens=24), [*HEADS, *WIDE_HEADS], rounds=3),
        Case(Setting("batch32", batch=32, new_tokens=24), [*some, *ADAPTIVE, *BASELINES], rounds=2),
        Case(Setting("candidates", batch=1, top_k=30), [*some, *BASELINES], rounds=2),
        Case(Setting("candidates", batch=8, top_k=30), [*some, *BASELINES], rounds=2),
        Case(Setting("objectives", batch=8, objectives=1), [*ONE, *RECOMPUTED], rounds=2),
        Case(Setting("objectives", batch=8, objectives=3), [*some, *RECOMPUTED], rounds=2),
        Case(Setting("context", batch=1, context=1024), [*some, *BASELINES], rounds=2),
        Case(Setting("context", batch=8, context=1024, new_tokens=16), [*some, *RECOMPUTED], rounds=1),
        Case(Setting("lengths", batch=8, context=256, different_lengths=True), [*some, *BASELINES], rounds=2),
        Case(Setting("dtype", batch=1, value_dtype="bfloat16"), MODELS, rounds=3),
        Case(Setting("dtype", batch=8, value_dtype="bfloat16"), MODELS, rounds=2),
    ]


def gpu_cases() -> list[Case]:
    """For the shapes of Llama-2-7B and TinyLlama-1.1B in bfloat16 on a GPU."""
    some = ["value head, strategy", *MODELS]
    cases = [
        *(Case(Setting("main", batch=batch), [*STEERED, *BASELINES], rounds=5) for batch in (1, 8)),
        *(Case(Setting("compiled", batch=batch, compiled=True), PROCESSORS, rounds=5) for batch in (1, 8, 32)),
        Case(Setting("batch32", batch=32), [*some, *ADAPTIVE, *BASELINES], rounds=3),
        *(Case(Setting("head", batch=batch), [*HEADS, *WIDE_HEADS, *WHOLE], rounds=5) for batch in (1, 8, 32)),
        *(Case(Setting("candidates", batch=batch, top_k=30), [*some, *BASELINES], rounds=3) for batch in (1, 8)),
        Case(Setting("objectives", batch=8, objectives=1), [*ONE, *RECOMPUTED], rounds=3),
        Case(Setting("objectives", batch=8, objectives=3), [*some, *RECOMPUTED], rounds=3),
        *(Case(Setting("context", batch=batch, context=1024), [*some, *BASELINES], rounds=3) for batch in (1, 8)),
        Case(Setting("lengths", batch=8, context=256, different_lengths=True), [*some, *BASELINES], rounds=3),
        Case(Setting("twin", batch=1), ["slow twin"], rounds=1),
    ]
    return [replace(case, setting=replace(case.setting, value_dtype="bfloat16")) for case in cases]


def dry(cases: Sequence[Case]) -> list[Case]:
    """The same comparisons, so small that all of them run in seconds."""

    def small(setting: Setting) -> Setting:
        context = 24 if setting.context > 64 else 12
        return replace(setting, batch=min(setting.batch, 2), top_k=3, context=context, new_tokens=3)

    return [replace(case, setting=small(case.setting), rounds=1) for case in cases]
