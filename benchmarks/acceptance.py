"""How much of what a draft model proposes survives steering, and how much more if the drafts are tilted as well?

    python benchmarks/acceptance.py --draft-head runs/smollm2/head-output      # SmolLM2, some minutes on a core

Speculative decoding accepts a draft of the distribution q with probability sum_a min(pi(a), q(a)), and the likeliest
token of q with probability pi of it, pi being the tilted distribution. Both are computed here, not sampled, at every
token of steered answers. The drafter is the model itself, which unsteered is always accepted: what is lost is lost to
the tilt alone. Tilted drafts take a head on the drafter's last state, which is all that vLLM hands out of it
(`draft_values` of docs/serving.md). Results go to docs/results/acceptance.json and acceptance.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from decode import machine
from mavis_logits import MavisConfig, MavisLogitsProcessor, ValueHead
from mavis_logits.models import load_chat_model
from mavis_training.base.prompts import encode_prompts, read_prompts

_TOP_K = 200


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--head", default="model_cards/smollm2-135m-taught-head", help="that steers")
    parser.add_argument("--draft-head", required=True, help="that tilts the drafts, on the last state")
    parser.add_argument("--prompts", default="examples/data/prompts_test.jsonl")
    parser.add_argument("--limit", type=int, default=50, help="prompts (default: %(default)s)")
    parser.add_argument("--betas", type=float, nargs="+", default=[0.0, 2.65, 5.3, 10.6], help="in recommended units")
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--out", type=Path, default=Path("docs/results/acceptance"), help="of the .json and the .md")
    given = parser.parse_args(argv)
    model, tokenizer = load_chat_model("smollm2", torch.bfloat16)
    head, drafts = (ValueHead.from_pretrained(name).float().bind(model) for name in (given.head, given.draft_head))
    if drafts.config.layer is not None:
        raise SystemExit(f"{given.draft_head} reads layer {drafts.config.layer}: a drafter hands out its last state")
    prompts = encode_prompts(read_prompts(given.prompts, limit=given.limit), tokenizer, 512)
    rows = []
    for beta in given.betas:
        for objective in head.config.objectives[: 1 if beta == 0 else None]:
            answers = steered(model, tokenizer, head, prompts, objective, beta, given.new_tokens)
            found = torch.cat(
                [accepted(model, (head, drafts), prompt, answer, objective, beta)
                 for prompt, answer in zip(prompts, answers, strict=True)]
            ).mean(dim=0)  # fmt: skip
            names = ("kl", "sampled", "sampled_tilted", "likeliest", "likeliest_tilted")
            rows.append({"objective": objective, "beta": beta, **dict(zip(names, found.tolist(), strict=True))})
            print(json.dumps(rows[-1]), flush=True)
    content = {
        "date": date.today().isoformat(), "machine": machine(torch.device("cpu")),
        "versions": {name: version(name) for name in ("torch", "transformers", "mavis-logits")},
        "settings": {"head": given.head, "draft_head": drafts.config.recipe, "prompts": len(prompts), "seed": 0},
        "rows": rows,
    }  # fmt: skip
    given.out.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    given.out.with_suffix(".md").write_text(page(content), encoding="utf-8")
    print(page(content))
    return 0


@torch.inference_mode()
def steered(
    model: Any, tokenizer: Any, head: ValueHead, prompts: Sequence[list[int]], objective: str, beta: float, new: int
) -> list[list[int]]:
    """One answer to each prompt, at temperature 1."""
    torch.manual_seed(0)
    config = MavisConfig(beta=beta, top_k=_TOP_K, normalize="standard", unscored="expected")
    answers: list[list[int]] = []
    ends = model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends])
    for start in range(0, len(prompts), 25):
        batch = {"input_ids": prompts[start : start + 25]}
        inputs = tokenizer.pad(batch, padding=True, padding_side="left", return_tensors="pt")
        with MavisLogitsProcessor(head, {objective: 1.0}, model=model, config=config) as mavis:
            out = model.generate(
                **inputs, max_new_tokens=new, do_sample=True, temperature=1.0, top_k=0, logits_processor=[mavis]
            )
        for row in out[:, inputs["input_ids"].shape[1] :].tolist():
            end = next((i for i, token in enumerate(row) if token in ends), len(row) - 1)
            answers.append(row[: end + 1])
    return answers


@torch.inference_mode()
def accepted(
    model: Any, heads: Sequence[ValueHead], prompt: list[int], answer: list[int], objective: str, beta: float
) -> Tensor:
    """[T, 5] at every token of an answer: KL(pi, pi_ref), and the probabilities that drafts are accepted."""
    said = model(torch.tensor([[*prompt, *answer]]), output_hidden_states=True)
    here = slice(len(prompt) - 1, len(prompt) - 1 + len(answer))
    reference = said.logits[0, here].float().log_softmax(dim=-1)
    policies = []
    for head in heads:
        states = said.hidden_states[-1 if head.config.layer is None else head.config.layer][0, here]
        policies.append(tilted(reference, head, states.float(), objective, beta))
    policy, draft = policies
    plain, pi, q = reference.exp(), policy.exp(), draft.exp()
    every = torch.arange(len(pi))
    return torch.stack(
        [
            (pi * (policy - reference)).sum(dim=-1),
            torch.minimum(pi, plain).sum(dim=-1), torch.minimum(pi, q).sum(dim=-1),
            pi[every, plain.argmax(dim=-1)], pi[every, q.argmax(dim=-1)],
        ],
        dim=1,
    )  # fmt: skip


def tilted(reference: Tensor, head: ValueHead, states: Tensor, objective: str, beta: float) -> Tensor:
    """log pi [T, V] of the policy that a head tilts; what it does not score counts as its state does."""
    m = head.config.objectives.index(objective)
    best, candidates = reference.topk(_TOP_K, dim=-1)
    values = beta * head(states, candidates)[..., m] / float(head.units[2][m])
    own = values - (best.softmax(dim=-1) * values).sum(dim=-1, keepdim=True)
    return (reference + torch.zeros_like(reference).scatter(1, candidates, own)).log_softmax(dim=-1)


def page(content: dict[str, Any]) -> str:
    """The results as a page."""
    versions = ", ".join(f"{name} {number}" for name, number in content["versions"].items())
    lines = [
        "# Drafts under steering", "",
        f"`benchmarks/acceptance.py`, {content['date']}, {content['machine']}; {versions}. SmolLM2-135M steered by "
        f"{content['settings']['head']}, drafting for itself; {content['settings']['prompts']} held-out prompts, "
        "temperature 1, seed 0. The probability that a draft token is accepted, computed at every token of steered "
        "answers.", "",
        "| objective | strength | nats a token | sampled drafts | tilted | likeliest drafts | tilted |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in content["rows"]:
        shares = " | ".join(
            f"{row[name]:.3f}" for name in ("sampled", "sampled_tilted", "likeliest", "likeliest_tilted")
        )
        name = row["objective"] if row["beta"] else "any"
        lines.append(f"| {name} | {row['beta']:g} | {row['kl']:.3f} | {shares} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
