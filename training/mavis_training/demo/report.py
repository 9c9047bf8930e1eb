"""What ``mavis demo`` shows: answers side by side, the table of rewards, the figure, and how to do it in Python."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from ..base.files import write_json
from ..measure.summary import mean_and_error, with_error

if TYPE_CHECKING:
    from .record import Measured

# Narrower columns than this are hard to read.
_COLUMN_WIDTH = 28


def introduction(objectives: Sequence[str], top_k: int, max_new_tokens: int) -> RenderableType:
    """Say in a few lines what is about to happen."""
    first, second = objectives
    return Panel(
        "A small language model answers everyday questions: first by itself, then steered. "
        f"Answers are cut off after {max_new_tokens} tokens (pieces of words).\n"
        f"At every step a [bold]value function[/bold] looks at the {top_k} likeliest next tokens and "
        f"foresees, for each, how high the answer would score on [bold]{first}[/bold] and [bold]{second}[/bold]. "
        "The choice is shifted towards the mix asked for. The language model itself is never changed.",
        title="mavis demo",
    )


@contextmanager
def progress(console: Console, total: int) -> Iterator[Callable[[str, int], None]]:
    """Show a bar of `total` steps; yields the function that says what is being done and moves the bar on."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        TextColumn("left:"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=total)
        yield lambda description, steps: bar.update(task, description=description, advance=steps)


def side_by_side(prompt: str, measured: Sequence[Measured], index: int, width: int) -> Table:
    """Return the answers to prompt `index`, unsteered and steered (first seed): columns, or rows on a narrow screen."""
    title = Text(f"“{prompt}”", style="bold")
    shown = [one for one in measured if one.setting.beta or not one.setting.weights]
    names = [one.setting.name for one in shown]
    answers = [Text(one.answers[0][index]) for one in shown]
    if width >= _COLUMN_WIDTH * len(shown):
        table = Table(*names, title=title, title_justify="left", expand=True)
        table.add_row(*answers)
        return table
    table = Table("weights", "answer", title=title, title_justify="left", expand=True, show_lines=True)
    for name, answer in zip(names, answers, strict=True):
        table.add_row(name, answer)
    return table


def table(measured: Sequence[Measured], objectives: Sequence[str]) -> RenderableType:
    """Return mean rewards and mean KL per setting with standard errors."""
    seeds, prompts = measured[0].kl.shape
    result = Table(title="Mean reward of an answer ± standard error", title_justify="left", title_style="bold")
    result.add_column("setting")
    for name in [*objectives, "KL (nats)"]:
        result.add_column(name, justify="right")
    for one in measured:
        cells = [_plus_minus(one.rewards[name]) for name in objectives]
        result.add_row(one.setting.name, *cells, _plus_minus(one.kl) if one.setting.weights else "0")
    note = (
        f"{prompts} prompts x {seeds} samples. Higher is better. KL says how far the answers have moved from what the "
        "model would say by itself: 0 is not at all. The second row is not steered either: it only shows what limiting "
        "the choice to the likeliest tokens does, as every steered row does too."
    )
    return Group(result, Text(note, style="dim"))


def reading(measured: Sequence[Measured], objectives: Sequence[str]) -> str:
    """Say in words, for each objective, how much its reward rose where it has all the weight."""
    lines = []
    unsteered = measured[0]
    for name in objectives:
        alone = next((one for one in measured if one.setting.beta and one.setting.weights.get(name) == 1.0), None)
        if alone is None:
            continue
        spread = unsteered.rewards[name].std(ddof=1)
        gain = (alone.rewards[name].mean() - unsteered.rewards[name].mean()) / spread
        lines.append(
            f"With all the weight on {name}, the mean {name} reward moves by {gain:+.1f} standard deviations "
            "of unsteered answers."
        )
    return "\n".join(lines) + "\n"


def draw(measured: Sequence[Measured], objectives: Sequence[str], path: Path) -> None:
    """Write a PNG of the trade-off: one objective's mean reward against the other's, with standard errors."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    first, second = objectives
    figure, axes = pyplot.subplots(figsize=(7, 5), layout="constrained")
    for one in measured:
        (x, x_error), (y, y_error) = _mean_and_error(one.rewards[first]), _mean_and_error(one.rewards[second])
        colour = "tab:blue" if one.setting.beta else "tab:grey"
        axes.errorbar(x, y, xerr=x_error, yerr=y_error, fmt="o", color=colour, capsize=3)
        offset = (
            (6, -14) if one.setting.weights and not one.setting.beta else (6, 6)
        )  # apart from "unsteered" beside it
        axes.annotate(one.setting.name, (x, y), xytext=offset, textcoords="offset points")
    steered = [one for one in measured if one.setting.beta]
    axes.plot(
        [one.rewards[first].mean() for one in steered],
        [one.rewards[second].mean() for one in steered],
        color="tab:blue",
        alpha=0.4,
        zorder=0,
    )
    axes.margins(0.2)
    seeds, prompts = measured[0].kl.shape
    axes.set_xlabel(f"mean {first} reward")
    axes.set_ylabel(f"mean {second} reward")
    axes.set_title(f"One language model, several weightings\n{prompts} prompts x {seeds} samples, bars: standard error")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def write_results(path: Path, prompts: Sequence[str], measured: Sequence[Measured], options: dict[str, object]) -> None:
    """Write the run: options, package versions, and for every setting its answers (first seed) and mean rewards."""
    content = {
        "date": date.today().isoformat(),
        "versions": {name: version(name) for name in ("mavis-logits", "torch", "transformers")},
        "options": {name: value for name, value in options.items() if name not in ("out", "json", "prompts")},
        "prompts": list(prompts),
        "settings": [
            {
                "name": one.setting.name,
                "weights": one.setting.weights,
                "beta": one.setting.beta,
                "rewards": {name: _json_mean(samples) for name, samples in one.rewards.items()},
                "kl": _json_mean(one.kl),
                "answers": one.answers[0],
            }
            for one in measured
        ],
    }
    write_json(path, content)


def closing(out: str, values: str | dict[str, str], objectives: Sequence[str], steering: Mapping[str, object]) -> str:
    """Say where the figure is and how to do the same in Python and on the command line."""
    return "\n".join(
        [
            f"The trade-off as a picture: {out}",
            "",
            "The same in Python, with a model and tokenized inputs of your own:",
            "    from mavis_logits import MavisLogitsProcessor",
            f"    mavis = MavisLogitsProcessor.from_pretrained({values!r}, "
            f"weights={dict.fromkeys(objectives, 0.5)}, "
            f"{', '.join(f'{name}={value!r}' for name, value in steering.items())}, model=model)",
            "    model.generate(**inputs, do_sample=True, top_k=0, max_new_tokens=48, logits_processor=[mavis])",
            "",
            "Your own question:",
            '    mavis generate --prompt "How do I make good tea?" --weights concise=0.5,formal=0.5 --unsteered',
        ]
    )


def _mean_and_error(samples: np.ndarray) -> tuple[float, float | None]:
    """Mean of samples [S, P] (S seeds, P prompts) and its standard error over prompts."""
    return mean_and_error(samples.ravel(), samples.shape[1])


def _json_mean(samples: np.ndarray) -> dict[str, float | None]:
    mean, error = _mean_and_error(samples)
    return {"mean": mean, "error": error, "deviation": float(samples.std())}


def _plus_minus(samples: np.ndarray) -> str:
    return with_error(*_mean_and_error(samples))
