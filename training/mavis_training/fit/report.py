"""The page that a fit ends with: what was gained at what price, how sure that is, answers before and after."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from mavis_logits.hub.quality import weaknesses

from ..base.files import replace_when_whole
from .config import FitConfig, told
from .tune import STRENGTHS, Trial

_TEMPLATE = Path(__file__).with_name("report_template.html")
_WIDTH, _HEIGHT, _EDGE = 560, 260, 44  # of a picture, in pixels


@dataclass(frozen=True)
class _Point:
    """A setting in a picture of gain against divergence."""

    x: float
    y: float
    low: float
    high: float
    name: str


def verdict(name: str, row: Mapping[str, Any]) -> str:
    """One sentence on what steering towards an objective does to it.

    Args:
        name: of the objective.
        row: of the setting that steers towards it, as `evaluate` returns it.
    """
    gain, error, kl = row[name]["gain_sd"], row[name]["gain_sd_error"], row["kl"]
    if gain is None:
        return f"{name}: the reward does not vary among the model's own answers, so that nothing can be said."
    price = f"at {kl:.1f} nats from the model"
    if error is None or abs(gain) < 2 * error:
        return f"{name}: {gain:+.2f} standard deviations {price}, no more than chance might do (error {error:.2f})."
    return f"{name}: {gain:+.2f} ± {error:.2f} standard deviations {price}."


def usage(state: Mapping[str, Any]) -> str:
    """How to steer by the bundle in Python, once `model`, `tokenizer` and `inputs` are there."""
    nucleus = "" if state["top_p"] == 1.0 else f", top_p={state['top_p']:g}"
    return (
        "from mavis_logits import MavisSampling\n"
        f'mavis = MavisSampling.from_pretrained("{state["bundle"]}", model=model, tokenizer=tokenizer)\n'
        f"model.generate(**inputs, custom_generate=mavis, do_sample=True, temperature={state['temperature']:g}, top_k=0"
        f"{nucleus})"
    )


def judged(config: FitConfig, metrics: Mapping[str, Any]) -> list[str]:
    """What held-out trees, or pairs, say of the values for each objective."""
    if config.pairs is None:
        return [f"{name}: {_figures(metrics[name])}" for name in config.objectives]
    name, count = config.objective, metrics["trees"]
    right = metrics["ordered_right"][name]["after"]
    words = "" if right > 0.5 + 1 / count**0.5 else ", no more than chance: give more pairs"
    return [f"{name}: of {count} held-out pairs it puts the chosen answer first in {right:.0%}{words}"]


def _figures(values: Mapping[str, Any]) -> str:
    """How well values foresee a reward; whether steering by them is worth it is measured, not judged by this."""
    ranking = values["ranking"]
    return (
        f"foresees it with R2 {values['r2']:.2f}; of two next tokens it prefers the better in "
        f"{ranking['accuracy']:.0%} of {ranking['pairs']} pairs"
    )


def summary(config: FitConfig, results: Mapping[str, Any]) -> list[str]:
    """The verdicts, of every objective and of all together."""
    lines = [verdict(name, results["settings"][by]) for name, by in config.shown]
    together = results["settings"].get("all alike")
    if together is not None:
        gains = ", ".join(f"{name} {together[name]['gain_sd'] or 0.0:+.2f}" for name in config.measured)
        lines.append(f"all alike: {gains} at {together['kl']:.1f} nats.")
    return lines


def write_report(
    path: Path,
    config: FitConfig,
    state: Mapping[str, Any],
    results: Mapping[str, Any],
    tried: Sequence[Trial],
    metrics: Mapping[str, Any],
    answers: Sequence[Mapping[str, str]],
) -> None:
    """Write the page.

    Args:
        path: of the page.
        config: what was wanted.
        state: what `fit.json` holds.
        results: of `evaluate`, on prompts that nothing was learned from or chosen on.
        tried: settings, on the prompts that they were chosen on.
        metrics: of the training.
        answers: a prompt, and by setting what was written to it, in each.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        config=config,
        rewards={name: str(spec) for name, spec in config.measured.items()},
        objectives=config.objectives,
        state=state,
        time=told(state["spent"]),
        verdicts=summary(config, results),
        weak=weaknesses(metrics, config.objectives) if config.pairs is None else [],
        judged=judged(config, metrics),
        trees=metrics.get("training_trees", state["collected"]),
        held_out_trees=metrics["trees"],
        pictures={name: _picture(name, by, results, tried) for name, by in config.shown},
        size=(_WIDTH, _HEIGHT, _EDGE),
        rows=results["settings"],
        prompts=results["prompts"],
        seeds=len(results["config"]["seeds"]),
        answers=answers,
        chosen=state["chosen"],
        usage=usage(state),
        made=f"{datetime.now(UTC).date().isoformat()}, {platform.machine()}, mavis-logits {version('mavis-logits')}, "
        f"transformers {version('transformers')}, torch {version('torch')}, seed {config.seed}",
    )
    with replace_when_whole(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def _picture(name: str, by: str, results: Mapping[str, Any], tried: Sequence[Trial]) -> dict[str, Any]:
    """Points of a reward's gain, steered towards the objective `by`, in pixels, with the ends of both axes."""
    measured = [(results["settings"][by + end], end) for end in sorted(STRENGTHS, key=STRENGTHS.__getitem__)]
    found = [
        (row["kl"], row[name]["gain_sd"] or 0.0, row[name]["gain_sd_error"] or 0.0, end.strip(", ") or "as recommended")
        for row, end in measured
    ]
    others = [(trial.kl, trial.gains[name]) for trial in tried]
    right = 1.1 * max([kl for kl, *_ in found] + [kl for kl, _ in others] + [1.0])
    top = 1.1 * max([gain + error for _, gain, error, _ in found] + [gain for _, gain in others] + [0.2])
    bottom = min([0.0] + [gain - error for _, gain, error, _ in found] + [gain for _, gain in others])

    def x(kl: float) -> float:
        return round(_EDGE + kl / right * (_WIDTH - 2 * _EDGE), 1)

    def y(gain: float) -> float:
        return round(_HEIGHT - _EDGE - (gain - bottom) / (top - bottom) * (_HEIGHT - 2 * _EDGE), 1)

    points = [_Point(x(kl), y(gain), y(gain - error), y(gain + error), word) for kl, gain, error, word in found]
    return {
        "points": [_Point(x(0.0), y(0.0), y(0.0), y(0.0), "left alone"), *points],
        "others": [(x(kl), y(gain)) for kl, gain in others],
        "right": f"{right:.0f}", "top": f"{top:+.1f}", "zero": y(0.0),
    }  # fmt: skip
