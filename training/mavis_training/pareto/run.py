"""`mavis pareto`: every method at every weighting, and what their trade-offs are worth."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..base.files import read_json, write_json
from ..base.prompts import read_prompts
from ..evaluate import evaluate
from ..measure.completions import Completions
from ..measure.summary import distinct
from ..measure.win_rate import VERDICTS, Judge
from .analysis import (
    Array,
    Points,
    bootstrap,
    coverage,
    front,
    holm,
    hypervolume,
    interval,
    mean_inner_product,
    p_value,
    resampled,
    spacing,
)
from .beside import points_of, read_beside, require_same_model
from .config import UNSTEERED, Cell, ParetoConfig
from .report import draw, markdown, page

FEWEST = 10  # prompts for an interval
SHOWN = 6  # prompts whose answers are on the page
HARMFUL = "harmful"  # the `kind` of prompts whose answers are on no page


def pareto(
    config: ParetoConfig, loaded_base: tuple[PreTrainedModel, PreTrainedTokenizerBase] | None = None
) -> dict[str, Any]:
    """Measure all cells, write results, table, figures and page, and return the results.

    Killed at any instant, a rerun loses the cell in flight; the same run twice gives the same numbers.

    Args:
        config: what to compare.
        loaded_base: the base model and its tokenizer, if they are loaded already.

    Raises:
        ValueError: a method that cannot be read, completions of another protocol, too few prompts for an interval.
        OSError: a file that cannot be read.
    """
    rows = read_prompts(config.prompts, config.limit)
    if len(rows) < FEWEST:
        raise ValueError(
            f"{config.prompts} has {len(rows)} prompts, too few to say how sure a difference is: give at least {FEWEST}"
        )
    others = {path: read_beside(path, config) for path in config.beside}
    if config.judge is not None and not _all_judged(config):
        Judge(config.judge).require_there()
    output = Path(config.output)
    evaluation = config.evaluation()
    object.__setattr__(evaluation, "output", str(Path(config.completions, "cells.json")))
    evaluated = evaluate(evaluation, loaded_base)
    cells = {cell.name: cell for cell in config.cells()}
    plain = rewards_of(config, UNSTEERED)
    flat = [name for name in config.traded if plain[name].std() == 0]
    if flat:
        raise ValueError(f"the reward of {', '.join(flat)} does not vary between the model's own answers: no units")
    results: dict[str, Any] = {name: evaluated[name] for name in ("date", "machine", "versions", "prompts")}
    results |= {
        "config": {**evaluated["config"], "settings": None, "judge": config.judge and asdict(config.judge),
                   "methods": config.methods, "steps": config.steps,
                   "most_kl": config.most_kl, "worst": config.worst, "objectives": list(config.traded)},
        "cells": {
            name: {"method": cell.method, "weights": cell.weights, "swept": cell.swept, "setting": cell.setting}
            | _measured(config, cell, plain, rows)
            for name, cell in cells.items()
        },
        "missing": config.missing(),
        UNSTEERED: evaluated["settings"][UNSTEERED],
    }  # fmt: skip
    for path, found in others.items():
        require_same_model(path, found[UNSTEERED], results[UNSTEERED])
        results["cells"] |= found["cells"]
    by_method: dict[str, list[Any]] = {}
    for cell in results["cells"].values():
        by_method.setdefault(cell["method"], []).append(cell)
    results["methods"] = compared({name: points_of(own, config) for name, own in by_method.items()}, config)
    write_json(output, results)
    output.with_suffix(".md").write_text(markdown(results), encoding="utf-8")
    draw(results, output.with_suffix(".png"))
    shown = _answers(config, cells, results, rows)
    output.with_suffix(".html").write_text(page(results, shown), encoding="utf-8")
    return results


def _all_judged(config: ParetoConfig) -> bool:
    return all(Path(config.completions, f"{cell.name}{VERDICTS}").exists() for cell in config.cells())


def rewards_of(config: ParetoConfig, cell: str) -> dict[str, Array]:
    """[S * P * n] rewards by objective that the evaluation has kept of a cell."""
    content = read_json(Path(config.completions) / f"{cell}.rewards.json")["rewards"]
    return {name: np.asarray(content[name]["values"], dtype=np.float64) for name in config.rewards}


def completions_of(config: ParetoConfig, cell: str) -> Completions:
    """What the evaluation has kept of a cell."""
    content = read_json(Path(config.completions) / f"{cell}.json")
    return Completions(**{name: value for name, value in content.items() if name != "origin"})


def _measured(
    config: ParetoConfig, cell: Cell, plain: Mapping[str, Array], rows: list[dict[str, Any]]
) -> dict[str, Any]:
    """The numbers of a cell."""
    prompts = len(rows)
    done, rewards = completions_of(config, cell.name), rewards_of(config, cell.name)
    standard = {name: (values - plain[name].mean()) / (plain[name].std() or 1.0) for name, values in rewards.items()}
    returned = done.returned
    utility = sum(cell.weights[name] * standard[name] for name in config.traded)
    which = np.arange(len(done.prompt_ids)) * returned + np.reshape(utility, (-1, returned)).argmax(axis=1)
    kept = {name: values[which].reshape(-1, prompts) for name, values in standard.items()}  # [S, P]
    kl = np.nan
    if done.log_ratios is not None:  # the best of n spends at most log n - (n - 1) / n more
        kl = float(np.mean(done.log_ratios)) + np.log(returned) - (returned - 1) / returned
    texts, lengths = [done.texts[row] for row in which], [done.lengths[row] for row in which]
    won: dict[str, Any] = {}
    if config.judge is not None:
        path = Path(config.completions, f"{cell.name}{VERDICTS}")
        asked = rows * len(config.seeds), texts, completions_of(config, UNSTEERED).texts
        won = {"win_rate": Judge(config.judge).win_rate(path, *asked, prompts)}
    return won | {
        "gains": {name: float(values.mean()) for name, values in kept.items()},
        "errors": {name: float(values.mean(axis=0).std(ddof=1) / np.sqrt(prompts)) for name, values in kept.items()},
        "kl": kl, "tokens": float(np.mean(lengths)), "distinct_2": distinct(texts, 2),
        "tokens_per_second": None if not done.seconds else round(sum(lengths) / done.seconds, 1),
        "which": [int(row) for row in which[:prompts]],
        "by_prompt": {name: [round(float(gain), 4) for gain in kept[name].mean(axis=0)] for name in config.traded},
    }  # fmt: skip


def compared(methods: Mapping[str, Points], config: ParetoConfig) -> dict[str, Any]:
    """By method its numbers, and how its hypervolume stands to that of the method it is compared with."""
    counted = {name: points.at_most(config.most_kl) for name, points in methods.items()}
    corner = np.full(len(config.traded), -float(config.worst))
    against = config.against or next(iter(methods))
    prompts = next(iter(methods.values())).gains.shape[1]
    draws = resampled(prompts, config.resamples)
    volumes = {
        name: bootstrap(lambda means, name=name: hypervolume(means[name], corner), {name: points}, draws)  # type: ignore[misc]
        for name, points in counted.items()
    }
    found: dict[str, Any] = {}
    p_values = {}
    theirs = counted[against].gains.mean(axis=1)
    for name, points in counted.items():
        means = points.gains.mean(axis=1)
        own = hypervolume(means, corner)
        inner = mean_inner_product(means, points.weights)
        found[name] = {
            "cells": len(methods[name].kl), "counted": len(points.kl), "front": int(front(means).sum()),
            "hypervolume": own, "interval": interval(volumes[name], config.level), "spacing": spacing(means),
            "mean_inner_product": inner,
        }  # fmt: skip
        if name != against:
            other = hypervolume(theirs, corner)
            ratios = [a / b for a, b in zip(volumes[against], volumes[name], strict=True) if b > 0]
            found[name] |= {
                "against": against,
                "ratio": other / own if own > 0 else None,
                "ratio_interval": interval(ratios, config.level) if ratios else None,
                "covered": coverage(theirs, means), "covers": coverage(means, theirs),
            }  # fmt: skip
            p_values[name] = p_value([a - b for a, b in zip(volumes[against], volumes[name], strict=True)], 0.0)
    for name, value in holm(p_values).items():
        found[name]["p_corrected"] = value
    return found


def _answers(
    config: ParetoConfig, cells: Mapping[str, Cell], results: Mapping[str, Any], rows: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """For a few prompts that are fit to show, every method's answer at its most even weighting within `most_kl`."""
    even: dict[str, tuple[Any, str]] = {}
    for name, cell in cells.items():
        uneven = max(cell.weights.values()) - min(cell.weights.values())
        kl = results["cells"][name]["kl"]
        far = config.most_kl is not None and not kl <= config.most_kl
        key = (far, uneven, -sum(results["cells"][name]["gains"][n] for n in config.traded))
        even[cell.method] = min(even.get(cell.method, (key, name)), (key, name))
    chosen = {method: name for method, (_, name) in even.items()}
    texts = {method: completions_of(config, name).texts for method, name in chosen.items()}
    plain = completions_of(config, UNSTEERED).texts
    shown = []
    fit_to_show = [i for i, row in enumerate(rows) if row.get("kind") != HARMFUL]
    for i in fit_to_show[:SHOWN]:
        answers = {UNSTEERED: plain[i]}
        answers |= {chosen[m]: texts[m][results["cells"][chosen[m]]["which"][i]] for m in chosen}
        shown.append({"prompt": rows[i]["prompt"], "answers": answers})
    return shown
