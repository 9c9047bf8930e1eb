"""Measure the two rewards of summaries on held-out documents.

    python examples/evaluate_summary_rewards.py --data FOLDER [--rewards examples/rewards] [--out docs/results]

Writes `summary_rewards.{json,md}` to the out folder. A few minutes on a core.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import transformers

from evaluate_rewards import MAX_PAIRS, SEED, Score, pair_slices, prefers_better, proportion, run_facts
from mavis_training.rewards.load import load_reward
from reward_cards import share, slices_table, stamp, table
from reward_data import Pair
from summary_data import read_documents, sentences, summary_pairs, summary_prompt

SOURCES = {"scitldr": "scientific abstracts", "debian": "descriptions of packages"}


def as_score(spec: str) -> Score:
    """A reward as a function of (prompt, reply) texts."""
    reward = load_reward(spec)
    return lambda texts: reward([prompt for prompt, _ in texts], [reply for _, reply in texts])


def conflict(rewards: dict[str, Score], documents: list[dict]) -> dict[str, dict]:
    """How often each reward prefers a document's own first sentence to a person's summary of it."""
    pairs = [
        Pair((summary_prompt(d["text"]), sentences(d["text"])[0]), (summary_prompt(d["text"]), d["references"][0]), "")
        for d in documents[:MAX_PAIRS]
    ]
    return {name: proportion(prefers_better(reward, pairs)) for name, reward in rewards.items()}


def main() -> None:
    """Measure, and write results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the source collections")
    parser.add_argument("--rewards", type=Path, default=Path("examples/rewards"))
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    rewards = {
        "summary": as_score(f"{args.rewards / 'summary.py'}:summary"),
        "faithful": as_score(f"{args.rewards / 'faithful.py'}:faithful"),
    }
    documents = {source: read_documents(args.data, "test", [source]) for source in SOURCES}
    held_out = {
        name: {
            what: pair_slices(reward, summary_pairs(documents[source], random.Random(SEED)))
            for source, what in SOURCES.items()
        }
        for name, reward in rewards.items()
    }
    report = run_facts() | {
        "held_out": held_out,
        "first_sentence_preferred": conflict(rewards, documents["scitldr"]),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "summary_rewards.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    shares = [[name, share(result)] for name, result in report["first_sentence_preferred"].items()]
    parts = [
        "# The rewards of summaries, measured\n",
        f"{stamp(report)} Written by `examples/evaluate_summary_rewards.py`. ± is one standard error. How often a "
        "person's summary of a held-out document scores above what stands on the left, and how often the longer text "
        "is that summary.\n",
        *(f"## {name}\n\n{slices_table(cuts)}" for name, cuts in held_out.items()),
        "## They conflict\n",
        "How often the first sentence of an abstract, as it is, scores above a person's summary of it:\n",
        table(["reward", "first sentence preferred"], shares),
    ]
    (args.out / "summary_rewards.md").write_text("\n".join(parts), encoding="utf-8")


if __name__ == "__main__":
    main()
