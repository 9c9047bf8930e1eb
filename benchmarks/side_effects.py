"""What steering does beside what it is for: prompts put in other ways, and questions that have one right answer.

    python benchmarks/side_effects.py --config training/recipes/smollm2/evaluate-side-effects.yaml

The recipe is one of `mavis evaluate`; its settings are measured on every variant of its prompts (a gain that holds only
for prompts as they stood in training would be no use), and on `examples/data/questions.jsonl` by whether the answer is
there. Everything is kept and resumable as `mavis evaluate` does it.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from mavis_training.base.files import write_json, write_json_lines
from mavis_training.base.prompts import read_prompts
from mavis_training.cli import read_config
from mavis_training.evaluate import EvaluateConfig, evaluate

QUESTIONS = "examples/data/questions.jsonl"


def turns(*texts: str) -> list[dict[str, str]]:
    """A conversation that begins and ends with the user."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def typos(text: str) -> str:
    """Two neighbouring letters swapped in every fourth word."""
    rng, words = random.Random(text), text.split(" ")
    for i in range(0, len(words), 4):
        word = words[i]
        if len(word) > 3 and word.isalpha():
            at = rng.randrange(1, len(word) - 2)
            words[i] = word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    return " ".join(words)


VARIANTS: dict[str, Callable[[str], dict[str, Any]]] = {
    "as it is": lambda text: {},
    "asked politely": lambda text: {"conversation": turns(f"I have a question, please answer it: {text} Thank you!")},
    "a system prompt": lambda text: {
        "conversation": [{"role": "system", "content": "You are a helpful assistant."}, *turns(text)]
    },
    "a second turn": lambda text: {
        "conversation": turns("Hello, can I ask you something?", "Of course, go ahead.", text)
    },
    "capitals": lambda text: {"conversation": turns(text.upper())},
    "typing errors": lambda text: {"conversation": turns(typos(text))},
    "JSON": lambda text: {"conversation": turns(json.dumps({"task": "answer", "question": text}))},
}


def correct(prompts: list[str], completions: list[str], answer: list[str], **columns: object) -> list[float]:
    """1 where the answer, one of several after `|`, is in the text as words of its own."""
    found = []
    for text, wanted in zip(completions, answer, strict=True):
        said = " " + re.sub(r"[^a-z0-9]+", " ", text.lower().replace(",", "")) + " "
        found.append(float(any(f" {one.strip().lower()} " in said for one in wanted.split("|"))))
    return found


def main() -> None:
    """Measure the questions and every variant, and write both tables as they grow."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--config", type=Path, required=True, help="recipe of mavis evaluate")
    config = read_config(EvaluateConfig, ["--config", str(parser.parse_args().config)], "evaluate")
    rows, folder, output = read_prompts(config.prompts, config.limit), Path(config.completions), Path(config.output)
    plain = next(name for name, setting in config.settings.items() if not setting)
    steered = [name for name in config.settings if name != plain]
    questions = evaluate(
        replace(
            config, prompts=QUESTIONS, output=str(folder / "questions.json"), completions=str(folder / "questions"),
            rewards={"correct": f"{__file__}:correct"}, limit=None, combined=None,
            contrasts=[[name, plain] for name in steered],
        )
    )  # fmt: skip
    variants: dict[str, Any] = {}
    results = {key: questions[key] for key in ("date", "machine", "versions")} | {
        "temperature": config.temperature, "top_p": config.top_p, "dtype": config.dtype, "seeds": config.seeds,
        "prompts": len(rows), "questions": questions["prompts"], "variants": variants, "correct": questions["settings"],
        "contrasts": questions["contrasts"],
    }  # fmt: skip
    for name, make in VARIANTS.items():
        file = folder / f"{name}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json_lines(file, [row | make(row["prompt"]) for row in rows])
        found = evaluate(
            replace(config, prompts=str(file), output=str(folder / f"{name}.json"), completions=str(folder / name))
        )
        variants[name] = found["settings"]
        write_json(output, results)  # what is there already, should the rest be interrupted
        output.with_suffix(".md").write_text(table(results, steered, plain), encoding="utf-8")


def table(results: dict[str, Any], steered: list[str], plain: str) -> str:
    """Gains by variant, each setting by the reward of its own name, and what share of the plain gain that is."""
    base = results["variants"]["as it is"]
    lines = ["| prompts | " + " | ".join(steered) + " |", "|" + "---|" * (len(steered) + 1)]
    for name, settings in results["variants"].items():
        cells = []
        for setting in steered:
            own, first = settings[setting][setting]["gain_sd"], base[setting][setting]["gain_sd"]
            error = settings[setting][setting]["gain_sd_error"]
            cells.append(f"{own:+.2f} ± {error:.2f} ({own / first:.0%}), {settings[setting]['kl']:.1f} nats")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += ["", "| questions | " + " | ".join([plain, *steered]) + " |", "|" + "---|" * (len(steered) + 2)]
    right = [results["correct"][name]["correct"] for name in (plain, *steered)]
    lines.append("| right | " + " | ".join(f"{one['reward']:.1%} ± {one['error']:.1%}" for one in right) + " |")
    paired = {one["setting"]: one["correct"] for one in results["contrasts"]}
    share = results["correct"][plain]["correct"]["reward"]
    spread = (share * (1 - share)) ** 0.5  # the unit of gains, of answers that are right or wrong
    cells = [
        f"{paired[name]['gain_sd'] * spread:+.1%} ± {paired[name]['gain_sd_error'] * spread:.1%}" for name in steered
    ]
    lines.append(f"| beyond {plain}, question by question | | {' | '.join(cells)} |")
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    lines += [
        "",
        "Gains in standard deviations of the unsteered reward on the same prompts, and as a share of those on prompts "
        f"as they are; {results['prompts']} prompts, {results['questions']} questions, seeds {results['seeds']}, "
        f"temperature {results['temperature']:g}, top-p {results['top_p']:g}, base model in {results['dtype']}; "
        f"{results['machine']}; {versions}; {results['date']}.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
