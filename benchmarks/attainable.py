"""What steering could gain at best: the optimum of equation 1 among the answers that stored trees have.

    python benchmarks/attainable.py examples/data/trees/temperature-1 --out docs/results/attainable

Over the answers y of one tree, drawn from the reference with weights w, equation 1 is solved by weights proportional to
w exp(R / eta): no policy gains more among these answers at the divergence that this spends. As eta falls it becomes the
best answer of each tree, picked by the reward itself, which costs up to the log of their number (2.7 nats for 15). So
the gains say how much of a reward's spread lies within prompts, which is all that steering can reach, and how far the
values that are measured beside them are from knowing the reward in advance.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mavis_training.fitting.efficiency import leaf_shares
from mavis_training.trees.data import LabelledTree, load_trees
from mavis_training.trees.tree_store import TreeStore

ETAS = (1.0, 0.5, 1 / 3, 0.2, 0.1)
BEST = "best answer"


def main(argv: Sequence[str] | None = None) -> int:
    """Write the numbers as JSON and as a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", help="folder of labelled trees, sampled from the reference")
    parser.add_argument("--out", default="docs/results/attainable", help="of the .json and the .md")
    given = parser.parse_args(argv)
    objectives = TreeStore.open(given.store).objectives()
    _, trees = load_trees(given.store, objectives, 0.0)
    found = attainable(trees, objectives)
    out = Path(given.out)
    out.with_suffix(".json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    out.with_suffix(".md").write_text(table(found), encoding="utf-8")
    print(table(found))
    return 0


def attainable(trees: Sequence[LabelledTree], objectives: Sequence[str]) -> dict[str, Any]:
    """By objective: the share of the reward's standard deviation that is within prompts, and for every eta and for the
    best answer `gain` in standard deviations of the reward, its standard error over prompts, and `kl` in nats."""
    every = np.concatenate([item.rewards for item in trees])
    scale = every.std(axis=0)
    parts = [(leaf_shares(item.tree)[:, None], item.rewards / scale) for item in trees]
    within = np.sqrt(np.mean([(w * (r - (w * r).sum(axis=0)) ** 2).sum(axis=0) for w, r in parts], axis=0))
    rows: dict[str, list[tuple[Any, Any]]] = {}
    for weights, rewards in parts:
        for eta in (*ETAS, 0.0):
            rows.setdefault(f"eta {eta:.2g}" if eta else BEST, []).append(tilted(weights, rewards, eta))
    measured = {name: [np.stack(column) for column in zip(*own, strict=True)] for name, own in rows.items()}
    return {"trees": len(trees), "answers": len(every)} | {
        objective: {
            "within": float(within[m]),
            "at": {
                name: {
                    "gain": float(gain[:, m].mean()), "error": float(gain[:, m].std() / len(trees) ** 0.5),
                    "kl": float(kl[:, m].mean()),
                }
                for name, (gain, kl) in measured.items()
            },
        }
        for m, objective in enumerate(objectives)
    }  # fmt: skip


def tilted(weights: np.ndarray, rewards: np.ndarray, eta: float) -> tuple[np.ndarray, np.ndarray]:
    """Gain and KL divergence `[M]` of the optimum over L answers.

    Args:
        weights: `[L, 1]` of the reference, summing to 1.
        rewards: `[L, M]`.
        eta: of equation 1; 0 for the best answer alone (those that are equally good together).
    """
    if eta:
        logits = np.log(weights) + rewards / eta
        raised = np.exp(logits - logits.max(axis=0))
    else:
        raised = weights * (rewards == rewards.max(axis=0))
    raised = raised / raised.sum(axis=0)
    ratio = np.log(np.where(raised > 0, raised / weights, 1.0))
    return ((raised - weights) * rewards).sum(axis=0), (raised * ratio).sum(axis=0)


def table(found: dict[str, Any]) -> str:
    """The numbers as a table in Markdown."""
    names = [name for name, value in found.items() if isinstance(value, dict)]
    steps = list(found[names[0]]["at"])
    lines = [
        "| objective | spread within prompts |" + "".join(f" {step} |" for step in steps),
        "|---|---|" + "---|" * len(steps),
    ]
    for name in names:
        cells = (f" {at['gain']:+.2f} ± {at['error']:.2f} ({at['kl']:.1f}) |" for at in found[name]["at"].values())
        lines.append(f"| {name} | {found[name]['within']:.2f} |" + "".join(cells))
    lines += [
        "",
        "Gains in standard deviations of the reward ± standard errors over prompts, in brackets nats; "
        f"{found['trees']} trees, {found['answers']} answers. Spread: the standard deviation within prompts, of all.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())
