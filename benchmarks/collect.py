"""How fast steered trees are collected, beside how fast the same policy decodes: tokens a second, both in one run.

Decoding is `MavisSampling` as the decoding benchmark times it (`measuring.py`), at the batch size that serves it best.
Collecting is Algorithm 3 with the same value functions, trees of several prompts side by side. Both take turns: every
round has other prompts, times decoding before and after collecting, and gives one ratio.

Run it on a machine that does nothing else. Results go to docs/results/collect.json and collect.md:

    python benchmarks/collect.py                                  # SmolLM2, about 15 minutes on two cores
    python benchmarks/collect.py --rounds 1 --prompts 2 --new-tokens 24 --batches 8 16 --out runs/quick
    python benchmarks/collect.py --device cuda                    # shapes of Llama-2-7B and TinyLlama-1.1B
    python benchmarks/collect.py --dry-run --out runs/dry         # tiny random models: does all of it run?
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import transformers

from decode import machine, make_setup
from mavis_logits.decoding.strategies import MavisSampling
from mavis_training.base.files import write_json
from mavis_training.collect import CollectConfig
from mavis_training.iteration.config import LATER_TREES
from mavis_training.sampling.rollout import sample_trees
from measuring import Setting, decode
from roofline import synchronize
from setups import ROOT, Setup
from variants import STRATEGY, steered

OBJECTIVES = 2


@dataclass(frozen=True)
class Policy:
    """What steers: value functions and how many candidates they score."""

    functions: Callable[[Setup], Any]
    top_k: int


POLICIES = {
    "value head": Policy(lambda setup: setup.head(OBJECTIVES), 15),
    "value head, k 200": Policy(lambda setup: setup.head(OBJECTIVES), 200),
    "value model": Policy(lambda setup: setup.shared_model(OBJECTIVES, setup.model.dtype), 15),
}


@dataclass
class Rounds:
    """Tokens a second of both sides, round by round.

    Attributes:
        batch: of decoding: the best of those tried.
        tried: tokens a second by batch size.
        decoding: mean of the runs before and after collecting.
        collecting: tokens a second.
        tokens: of the trees.
    """

    batch: int
    tried: dict[int, float]
    decoding: list[float] = field(default_factory=list)
    collecting: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        """Median over rounds of collecting over decoding."""
        return statistics.median(c / d for c, d in zip(self.collecting, self.decoding, strict=True))


def main(argv: Sequence[str] | None = None) -> int:
    """Measure every policy, write it down and print the table."""
    options = parser().parse_args(argv)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        setup = make_setup(options)
    except (ImportError, ValueError) as error:
        print(f"collect.py: {error}", file=sys.stderr)
        return 2
    results = {name: measure(setup, POLICIES[name], options) for name in options.policies}
    report(results, setup, options)
    return 0


def parser() -> argparse.ArgumentParser:
    """Return the parser of the benchmark's options."""
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = result.add_argument
    add("--policies", nargs="+", default=list(POLICIES), choices=list(POLICIES), help="what steers (default: all)")
    add("--batches", type=int, nargs="+", default=[8, 16, 32, 64], help="batch sizes that decoding may choose from")
    add(
        "--prompts", type=int, default=CollectConfig.prompts_per_shard, help="trees side by side (default: %(default)s)"
    )
    add("--context", type=int, default=64, help="tokens of a prompt (default: %(default)s)")
    add("--new-tokens", type=int, default=48, help="T, tokens of a completion (default: %(default)s)")
    add("--rounds", type=int, default=3, help="default: %(default)s")
    add("--device", default="cpu", choices=["cpu", "cuda"], help="cuda has its own models (default: %(default)s)")
    add("--dry-run", action="store_true", help="tiny random models on the CPU")
    add("--out", type=Path, default=ROOT / "docs" / "results", help="folder for collect.json and collect.md")
    return result


def measure(setup: Setup, policy: Policy, options: argparse.Namespace) -> Rounds:
    """Find the batch size that decodes most tokens a second, then compare it with collecting, round by round."""
    setting = Setting("collect", top_k=policy.top_k, objectives=OBJECTIVES)
    strategy = steered(policy.functions(setup), setup, setting, STRATEGY)["custom_generate"]
    decoding_speed(setup, strategy, min(options.batches), options, 0)  # does not count
    tried = {batch: decoding_speed(setup, strategy, batch, options, 0) for batch in options.batches}
    rounds = Rounds(max(tried, key=lambda batch: tried[batch]), tried)
    before = decoding_speed(setup, strategy, rounds.batch, options, 1)
    for turn in range(1, options.rounds + 1):
        speed, tokens = collecting_speed(setup, strategy, options, turn)
        after = decoding_speed(setup, strategy, rounds.batch, options, turn + 1)
        rounds.decoding.append((before + after) / 2)
        rounds.collecting.append(speed)
        rounds.tokens.append(tokens)
        print(f"round {turn}: {speed:.0f} tokens/s collecting, {rounds.decoding[-1]:.0f} decoding", flush=True)
        before = after
    return rounds


def decoding_speed(setup: Setup, strategy: MavisSampling, batch: int, options: argparse.Namespace, turn: int) -> float:
    """Tokens a second of `generate` with exactly `new_tokens` tokens a row."""
    setting = Setting("collect", batch=batch, context=options.context, new_tokens=options.new_tokens)
    inputs = setup.prompts(turn, batch, options.context, different=False)
    timing = decode(setup, setting, inputs, {"custom_generate": strategy}, options.new_tokens, turn)
    return batch * options.new_tokens / timing.seconds


def collecting_speed(
    setup: Setup, strategy: MavisSampling, options: argparse.Namespace, turn: int
) -> tuple[float, int]:
    """Tokens a second of sampling trees, in the shape of section F.4's later iterations, and how many tokens."""
    shape = CollectConfig("", "", max_new_tokens=options.new_tokens, **LATER_TREES)  # type: ignore[arg-type]
    prompts = setup.prompts(turn, options.prompts, options.context, different=False)["input_ids"].tolist()
    rows = [{"id": str(number), "prompt": ""} for number in range(len(prompts))]
    synchronize(setup.device)
    start = time.perf_counter()
    trees = sample_trees(setup.model, rows, prompts, {setup.model.config.eos_token_id}, shape, turn, 1.0, strategy)
    synchronize(setup.device)
    tokens = sum(len(tree.tokens) for tree in trees)
    return tokens / (time.perf_counter() - start), tokens


def report(results: dict[str, Rounds], setup: Setup, options: argparse.Namespace) -> None:
    """Write collect.json and collect.md, and print the latter."""
    about = {
        "model": setup.name,
        "machine": machine(setup.device),
        "versions": {name: version(name) for name in ("torch", "transformers", "mavis-logits")},
        "date": date.today().isoformat(),
    }
    settings = {name: getattr(options, name) for name in ("prompts", "context", "new_tokens", "rounds")} | LATER_TREES
    rows = {
        name: {
            "batch": own.batch,
            "decoding_by_batch": {str(batch): speed for batch, speed in own.tried.items()},
            "decoding": own.decoding,
            "collecting": own.collecting,
            "tokens": own.tokens,
            "ratio": own.ratio,
        }
        for name, own in results.items()
    }
    options.out.mkdir(parents=True, exist_ok=True)
    write_json(options.out / "collect.json", {"about": about, "settings": settings, "policies": rows})
    text = table(results) + (
        f"\nTokens a second, medians of {options.rounds} rounds; the ratio is the median of the rounds' own. Decoding: "
        f"`MavisSampling`, {options.new_tokens} tokens after {options.context}, at the best of the batch sizes "
        f"{', '.join(map(str, options.batches))}. Collecting: trees of {options.prompts} prompts side by side, L "
        f"{LATER_TREES['layers']}, K_root {LATER_TREES['root_children']}, K {LATER_TREES['children']}, T "
        f"{options.new_tokens}. {about['model']}; {about['machine']}; "
        f"{', '.join(f'{name} {number}' for name, number in about['versions'].items())}; {about['date']}.\n"  # type: ignore[attr-defined]
    )
    (options.out / "collect.md").write_text(text, encoding="utf-8")
    print(text)


def table(results: dict[str, Rounds]) -> str:
    """One line for every policy, in Markdown."""
    lines = ["| policy | collecting | decoding (batch) | collecting / decoding |", "|---|---|---|---|"]
    for name, own in results.items():
        speeds = statistics.median(own.collecting), statistics.median(own.decoding)
        lines.append(f"| {name} | {speeds[0]:.0f} | {speeds[1]:.0f} ({own.batch}) | {own.ratio:.2f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
