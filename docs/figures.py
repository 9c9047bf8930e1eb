"""Draw the figures of docs/how_it_works.md with the library's own arithmetic: `make figures`."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch

from mavis_logits.core.tilting import kl_divergence, normalize, tilt

FOLDER = Path(__file__).parent / "figures"
TOKENS = ["the", "a", "tea", "hot", "well", "first", "boil", "well-known"]
REFERENCE = torch.tensor([[0.34, 0.22, 0.14, 0.10, 0.08, 0.06, 0.04, 0.02]]).log()
VALUES = torch.tensor([[0.2, 0.1, 0.5, 0.35, 0.3, 0.8, 1.0, 0.0]])
STRENGTHS = (0.0, 1.5, 4.0)


def tilted(beta: float) -> torch.Tensor:
    """Log pi [1, k] at a strength, normalised over the candidates."""
    values = normalize(VALUES, torch.ones_like(VALUES, dtype=torch.bool), "minmax")
    return torch.log_softmax(tilt(REFERENCE, values, torch.tensor(beta)), dim=-1)


def draw_tilt(folder: Path) -> Path:
    """Bars of the candidates' probabilities at each strength."""
    figure, axes = mpl.pyplot.subplots(figsize=(8, 3.2), layout="constrained")
    places = np.arange(len(TOKENS))
    for number, (beta, colour) in enumerate(zip(STRENGTHS, ("#9aa5b1", "#5b8def", "#12357a"), strict=True)):
        label = "reference" if beta == 0 else f"β = {beta:g}"
        axes.bar(places + (number - 1) * 0.27, tilted(beta).exp()[0], 0.27, color=colour, label=label)
    labels = [f"{token}\nv = {value:.2g}" for token, value in zip(TOKENS, VALUES[0].tolist(), strict=True)]
    axes.set_xticks(places, labels)
    axes.set(ylabel="probability")
    axes.legend(frameon=False)
    return _save(figure, folder / "tilt.svg")


def draw_frontier(folder: Path) -> Path:
    """Expected value against divergence, as the strength grows."""
    betas = np.linspace(0, 14, 60)
    policies = [tilted(float(beta)) for beta in betas]
    spent = [float(kl_divergence(policy, REFERENCE)) for policy in policies]
    values = [float((policy.exp() * VALUES).sum()) for policy in policies]
    figure, axes = mpl.pyplot.subplots(figsize=(8, 3.2), layout="constrained")
    axes.plot(spent, values, color="#12357a")
    for beta in (1, 2, 4, 8):
        i = int(np.abs(betas - beta).argmin())
        axes.plot(spent[i], values[i], "o", color="#12357a")
        axes.annotate(f"β = {beta}", (spent[i], values[i]), xytext=(6, -12), textcoords="offset points")
    axes.set(xlabel="divergence from the reference (nats)", ylabel="expected value")
    return _save(figure, folder / "frontier.svg")


# Boxes by name: where their middle is, and what is in them; arrows by the boxes that they join, and what is on them.
TRAINING = {
    "prompts": (0.7, 1.5, "prompts"),
    "trees": (2.6, 1.5, "trees of answers\n(Algorithm 3)"),
    "rewards": (4.7, 1.5, "a reward for each\nfinished answer"),
    "targets": (6.8, 1.5, "values of all beginnings\n(equation 6)"),
    "head": (9.0, 1.5, "value head\nor value model"),
    "decoding": (9.0, 0.4, "decoding\n(Algorithm 2)"),
}
TRAINING_ARROWS = [
    ("prompts", "trees", ""), ("trees", "rewards", ""), ("rewards", "targets", ""), ("targets", "head", ""),
    ("head", "decoding", ""), ("decoding", "trees", "steered trees: policy iteration (Algorithm 1)"),
]  # fmt: skip
STEP = {
    "generate": (0.8, 1.5, "generate"),
    "model": (2.9, 1.5, "base model"),
    "others": (5.1, 1.9, "grammars,\npenalties"),
    "processor": (7.3, 1.5, "MavisLogitsProcessor\n(Policy.step)"),
    "values": (7.3, 0.4, "value functions"),
    "sample": (9.5, 1.5, "sample"),
}
STEP_ARROWS = [
    ("generate", "model", "token"), ("model", "others", "logits"), ("others", "processor", ""),
    ("model", "processor", "hidden state"), ("processor", "values", "candidates, values"),
    ("processor", "sample", "log π"),
]  # fmt: skip


def draw_boxes(boxes: dict[str, tuple[float, float, str]], arrows: list[tuple[str, str, str]], path: Path) -> Path:
    """Boxes and arrows."""
    figure, axes = mpl.pyplot.subplots(figsize=(10, 2.4), layout="constrained")
    axes.set(xlim=(0, 10.1), ylim=(0, 2.3))
    axes.axis("off")
    found = {}
    for name, (x, y, text) in boxes.items():
        style = {"boxstyle": "round,pad=0.5", "facecolor": "#e8effc", "edgecolor": "#5b8def"}
        found[name] = axes.text(x, y, text, ha="center", va="center", fontsize=9, bbox=style)
    for start, end, text in arrows:
        (x0, y0, _), (x1, y1, _) = boxes[start], boxes[end]
        axes.annotate(
            "", (x1, y1), (x0, y0), annotation_clip=False,
            arrowprops={"arrowstyle": "->", "color": "#12357a", "patchA": found[start].get_bbox_patch(),
                        "patchB": found[end].get_bbox_patch(), "shrinkA": 2, "shrinkB": 2},
        )  # fmt: skip
        if text:
            axes.text(
                (x0 + x1) / 2,
                (y0 + y1) / 2,
                text,
                ha="center",
                va="center",
                fontsize=8,
                color="#12357a",
                backgroundcolor="white",
            )
    return _save(figure, path)


def _save(figure: mpl.figure.Figure, path: Path) -> Path:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None})
    mpl.pyplot.close(figure)
    return path


def main(folder: Path = FOLDER) -> list[Path]:
    """Draw all of them."""
    import matplotlib.pyplot  # noqa: F401

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "mavis"  # the same file every time
    mpl.rcParams["svg.fonttype"] = "none"
    folder.mkdir(exist_ok=True)
    return [
        draw_tilt(folder),
        draw_frontier(folder),
        draw_boxes(TRAINING, TRAINING_ARROWS, folder / "training.svg"),
        draw_boxes(STEP, STEP_ARROWS, folder / "step.svg"),
    ]


if __name__ == "__main__":
    print(*main(), sep="\n")
