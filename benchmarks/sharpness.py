"""What log pi_ref adds to the values of heads, foreseen on trees that they have not learnt from.

    python benchmarks/sharpness.py      # a quarter of an hour on a core

To first order a tilt gains Cov(R, G) / sqrt(sum of variances) for sqrt(2 KL) = 1 (`mavis_training.fitting.efficiency`).
Here that is measured for log pi_ref alone, which is a lower temperature, for a head's values alone, and for both in the
best proportion, found on the same trees. Results go to docs/results/sharpness.json and sharpness.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from decode import machine
from mavis_logits import ValueHead
from mavis_logits.models import load_chat_model
from mavis_training.fitting.efficiency import log_prob_weights, sharpened, steering_efficiency
from mavis_training.fitting.foreseen import parts_of, reference_of
from mavis_training.fitting.states import tree_states
from mavis_training.trees.data import load_trees
from mavis_training.trees.packing import pack

_RESAMPLES = 500
Parts = list[tuple[np.ndarray, np.ndarray]]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--heads", nargs="+", default=["model_cards/smollm2-135m-taught-head", "model_cards/smollm2-135m-value-head"]
    )
    parser.add_argument("--store", default="examples/data/trees/temperature-1-bfloat16")
    parser.add_argument("--trees", type=int, default=200, help="of the store (default: %(default)s)")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("docs/results/sharpness"), help="of the .json and the .md")
    given = parser.parse_args(argv)
    model = load_chat_model(given.model, torch.float32)[0].eval()
    found = {name: of_head(name, given, model) for name in given.heads}
    results = {
        "heads": found, "store": given.store, "trees": given.trees, "seed": given.seed,
        "machine": machine(model.device),
        "versions": {name: version(name) for name in ("torch", "transformers")}, "date": date.today().isoformat(),
    }  # fmt: skip
    given.out.with_suffix(".json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    given.out.with_suffix(".md").write_text(table(results), encoding="utf-8")
    print(table(results))
    return 0


def of_head(name: str, given: argparse.Namespace, model: Any) -> dict[str, dict[str, float]]:
    """By objective: the gains of log pi_ref, of the values and of both, the weight, and their standard errors."""
    head = ValueHead.from_pretrained(name).bind(model).float().eval()
    (store,), trees = load_trees(given.store, head.config.objectives, 0.0, most=given.trees)
    trees = [item for item in trees if (item.tree.parent == -1).sum() > 1]
    how = reference_of(store)
    if how is None:
        raise SystemExit(f"{given.store} was sampled from a policy: name trees of the base model alone")
    states = [(item, tree_states(model, pack(item.tree), head.config.layer)) for item in trees]
    parts, rewards = parts_of(head, model, states, given.seed, *how), [item.rewards for item in trees]
    at_first = measured(parts, rewards)
    rng = np.random.default_rng(given.seed)
    picks = [rng.integers(len(parts), size=len(parts)) for _ in range(_RESAMPLES)]
    again = [measured([parts[i] for i in pick], [rewards[i] for i in pick]) for pick in picks]
    errors = {key: np.std([one[key] for one in again], axis=0) for key in at_first}
    return {
        objective: {
            key: float(value[m]) for key, values in at_first.items()
            for key, value in ((key, values), (f"{key} error", errors[key]))
        }
        for m, objective in enumerate(head.config.objectives)
    }  # fmt: skip


def measured(parts: Parts, rewards: list[np.ndarray]) -> dict[str, np.ndarray]:
    """Gains `[M]` of log pi_ref alone, of the values alone and of both, and what a nat counts for."""
    weights = log_prob_weights(parts)
    names = [str(m) for m in range(len(weights))]
    sides: dict[str, Parts] = {
        "log pi_ref": [(c[:, 1], s[:, 1, 1]) for c, s in parts],
        "values": sharpened(parts, np.zeros_like(weights)),
        "both": sharpened(parts, weights),
    }
    gains = {
        side: np.array([one["gain"] for one in steering_efficiency(own, rewards, names).values()])
        for side, own in sides.items()
    }
    return gains | {"weight": weights}


def table(results: dict[str, Any]) -> str:
    """The numbers as a table in Markdown."""
    lines = [
        "| head | objective | log pi_ref alone | values alone | both | a nat counts for |",
        "|---|---|---|---|---|---|",
    ]
    for name, objectives in results["heads"].items():
        for objective, own in objectives.items():
            gains = " | ".join(
                f"{own[key]:+.3f} ± {own[f'{key} error']:.3f}" for key in ("log pi_ref", "values", "both")
            )
            weight = f"{own['weight']:+.4f} ± {own['weight error']:.4f}"
            lines.append(f"| {Path(name).name} | {objective} | {gains} | {weight} |")
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    lines += [
        "",
        "Foreseen gain in standard deviations of the reward for sqrt(2 KL) = 1 ± standard errors over trees "
        "(bootstrap); a nat of log pi_ref in the head's own units. "
        f"{results['trees']} trees of {results['store']}, seed {results['seed']}; {results['machine']}; {versions}; "
        f"{results['date']}.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
