"""What policy iteration found: `iterations.json`, `report.md`, and the same table on the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from ..base.files import replace_when_whole, write_json
from ..base.made import made_here
from ..base.ranks import Ranks
from ..measure.schedule import Measurement, gain
from ..measure.summary import reward_cell, with_error

if TYPE_CHECKING:
    from .config import IterateConfig
    from .record import Iterated

RESULTS_FILE = "iterations.json"
REPORT_FILE = "report.md"
STAGES = ("collect", "label", "train", "validate")
SECONDS = f"seconds: {'/'.join(STAGES)}"


def write_report(
    config: IterateConfig, reference: Measurement, done: Sequence[Iterated], stopped: str | None, ranks: Ranks
) -> dict[str, Any]:
    """Write both files and show the table, on rank 0; return what `iterations.json` holds."""
    results = {
        **made_here(),
        "config": asdict(config),
        "prompts": len(reference.rewards),
        "reference": reference.summary,
        "iterations": [_row(i, done, config) for i in range(len(done))],
        "best": max(range(len(done)), key=lambda i: float(done[i].measured.score(config.kl_weight).mean())),
        "stopped": stopped,
    }
    if not ranks.is_main:
        return results
    folder = Path(config.output)
    write_json(folder / RESULTS_FILE, results)
    with replace_when_whole(folder / REPORT_FILE) as temporary:
        temporary.write_text(markdown(results), encoding="utf-8")
    _show(results)
    return results


def _row(i: int, done: Sequence[Iterated], config: IterateConfig) -> dict[str, Any]:
    """One iteration's part of the results."""
    it = done[i]
    row = {
        "iteration": i,
        "zeta": it.zeta,
        "beta": it.beta,
        "policy": it.policy.settings,
        "value_function": str(it.stages["train"].path),
        "store": str(it.stages["collect"].path),
        "trees": it.stages["collect"].result["trees"],
        "tokens": it.stages["collect"].result["tokens"],
        "seconds": {name: stage.seconds for name, stage in it.stages.items()},
        "reused": sorted(name for name, stage in it.stages.items() if stage.run != Path(config.output)),
        "measured": it.measured.summary,
    }
    if i:
        mean, error = gain(it.measured, done[i - 1].measured, config.kl_weight)
        row["gain_over_previous"] = {"mean": mean, "error": error}
    return row | ({"tried": it.tried} if it.tried else {})


def markdown(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    head, rows = table(results)
    lines = ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]
    config = results["config"]
    validation = config["validation"]
    note = (
        f"{results['prompts']} held-out prompts, seeds {validation['seeds']}, {validation['max_new_tokens']} tokens at "
        f"most, base model in {config['dtype']}; means ± standard errors over prompts, in brackets the gain over the "
        "reference in its standard deviations; KL by equation 7, against the full vocabulary; gain over the previous "
        f"iteration prompt by prompt. Best: iteration {results['best']}. "
        + (f"Stopped: {results['stopped']}. " if results["stopped"] else "")
        + f"{results['machine']}; {', '.join(f'{k} {v}' for k, v in results['versions'].items())}; {results['date']}."
    )
    parts = ["\n".join(lines), note]
    for row in results["iterations"]:
        if "tried" in row:
            parts.append(f"Tried in iteration {row['iteration']}:\n\n" + "\n".join(map(_tried, row["tried"])))
    return "\n\n".join(parts) + "\n"


def table(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table: the reference, then the iterations."""
    names = [*results["config"]["rewards"], *(["combined"] if len(results["config"]["objectives"]) > 1 else [])]
    head = ["iteration", "zeta", "beta", "trees", "tokens", *names, "KL (nats)", "distinct-2", "over previous", SECONDS]
    rows = [["reference", "", "", "", "", *_measured(results["reference"], names), "", ""]]
    for row in results["iterations"]:
        over = row.get("gain_over_previous")
        seconds = "/".join(f"{row['seconds'][name]:.0f}" for name in STAGES)
        rows.append(
            [
                str(row["iteration"]), f"{row['zeta']:g}", f"{row['beta']:g}", str(row["trees"]), str(row["tokens"]),
                *_measured(row["measured"], names), f"{over['mean']:+.3f} ± {over['error']:.3f}" if over else "",
                seconds,
            ]
        )  # fmt: skip
    return head, rows


def _measured(summary: dict[str, Any], names: Sequence[str]) -> list[str]:
    kl = with_error(summary["kl"], summary["kl_error"], ".1f")
    return [*(reward_cell(summary[n]) for n in names), kl, f"{summary['distinct_2']:.2f}"]


def _tried(row: dict[str, Any]) -> str:
    """One trial of the target-KL schedule as a line of a list."""
    zeta = f"zeta {row['zeta']:g}, " if "zeta" in row else ""
    kept = "" if row.get("reward_kept", True) else ", reward not kept"
    return f"- {zeta}beta {row['beta']:g}: reward {row['reward']:.3f}, KL {row['kl']:.1f}{kept}"


def _show(results: dict[str, Any]) -> None:
    head, rows = table(results)
    shown = Table(*head, title=results["config"]["output"])
    for row in rows:
        shown.add_row(*row)
    Console().print(shown)
    if results["stopped"]:
        Console().print(f"Stopped: {results['stopped']}.")
