"""How much better values steer with more data, and by which learning rule: heads on one large store of trees.

    python benchmarks/scaling.py --store examples/data/trees/temperature-1 --states runs/states-layer-10 --layer 10

A tenth of the prompts (by a hash of their text) is held out. A run is a number of training prompts, how many of the
first-layer branches of each are kept, a rule and a seed; every run is kept in the output as soon as it is done, and a
rerun makes only those that are missing. `gain` is that of `mavis_training.fitting.efficiency`: standard deviations of
the reward at half a nat, from held-out trees of the reference.
"""

from __future__ import annotations

import argparse
import copy
import platform
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm
from transformers import set_seed

from mavis_logits.backbone import Backbone
from mavis_logits.models import load_chat_model
from mavis_logits.values.value_head import ValueHead
from mavis_training.base.files import read_json, replace_when_whole, write_json
from mavis_training.base.ranks import join
from mavis_training.base.settings import torch_dtype
from mavis_training.fitting.efficiency import sample_actions, steering_efficiency, steering_parts
from mavis_training.fitting.head_config import TrainHeadConfig
from mavis_training.fitting.states import compute_states, read_states, tree_states
from mavis_training.train_head import fit_by_rule, fit_head, starting_head
from mavis_training.trees.data import LabelledTree, load_trees, reward_units, split_by_prompt
from mavis_training.trees.packing import pack
from mavis_training.trees.targets import node_targets, stable_hash
from mavis_training.trees.tree import Tree

ACTIONS = 8
LITTLE = {"bootstrap": 0.0, "dropout": 0.3, "weight_decay": 0.1, "epochs": 2}
SETTINGS: dict[str, dict[str, Any]] = {
    "much regularised": {},
    "much regularised, no bootstrap": {"bootstrap": 0.0},
    "little regularised": LITTLE,
    "little regularised, width 1024": {**LITTLE, "width": 1024},
    "little regularised, two layers": {**LITTLE, "num_layers": 2},
    **{rule: {**LITTLE, "rule": rule} for rule in ("sums", "gain", "pairs", "balance")},
}


def main() -> None:
    """Make the runs that are missing, and the table."""
    arguments = parser().parse_args()
    stores, trees = load_trees(arguments.store, arguments.objectives, 0.0)
    model = load_chat_model(arguments.model, torch_dtype(arguments.dtype))[0]
    states: list[Tensor] = []
    for store, folder in zip(stores, arguments.states, strict=True):
        compute_states(store, model, folder, arguments.layer)
        states += read_states(store, folder)
    if join("cpu").rank:  # under torchrun the others only share the pass above
        return
    of_tree = {id(item): tensor for item, tensor in zip(trees, states, strict=True)}
    training, validation = split_by_prompt(trees, 0.1)
    measured = [item for item in validation if (item.tree.parent == -1).sum() > 1][: arguments.held_out]
    drawn_at = actions_of(measured, model, Path(arguments.states[0], "drawn.safetensors"))
    results = read_json(arguments.output) if arguments.output.exists() else {"runs": {}}
    for name, size, branches, seed in runs(arguments, len(training)):
        key = f"{name} | {size} prompts | {branches} branches | seed {seed}"
        if key in results["runs"]:
            continue
        tqdm.write(key)
        chosen = sorted(training, key=lambda item: stable_hash(f"{seed}/{item.tree.prompt_id}"))[:size]
        if name in arguments.rules:
            drawn_at |= actions_of(chosen, model, Path(arguments.states[0], "drawn.safetensors"))
        kept = [thinned(item, branches, of_tree) for item in chosen]
        found = run(name, kept, validation, measured, of_tree, drawn_at, model, arguments, seed)
        results["runs"][key] = found | {"rule": name, "prompts": len(chosen), "branches": branches, "seed": seed}
        write_json(arguments.output, results)
        arguments.output.with_suffix(".md").write_text(table(results, arguments.objectives), encoding="utf-8")


def actions_of(items: Sequence[LabelledTree], model: Any, file: Path) -> dict[int, Tensor]:
    """Tokens that the reference would choose at every token of some trees; kept in a file."""
    kept = load_file(file) if file.exists() else {}
    missing = [item.tree for item in items if item.tree.prompt_id not in kept]
    embedding = Backbone.of(model).output_embedding
    for i, tree in enumerate(tqdm(missing, desc="actions of the reference", unit="tree")):
        generator = torch.Generator().manual_seed(stable_hash(tree.prompt_id))
        kept[tree.prompt_id] = sample_actions(embedding, tree_states(model, pack(tree)), ACTIONS, generator)
        if i % 100 == 99 or i == len(missing) - 1:
            with replace_when_whole(file) as temporary:
                save_file(kept, temporary)
    return {id(item): kept[item.tree.prompt_id] for item in items}


def runs(arguments: argparse.Namespace, most: int) -> list[tuple[str, int, int, int]]:
    """(rule, prompts, branches, seed) of everything that is to be made, the small ones first."""
    sizes = list(dict.fromkeys(min(size, most) for size in arguments.sizes))
    found = [(name, size, 4, seed) for name in arguments.curves for size in sizes for seed in arguments.seeds]
    at = min(arguments.rules_at, most)
    found += [(rule, at, 4, seed) for rule in arguments.rules for seed in arguments.seeds]
    found += [(arguments.curves[0], at // branches, branches, seed) for branches in arguments.branches
              for seed in arguments.seeds]  # fmt: skip
    return list(dict.fromkeys(found))


def thinned(item: LabelledTree, branches: int, *beside: dict[int, Tensor]) -> LabelledTree:
    """A tree with the first `branches` children of its prompt only; its states and actions are put `beside` it."""
    tree = item.tree
    kept = np.zeros(len(tree), dtype=bool)
    kept[np.flatnonzero(tree.parent == -1)[:branches]] = True
    for node in np.flatnonzero(tree.parent >= 0):
        kept[node] = kept[tree.parent[node]]
    if kept.all():
        return item
    number = np.cumsum(kept) - 1
    parent = np.where(tree.parent[kept] >= 0, number[tree.parent[kept]], -1)
    columns = {name: getattr(tree, name)[kept] for name in ("start", "length", "logp_gen", "logp_ref", "terminal")}
    small = Tree(tree.prompt_id, tree.prompt, tree.prompt_tokens, tree.tokens, parent, columns=tree.columns, **columns)
    rewards = item.rewards[np.isin(tree.leaves(), np.flatnonzero(kept))]
    found = LabelledTree(small, rewards, node_targets(small, rewards))
    layout, prompt = pack(tree), len(tree.prompt_tokens)
    rows = np.concatenate([np.arange(prompt), np.flatnonzero((layout.node >= 0) & kept[layout.node])])
    for of_tree in beside:
        of_tree[id(found)] = of_tree[id(item)][torch.from_numpy(rows)]
    return found


def run(
    name: str,
    training: Sequence[LabelledTree],
    validation: Sequence[LabelledTree],
    measured: Sequence[LabelledTree],
    of_tree: dict[int, Tensor],
    drawn_at: dict[int, Tensor],
    model: Any,
    arguments: argparse.Namespace,
    seed: int,
) -> dict[str, Any]:
    """Train one head, measure it and, where heads are to be kept, keep it."""
    set_seed(seed)
    settings = {"layer": arguments.layer, "drop_leaves": 0.0, "epochs": 3, "seed": seed, "device": "cpu"}
    config = TrainHeadConfig("store", arguments.objectives, "output", **settings | SETTINGS[name])
    started = time.process_time()
    by_positions = replace(config, rule="positions")
    key = str(by_positions), len(training), sum(len(item.tree) for item in training)
    if key not in _fitted:  # rules start from the same head
        head = starting_head(by_positions, model, reward_units(training))
        metrics = fit_head(head, training, list(validation)[:200], of_tree, by_positions)
        _fitted[key] = head, metrics
    head, metrics = copy.deepcopy(_fitted[key])
    found: dict[str, Any] = {}
    if config.rule != "positions":
        found["before the rule"] = gain_of(head, measured, of_tree, drawn_at, arguments.objectives)
        seen = [item for item in training if (item.tree.parent == -1).sum() > 1]
        few = {id(item): drawn_at[id(item)][:, : config.actions] for item in (*seen, *measured)}
        found |= fit_by_rule(head, seen, measured, of_tree, few, replace(config, learning_rate=3e-4))
    if arguments.heads is not None:
        head.save_pretrained(arguments.heads / f"{name}-{len(training)}-{seed}".replace(", ", "-").replace(" ", "-"))
    return found | {
        "objectives": gain_of(head, measured, of_tree, drawn_at, arguments.objectives),
        "r2": {objective: metrics[objective]["r2"] for objective in arguments.objectives},
        "cpu_seconds": round(time.process_time() - started),
        "held_out_trees": len(measured),
        "made": f"{platform.machine()}, torch {version('torch')}, base model in {arguments.dtype}, "
        f"{datetime.now(UTC):%Y-%m-%d}",
    }


_fitted: dict[tuple[str, int, int], tuple[ValueHead, dict[str, Any]]] = {}


def gain_of(
    head: ValueHead,
    trees: Sequence[LabelledTree],
    of_tree: dict[int, Tensor],
    drawn_at: dict[int, Tensor],
    objectives: list[str],
) -> dict[str, dict[str, float]]:
    """Gain and calibration by objective, with the standard error of the gain by a bootstrap over trees."""
    parts = [steering_parts(head, item, of_tree[id(item)], drawn_at[id(item)]) for item in trees]
    rewards = [item.rewards for item in trees]
    found = steering_efficiency(parts, rewards, objectives)
    rng = np.random.default_rng(0)
    drawn = [rng.integers(len(trees), size=len(trees)) for _ in range(200)]
    again = [steering_efficiency([parts[i] for i in d], [rewards[i] for i in d], objectives) for d in drawn]
    for name in objectives:
        found[name]["error"] = float(np.std([each[name]["gain"] for each in again]))
    return found


def table(results: dict[str, Any], objectives: list[str]) -> str:
    """All runs of a kind as one row: means over seeds."""
    kinds: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for each in results["runs"].values():
        kinds.setdefault((each["rule"], each["prompts"], each["branches"]), []).append(each)
    head = ["rule", "prompts", "branches", *objectives, "mean gain", "seeds", "CPU s"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for (rule, prompts, branches), found in kinds.items():
        gains = {o: np.mean([each["objectives"][o]["gain"] for each in found]) for o in objectives}
        errors = {o: np.mean([each["objectives"][o]["error"] for each in found]) for o in objectives}
        mean = np.mean(list(gains.values()))
        error = np.sqrt(np.sum(np.square(list(errors.values())))) / len(objectives)
        cells = [f"{gains[o]:.2f} ± {errors[o]:.2f}" for o in objectives]
        seconds = np.mean([each["cpu_seconds"] for each in found])
        row = [
            rule,
            f"{prompts:,}",
            str(branches),
            *cells,
            f"{mean:.3f} ± {error:.3f}",
            str(len(found)),
            f"{seconds:.0f}",
        ]
        lines.append("| " + " | ".join(row) + " |")
    last = list(results["runs"].values())[-1]
    trees, made = last["held_out_trees"], last["made"]
    note = f"Gain in standard deviations of the reward at half a nat, on {trees} held-out trees. {made}."
    return "\n".join([*lines, "", note, *doublings(results, objectives), ""])


def doublings(results: dict[str, Any], objectives: list[str]) -> list[str]:
    """What twice the prompts add to the gain, by a line through it over their logarithm, for every rule that was tried
    at three sizes or more with all branches."""
    by_rule: dict[str, list[dict[str, Any]]] = {}
    for each in results["runs"].values():
        if each["branches"] == 4:
            by_rule.setdefault(each["rule"], []).append(each)
    lines = []
    for rule, found in by_rule.items():
        sizes = np.log2([each["prompts"] for each in found])
        if len(set(sizes)) < 3:
            continue
        slopes = {}
        for objective in objectives:
            slopes[objective] = np.polyfit(sizes, [each["objectives"][objective]["gain"] for each in found], 1)[0]
        own = ", ".join(f"{objective} {slope:+.3f}" for objective, slope in slopes.items())
        span = f"{2 ** sizes.min():,.0f} to {2 ** sizes.max():,.0f}"
        mean = np.mean(list(slopes.values()))
        lines.append(f"Twice the prompts, {rule}, {span}: {mean:+.3f} on average ({own}), by least squares.")
    return ["", *lines] if lines else []


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    result = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    add = result.add_argument
    add("--store", nargs="+", required=True)
    add("--states", nargs="+", required=True, help="folders of hidden states, one for each store; actions in the first")
    add("--layer", type=int, default=10)
    add("--model", default="smollm2")
    add("--dtype", default="bfloat16", help="of its weights, in the passes that write states and actions")
    add("--heads", type=Path, help="folder in which the heads are kept, for decoding with them")
    add("--objectives", nargs="+", default=["helpful", "harmless", "humour"])
    add("--sizes", type=int, nargs="*", default=[250, 500, 1000, 2000, 4000, 8000])
    add("--curves", nargs="*", default=["little regularised"], choices=list(SETTINGS), help="settings at every size")
    add("--branches", type=int, nargs="*", default=[], help="of each prompt, at as many branches in all")
    add("--rules", nargs="*", default=[], choices=list(SETTINGS))
    add("--rules-at", type=int, default=2000, help="training prompts of the rules, and branches of that study")
    add("--seeds", type=int, nargs="+", default=[0])
    add("--held-out", type=int, default=200, help="trees that heads are measured on")
    add("--output", type=Path, default=Path("docs/results/scaling.json"))
    return result


if __name__ == "__main__":
    main()
