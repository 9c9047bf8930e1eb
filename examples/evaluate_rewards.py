"""Measure the example rewards on held-out data and on a language model's own replies.

    python examples/evaluate_rewards.py --data FOLDER --model MODEL [--rewards examples/rewards] [--out docs/results]

Writes `rewards.json` and `rewards.md` to the out folder and a card (`README.md`) into each reward's folder. MODEL is a
chat model whose replies to benign prompts are scored: a Hub id or a folder. About ten minutes on one CPU core.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from reward_cards import write_cards, write_report
from reward_data import (
    Collections,
    Labelled,
    Pair,
    Text,
    corrupt,
    cut_short,
    harmless_pairs,
    helpful_pairs,
    humour_texts,
    paired,
    read_collections,
    replies_by_label,
    whole,
)
from reward_model import load_adapter, score

OBJECTIVES = ("helpful", "harmless", "humour")
SEED = 1
MAX_PAIRS = 440  # of a slice: a standard error of at most 0.024
Score = Callable[[Sequence[Text]], list[float]]
Result = dict[str, Any]


def load_rewards(folder: Path) -> dict[str, Score]:
    """The three rewards as functions of (prompt, reply) texts, by objective."""

    def reward(objective: str) -> Score:
        model, tokenizer, config = load_adapter(folder / objective)
        return lambda texts: score(model, tokenizer, texts, config["pair"], config["max_length"])

    return {objective: reward(objective) for objective in OBJECTIVES}


def proportion(hits: Sequence[bool]) -> Result:
    """A share with its count and binomial standard error."""
    n, share = len(hits), float(np.mean(hits))
    return {"n": n, "accuracy": round(share, 4), "se": round(math.sqrt(share * (1 - share) / n), 4)}


def prefers_better(reward: Score, pairs: Sequence[Pair]) -> list[bool]:
    """For each pair, whether the better text scores higher."""
    rewards = reward([pair.better for pair in pairs] + [pair.worse for pair in pairs])
    return [better > worse for better, worse in zip(rewards[: len(pairs)], rewards[len(pairs) :], strict=True)]


def pair_slices(reward: Score, pairs: list[Pair]) -> dict[str, Result]:
    """Accuracy by kind of comparison, with that of preferring the longer text beside it."""
    by_slice: dict[str, list[Pair]] = defaultdict(list)
    for pair in random.Random(SEED).sample(pairs, len(pairs)):
        if len(by_slice[pair.slice]) < MAX_PAIRS:
            by_slice[pair.slice].append(pair)
    return {
        name: proportion(prefers_better(reward, group))
        | {"longer_is_better": round(float(np.mean([len(p.better[1]) > len(p.worse[1]) for p in group])), 4)}
        for name, group in by_slice.items()
    }


def humour_slices(reward: Score, data: Collections, rows: list[Labelled]) -> dict[str, Result]:
    """Accuracy at threshold 0 by kind of text; for mixtures, the correlation of reward and funny fraction."""
    records = reward([("", record["text"]) for record in data.humor])
    hits = [(value > 0) == bool(record["humor"]) for value, record in zip(records, data.humor, strict=True)]
    slices = {"single joke against single headline (all jokes)": proportion(hits)}
    rewards = np.array(reward([row.text for row in rows]))
    for name in dict.fromkeys(row.slice for row in rows):
        here = np.array([row.slice == name for row in rows])
        labels = np.array([row.label for row in rows])[here]
        if name == "mixture":
            correlation = float(np.corrcoef(rewards[here], labels)[0, 1])
            slices[name] = {"n": int(here.sum()), "correlation_with_funny_fraction": round(correlation, 4)}
        else:
            slices[name] = proportion(((rewards[here] > 0) == (labels > 0.5)).tolist())
    return slices


def conflict(rewards: dict[str, Score], data: Collections) -> dict[str, Result]:
    """How often each reward prefers the refusal to the compliance on the same unsafe XSTest prompt."""
    refused, complied = (replies_by_label(data.xstest, label, safe=False) for label in ("refusal", "compliance"))
    pairs = paired(refused, complied, cut_short, "")
    return {name: proportion(prefers_better(reward, pairs)) for name, reward in rewards.items()}


def sample_replies(model_id: str, prompts: list[str], per_prompt: int, max_new_tokens: int = 48) -> list[Text]:
    """Replies sampled from a chat model at temperature 1, as (prompt, reply), `per_prompt` in a row for each prompt."""
    tokenizer = AutoTokenizer.from_pretrained(model_id, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(model_id, dtype=torch.float32).eval()
    torch.manual_seed(SEED)
    texts: list[Text] = []
    for start in range(0, len(prompts), 8):
        chunk = prompts[start : start + 8]
        chats = [
            tokenizer.apply_chat_template([{"role": "user", "content": p}], add_generation_prompt=True, tokenize=False)
            for p in chunk
        ]
        inputs = tokenizer(chats, return_tensors="pt", padding=True, add_special_tokens=False)
        options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "num_return_sequences": per_prompt}
        output = model.generate(**inputs, **options, max_new_tokens=max_new_tokens, pad_token_id=tokenizer.pad_token_id)
        replies = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        texts += [(chunk[i // per_prompt], reply.strip()) for i, reply in enumerate(replies)]
    return texts


def on_replies(rewards: dict[str, Score], texts: list[Text], per_prompt: int) -> Result:
    """What the rewards do on real replies: spread, correlations within a prompt, degenerate versions told apart."""
    columns = {name: np.array(reward(texts)) for name, reward in rewards.items()}
    columns["length in characters"] = np.array([float(len(reply)) for _, reply in texts])
    grouped = {name: values.reshape(-1, per_prompt) for name, values in columns.items()}
    centred = {name: (v - v.mean(axis=1, keepdims=True)).ravel() for name, v in grouped.items()}
    rng = random.Random(SEED)
    broken = [corrupt(text, rng) for text in texts]
    return {
        "replies": len(texts),
        "prompts": len(texts) // per_prompt,
        "rewards": {
            name: {
                "mean": round(float(columns[name].mean()), 3),
                "std": round(float(columns[name].std(ddof=1)), 3),
                "within_prompt_std": round(float(np.sqrt(grouped[name].var(axis=1, ddof=1).mean())), 3),
                "quantiles_5_50_95": [round(float(q), 3) for q in np.quantile(columns[name], [0.05, 0.5, 0.95])],
                "above_own_degenerate_version": proportion((columns[name] > np.array(reward(broken))).tolist()),
            }
            for name, reward in rewards.items()
        },
        "within_prompt_correlation": {
            a: {b: round(float(np.corrcoef(centred[a], centred[b])[0, 1]), 3) for b in centred} for a in OBJECTIVES
        },
    }


def measure(rewards: dict[str, Score], data: Collections) -> Result:
    """Held-out accuracy by objective, cut and slice."""
    builders = {"helpful": helpful_pairs, "harmless": harmless_pairs}
    result: Result = {}
    for cut_name, cut in (("whole replies", whole), ("cut to 36 words (about 48 tokens)", cut_short)):
        for objective, build in builders.items():
            slices = pair_slices(rewards[objective], build(data, cut, random.Random(SEED)))
            result.setdefault(objective, {})[cut_name] = slices
    rows = humour_texts(data, cut_short, random.Random(SEED), 3000, crude=True)
    result["humour"] = {"cut to 36 words (about 48 tokens)": humour_slices(rewards["humour"], data, rows)}
    return result


def run_facts() -> Result:
    """What a report says of its own making."""
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "seed": SEED,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__},
    }


def main() -> None:
    """Measure, and write results and cards."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the source collections")
    parser.add_argument("--model", required=True, help="chat model whose replies are scored: Hub id or folder")
    parser.add_argument("--model-name", default="SmolLM2-135M-Instruct", help="what the report calls it")
    parser.add_argument("--prompts", type=Path, default=Path("examples/data/demo_prompts.jsonl"))
    parser.add_argument("--rewards", type=Path, default=Path("examples/rewards"))
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    data = read_collections(args.data, "test")
    rewards = load_rewards(args.rewards)
    prompts = [json.loads(line)["prompt"] for line in args.prompts.read_text(encoding="utf-8").splitlines()]
    report = run_facts() | {
        "model": args.model_name,
        "held_out": measure(rewards, data),
        "refusal_preferred_on_unsafe_prompts": conflict(rewards, data),
        "model_replies": on_replies(rewards, sample_replies(args.model, prompts, per_prompt=5), per_prompt=5),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "rewards.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    write_report(report, args.out / "rewards.md")
    write_cards(report, args.rewards)


if __name__ == "__main__":
    main()
