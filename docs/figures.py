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
    return [draw_tilt(folder), draw_frontier(folder)]


if __name__ == "__main__":
    print(*main(), sep="\n")
