"""Does a value head steer better when it learns from what it makes the model say itself?

    python benchmarks/head_on_policy.py --output runs/smollm2/head-on-policy      # SmolLM2, an hour on a core

A policy gradient on the head alone: at every step the steered model answers some prompts several times, and the head's
weights go down the variance, within each prompt, of eta log pi / pi_ref - R. That gradient is RLOO's for the objective
of equation 1 (`mavis_training.tuning.on_policy`). No gradient goes through the base model, so that a step costs little
more than its answers. The head is written every few steps, to be gone on from, with what each step has seen.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mavis_logits import MavisConfig, MavisLogitsProcessor
from mavis_logits.core.rewards import compute_rewards
from mavis_logits.models import load_chat_model
from mavis_logits.values.value_head import ValueHead
from mavis_training.base.prompts import encode_prompts, read_prompts
from mavis_training.rewards.load import load_reward
from mavis_training.trees.data import load_trees, reward_units

_SAVE_EVERY = 5
_LONGEST_PROMPT = 128  # tokens


def main(argv: Sequence[str] | None = None) -> int:
    """Tune a head, step by step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--head", default="model_cards/smollm2-135m-taught-head")
    parser.add_argument("--objective", default="helpful")
    parser.add_argument("--reward", default="examples/rewards/helpful")
    parser.add_argument("--prompts", default="examples/data/prompts_trees.jsonl")
    parser.add_argument("--store", default="examples/data/trees/temperature-1", help="whose rewards say what one is")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=64, help="answers a step (default: %(default)s)")
    parser.add_argument("--generations", type=int, default=4, help="answers to a prompt (default: %(default)s)")
    parser.add_argument("--beta", type=float, default=1.42, help="strength that the head is tuned at")
    parser.add_argument("--top-k", type=int, default=200)
    parser.add_argument("--eta", type=float, default=0.04, help="reward that a nat costs, in standard deviations")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(argv)
    model, tokenizer = load_chat_model("smollm2", torch.bfloat16)
    log = given.output / "log.jsonl"
    done = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    done = done[: len(done) // _SAVE_EVERY * _SAVE_EVERY]  # later steps are in no file of weights
    head = ValueHead.from_pretrained(given.output if done else given.head).float().bind(model)
    optimizer = torch.optim.Adam(head.parameters(), lr=given.learning_rate, betas=(0.9, 0.98))
    if done:
        optimizer.load_state_dict(torch.load(given.output / "optimizer.pt"))
    rows = read_prompts(given.prompts)
    prompts = encode_prompts(rows, tokenizer, 1024)
    short = [i for i, prompt in enumerate(prompts) if len(prompt) <= _LONGEST_PROMPT]
    reward = load_reward(given.reward)
    scale = float(reward_units(load_trees(given.store, [given.objective], zeta=0.0, most=200)[1])[1][0])
    order = torch.randperm(len(short), generator=torch.Generator().manual_seed(given.seed)).tolist()
    each = given.batch_size // given.generations
    given.output.mkdir(parents=True, exist_ok=True)
    for step in range(len(done), given.steps):
        began = time.perf_counter()
        some = [short[order[(step * each + i) % len(order)]] for i in range(each)]
        answers = sampled(model, tokenizer, head, [prompts[i] for i in some], given, seed=given.seed * 100_003 + step)
        texts = [tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]
        asked = [rows[i]["prompt"] for i in some for _ in range(given.generations)]
        rewards = torch.tensor(compute_rewards(reward, asked, texts, {}, given.objective)) / scale
        for group in optimizer.param_groups:
            group["lr"] = given.learning_rate * min(1.0, (step + 1) / 5)
        row = learn(model, head, optimizer, [prompts[i] for i in some], answers, rewards, given)
        row |= {"step": step, "reward": float(rewards.mean()), "seconds": round(time.perf_counter() - began, 1)}
        done.append(row)
        print(row, flush=True)
        if len(done) % _SAVE_EVERY == 0:
            head.save_pretrained(given.output)
            torch.save(optimizer.state_dict(), given.output / "optimizer.pt")
            log.write_text("".join(json.dumps(row) + "\n" for row in done), encoding="utf-8")
    return 0


@torch.inference_mode()
def sampled(
    model: Any, tokenizer: Any, head: ValueHead, prompts: Sequence[Sequence[int]], given: argparse.Namespace, seed: int
) -> list[list[int]]:
    """Steered answers, `generations` to each prompt, with their end of text if they have one."""
    torch.manual_seed(seed)
    head.eval()
    config = MavisConfig(beta=given.beta, top_k=given.top_k, normalize="none", unscored="expected")
    batch = [prompt for prompt in prompts for _ in range(given.generations)]
    inputs = tokenizer.pad({"input_ids": batch}, padding=True, padding_side="left", return_tensors="pt")
    with MavisLogitsProcessor(head, {given.objective: 1.0}, model=model, config=config) as mavis:
        out = model.generate(
            **inputs, max_new_tokens=given.new_tokens, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
            logits_processor=[mavis],
        )  # fmt: skip
    ends = model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends])
    answers = []
    for row in out[:, inputs["input_ids"].shape[1] :].tolist():
        end = next((i for i, token in enumerate(row) if token in ends), len(row) - 1)
        answers.append(row[: end + 1])
    return answers


def learn(
    model: Any,
    head: ValueHead,
    optimizer: torch.optim.Optimizer,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    rewards: Tensor,
    given: argparse.Namespace,
) -> dict[str, float]:
    """One step of the optimizer on all prompts; what it saw."""
    head.train()
    head.dropout.p = 0.0
    optimizer.zero_grad()
    kls, losses = [], []
    for i, prompt in enumerate(prompts):
        own = slice(i * given.generations, (i + 1) * given.generations)
        ratios = log_ratios(model, head, prompt, answers[own], given)
        missed = given.eta * ratios - rewards[own]
        loss = missed.var(unbiased=False)
        (loss / len(prompts)).backward()
        kls.append(float(ratios.mean()))
        losses.append(float(loss))
    norm = torch.nn.utils.clip_grad_norm_(head.parameters(), 10.0)
    optimizer.step()
    return {"kl": sum(kls) / len(kls), "loss": sum(losses) / len(losses), "gradient": float(norm)}


def log_ratios(
    model: Any, head: ValueHead, prompt: Sequence[int], answers: Sequence[Sequence[int]], given: argparse.Namespace
) -> Tensor:
    """log pi / pi_ref of answers to one prompt, [answers]: of the policy tilted by the head, through which it learns."""
    most = max(map(len, answers))
    ids = torch.tensor([[*prompt, *answer, *[0] * (most - len(answer))] for answer in answers])  # later tokens do not count
    with torch.no_grad():
        said = model(ids, output_hidden_states=True)
        before = slice(len(prompt) - 1, len(prompt) - 1 + most)
        scores = said.logits[:, before].float().log_softmax(dim=-1)
        hidden = said.hidden_states[head.config.layer][:, before]
    there = torch.tensor([[j < len(answer) for j in range(most)] for answer in answers])
    scores, hidden, taken = scores[there], hidden[there].float(), ids[:, len(prompt) :][there]
    best, candidates = scores.topk(given.top_k, dim=-1)
    m = head.config.objectives.index(given.objective)
    values = head(hidden, candidates)[..., m]
    tilted = given.beta * values
    inside = best.exp().sum(dim=-1)
    state = (torch.softmax(best, dim=-1) * tilted).sum(dim=-1)  # what the others count as
    outside = (1 - inside).clamp(min=1e-9).log() + state
    partition = torch.logaddexp((best + tilted).logsumexp(dim=-1), outside)
    where = candidates == taken[:, None]
    own = torch.where(where.any(dim=-1), (where * tilted).sum(dim=-1), state)
    ratio = own - partition
    which = there.nonzero()[:, 0]
    return ratio.new_zeros(len(answers)).index_add(0, which, ratio)


if __name__ == "__main__":
    sys.exit(main())
