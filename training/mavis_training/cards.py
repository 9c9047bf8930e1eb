"""`mavis card`: a value function's folder gets its model card, rendered from what training and evaluation wrote."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from importlib.util import find_spec
from pathlib import Path

from mavis_logits.hub.cards import CARD, CARD_DETAILS, KINDS, METRICS, CardDetails, evaluation_of, render_folder

from .base.files import read_json, replace_when_whole


@dataclass(frozen=True)
class CardConfig:
    """Which card to write. What is not given is as an earlier `card.json` in the folder has it.

    Attributes:
        folder: of a trained value function, with its `config.json` and `metrics.json`; the card is its `README.md`.
        name: title of the card, and the id in its examples; None for the folder's name.
        evaluation: results of `mavis evaluate` with this value function, as JSON.
        rewards: what each objective's reward is, in a sentence.
        prompts: what the prompts of the training trees are, in a sentence.
        datasets: Hub ids of the data sets that the prompts come from.
        base_weights: which copy of the base model's weights it was trained on, in a sentence, where that matters.
        load_base: Python code for the card's example that sets `model` and `tokenizer` to that copy.
        how_far: at which strength it goes wrong, by what is known of it, in a sentence or two: by a second opinion that
            it was not trained on, say.
        license: of the value function, by its Hub identifier, such as `apache-2.0`.
        language: of the texts it knows, such as `en`.
        plots: draw the card's two pictures, too (needs matplotlib).
    """

    folder: str
    name: str | None = None
    evaluation: str | None = None
    rewards: dict[str, str] | None = None
    prompts: str | None = None
    datasets: list[str] | None = None
    base_weights: str | None = None
    load_base: str | None = None
    how_far: str | None = None
    license: str | None = None
    language: str | None = None
    plots: bool = True


def write_card(config: CardConfig) -> Path:
    """Write a value function's model card and the `card.json` that it can be rendered from again; return its path.

    Raises:
        OSError: no trained value function in the folder.
        ValueError: `config.json` is of something else, or a file is no valid JSON.
        ImportError: pictures are wanted, and matplotlib is not installed.
    """
    folder = Path(config.folder)
    model, metrics = read_json(folder / "config.json"), read_json(folder / METRICS)
    if model.get("model_type") not in KINDS:
        raise ValueError(f"{folder} has a config.json of type {model.get('model_type')!r}, expected {list(KINDS)}.")
    objectives = model["objectives"]
    said = CardDetails.read(folder / CARD_DETAILS) if (folder / CARD_DETAILS).is_file() else CardDetails()
    given = {f.name: getattr(config, f.name, None) for f in fields(CardDetails)}
    if config.evaluation is not None:
        given["evaluation"] = evaluation_of(read_json(Path(config.evaluation)), objectives)
    details = replace(said, **{name: value for name, value in given.items() if value is not None})
    if config.plots:
        draw_plots(folder, {name: metrics[name] for name in objectives}, details.evaluation)
    _write(folder / CARD_DETAILS, details.to_json())
    _write(folder / CARD, render_folder(folder, config.name or folder.resolve().name))
    return folder / CARD


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def draw_plots(folder: Path, metrics: Mapping[str, Mapping], evaluation: Mapping | None) -> None:
    """Write `foresight.png` and, with an evaluation, `steering.png` into `folder`.

    Args:
        folder: of the card.
        metrics: of the validation, by objective.
        evaluation: what `evaluation_of` returns.

    Raises:
        ImportError: matplotlib is not installed.
    """
    if not can_draw():
        raise ImportError('the pictures of a card need matplotlib: pip install "mavis-logits[demo]", or plots: false')
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axes = figure.subplots()
    for objective, values in metrics.items():
        shares = [float(share) for share in values["by_fraction"]]
        axes.plot(shares, [v["correlation"] for v in values["by_fraction"].values()], marker="o", label=objective)
    axes.set(xlabel="share of the answer that is written", ylabel="correlation with the final reward", ylim=(-0.05, 1))
    axes.legend()
    _save(figure, folder / "foresight.png")
    if evaluation is None:
        return
    rows = evaluation["settings"][::-1]  # the first on top
    names = list(rows[0]["rewards"])
    height = 0.8 / len(names)
    figure = Figure(figsize=(6, 0.9 + 0.4 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for index, name in enumerate(names):
        places = [row - index * height for row in range(len(rows))]
        axes.barh(places, [row["rewards"][name]["gain_sd"] or 0.0 for row in rows], height, label=name)
    labels = [f"{row['name']} ({row['kl']:.0f} nats)" for row in rows]
    axes.set_yticks([row - 0.4 + height / 2 for row in range(len(rows))], labels)
    axes.axvline(0, color="black", linewidth=0.6)
    axes.set(xlabel="change of mean reward (standard deviations)")
    axes.legend(fontsize=8)
    _save(figure, folder / "steering.png")


def _save(figure, path: Path) -> None:  # type: ignore[no-untyped-def]
    with replace_when_whole(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110, metadata={"Software": None})


def _write(path: Path, text: str) -> None:
    with replace_when_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
