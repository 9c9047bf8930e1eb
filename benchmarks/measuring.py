"""Timing of `generate`: variants take turns, and every round compares them with plain runs of its own."""

from __future__ import annotations

import gc
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from roofline import synchronize
from schemes import Scheme
from setups import Setup

PLAIN = "plain generate"
_WARM_UP_TOKENS = 4


@dataclass(frozen=True)
class Setting:
    """What all variants of a comparison share.

    Attributes:
        section: of the report.
        batch, top_k, objectives: R, k, M.
        context: tokens of the (longest) prompt.
        new_tokens: tokens that every answer gets.
        different_lengths: prompts of a quarter to all of `context`, padded on the left.
        value_dtype: of the value models.
        compiled: the base model has a static cache, and on a GPU is compiled.
    """

    section: str
    batch: int = 1
    top_k: int = 15
    objectives: int = 2
    context: int = 64
    new_tokens: int = 48
    different_lengths: bool = False
    value_dtype: str = "float32"
    compiled: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """`value_dtype` as torch's."""
        return getattr(torch, self.value_dtype)

    @property
    def middle(self) -> int:
        """Mean length of the sequences half-way through decoding."""
        prompt = self.context * 5 // 8 if self.different_lengths else self.context
        return prompt + self.new_tokens // 2


@dataclass
class Timing:
    """One run of `generate`: its seconds, those of a token after the first, and the memory it took.

    `memory` is in bytes, above what the process held before; None where the system does not tell.
    """

    seconds: float
    token_seconds: float
    memory: int | None


@dataclass
class Measured:
    """The runs of one variant, and beside each what plain `generate` took around it."""

    timings: list[Timing] = field(default_factory=list)
    plain: list[Timing] = field(default_factory=list)

    def add(self, timing: Timing, plain: Timing) -> None:
        """One more run."""
        self.timings.append(timing)
        self.plain.append(plain)

    @property
    def ratios(self) -> list[float]:
        """Time over plain, run by run."""
        return [own.seconds / plain.seconds for own, plain in zip(self.timings, self.plain, strict=True)]

    @property
    def token_ratios(self) -> list[float]:
        """Time per token after the first over plain's, run by run."""
        return [own.token_seconds / plain.token_seconds for own, plain in zip(self.timings, self.plain, strict=True)]

    @property
    def memory(self) -> int | None:
        """The most that any run took."""
        known = [timing.memory for timing in self.timings if timing.memory is not None]
        return max(known, default=None)


def measure(
    setup: Setup, setting: Setting, variants: Mapping[str, dict[str, Any]], rounds: Mapping[str, int]
) -> dict[str, Measured]:
    """Time variants in turns, plain `generate` before and after each, after a few tokens that do not count.

    Args:
        setup: models and prompts.
        setting: what they have in common.
        variants: arguments of `generate` by variant; plain `generate` is added.
        rounds: how many rounds each variant takes part in.

    Returns:
        what was measured by variant, each run beside the mean of the plain ones around it, so that a machine that gets
        slower and faster is slower and faster for both. Plain `generate` included: each run beside the one before it.
    """
    measured = {name: Measured() for name in (PLAIN, *variants)}
    # What is compiled is compiled for one length: then only a whole run warms up.
    few = setting.new_tokens if setting.compiled else min(_WARM_UP_TOKENS, setting.new_tokens)
    inputs = setup.prompts(0, setting.batch, setting.context, setting.different_lengths)
    fresh = {name: decode(setup, setting, inputs, own, few, 0) for name, own in {PLAIN: {}, **variants}.items()}
    for turn in range(1, max(rounds.values(), default=1) + 1):
        inputs = setup.prompts(turn, setting.batch, setting.context, setting.different_lengths)
        before = decode(setup, setting, inputs, {}, setting.new_tokens, turn)
        taking_part = [name for name in variants if turn <= rounds[name]]
        for name in taking_part:
            timing = decode(setup, setting, inputs, variants[name], setting.new_tokens, turn)
            after = decode(setup, setting, inputs, {}, setting.new_tokens, turn)
            # Buffers that a processor keeps from run to run show only in its first one.
            timing.memory = _larger(timing.memory, fresh[name].memory)
            after.memory = _larger(after.memory, fresh[PLAIN].memory)
            measured[name].add(timing, _mean(before, after))
            measured[PLAIN].add(after, before)
            before = after
        print(_line(setting, turn, measured, taking_part), flush=True)
    return measured


def decode(
    setup: Setup,
    setting: Setting,
    inputs: Mapping[str, Tensor],
    arguments: Mapping[str, Any],
    new_tokens: int,
    seed: int,
) -> Timing:
    """Time `generate` for exactly `new_tokens` tokens a row."""
    for processor in arguments.get("logits_processor", ()):
        if isinstance(processor, Scheme):
            processor.reset()
    torch.manual_seed(seed)
    clock = FirstToken(setup.device)
    with peak_memory(setup.device) as peak:
        synchronize(setup.device)
        start = time.perf_counter()
        setup.model.generate(
            **inputs,
            do_sample=True,
            top_k=0,
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            pad_token_id=setup.pad_token_id,
            stopping_criteria=StoppingCriteriaList([clock]),
            **({"cache_implementation": "static"} if setting.compiled else {}),
            **arguments,
        )
        synchronize(setup.device)
        end = time.perf_counter()
    if clock.time is None:
        raise ValueError("generate never asked its stopping criteria: the first token's time is not known")
    return Timing(end - start, (end - clock.time) / max(1, new_tokens - 1), peak[0] if peak else None)


class FirstToken(StoppingCriteria):
    """Notes when the first token is there; stops nothing."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.time: float | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:  # type: ignore[override]
        """See the class."""
        if self.time is None:
            synchronize(self.device)
            self.time = time.perf_counter()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


@contextmanager
def peak_memory(device: torch.device) -> Iterator[list[int]]:
    """Yield a list that in the end holds the most memory, in bytes, that was in use above what was before.

    The GPU's where that is the device, else the process's, which Linux tells. The list stays empty on other systems.
    """
    peak: list[int] = []
    gc.collect()  # garbage of before that goes meanwhile would hide as much of what comes
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield peak
        peak.append(torch.cuda.max_memory_allocated(device) - before)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
        before = _process_memory("VmRSS")
    except OSError:
        yield peak
        return
    yield peak
    peak.append(max(0, _process_memory("VmHWM") - before))


def _process_memory(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    if found is None:
        raise OSError(f"the system does not tell {name}")
    return int(found[1]) * 1024


def _mean(one: Timing, other: Timing) -> Timing:
    """Their mean; of no memory."""
    return Timing((one.seconds + other.seconds) / 2, (one.token_seconds + other.token_seconds) / 2, None)


def _larger(one: int | None, other: int | None) -> int | None:
    return one if other is None else other if one is None else max(one, other)


def _line(setting: Setting, turn: int, measured: Mapping[str, Measured], done: Iterable[str]) -> str:
    ratios = ", ".join(f"{name} {measured[name].ratios[-1]:.2f}" for name in done)
    plain = measured[PLAIN].plain[-1].seconds
    return f"{setting.section}, batch {setting.batch}, round {turn}: plain {plain:.2f} s; over plain: {ratios}"
