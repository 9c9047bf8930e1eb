"""How much longer decoding takes when it is steered: both sides in one run, as ratios to plain `generate`.

Compared are plain sampling, sampling steered by a value head, by two value models of four layers each, and by the same
two models without a cache (the slow twin: every candidate is re-forwarded from scratch, as the tests do). The time
does not depend on what the value functions have learned, so that they are random here.

All variants take turns (A B C D, A B C D, ...), so that a machine which slows down slows all of them. Every round has
other prompts and gives one ratio; processors live through all rounds, as they do in a user's program. Run it on a
machine that does nothing else:

    python benchmarks/decode.py                                          # writes docs/results/decode.{json,md}
    python benchmarks/decode.py --new-tokens 4 --repeats 1 --out runs/quick  # a quick look
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import BatchEncoding, LogitsProcessor, PreTrainedModel

from mavis_logits import MavisLogitsProcessor, ValueHead, ValueModel
from mavis_logits.demo import load_smollm2
from mavis_logits.demo.chat import chat_inputs
from mavis_logits.tilting import combine, normalize, tilt

ROOT = Path(__file__).resolve().parents[1]
PLAIN = "plain generate"
TWIN = "two 4-layer value models, slow twin"
SEED = 0


@dataclass(frozen=True)
class Ratio:
    """Time of one variant over time of plain `generate` at one batch size: median and range over the rounds."""

    variant: str
    batch: int
    median: float
    low: float
    high: float
    rounds: int
    tokens_per_second: float


def main() -> None:
    """Measure, write the results, print them."""
    arguments = parser().parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model, tokenizer = load_smollm2()
    variants = make_variants(model, arguments.top_k)
    results: list[Ratio] = []
    for batch in arguments.batches:
        rounds = [chat_inputs(tokenizer, demo_prompts(batch, turn)) for turn in range(arguments.repeats + 1)]
        results += measure(model, rounds, variants, arguments.new_tokens, arguments.twin_repeats)
    report = {
        "date": date.today().isoformat(),
        "machine": machine(),
        "versions": {name: version(name) for name in ("torch", "transformers", "mavis-logits")},
        "settings": {
            "model": model.name_or_path,
            "dtype": str(model.dtype),
            "new_tokens": arguments.new_tokens,
            "top_k": arguments.top_k,
            "seed": SEED,
        },
        "results": [asdict(result) for result in results],
    }
    folder = Path(arguments.out)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "decode.json").write_text(json.dumps(report, indent=1) + "\n")
    text = markdown(report)
    (folder / "decode.md").write_text(text)
    print(text)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the benchmark's options."""
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = result.add_argument
    add("--batches", type=int, nargs="+", default=[1, 8], help="prompts at once (default: 1 8)")
    add("--new-tokens", type=int, default=48, help="tokens that every answer gets (default: %(default)s)")
    add("--top-k", type=int, default=15, help="candidates at every step (default: %(default)s)")
    add("--repeats", type=int, default=7, help="rounds (default: %(default)s)")
    add("--twin-repeats", type=int, default=2, help="rounds in which the slow twin takes part (default: %(default)s)")
    add("--out", default=str(ROOT / "docs" / "results"), help="folder for decode.json and decode.md")
    return result


def make_variants(model: PreTrainedModel, top_k: int) -> dict[str, LogitsProcessor | None]:
    """Return the logits processor of every variant, the plain one first (None)."""
    torch.manual_seed(SEED)
    head = ValueHead.for_model(model, objectives=["a", "b"]).eval()
    models = {name: ValueModel.from_backbone(model, objectives=[name], num_layers=4).eval() for name in ("a", "b")}
    steering: dict[str, Any] = {"weights": {"a": 0.5, "b": 0.5}, "beta": 5.0, "top_k": top_k}
    return {
        PLAIN: None,
        "value head": MavisLogitsProcessor(head, **steering, model=model),
        "two 4-layer value models": MavisLogitsProcessor(models, **steering),
        TWIN: SlowTwin(models, **steering, pad_token_id=model.config.eos_token_id),
    }


class SlowTwin(LogitsProcessor):
    """Algorithm 2 word for word: every candidate's sequence goes through every value model from its first token."""

    def __init__(
        self, models: dict[str, ValueModel], weights: dict[str, float], beta: float, top_k: int, pad_token_id: int
    ) -> None:
        self.models, self.beta, self.top_k, self.pad_token_id = models, beta, top_k, pad_token_id
        self.weights = torch.tensor([weights[name] for name in models])

    @torch.inference_mode()
    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Map ids [R, T] and scores [R, V] to tilted scores [R, V]."""
        reference, candidates = scores.topk(self.top_k)
        values = torch.stack([self.values(ids, own) for ids, own in zip(input_ids, candidates, strict=True)])
        combined = normalize(combine(values, self.weights), reference.isfinite(), "minmax")
        return torch.full_like(scores, -torch.inf).scatter(1, candidates, tilt(reference, combined, self.beta))

    def values(self, ids: Tensor, candidates: Tensor) -> Tensor:
        """Map the left-padded ids [T] of one row and its candidates [k] to values [k, M]."""
        start = int((ids != self.pad_token_id).nonzero()[0])
        rows = torch.cat([ids[start:].expand(len(candidates), -1), candidates[:, None]], dim=1)
        return torch.cat([model(rows).values[:, -1] for model in self.models.values()], dim=-1)


def measure(
    model: PreTrainedModel,
    rounds: list[BatchEncoding],
    variants: dict[str, LogitsProcessor | None],
    new_tokens: int,
    twin_repeats: int,
) -> list[Ratio]:
    """Time all variants in turns at one batch size; the first round, of two tokens, is not counted."""
    batch = len(rounds[0]["input_ids"])
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for processor in variants.values():
        decode(model, rounds[0], processor, new_tokens=2)
    for turn, inputs in enumerate(rounds[1:], start=1):
        for name, processor in variants.items():
            if name != TWIN or turn <= twin_repeats:
                seconds[name].append(decode(model, inputs, processor, new_tokens))
                print(f"batch {batch}, round {turn}, {name}: {seconds[name][-1]:.2f} s", flush=True)
    return [summary(name, seconds, batch, new_tokens) for name in variants]


def decode(model: PreTrainedModel, inputs: BatchEncoding, processor: LogitsProcessor | None, new_tokens: int) -> float:
    """Return the seconds that `generate` takes for exactly `new_tokens` tokens a row."""
    torch.manual_seed(SEED)
    start = time.perf_counter()
    model.generate(
        **inputs,
        do_sample=True,
        top_k=0,
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
        logits_processor=[processor] if processor else [],
        pad_token_id=model.config.eos_token_id,
    )
    return time.perf_counter() - start


def summary(name: str, seconds: dict[str, list[float]], batch: int, new_tokens: int) -> Ratio:
    """Return the ratios of a variant to the plain run of the same round."""
    ratios = [own / plain for own, plain in zip(seconds[name], seconds[PLAIN], strict=False)]
    speed = batch * new_tokens / statistics.median(seconds[name])
    return Ratio(name, batch, statistics.median(ratios), min(ratios), max(ratios), len(ratios), speed)


def demo_prompts(count: int, turn: int) -> list[str]:
    """Return `count` prompts of the demo, others every turn until all have been used."""
    lines = (ROOT / "examples" / "data" / "demo_prompts.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(lines[(turn * count + i) % len(lines)])["prompt"] for i in range(count)]


def machine() -> str:
    """Return processor, number of cores and threads in use."""
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} threads"


def markdown(report: dict[str, Any]) -> str:
    """Return the results as a page."""
    settings, versions = report["settings"], report["versions"]
    lines = [
        "# Time of steered decoding",
        "",
        "Time of `generate` divided by the time of plain `generate` in the same round: median (range). "
        "Written by `benchmarks/decode.py`.",
        "",
        "| batch | decoding | time over plain | rounds | tokens/s |",
        "|---|---|---|---|---|",
    ]
    for row in report["results"]:
        lines.append(
            f"| {row['batch']} | {row['variant']} | {row['median']:.2f} ({row['low']:.2f} to {row['high']:.2f}) "
            f"| {row['rounds']} | {row['tokens_per_second']:.0f} |"
        )
    lines += [
        "",
        f"{settings['model']} in {settings['dtype']}, {settings['new_tokens']} new tokens, top_k {settings['top_k']}, "
        f"seed {settings['seed']}. {report['machine']}. "
        + ", ".join(f"{name} {number}" for name, number in versions.items())
        + f". {report['date']}.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
