"""Seconds that a step of reinforcement learning takes: TRL's RLOO, and the same gradient on packed trees.

    python benchmarks/tuning.py            # SmolLM2, a helpful policy: some ten minutes on two cores

Both take `batch_size` answers to the same prompts at every step, the same adapter, reward and temperature, in turns,
each turn a fresh `mavis tune`. What is timed is the training itself, without loading and without what is measured
afterwards. TRL keeps activations (`gradient_checkpointing: false`), which is its faster way where memory does not lack.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from decode import machine
from mavis_training.fitting.settings import LoraSettings
from mavis_training.tuning.config import TuneConfig
from mavis_training.tuning.run import tune

METHODS: dict[str, dict[str, Any]] = {"on_policy": {}, "rloo": {"gradient_checkpointing": False}}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write the numbers as JSON and as a table, and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="of both methods (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=2, help="of each round (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=32, help="answers a step (default: %(default)s)")
    parser.add_argument("--generations", type=int, default=4, help="answers to a prompt (default: %(default)s)")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--prompts", default="examples/data/prompts_trees.jsonl")
    parser.add_argument("--reward", default="examples/rewards/helpful")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--out", type=Path, default=Path("docs/results/tuning"), help="of the .json and the .md")
    given = parser.parse_args(argv)
    seconds: dict[str, list[float]] = {method: [] for method in METHODS}
    for turn in range(given.rounds):
        for method in METHODS:
            seconds[method].append(a_step(method, turn, given))
            print(f"round {turn + 1}: {method} {seconds[method][-1]:.1f} s a step", flush=True)
    ratios = [a / b for a, b in zip(seconds["on_policy"], seconds["rloo"], strict=True)]
    names = ("steps", "batch_size", "generations", "model", "dtype")
    found = {
        "seconds_a_step": seconds, "ratio": statistics.median(ratios),
        "settings": {name: getattr(given, name) for name in names},
        "machine": machine(torch.device("cpu")),
        "versions": {name: version(name) for name in ("torch", "transformers", "trl", "mavis-logits")},
        "date": date.today().isoformat(),
    }  # fmt: skip
    given.out.with_suffix(".json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    given.out.with_suffix(".md").write_text(table(found), encoding="utf-8")
    print(table(found))
    return 0


def a_step(method: str, seed: int, given: argparse.Namespace) -> float:
    """Seconds of one of its steps."""
    with tempfile.TemporaryDirectory() as folder:
        config = TuneConfig(
            method, f"{folder}/out", {"reward": 1.0}, prompts=given.prompts, rewards={"reward": given.reward},
            steps=given.steps, batch_size=given.batch_size, generations=given.generations, model=given.model, beta=0.1,
            lora=LoraSettings(rank=16, alpha=32, dropout=0.0), dtype=given.dtype, bf16=given.dtype == "bfloat16",
            device="cpu", seed=seed, trl=METHODS[method],
        )  # fmt: skip
        log = tune(config)["log"]
    return float(next(row["train_runtime"] for row in log if "train_runtime" in row)) / given.steps


def table(found: Mapping[str, Any]) -> str:
    """Seconds of each method, and their ratio round by round."""
    settings, seconds = found["settings"], found["seconds_a_step"]
    lines = ["| method | seconds a step | by round |", "|---|---|---|"]
    for method, own in seconds.items():
        lines.append(f"| {method} | {statistics.median(own):.1f} | {', '.join(f'{value:.1f}' for value in own)} |")
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    lines += [
        "",
        f"on_policy takes {found['ratio']:.2f} of the time of rloo: {settings['batch_size']} answers of at most 48 "
        f"tokens a step, {settings['generations']} to a prompt, {settings['model']} in {settings['dtype']}. "
        f"{found['machine']}; {versions}; {found['date']}.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
