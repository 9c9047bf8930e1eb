"""Two checkouts of this repository side by side: does a change make decoding slower?

Each gets a process of its own; the two decode in turns, the same prompts with the same seed, so that a machine which
slows down slows both. Printed and written is the ratio of this checkout's time to the other's, round by round; of
"own share" that of the time a step spends in the processor and not in value functions.

    git worktree add ../before COMMIT
    python benchmarks/checkouts.py ../before                 # writes docs/results/checkouts.json
    python benchmarks/checkouts.py ../before --cases "own share" --out docs/results/own_share.json

Run it on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PROMPTS = [
    "How do I make good tea?",
    "Tell me about the sea.",
    "Why is the sky blue?",
    "What is a good name for a cat?",
]
SIDES = ("this", "other")
CASES = [
    f"{values} by {way}, batch {batch}"
    for values in ("plain", "head", "two value models")
    for way in (("generate",) if values == "plain" else ("processor", "strategy"))
    for batch in (1, 8)
] + ["own share, k 15 by processor, batch 8", "own share, k 200 and the rest kept by processor, batch 8"]
PAPERS: dict[str, Any] = {"top_k": 15, "normalize": "minmax", "beta": 5.0, "unscored": "drop"}
OWN_SHARE: dict[str, dict[str, Any]] = {
    "own share, k 15": {**PAPERS, "beta": 3.0},
    "own share, k 200 and the rest kept": {"top_k": 200, "normalize": "none", "beta": 3.0, "unscored": "keep"},
}


def main(argv: Sequence[str] | None = None) -> int:
    """Compare, print and write."""
    options = parser().parse_args(argv)
    if options.work:
        work(options.new_tokens)
        return 0
    workers = {"this": start(ROOT, options.new_tokens), "other": start(Path(options.other), options.new_tokens)}
    imports = {side: ask(worker, "ready") for side, worker in workers.items()}
    rows = []
    for case in (case for case in CASES if not options.cases or any(part in case for part in options.cases)):
        seconds: dict[str, list[float]] = {side: [] for side in SIDES}
        for number in range(options.rounds + 1):
            for side in SIDES if number % 2 else SIDES[::-1]:
                taken = ask(workers[side], case)
                if number:  # the first round warms up
                    seconds[side].append(taken)
        ratios = sorted(a / b for a, b in zip(seconds["this"], seconds["other"], strict=True))
        rows.append({"case": case, "ratio": statistics.median(ratios), "least": ratios[0], "most": ratios[-1]})
        print(f"{case:36} {rows[-1]['ratio']:.3f}  ({ratios[0]:.2f} to {ratios[-1]:.2f})", flush=True)
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()
    result = {
        "other": commit(Path(options.other)), "this": commit(ROOT), "date": str(date.today()), "seed": 0,
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
        "rounds": options.rounds, "new_tokens": options.new_tokens, "import_seconds": imports, "rows": rows,
    }  # fmt: skip
    Path(options.out).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


def parser() -> argparse.ArgumentParser:
    """The options."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("other", help="folder of the other checkout")
    found.add_argument("--cases", nargs="+", help="those whose names have one of these in them; by default all")
    found.add_argument("--rounds", type=int, default=7)
    found.add_argument("--new-tokens", type=int, default=32)
    found.add_argument("--out", default=str(ROOT / "docs" / "results" / "checkouts.json"))
    found.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    return found


def start(checkout: Path, new_tokens: int) -> subprocess.Popen[str]:
    """A process that decodes with the code of a checkout, on request."""
    command = [sys.executable, __file__, str(checkout), "--work", "--new-tokens", str(new_tokens)]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment(checkout), cwd=ROOT, **pipes)


def environment(checkout: Path) -> dict[str, str]:
    """Of a process that imports the code of a checkout."""
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(str((checkout / part).resolve()) for part in ("src", "training"))
    }


def ask(worker: subprocess.Popen[str], case: str) -> float:
    """The seconds that a worker took."""
    assert worker.stdin is not None
    assert worker.stdout is not None
    print(case, file=worker.stdin, flush=True)
    return float(worker.stdout.readline())


def commit(checkout: Path) -> str:
    """The commit that is checked out in a folder."""
    command = ["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def work(new_tokens: int) -> None:
    """Decode what standard input asks for; the seconds go to standard output."""
    started = time.perf_counter()
    import mavis_logits

    mavis_logits.MavisLogitsProcessor  # noqa: B018 (imported only when used)
    imported = time.perf_counter() - started
    import torch
    import transformers

    from mavis_logits.demo import load_smollm2  # under this name in every version

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model, tokenizer = load_smollm2()
    cards = Path(mavis_logits.__file__).parents[2] / "model_cards"  # its own: what they record may have changed
    values: dict[str, Any] = {
        "head": str(cards / "smollm2-135m-value-head"),
        "two value models": {name: str(cards / f"smollm2-135m-value-{name}") for name in ("helpful", "humour")},
    }
    made: dict[str, dict[str, Any]] = {}
    for case in map(str.strip, sys.stdin):
        if case == "ready":
            print(imported, flush=True)
            continue
        name, _, rest = case.partition(" by ")
        way, _, batch = rest.partition(", batch ")
        key = f"{name} {way}"
        if key not in made:
            made[key] = {}
            if name in OWN_SHARE:
                made[key] = {"logits_processor": [OwnShare(values["head"], model, OWN_SHARE[name])]}
            elif name != "plain":
                kind = mavis_logits.MavisLogitsProcessor if way == "processor" else mavis_logits.MavisSampling
                # Said here: what value functions recommend for themselves may have changed.
                steer = kind.from_pretrained(values[name], model=model, **PAPERS)
                made[key] = {"logits_processor": [steer]} if way == "processor" else {"custom_generate": steer}
        texts = [PROMPTS[i % len(PROMPTS)] for i in range(int(batch))]
        inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
        torch.manual_seed(0)
        started = time.perf_counter()
        model.generate(
            **inputs, **made[key], do_sample=True, temperature=1.0, top_k=0, min_new_tokens=new_tokens,
            max_new_tokens=new_tokens, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        taken = time.perf_counter() - started
        print(made[key]["logits_processor"][0].median() if name in OWN_SHARE else taken, flush=True)


class OwnShare:
    """A processor that is steered by a head, and what of each step is its own."""

    def __init__(self, head: str, model: Any, settings: dict[str, Any]) -> None:
        from mavis_logits import MavisLogitsProcessor

        self.steer = MavisLogitsProcessor.from_pretrained(head, model=model, **settings)
        self.seconds: list[float] = []

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        started, before = time.perf_counter(), self.steer.stats.seconds
        result = self.steer(input_ids, scores)
        self.seconds.append(time.perf_counter() - started - (self.steer.stats.seconds - before))
        return result

    def median(self) -> float:
        """Seconds a step, of those since it was last asked."""
        found, self.seconds = statistics.median(self.seconds), []
        return found


if __name__ == "__main__":
    sys.exit(main())
