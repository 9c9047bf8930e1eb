"""Train second opinions on helpful, harmless and humour, and measure them.

    python examples/train_gold_rewards.py --data FOLDER [--out examples/rewards/gold.safetensors]

They learn from the collections' **test** halves, which the rewards beside them have not seen, on another model's states
(`rewards/gold.py`); a fifth of the prompts is kept to measure on. Some fifteen minutes on a core. Writes
`docs/results/gold_rewards.json` as well.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections import defaultdict
from hashlib import sha256
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent / "rewards"))

from gold import WEIGHTS, features

from evaluate_rewards import proportion, run_facts
from reward_data import Labelled, Pair, cut_short, harmless_pairs, helpful_pairs, humour_texts, read_collections
from train_rewards import fraction_loss, preference_loss

PAIRS, TEXTS, STEPS, DECAY, SMOOTHING = 1200, 1500, 400, 0.03, 0.05
OBJECTIVES = ("helpful", "harmless", "humour")


def main() -> None:
    """Train and write the weights, and what they are worth."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the source collections")
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    args = parser.parse_args()
    torch.manual_seed(0)
    rows = {objective: rows_of(objective, args.data) for objective in OBJECTIVES}
    read = {objective: [features(*texts) for texts in columns(own)] for objective, own in rows.items()}
    every = torch.cat([part for own in read.values() for part in own])
    weights = {"mean": every.mean(dim=0), "scale": every.std(dim=0) + 1e-6}
    measured = {}
    for objective, own in rows.items():
        standard = [(part - weights["mean"]) / weights["scale"] for part in read[objective]]
        kept = torch.tensor([is_held_out(row) for row in own])
        weights[objective] = fit(standard, own, ~kept)
        measured[objective] = slices([part @ weights[objective] for part in standard], own, kept)
        print(objective, measured[objective], flush=True)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, args.out)
    found = {"held_out": measured, "run": run_facts()}
    Path("docs/results/gold_rewards.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def rows_of(objective: str, data: Path) -> list[Pair] | list[Labelled]:
    """Pairs, or for humour labelled texts, of the test half, cut to the length of a completion."""
    rng = random.Random(0)
    collections = read_collections(data, "test")
    if objective == "humour":
        return humour_texts(collections, cut_short, rng, TEXTS)
    build = {"helpful": helpful_pairs, "harmless": harmless_pairs}[objective]
    rows = build(collections, cut_short, rng)
    return rng.sample(rows, min(PAIRS, len(rows)))


def columns(rows: list[Pair] | list[Labelled]) -> list[tuple[list[str], list[str]]]:
    """(prompts, replies): the better and the worse ones, or the labelled ones."""
    sides = [[(row.better, row.worse) if isinstance(row, Pair) else (row.text,) for row in rows]]
    return [([text[0] for text in side], [text[1] for text in side]) for side in zip(*sides[0], strict=True)]


def is_held_out(row: Pair | Labelled) -> bool:
    """A fifth, by prompt; of texts without one by their first words."""
    prompt, reply = row.better if isinstance(row, Pair) else row.text
    return int(sha256((prompt or reply[:40]).encode()).hexdigest(), 16) % 5 == 0


def fit(read: list[Tensor], rows: list[Pair] | list[Labelled], training: Tensor) -> Tensor:
    """Weights [3 d] of a linear reward, by all rows at once."""
    weights = torch.zeros(read[0].shape[1], requires_grad=True)
    labels = None if isinstance(rows[0], Pair) else torch.tensor([row.label for row in rows])  # type: ignore[union-attr]
    optimizer = torch.optim.AdamW([weights], lr=3e-3, weight_decay=0.0)
    for _ in range(STEPS):
        said = [(part @ weights)[training] for part in read]
        if labels is None:
            loss = preference_loss(torch.cat(said), SMOOTHING, centering=0.0)
        else:
            loss = fraction_loss(said[0], labels[training], SMOOTHING)
        loss = loss + DECAY * weights.square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return weights.detach()


def slices(said: list[Tensor], rows: list[Pair] | list[Labelled], kept: Tensor) -> dict[str, dict[str, float]]:
    """Held-out accuracy by kind of comparison, or of text."""
    hits: dict[str, list[bool]] = defaultdict(list)
    for number in kept.nonzero()[:, 0].tolist():
        row = rows[number]
        if isinstance(row, Pair):
            hits[row.slice].append(bool(said[0][number] > said[1][number]))
        elif row.slice != "mixture":
            hits[row.slice].append(bool(said[0][number] > 0) == (row.label > 0.5))
    return {name: proportion(own) for name, own in hits.items()}


if __name__ == "__main__":
    main()
