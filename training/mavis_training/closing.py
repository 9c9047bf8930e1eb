"""The last words of a command: what it has made, how good that is, whether it is worth using, and what comes next."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mavis_logits.hub.bundle import BUNDLE_FILE
from mavis_logits.hub.cards import METRICS
from mavis_logits.hub.quality import foresight, is_evidence, weaknesses
from mavis_logits.models import load_tokenizer

from .base.files import read_json
from .evaluate import COMBINED, EvaluateConfig, markdown
from .fitting.head_config import TrainHeadConfig
from .fitting.model_config import TrainModelConfig
from .iteration.config import IterateConfig
from .label import LabelConfig
from .make_prompts import PromptsConfig
from .trees.tree import leaf_texts
from .trees.tree_store import TreeStore

_SHOWN = 160  # characters of an example


def next_step(command: str, **settings: Any) -> str:
    """A line with the command that usually follows."""
    flags = [part for name, value in settings.items() for part in (f"--{name}", _word(value))]
    return f"Next: mavis {' '.join([command, *flags])}"


def of_prompts(config: PromptsConfig) -> str:
    """What samples from the prompts, or trains on the pairs."""
    if config.completions:
        return next_step("sft", data=[config.output], output="runs/sft")
    return next_step("collect", prompts=config.output, store="runs/trees")


def of_sft(output: str) -> str:
    """What the model has learned."""
    metrics = read_json(Path(output) / METRICS)
    losses = [row["eval_loss"] for row in metrics["log"] if "eval_loss" in row]
    change = f", from {losses[0]:.3f} at the first look" if len(losses) > 1 else ""
    return (
        f"{output}: a model tuned on {metrics['training_examples']} examples in {metrics['steps']} steps; loss on "
        f"{metrics['validation_examples']} held-out ones {metrics['validation_loss']:.3f}{change}.\n"
        + next_step("collect", model=output, prompts="prompts.jsonl", store="runs/trees")
    )


def of_iteration(config: IterateConfig, results: Mapping[str, Any]) -> str:
    """Which iteration is best, and whether it is worth using."""
    best = results["iterations"][results["best"]]
    gains = {name: best["measured"][name] for name in config.objectives}
    sure = [f"{name} {row['gain_sd']:+.2f}" for name, row in gains.items() if _is_sure(row)]
    if not sure:
        return f"{config.output}: no iteration changed a reward by more than chance. Not worth using as it is."
    return (
        f"{config.output}: best is iteration {results['best']}, which changes {', '.join(sure)} (standard deviations) "
        f"at {best['measured']['kl']:.1f} nats.\nNext: mavis bundle my-bundle --values {best['value_function']}"
    )


def of_collect(store: TreeStore) -> str:
    """How many trees and completions there are, and how they end."""
    trees = list(store)
    leaves = [tree.leaves() for tree in trees]
    lengths = np.array([len(tree.completion(leaf)) for tree, own in zip(trees, leaves, strict=True) for leaf in own])
    longest = store.metadata.sampling["max_new_tokens"]
    cut = (lengths >= longest).mean()
    lines = [
        f"{store.folder}: {len(trees)} trees with {len(lengths)} completions of {lengths.mean():.0f} tokens on "
        f"average; {cut:.0%} were cut off at max_new_tokens {longest}."
    ]
    if len(trees) < 100:
        lines.append(f"{len(trees)} trees do for a trial; a value function worth using takes some hundreds or more.")
    return "\n".join([*lines, next_step("label", store=store.folder, **{"rewards.NAME": "file.py:function"})])


def of_label(config: LabelConfig, store: TreeStore) -> str:
    """Mean and spread of every reward, the share of it that completions decide, and the ends of its scale."""
    tokenizer = load_tokenizer(config.tokenizer or store.metadata.model)
    lines = []
    for objective in config.rewards:
        rewards = store.rewards(objective)
        values = np.concatenate(rewards)
        within = float(np.sqrt(np.mean(np.concatenate([own - own.mean() for own in rewards]) ** 2)))
        lines.append(
            f"{objective}: {len(values)} rewards, mean {values.mean():.3g}, standard deviation {values.std():.3g} "
            f"(among completions of one prompt {within:.3g}), from {values.min():.3g} to {values.max():.3g}."
        )
        if values.std() > 0 and within < 0.1 * values.std():
            lines.append(f"  Nearly all of {objective} depends on the prompt: steering can change little of it.")
        lines += _ends(store, objective, rewards, tokenizer)
    lines.append(
        next_step(
            "train-head",
            store=store.folder,
            objectives=list(config.rewards),
            output="runs/head",
            model=store.metadata.model,
        )
    )
    return "\n".join(lines)


def _ends(store: TreeStore, objective: str, rewards: Sequence[Any], tokenizer: Any) -> list[str]:
    """The completions of the lowest and the highest reward to one prompt: that where these are farthest apart."""
    spreads = [float(np.ptp(own)) for own in rewards]
    index = int(np.argmax(spreads))
    if spreads[index] == 0:
        return []
    tree = next(tree for number, tree in enumerate(store) if number == index)
    texts = leaf_texts(tree, tokenizer)
    own = rewards[index]
    return [
        f"  {own[at]:>8.3g}  {_cut(tree.prompt, 60)} -> {_cut(texts[at], _SHOWN)}"
        for at in (int(own.argmin()), int(own.argmax()))
    ]


def of_training(config: TrainModelConfig | TrainHeadConfig) -> str:
    """What validation says of the value function that was trained, and whether to use it."""
    output, objectives = config.output, config.objectives
    path = Path(output) / METRICS
    if not path.is_file():  # distilled on trees without rewards
        return f"{output}: written; how well it agrees with its teachers is in {path.with_name('agreement.json')}"
    metrics = read_json(path)
    lines = [f"{output}: on {metrics['trees']} held-out trees,"]
    lines += [f"  {name}: {foresight(metrics[name])}" for name in objectives]
    for name, found in metrics.get("steering", {}).items():
        alone = f", by values without log pi_ref {found['gain_of_values']:.2f}" if "gain_of_values" in found else ""
        lines.append(f"  {name}: foreseen gain {found['gain']:.2f} standard deviations at half a nat of KL{alone}")
    if not is_evidence(metrics):
        lines.append(f"  {metrics['trees']} held-out trees are too few to say how good it is: collect more.")
    if weaknesses(metrics, objectives) and is_evidence(metrics):
        lines.append(
            "Not worth using: mavis bundle and mavis push refuse it. Collect more trees, or check that the reward "
            "varies among completions of one prompt (mavis label says so)."
        )
    else:
        model = config.model if isinstance(config, TrainHeadConfig) else config.backbone
        settings = {"prompts": "held-out.txt", "value_functions": output, "model": model, "output": "results.json"}
        rewards = {f"rewards.{name}": "file.py:function" for name in objectives}
        lines.append(next_step("evaluate", **settings, completions="runs/completions", **rewards))
    return "\n".join(lines)


def of_evaluation(config: EvaluateConfig, results: Mapping[str, Any]) -> str:
    """The table, what of it is more than chance, and where it lies."""
    lines = [markdown(results).rstrip(), ""]
    objectives = [*results["config"]["rewards"], *([COMBINED] if results["config"]["combined"] is not None else [])]
    steered = {name: row for name, row in results["settings"].items() if row["setting"]}
    better = False
    for name, row in steered.items():
        gains = {objective: row[objective] for objective in objectives}
        sure = {o: g for o, g in gains.items() if _is_sure(g)}
        up = [f"{o} {g['gain_sd']:+.2f}" for o, g in sure.items() if g["gain_sd"] > 0]
        down = [f"{o} {g['gain_sd']:+.2f}" for o, g in sure.items() if g["gain_sd"] < 0]
        better |= bool(up)
        told = "; ".join(
            part for part in (up and f"raises {', '.join(up)}", down and f"costs {', '.join(down)}") if part
        )
        lines.append(f"{name}: {told or 'no change that is more than chance'} (in standard deviations).")
    if steered:
        lines.append(
            "Worth using where the gain is worth its KL and its cost elsewhere; compare with a system prompt first."
            if better
            else "Not worth using as it is: train on more trees, or steer with a higher beta."
        )
    lines.append(f"Written: {config.output} and {Path(config.output).with_suffix('.md')}")
    values = config.value_functions
    if better and isinstance(values, str) and not (Path(values) / BUNDLE_FILE).exists():
        lines.append(f"Next: mavis bundle my-bundle --values {values}")
    return "\n".join(lines)


def _is_sure(gain: Mapping[str, Any]) -> bool:
    """Whether a gain is farther from 0 than two standard errors."""
    error = gain["gain_sd_error"]
    return gain["gain_sd"] is not None and error is not None and abs(gain["gain_sd"]) > 2 * error


def _cut(text: str, length: int) -> str:
    shown = " ".join(text.split()) or "(nothing)"
    return shown if len(shown) <= length else shown[: length - 3] + "..."


def _word(value: Any) -> str:
    return shlex.quote(",".join(map(str, value)) if isinstance(value, list) else str(value))
