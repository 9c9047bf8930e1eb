"""The page of tables and the plot made from a report's rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cases import RECOMPUTED, SECTIONS
from measuring import PLAIN
from row import Row

EXPLANATION = """\
Written by `benchmarks/decode.py`. Every variant decodes the same prompts in turns with plain `generate`, which runs
before and after each of them; its own line compares every such run with the one before it, that is, the noise.

- **time over plain**: seconds of the whole `generate` call over plain `generate`'s around it, median (range).
- **per token**: the same for the time per token after the first, without the prompts.
- **candidates**: scored in every row and step; with min-p their mean.
- **roofline**: what *per token* would be if both ran at the limits of this device: weights and caches read once, all
  operations done, at the bandwidth and throughput measured in the same run. For the plain schemes it is that of the
  separate value models, whose work would have been enough.
- **over roofline**: per token / roofline. 1 where steering comes as near to the limits as plain `generate` does; less
  where it comes nearer.
- **tokens/s**: of the whole batch, prompts included.
- **memory**: the most that a call took above what was held before, in MiB.
- **faster than**: time of the two schemes that compute the chosen token again, over this one's.
"""
NAMES = {"cpu": "CPU", "cuda": "GPU"}
VARYING = {
    "batch": "batch", "top_k": "k", "objectives": "objectives", "context": "prompt tokens", "new_tokens": "new tokens",
}  # fmt: skip


def markdown(rows: Sequence[Row], environments: Mapping[str, Mapping[str, Any]]) -> str:
    """All tables as a page, a section of the benchmark after the other."""
    lines = ["# Time of steered decoding", "", EXPLANATION]
    for device, environment in environments.items():
        lines += [f"## On a {NAMES[device]}", "", describe(environment), ""]
        for name, section in SECTIONS.items():
            own = [row for row in rows if (row.device, row.section) == (device, name)]
            if own:
                lines += [f"### {section.title}", "", f"{section.about} {shared(own)}.", "", *table(own), ""]
    return "\n".join(lines)


def describe(environment: Mapping[str, Any]) -> str:
    """Machine, model, versions and ceilings in a sentence or two."""
    ceilings = environment["ceilings"]
    versions = ", ".join(f"{name} {number}" for name, number in environment["versions"].items())
    throughput = ", ".join(f"{number / 1e9:.0f} in {dtype}" for dtype, number in ceilings["flops"].items())
    return (
        f"{environment['model']} in {environment['dtype']}. {environment['machine']}. {versions}. Measured ceilings: "
        f"{ceilings['bandwidth'] / 1e9:.0f} GB/s, Gflop/s of large products {throughput}."
    )


def shared(rows: Sequence[Row]) -> str:
    """What all rows of a table have in common."""
    same = [f"{title} {getattr(rows[0], name)}" for name, title in VARYING.items() if not varies(rows, name)]
    return f"{', '.join([*same, f'value models in {rows[0].value_dtype}'])}".capitalize()


def varies(rows: Sequence[Row], name: str) -> bool:
    """Whether rows differ in a field."""
    return len({getattr(row, name) for row in rows}) > 1


def table(rows: Sequence[Row]) -> list[str]:
    """A Markdown table; only what differs between rows has a column."""
    differing = {name: title for name, title in VARYING.items() if varies(rows, name)}
    compared = [name for name in RECOMPUTED if any(row.variant == name for row in rows)]
    head = ["decoding", "candidates", "time over plain", "per token", "roofline", "over roofline", "tokens/s", "memory"]
    lines = [[*differing.values(), *head, *(f"faster than {name}" for name in compared)]]
    lines.append(["---"] * len(lines[0]))
    for row in rows:
        lines.append(
            [
                *(str(getattr(row, name)) for name in differing),
                row.variant,
                f"{row.candidates:.3g}" if row.candidates < 100 else f"{row.candidates:.0f}",
                f"{row.median:.2f} ({row.low:.2f} to {row.high:.2f})",
                f"{row.token_ratio:.2f}",
                f"{row.roofline_ratio:.2f}",
                f"{row.over_roofline:.2f}",
                f"{row.tokens_per_second:.1f}",
                number(row.memory and row.memory / 2**20, ".0f"),
                *(number(speed_up(row, name, rows)) for name in compared),
            ]
        )
    return ["| " + " | ".join(line) + " |" for line in lines]


def speed_up(row: Row, name: str, rows: Sequence[Row]) -> float | None:
    """Time of the variant `name` under the same setting over this row's; None for plain `generate`."""
    if row.variant == PLAIN:
        return None
    other = next((one for one in rows if one.variant == name and one.key[2:] == row.key[2:]), None)
    return other and other.median / row.median


def number(value: float | None, form: str = ".2f") -> str:
    """A number, or a dash where there is none."""
    return "–" if value is None else format(value, form)


def plot(rows: Sequence[Row], file: Path) -> None:
    """Draw time over plain: a bar a variant with its range, a mark at its roofline, a panel for each batch."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        if row.section in ("main", "batch32") and row.variant != PLAIN:
            panels.setdefault((row.device, row.batch), []).append(row)
    if not panels:
        return
    height = 1.2 + 0.28 * max(len(own) for own in panels.values())
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(4.2 * len(panels) + 1.5, height), squeeze=False, layout="constrained"
    )
    for axis, ((device, batch), own) in zip(axes[0], panels.items(), strict=True):
        places = range(len(own), 0, -1)
        errors = [[row.median - row.low for row in own], [row.high - row.median for row in own]]
        colours = ["tab:blue" if row.variant.startswith(OURS) else "tab:grey" for row in own]
        axis.barh(places, [row.median for row in own], xerr=errors, color=colours, error_kw={"elinewidth": 1})
        limits = [row.roofline_ratio for row in own]
        axis.plot(limits, places, "|", color="tab:orange", markersize=11, label="roofline, per token")
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_yticks(places, [row.variant for row in own])
        axis.set_title(f"{NAMES[device]}, batch {batch}")
        axis.set_xlabel("time over plain generate")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower left", fontsize="small")
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


OURS = ("value head", "one value", "separate", "fused")
