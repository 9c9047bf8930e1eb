"""Fill the tables of README.md and of pages of docs from docs/results/*.json: no number there is written by hand.

python docs/fill_readme.py           # write them
python docs/fill_readme.py --check   # exit with 1 if one of them is not what the results say
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results"
_VALUES = {"none": "as they are", "standard": "in units of their own", "minmax": "rescaled to [0, 1]"}
_TESTED = ("suite", "sweep")
SHOWN_PROMPTS = 1  # spread over the file, whatever the answers are


def main(argv: Sequence[str]) -> int:
    """Fill, or with ``--check`` compare."""
    stale = []
    for page in PAGES:
        old = (ROOT / page).read_text(encoding="utf-8")
        new = filled(old, RESULTS, page)
        if new != old:
            stale.append(page)
            if "--check" not in argv:
                (ROOT / page).write_text(new, encoding="utf-8")
    if "--check" not in argv:
        return 0
    if stale:
        print(f"{', '.join(stale)} differ from docs/results. Run: make readme", file=sys.stderr)
    return int(bool(stale))


def filled(text: str, results: Path, page: str = "README.md") -> str:
    """Return the `text` of a page with every section between its markers made anew from the files in `results`."""
    for name in PAGES[page]:
        begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
        pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
        if not pattern.search(text):
            raise ValueError(f"{page} has no section {begin} ... {end}")
        body = SECTIONS[name](results)
        text = pattern.sub(lambda _, body=body, begin=begin, end=end: f"{begin}\n{body}{end}", text)
    return text


def demo(results: Path) -> str:
    """Return the demo's first questions with their answers, and its table of rewards."""
    run = read(results / "demo.json")
    if run is None:
        return ""
    settings, objectives = run["settings"], list(run["settings"][0]["rewards"])
    shown = [one for one in settings if one["beta"] or not one["weights"]]
    lines = [f"Answers, cut off after {run['options']['max_new_tokens']} tokens:", ""]
    prompts = run["prompts"]
    for index in (len(prompts) * i // SHOWN_PROMPTS for i in range(SHOWN_PROMPTS)):
        rows = [(one["name"], one["answers"][index]) for one in shown]
        lines += [f"“{cell(prompts[index])}”", "", *table(["weights", "answer"], rows), ""]
    rows = [
        (one["name"], *(plus_minus(one["rewards"][name]) for name in objectives), plus_minus(one["kl"]))
        for one in settings
    ]
    options = run["options"]
    lines += [
        f"Mean rewards ± standard error of {len(prompts)} questions x {options['seeds']} samples "
        f"(temperature {options.get('temperature', 1.0):g}, β {options['beta']:g}, k {options['top_k']}, values "
        f"{_VALUES[options['normalize']]}); KL is the distance in nats from what the model would say by itself:",
        "",
        *table(["setting", *objectives, "KL"], rows),
        "",
        "![Mean reward of one objective against the other's, for several weightings](docs/results/demo.png)",
        "",
    ]
    return "\n".join(lines)


def hack(results: Path) -> str:
    """Return an answer of the demo that has the reward and not what it stands for: a list that is none."""
    run = read(results / "demo.json")
    if run is None:
        return ""
    index = next(i for i, prompt in enumerate(run["prompts"]) if "list" in prompt)
    plain, steered = (next(s for s in run["settings"] if s["name"] == name) for name in ("unsteered", "concise 1"))
    rows = [
        (one["name"], one["answers"][index], plus_minus(one["rewards"]["concise"]), plus_minus(one["kl"]))
        for one in (plain, steered)
    ]
    head = ["setting", f"answer to “{run['prompts'][index]}”", "mean reward", "KL (nats)"]
    return "\n".join([*table(head, rows), ""])


_STEERED = {
    "trees": "One value head with six outputs, temperature 1",
    "cooler": "The same head at temperature 0.7, top-p 0.95, beside a system prompt for each objective",
    "model": "Three value models in the paper's setting, temperature 1",
}


def steering(results: Path) -> str:
    """Return the gains of every setting, for value heads and for value models."""
    lines = []
    for kind, title in _STEERED.items():
        run = read(results / f"steering_{kind}.json")
        if run is not None:
            about = (
                f"**{title}**: change of each reward in standard deviations of the unsteered model's, {measured(run)}:"
            )
            lines += [about, "", *gains(run), ""]
    return "\n".join(lines)


_WAYS = ("prompt", "steered", "both")


def prompted(results: Path) -> str:
    """Return what a system prompt, steering and both gain in the objective that they are for, by the latest run."""
    found = [read(results / f"{name}.json") for name in ("prompted_sharpened", "prompted")]
    runs = [run for run in found if run is not None]
    if not runs:
        return ""
    rows: dict[str, tuple[str, ...]] = {}
    dates = []
    for run in runs:
        new = [name for name in run["config"]["rewards"] if f"{name} prompt" in run["settings"] and name not in rows]
        dates.append(f"{', '.join(new)}: {measured(run)}")
        paired = {(one["setting"], one["against"]): one for one in run["contrasts"]}
        for name in new:
            own = [run["settings"][f"{name} {way}"] for way in _WAYS]
            cells = [f"{plus_minus_sd(one[name])} ({one['kl']:.1f})" for one in own]
            rows[name] = (name, *cells, plus_minus_sd(paired[f"{name} steered", f"{name} prompt"][name]))
    about = (
        "Gain in each objective, in standard deviations of the unsteered reward, and in brackets the nats that it "
        "costs: the best of four wordings of a system prompt, the shipped value heads, and both; temperature "
        f"{runs[0]['config']['temperature']:g}; {' and '.join(dates)}. The last column is paired by prompt."
    )
    head = ["objective", "system prompt", "steered", "both", "steered beyond the prompt"]
    return "\n".join([about, "", *table(head, list(rows.values())), ""])


def search(results: Path) -> str:
    """Return the gains of beam search and best of N."""
    run = read(results / "search.json")
    if run is None:
        return ""
    about = "**Four sequences a prompt, helpful and humour at equal weights**, by the value head; the same units"
    return "\n".join([f"{about}, {measured(run)}:", "", *gains(run), ""])


def tradeoff(results: Path, names: Sequence[str]) -> str:
    """Return what every way to steer between two objectives reaches, and how much of the plane it covers."""
    found = [read(results / f"pareto_{name}.json") for name in names]
    runs = [run for run in found if run is not None]
    if not runs:
        return ""
    run = runs[0]
    first, second = run["config"]["objectives"]
    shown = {f"all {first}": 1.0, "half and half": 0.5, f"all {second}": 0.0}
    rows = []
    # Two runs of one protocol; what both have measured came out alike.
    methods = {name: (one, method) for one in reversed(runs) for name, method in one["methods"].items()}
    for name, (own, method) in sorted(methods.items(), key=lambda item: -item[1][1]["hypervolume"]):
        row = [name]
        for share in shown.values():
            cells = [x for x in own["cells"].values() if x["method"] == name and x["weights"][first] == share]
            counted = [x for x in cells if x["kl"] <= own["config"]["most_kl"]]
            best = max(counted or cells, key=lambda x: sum(x["weights"][o] * x["gains"][o] for o in (first, second)))
            row.append(f"{best['gains'][first]:+.2f}, {best['gains'][second]:+.2f} ({best['kl']:.1f})")
        low, high = method["interval"]
        row.append(f"{method['hypervolume']:.2f} ({low:.2f} to {high:.2f})")
        rows.append(row)
    config = run["config"]
    about = (
        f"Gains in {first} and {second}, in standard deviations of the unsteered reward, and in brackets the nats that "
        f"they cost, at three weightings; {measured(run)}, temperature {config['temperature']:g}. Hypervolume: how "
        f"much of the plane all {config['steps'] + 1} weightings cover, from {config['worst']:g} below the unsteered "
        f"model; cells beyond {config['most_kl']:g} nats do not count; 95 % intervals over prompts."
    )
    return "\n".join([about, "", *table(["way", *shown, "hypervolume"], rows), ""])


def pairs(results: Path) -> str:
    """Return how much every way covers of the other two pairs' planes, and the head over it."""
    runs = [run for name in ("helpful_harmless", "harmless_humour") if (run := read(results / f"pareto_{name}.json"))]
    if not runs:
        return ""
    rows = []
    for name in sorted(runs[0]["methods"], key=lambda name: -runs[0]["methods"][name]["hypervolume"]):
        row = [name]
        for run in runs:
            method = run["methods"][name]
            low, high = method["interval"]
            row.append(f"{method['hypervolume']:.2f} ({low:.2f} to {high:.2f})")
            if "ratio" not in method:
                row.append("")
                continue
            mark = "" if method["p_corrected"] < 0.05 else " ="
            row.append(f"{method['ratio']:.2f} ({' to '.join(f'{x:.2f}' for x in method['ratio_interval'])}){mark}")
        rows.append(row)
    titles = [" against ".join(run["config"]["objectives"]) for run in runs]
    return "\n".join([*table(["way", *(cell for one in titles for cell in (one, "head over it"))], rows), ""])


def measured(run: dict[str, Any]) -> str:
    """Return on what an evaluation was made, and when."""
    return f"{run['prompts']} held-out prompts x {len(run['config']['seeds'])} seeds, {run['date']}"


def judged(run: dict[str, Any]) -> list[str]:
    """Return the rewards of an evaluation, a combined one last."""
    return [*run["config"]["rewards"], *(["combined"] if run["config"].get("combined") else [])]


def gains(run: dict[str, Any]) -> list[str]:
    """Return the gain of every reward under every setting of an evaluation as a table."""
    objectives = judged(run)
    rows = [
        (
            name,
            *(plus_minus_sd(row[objective]) for objective in objectives),
            "-" if row["kl"] is None else f"{row['kl']:.1f}",
        )
        for name, row in run["settings"].items()
    ]
    return table(["setting", *objectives, "KL (nats)"], rows)


def plus_minus_sd(gain: dict[str, float]) -> str:
    """Return ``gain ± error`` in standard deviations."""
    return f"{gain['gain_sd']:+.2f} ± {gain['gain_sd_error']:.2f}"


def decode(results: Path) -> str:
    """Return the ratios of decoding times: the main comparison, all others are in docs/results/decode.md."""
    run = read(results / "decode.json")
    if run is None:
        return ""
    main = [
        row
        for row in run["results"]
        if (row.get("section", "main"), row.get("device", "cpu")) == ("main", "cpu") and "min-p" not in row["variant"]
    ]
    batches = sorted({row["batch"] for row in main})
    cells = {(row["variant"], row["batch"]): ratio(row) for row in main}
    names = dict.fromkeys(row["variant"] for row in main)
    rows = [(name, *(cells.get((name, batch), "-") for batch in batches)) for name in names]
    note = f"{run['machine']}; {run['settings']['new_tokens']} new tokens, k {run['settings']['top_k']}, {run['date']}."
    return "\n".join([*table(["decoding", *(f"batch {batch}" for batch in batches)], rows), "", note, ""])


def versions(results: Path) -> str:
    """Return the releases that the tests were run on, and what came of it."""
    run = read(results / "versions.json")
    if run is None:
        return ""
    packages = ("python", "torch", "transformers", "peft", "trl")
    rows = [
        (
            name,
            *(one["versions"][package] for package in packages),
            *("not run" if one[part] is None else f"{one[part]['failed']} of {tried(one[part])}" for part in _TESTED),
        )
        for name, one in run.items()
    ]
    lines = table(["", *packages, "failed in the suite", "in the sweep over model types"], rows)
    return "\n".join([*lines, "", "All packages and tests: [versions](results/versions.md).", ""])


def tried(counts: dict[str, int]) -> int:
    """Return how many tests were run to their end."""
    return counts["passed"] + counts["failed"]


def ratio(row: dict[str, float]) -> str:
    """Return ``median (range)``."""
    return f"{row['median']:.2f} ({row['low']:.2f} to {row['high']:.2f})"


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """Return a Markdown table as lines."""
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(cell(str(part)) for part in line) + " |" for line in lines]


def cell(text: str) -> str:
    """Return text that cannot break a table or become Markdown."""
    return re.sub(r"([\\`*_<>|#\[\]])", r"\\\1", " ".join(text.split()))


def plus_minus(number: dict[str, float]) -> str:
    """Return ``mean ± error``."""
    return f"{number['mean']:.2f} ± {number['error']:.2f}"


def read(file: Path) -> dict[str, Any] | None:
    """Return a results file, or None where it has not been measured."""
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


SECTIONS: dict[str, Callable[[Path], str]] = {
    "demo": demo,
    "steering": steering,
    "prompted": prompted,
    "search": search,
    "tradeoff": partial(tradeoff, names=["helpful_humour", "helpful_humour_tuned"]),
    "tradeoff-harmless": partial(tradeoff, names=["helpful_harmless"]),
    "tradeoff-jokes": partial(tradeoff, names=["harmless_humour"]),
    "pairs": pairs,
    "decode": decode,
    "versions": versions,
    "hack": hack,
}
PAGES = {
    "README.md": ("demo", "prompted"),
    "docs/measured.md": (
        "steering",
        "prompted",
        "tradeoff",
        "tradeoff-harmless",
        "tradeoff-jokes",
        "search",
        "decode",
        "versions",
    ),
    "docs/limits.md": ("hack",),
    "docs/results/study.md": ("pairs",),
}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
