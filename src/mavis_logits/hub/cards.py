"""Model cards, rendered from what training and evaluation wrote: no number is typed by hand.

Beside a value function's `config.json` and `metrics.json` a folder may hold `card.json`: the words and the evaluation
that `CardDetails` describes. With these three files its card can be rendered again, under any name.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..backbone.needs import Needs
from ..core.config import MavisConfig
from .bundle import Bundle
from .files import read_json

CARD, CARD_DETAILS, METRICS = "README.md", "card.json", "metrics.json"
PLOTS = ("foresight.png", "steering.png")
KINDS = {"mavis_value": "value model", "mavis_value_head": "value head", "mavis_value_policy": "value policy"}
_TEMPLATES = Path(__file__).parent


@dataclass(frozen=True)
class CardDetails:
    """What a card says that is not in the value function's own config and metrics.

    Attributes:
        rewards: what each objective's reward is, in a sentence.
        prompts: what the prompts of the training trees are, in a sentence.
        datasets: Hub ids of the data sets that the prompts come from.
        evaluation: what `mavis evaluate` wrote, or `evaluation_of` made of it.
        base_weights: which copy of the base model's weights it was trained on, in a sentence, where that matters.
        load_base: Python code for the card's example that sets `model` and `tokenizer` to that copy.
        how_far: at which strength it goes wrong, by what is known of it, in a sentence or two.
        license: of the value function.
        language: of the texts it knows.
        tags: beyond those that every value function has.
    """

    rewards: Mapping[str, str] = field(default_factory=dict)
    prompts: str | None = None
    datasets: Sequence[str] = ()
    evaluation: Mapping[str, Any] | None = None
    base_weights: str | None = None
    load_base: str | None = None
    how_far: str | None = None
    license: str | None = None
    language: str | None = None
    tags: Sequence[str] = ()

    def to_json(self) -> str:
        """The text of `card.json`."""
        content = asdict(self)
        if self.how_far is None:  # which cards from before do not have
            content.pop("how_far")
        return json.dumps(content, indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def read(cls, path: Path) -> CardDetails:
        """Read a `card.json`.

        Raises:
            OSError: no such file, or no JSON object.
            ValueError: an unknown key.
        """
        content = read_json(path)
        unknown = sorted(content.keys() - {f.name for f in fields(cls)})
        if unknown:
            raise ValueError(f"{path} has the unknown key {unknown[0]!r}; known are {[f.name for f in fields(cls)]}")
        return cls(**content)


def render_folder(folder: Path, name: str) -> str:
    """The card of the value function in `folder`, under `name`, from the files that lie there.

    Raises:
        OSError: no `config.json`, or a file that is no JSON object.
        ValueError: `config.json` is of something else.
    """
    details, metrics = folder / CARD_DETAILS, folder / METRICS
    return render_card(
        name,
        read_json(folder / "config.json"),
        CardDetails.read(details) if details.is_file() else CardDetails(),
        read_json(metrics) if metrics.is_file() else None,
        [plot for plot in PLOTS if (folder / plot).is_file()],
    )


def render_card(
    name: str,
    config: Mapping[str, Any],
    details: CardDetails | None = None,
    metrics: Mapping[str, Any] | None = None,
    plots: Sequence[str] = (),
) -> str:
    """The text of a value function's card. What was not measured is said to be so.

    Args:
        name: title; what stands in it before a colon is the id in the card's examples.
        config: `config.json` of the value function.
        details: words and evaluation.
        metrics: `metrics.json`, as training writes it.
        plots: those of `PLOTS` that lie beside the card.

    Raises:
        ValueError: `config` is no value function's, or `details` describe rewards of objectives that it has not.
    """
    details = details or CardDetails()
    kind = KINDS.get(str(config.get("model_type")))
    if kind is None:
        raise ValueError(f"the card of {name} needs a value function's config, of type {' or '.join(KINDS)}; "
                         f"got type {config.get('model_type')!r}")  # fmt: skip
    objectives = list(config["objectives"])
    unknown = sorted(set(details.rewards) - set(objectives))
    if unknown:
        raise ValueError(f"rewards describes {unknown}, but the value function predicts {objectives}")
    evaluation = evaluation_of(details.evaluation, objectives) if details.evaluation else None
    recipe = config.get("recipe") or {}
    by_fraction = metrics[objectives[0]]["by_fraction"] if metrics else {}
    results = [*foresight_results(metrics, objectives), *steering_results(evaluation, objectives)]
    data = ModelCardData(
        model_name=name.partition(":")[0].rpartition("/")[2] if results else None,
        license=details.license,
        language=details.language,
        library_name="mavis-logits",
        base_model=config.get("base_model"),
        datasets=list(details.datasets) or None,
        tags=["mavis", kind.replace(" ", "-"), "decoding", *objectives, *details.tags],
        eval_results=results or None,
    )
    return _render(
        "card_template.md",
        data,
        name=name,
        id=name.partition(":")[0],
        kind=kind,
        is_policy=kind == "value policy",
        in_nats=kind == "value policy" or bool(recipe.get("teachers")),
        objectives=objectives,
        settings={key: value for key, value in (config.get("settings") or {}).items() if key != "temperature"},
        temperature=(config.get("settings") or {}).get("temperature"),
        mean=dict(zip(objectives, config["reward_mean"], strict=True)),
        scale=dict(zip(objectives, config["reward_scale"], strict=True)),
        about=details.rewards,
        prompts=details.prompts,
        highlights=highlights(evaluation, objectives),
        how_far=details.how_far,
        base=config.get("base_model") or "org/language-model",
        base_weights=details.base_weights,
        load_base=(details.load_base or "").strip() or None,
        layers=(config.get("backbone_config") or {}).get("num_hidden_layers"),
        state_layer=config.get("layer"),
        needs=Needs.of(config).in_words(),
        iteration=config.get("iteration", 0),
        recipe=yaml.safe_dump(recipe, sort_keys=False).strip() if recipe else "",
        sampling=(recipe.get("data") or {}).get("sampling") or {},
        metrics=metrics,
        fractions=list(by_fraction),
        within=all("within" in values for values in by_fraction.values()),
        steering=evaluation["settings"] if evaluation else [],
        evaluation=evaluation,
        plots=plots,
    )


def render_bundle_card(
    name: str, bundle: Bundle, details: CardDetails | None = None, custom_generate: bool = False
) -> str:
    """The text of a bundle's card.

    Args:
        name: title, and the id in its examples.
        bundle: what it holds.
        details: of one of its value functions: licence, and how the base model is loaded.
        custom_generate: whether the repository has `custom_generate/generate.py`.
    """
    details = details or CardDetails()
    count = len(bundle.value_functions)
    rows = []
    for objective, entry in bundle.value_functions.items():
        repo, inside = entry.repo, entry.subfolder
        rows.append(
            {
                "name": objective,
                "weight": (bundle.config.weights or {}).get(objective, 0.0) if bundle.config.weights else 1 / count,
                "where": "/".join(part for part in (repo, inside) if part),
                "link": f"https://huggingface.co/{repo}" if repo else f"./{inside}/{CARD}",
                "revision": entry.revision,
            }
        )
    shown = {key: value for key, value in asdict(bundle.config).items() if key in ("beta", "top_k", "normalize")}
    changed = {key: value for key, value in asdict(bundle.config).items() if value != asdict(MavisConfig())[key]}
    data = ModelCardData(
        license=details.license,
        library_name="mavis-logits",
        base_model=bundle.base_model,
        tags=["mavis", "value-model-bundle", "decoding", *bundle.value_functions]
        + (["custom_generate"] if custom_generate else []),
    )
    return _render(
        "bundle_card_template.md",
        data,
        name=name,
        base=bundle.base_model,
        base_weights=details.base_weights,
        load_base=(details.load_base or "").strip() or None,
        objectives=rows,
        settings={key: value for key, value in (shown | changed).items() if key != "weights"},
        custom_generate=custom_generate,
    )


def evaluation_of(evaluation: Mapping[str, Any], objectives: Iterable[str]) -> dict[str, Any]:
    """The part of `mavis evaluate`'s results that a card for `objectives` shows.

    That is the settings that these objectives have a part in, and those without steering. What it returned before comes
    back as it is.
    """
    if isinstance(evaluation["settings"], list):
        return dict(evaluation)
    rows = []
    for name, row in evaluation["settings"].items():
        setting = row["setting"]
        weights = setting.get("weights")
        if weights is None or not setting.get("beta", 1.0) or any(weights.get(o) for o in objectives):
            rewards = {key: value for key, value in row.items() if isinstance(value, dict) and "reward" in value}
            kept = {key: {k: r[k] for k in ("reward", "error", "gain_sd")} for key, r in rewards.items()}
            beta = None if weights is None else setting.get("beta", MavisConfig.beta)
            rows.append({"name": name, "weights": weights, "beta": beta, "rewards": kept})
            rows[-1] |= {"kl": row["kl"], "kl_error": row["kl_error"]}
    config = evaluation["config"]
    return {
        "prompts": evaluation["prompts"],
        "seeds": len(config["seeds"]),
        "max_new_tokens": config["max_new_tokens"],
        "settings": rows,
    }


def highlights(evaluation: Mapping[str, Any] | None, objectives: Sequence[str]) -> list[str]:
    """For each objective that was steered towards alone: what it gained, and how much of that by cutting alone."""
    lines = []
    cut = next((row for row in evaluation["settings"] if row["beta"] == 0), None) if evaluation else None
    for objective in objectives:
        row = _alone(evaluation, objective)
        if row is None or row["rewards"][objective]["gain_sd"] is None:  # a reward that does not vary has no gain
            continue
        gain = f"{row['rewards'][objective]['gain_sd']:+.2f}"
        line = f"Steering towards `{objective}` alone changed its mean reward by **{gain} standard deviations**"
        if cut is not None and cut["rewards"][objective]["gain_sd"] is not None:
            line += f" (merely leaving out unlikely tokens: {cut['rewards'][objective]['gain_sd']:+.2f})"
        rest = {o: r["gain_sd"] for o, r in row["rewards"].items() if o != objective}
        others = {o: gained for o, gained in rest.items() if gained is not None}
        if others:
            line += ". The others changed by " + " and ".join(f"{gained:+.2f} (`{o}`)" for o, gained in others.items())
        lines.append(line + ".")
    return lines


def foresight_results(metrics: Mapping[str, Any] | None, objectives: Sequence[str]) -> list[EvalResult]:
    """Correlation with the final reward, by objective and share of the completion, as the Hub's metadata."""
    if metrics is None:
        return []
    return [
        _result(
            f"{metrics['trees']} held-out trees of completions",
            "pearsonr",
            f"{objective}: correlation with the final reward after {float(share):.0%} of the completion",
            values["correlation"],
        )
        for objective in objectives
        for share, values in metrics[objective]["by_fraction"].items()
    ]


def steering_results(evaluation: Mapping[str, Any] | None, objectives: Sequence[str]) -> list[EvalResult]:
    """Reward and KL of steering towards each objective alone, as the Hub's metadata."""
    results = []
    for objective in objectives:
        row = _alone(evaluation, objective)
        if row is not None and evaluation is not None:
            data, where = f"{evaluation['prompts']} held-out prompts", f"steered by {objective} at beta {row['beta']:g}"
            results.append(_result(data, "reward", f"{objective}, {where}", row["rewards"][objective]["reward"]))
            results.append(_result(data, "kl", f"KL in nats, {where}", row["kl"]))
    return results


def _alone(evaluation: Mapping[str, Any] | None, objective: str) -> dict[str, Any] | None:
    """The first setting that steers towards `objective` only."""
    for row in evaluation["settings"] if evaluation else []:
        weighted = [name for name, weight in (row["weights"] or {}).items() if weight]
        if weighted == [objective] and row["beta"] and objective in row["rewards"]:
            return row
    return None


def _result(dataset: str, metric: str, name: str, value: float) -> EvalResult:
    return EvalResult(
        task_type="text-generation",
        dataset_type="prompts",
        dataset_name=dataset,
        metric_type=metric,
        metric_name=name,
        metric_value=round(value, 4),
    )


def _render(template: str, data: ModelCardData, **values: Any) -> str:
    text = (_TEMPLATES / template).read_text(encoding="utf-8")
    return str(ModelCard.from_template(data, template_str=text, **values)).rstrip() + "\n"
