"""Model cards, rendered from what training and evaluation wrote: no number is typed by hand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from .files import read_json, replace_when_whole

TEMPLATE = Path(__file__).with_name("card_template.md")
KINDS = {"mavis_value": "value model", "mavis_value_head": "value head"}


@dataclass(frozen=True)
class CardConfig:
    """Which card to write.

    Attributes:
        folder: of a trained value function, with its `config.json` and `metrics.json`; the card is its `README.md`.
        name: title of the card, and the repository's name in its examples; None for the folder's name.
        evaluation: results of `mavis evaluate` with this value function, as JSON.
        rewards: what each objective's reward is, in a sentence.
        prompts: what the prompts of the training trees are, in a sentence.
        license: of the value function.
    """

    folder: str
    name: str | None = None
    evaluation: str | None = None
    rewards: dict[str, str] | None = None
    prompts: str | None = None
    license: str = "apache-2.0"


def write_card(config: CardConfig) -> Path:
    """Write a value function's model card, and return its path.

    Raises:
        OSError: no trained value function in the folder.
        ValueError: `config.json` is of something else, or a file is no valid JSON.
    """
    folder = Path(config.folder)
    model, metrics = read_json(folder / "config.json"), read_json(folder / "metrics.json")
    evaluation = read_json(Path(config.evaluation)) if config.evaluation else None
    path = folder / "README.md"
    with replace_when_whole(path) as temporary:
        temporary.write_text(render(config, model, metrics, evaluation), encoding="utf-8")
    return path


def render(
    config: CardConfig, model: Mapping[str, Any], metrics: Mapping[str, Any], evaluation: Mapping[str, Any] | None
) -> str:
    """The card's text.

    Args:
        config: title and words.
        model: `config.json` of the value function.
        metrics: `metrics.json`, of `validation_metrics`.
        evaluation: JSON of `evaluate`, or None.

    Raises:
        ValueError: `model` is no value function's config.
    """
    kind = KINDS.get(str(model.get("model_type")))
    if kind is None:
        raise ValueError(
            f"{config.folder} has a config.json of type {model.get('model_type')!r}, expected {list(KINDS)}."
        )
    objectives = model["objectives"]
    unknown = set(config.rewards or {}) - set(objectives)
    if unknown:
        raise ValueError(f"rewards describes {sorted(unknown)}, but the value function predicts {objectives}.")
    data = ModelCardData(
        license=config.license,
        library_name="mavis-logits",
        base_model=model.get("base_model"),
        language="en",
        tags=["mavis-logits", "value-function", "decoding", *objectives],
    )
    card = ModelCard.from_template(
        data,
        template_str=TEMPLATE.read_text(encoding="utf-8"),
        name=config.name or Path(config.folder).name,
        kind=kind,
        objectives=objectives,
        mean=dict(zip(objectives, model["reward_mean"], strict=True)),
        scale=dict(zip(objectives, model["reward_scale"], strict=True)),
        about=config.rewards or {},
        prompts=config.prompts,
        base=model.get("base_model"),
        layers=(model.get("backbone_config") or {}).get("num_hidden_layers"),
        iteration=model.get("iteration", 0),
        recipe=yaml.safe_dump(model.get("recipe") or {}, sort_keys=False).strip(),
        sampling=((model.get("recipe") or {}).get("data") or {}).get("sampling") or {},
        metrics=metrics,
        fractions=list(metrics[objectives[0]]["by_fraction"]),
        steering=steering_rows(evaluation, objectives),
        evaluation=evaluation,
    )
    return str(card).rstrip() + "\n"


def steering_rows(evaluation: Mapping[str, Any] | None, objectives: list[str]) -> list[dict[str, Any]]:
    """The evaluated settings that these objectives have a part in, and those without steering, for the card's table."""
    rows = []
    for name, row in (evaluation or {"settings": {}})["settings"].items():
        weights = row["setting"].get("weights")
        if weights is None or any(weights.get(objective) for objective in objectives):
            rewards = {key: value for key, value in row.items() if isinstance(value, dict) and "reward" in value}
            rows.append({"name": name, "rewards": rewards, "kl": row["kl"], "kl_error": row["kl_error"]})
    return rows
