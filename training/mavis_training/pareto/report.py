"""A trade-off as a table, a figure and a page of one file."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from ..base.made import made_in_words
from ..measure.win_rate import judge_in_words, win_rate_cell

_TEMPLATE = Path(__file__).with_name("report_template.html")
_COLOURS = (
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999933", "#882255", "#44aa99",
    "#661100", "#6699cc",
)  # fmt: skip
_WIDTH, _HEIGHT, _EDGE = 640, 460, 56


def markdown(results: Mapping[str, Any]) -> str:
    """Two tables: the methods, and all of their cells."""
    objectives = results["config"]["objectives"]
    level = "95 %"
    head = ["method", "hypervolume", "ratio to it", "p, corrected", "its front covered", "front", "spacing", "MIP"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name, found in results["methods"].items():
        ratio = "" if found.get("ratio") is None else f"{found['ratio']:.2f} {_span(found['ratio_interval'])}"
        p = f"{found['p_corrected']:.3f}" if "p_corrected" in found else ""
        covered = "" if found.get("covered") is None else f"{found['covered']:.0%}"
        cells = [
            name, f"{found['hypervolume']:.2f} {_span(found['interval'])}", ratio, p, covered,
            f"{found['front']} of {found['counted']}", _number(found["spacing"]), _number(found["mean_inner_product"]),
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    against = next((found["against"] for found in results["methods"].values() if "against" in found), None)
    bound = results["config"]["most_kl"]
    lines += [
        "",
        f"Hypervolume from {results['config']['worst']:g} standard deviations below the unsteered model, in "
        f"{', '.join(objectives)}; {level} intervals by a bootstrap over prompts"
        + (f"; ratio: that of {against} over the method's" if against else "")
        + (f"; only cells of at most {bound:g} nats count." if bound is not None else "."),
        "",
    ]
    head = [
        "cell",
        *(f"{name} (sd)" for name in results["config"]["rewards"]),
        "KL",
        "tokens",
        "distinct-2",
        "tokens/s",
        *(["preferred"] if results["config"].get("judge") else []),
    ]
    lines += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += [f"| {name} | missing" + " |" * (len(head) - 1) for name in results["missing"]]
    for name, cell in results["cells"].items():
        gains = [f"{cell['gains'][o]:+.2f} ± {cell['errors'][o]:.2f}" for o in results["config"]["rewards"]]
        row = [name, *gains, _number(cell["kl"], ".1f"), f"{cell['tokens']:.0f}", f"{cell['distinct_2']:.2f}"]
        row.append(_number(cell["tokens_per_second"], ".0f"))
        row += [win_rate_cell(cell.get("win_rate"))] if results["config"].get("judge") else []
        lines.append("| " + " | ".join(row) + " |")
    config = results["config"]
    note = (
        f"{results['prompts']} held-out prompts, seeds {config['seeds']}, {config['max_new_tokens']} tokens at most, "
        f"temperature {config['temperature']:g}, top-p {config['top_p']:g}, base model in {config['dtype']}; "
        + (judge_in_words(config["judge"]) if config.get("judge") else "")
        + made_in_words(results)
    )
    return "\n".join([*lines, "", note, ""])


def draw(results: Mapping[str, Any], path: Path) -> None:
    """One panel for every pair of objectives, and one of gain against divergence for each.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    objectives = results["config"]["objectives"]
    pairs = list(itertools.combinations(objectives, 2))
    figure, axes = pyplot.subplots(1, len(pairs) + 1, figsize=(5.2 * (len(pairs) + 1), 4.6), layout="constrained")
    for axis, (a, b) in zip(axes, pairs, strict=False):
        for colour, (method, cells) in _by_method(results):
            points = sorted((cell["gains"][a], cell["gains"][b]) for cell in cells)
            axis.plot(*zip(*points, strict=True), "o-", color=colour, label=method, markersize=4, linewidth=1)
        axis.plot(0, 0, "x", color="grey")
        axis.set(xlabel=f"{a} (sd)", ylabel=f"{b} (sd)")
    last = axes[-1]
    for colour, (method, cells) in _by_method(results):
        points = sorted((cell["kl"], _utility(cell)) for cell in cells if not math.isnan(cell["kl"]))
        if points:
            last.plot(*zip(*points, strict=True), "o", color=colour, label=method, markersize=4)
    last.set(xlabel="nats from the unsteered model", ylabel="weighted gain (sd)")
    last.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def page(results: Mapping[str, Any], answers: Sequence[Mapping[str, Any]]) -> str:
    """The page: figures with what each point is under the pointer, the tables, answers side by side; no scripts."""
    pictures = []
    objectives = results["config"]["objectives"]
    for a, b in itertools.combinations(objectives, 2):
        pictures.append(
            _picture(results, f"{a} (sd)", f"{b} (sd)", lambda cell, a=a, b=b: (cell["gains"][a], cell["gains"][b]))
        )  # type: ignore[misc]
    pictures.append(
        _picture(results, "nats from the unsteered model", "weighted gain (sd)", lambda c: (c["kl"], _utility(c)))
    )
    environment = Environment(undefined=StrictUndefined, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    colours = dict(zip(results["methods"], itertools.cycle(_COLOURS), strict=False))
    return template.render(
        results=results, pictures=pictures, answers=answers, colours=colours, size=(_WIDTH, _HEIGHT, _EDGE),
        span=_span, number=_number,
    )  # fmt: skip


def _picture(results: Mapping[str, Any], across: str, up: str, place: Any) -> dict[str, Any]:
    spots = [(name, cell, *place(cell)) for name, cell in results["cells"].items()]
    spots = [spot for spot in spots if not math.isnan(spot[2])]
    xs, ys = [spot[2] for spot in spots] + [0.0], [spot[3] for spot in spots] + [0.0]
    low, high, bottom, top = min(xs), max(xs), min(ys), max(ys)

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            round(_EDGE + (x - low) / ((high - low) or 1) * (_WIDTH - 2 * _EDGE), 1),
            round(_HEIGHT - _EDGE - (y - bottom) / ((top - bottom) or 1) * (_HEIGHT - 2 * _EDGE), 1),
        )

    points = []
    for name, cell, x, y in spots:
        gains = ", ".join(f"{o} {cell['gains'][o]:+.2f}" for o in cell["gains"])
        told = f"{name}: {gains}; {_number(cell['kl'], '.1f')} nats"
        points.append({"method": cell["method"], "at": at(x, y), "told": told})
    return {"across": across, "up": up, "points": points, "zero": at(0.0, 0.0), "range": (low, high, bottom, top)}


def _by_method(results: Mapping[str, Any]) -> list[tuple[str, tuple[str, list[Mapping[str, Any]]]]]:
    found: dict[str, list[Mapping[str, Any]]] = {}
    for cell in results["cells"].values():
        found.setdefault(cell["method"], []).append(cell)
    return list(zip(itertools.cycle(_COLOURS), found.items(), strict=False))


def _utility(cell: Mapping[str, Any]) -> float:
    return float(sum(share * cell["gains"][name] for name, share in cell["weights"].items()))


def _span(ends: Sequence[float] | None) -> str:
    return "" if ends is None else f"({ends[0]:.2f} to {ends[1]:.2f})"


def _number(value: float | None, form: str = ".2f") -> str:
    return "n/a" if value is None or math.isnan(value) else f"{value:{form}}"
