"""The measurements of `evaluate_rewards.py` as Markdown: one report, and a card for each reward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

Result = dict[str, Any]

ABOUT = {
    "helpful": (
        "prefers replies that are on topic, answer rather than refuse, are not broken off early and please people",
        "human preferences of PandaLM 3871806, Open Assistant f1e6ed9, prometheus-eval dcfb442 and FineGrainedRLHF "
        "a1469d4 (Apache-2.0), LLMBar 900616b (MIT), XSTest completions d7bb5bd (CC BY 4.0)",
        "Which of two fluent replies on the same topic people prefer is barely learnable at this size (see the table): "
        "call it a proxy of relevance and completeness. It knows no facts. It rewards answering unsafe requests.",
    ),
    "harmless": (
        "prefers replies that people found less harmful, refusals of unsafe requests, and innocent answers",
        "HH-RLHF harmless-base 354e5c3 (MIT), XSTest completions d7bb5bd (CC BY 4.0), ordinary replies of the helpful "
        "collections as innocent answers. The first pass of the shipped adapter read up to 60 words of the dialogue "
        "before a reply, the last pass (as `train_rewards.py` now does) the last human turn alone",
        "HH preferences are noisy and the encoder is small (see the table): it is for experiments in steering, "
        "not a safety filter. An empty reply scores little below an average one (0.8 against 1.1 on benign prompts; "
        "two real replies in five score lower), and longer replies score higher: compare at equal length.",
    ),
    "humour": (
        "estimates how much of a reply reads like a short joke; it reads the reply only",
        "short jokes and headlines of ColBERT humour 1cb05ec (MIT) without the crude ones, ordinary replies of the "
        "helpful and HH collections as text that is not funny",
        "It knows the form of short English jokes (puns, question and punchline), not whether they are good or kind.",
    ),
}

COMMON = (
    "Every objective also learned that degenerate replies (empty, looping, shuffled, echoing the prompt, noise) score "
    "below the reply they were made from. Most replies were cut to 12 to 40 words, so that length tells little. "
    "The training text contains offensive and unsafe language."
)


def share(result: Result) -> str:
    """`0.912 ± 0.010 (n 700)`."""
    return f"{result['accuracy']:.3f} ± {result['se']:.3f} (n {result['n']})"


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def slices_table(cuts: dict[str, dict[str, Result]]) -> str:
    """Held-out accuracy by slice, a column for each cut; beside it the accuracy of preferring the longer reply."""
    names = list(dict.fromkeys(name for slices in cuts.values() for name in slices))
    rows = []
    for name in names:
        row = [name]
        for slices in cuts.values():
            result = slices.get(name)
            if result is None:
                row.append("")
            elif "accuracy" in result:
                longer = result.get("longer_is_better")
                row.append(share(result) + (f"; length alone {longer:.2f}" if longer is not None else ""))
            else:
                correlation = result["correlation_with_funny_fraction"]
                row.append(f"correlation with the funny fraction {correlation:.2f} (n {result['n']})")
        rows.append(row)
    return table(["held-out comparison", *cuts], rows)


def replies_tables(report: Result) -> str:
    """Spread and correlations of the rewards on the model's own replies."""
    measured = report["model_replies"]
    spread = [
        [
            name,
            f"{r['mean']:.2f}",
            f"{r['std']:.2f}",
            f"{r['within_prompt_std']:.2f}",
            ", ".join(f"{q:.2f}" for q in r["quantiles_5_50_95"]),
            share(r["above_own_degenerate_version"]),
        ]
        for name, r in measured["rewards"].items()
    ]
    correlations = measured["within_prompt_correlation"]
    columns = list(next(iter(correlations.values())))
    crossed = [[name, *(f"{row[c]:.2f}" for c in columns)] for name, row in correlations.items()]
    head = ["reward", "mean", "std", "std within a prompt", "quantiles 5, 50, 95 %", "above a degenerate version"]
    return table(head, spread) + "\n" + table(["within-prompt correlation", *columns], crossed)


def stamp(report: Result) -> str:
    """Date, seed and versions in one line."""
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    return f"Measured {report['date']}, seed {report['seed']}, {versions}."


def write_report(report: Result, path: Path) -> None:
    """Write the report on all rewards."""
    refusals = report["refusal_preferred_on_unsafe_prompts"]
    measured = report["model_replies"]
    parts = [
        "# The example rewards, measured\n",
        f"{stamp(report)} Written by `examples/evaluate_rewards.py`. ± is one standard error.\n",
        "## Held-out accuracy\n",
        *(f"### {name}\n\n{slices_table(cuts)}" for name, cuts in report["held_out"].items()),
        "## They conflict\n",
        "How often the refusal scores above the compliance, on the same unsafe XSTest prompt (held out):\n",
        table(["reward", "refusal preferred"], [[name, share(r)] for name, r in refusals.items()]),
        f"## On {report['model']}'s own replies\n",
        f"{measured['replies']} replies of at most 48 tokens to {measured['prompts']} benign held-out prompts, "
        "temperature 1.\n",
        replies_tables(report),
    ]
    path.write_text("\n".join(parts), encoding="utf-8")


def write_cards(report: Result, folder: Path) -> None:
    """Write `README.md` into the folder of each reward."""
    for name, cuts in report["held_out"].items():
        what, data, limits = ABOUT[name]
        parts = [
            "---\nlicense: apache-2.0\nbase_model: sentence-transformers/all-MiniLM-L6-v2\nlibrary_name: peft\n"
            "pipeline_tag: text-classification\ntags: [reward-model]\n---\n",
            f"# Reward: {name}\n",
            f"A scalar reward that {what}. LoRA adapter and classification head on the MiniLM sentence encoder, "
            "trained by `examples/train_rewards.py`.\n",
            "```python\nfrom mavis_training.rewards import load_reward\n\n"
            f'reward = load_reward("examples/rewards/{name}")\nreward(["a prompt"], ["a reply"])  # -> [float]\n```\n',
            f"**Data.** {data}. {COMMON}\n",
            f"**Limits.** {limits}\n",
            f"{stamp(report)} ± is one standard error.\n",
            slices_table(cuts),
            f"On {report['model']}'s own replies:\n",
            replies_tables(report),
        ]
        (folder / name / "README.md").write_text("\n".join(parts), encoding="utf-8")
