"""A policy gradient on a value head alone: what decoding meets is what is learned from, through no base model.

    python benchmarks/reinforce.py --head runs/head --prompts examples/data/prompts_train.jsonl \
        --reward humour=examples/rewards/humour --output runs/head-reinforced

Every step samples completions steered towards one objective after another, and moves the head towards those that its
rewards prefer to the others of the same prompt (RLOO), less `--kl-weight` times the exact divergence of each step:

    grad  E_pi [ (R_i - mean of the prompt's other R) sum_t grad log pi(a_t | s_t) ] - eta grad sum_t KL(pi || pi_ref)

with pi(a | s) prop. to pi_ref(a | s) exp(beta Q(s, a)). Hidden states are those that sampling has computed: only the
head is differentiated, on a share of the positions.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mavis_logits.core.tilting import kl_divergence
from mavis_logits.decoding.strategies.sampling import sample_index
from mavis_logits.decoding.strategies.session import Session
from mavis_logits.models import load_chat_model
from mavis_logits.steering.steering import Steering
from mavis_logits.values.value_head import ValueHead
from mavis_training.base.files import write_json
from mavis_training.base.prompts import encode_prompts, read_prompts
from mavis_training.rewards.load import Reward, compute_rewards, load_reward
from mavis_training.sampling.reference import Reference, warpers
from mavis_training.sampling.rollout import left_padded


@dataclass
class Positions:
    """Steps of steered sampling, one entry a row and step.

    Attributes:
        row: `[S]`, which completion.
        hidden: `[S, d]`, the state that the head reads.
        candidates, reference: `[S, k]`, of the step.
        chosen: `[S]`, which candidate was drawn.
    """

    row: Tensor
    hidden: Tensor
    candidates: Tensor
    reference: Tensor
    chosen: Tensor

    def __len__(self) -> int:
        return len(self.row)

    def taken(self, index: Tensor) -> Positions:
        """Some of them."""
        return Positions(*(x[index] for x in (self.row, self.hidden, self.candidates, self.reference, self.chosen)))


@dataclass(frozen=True)
class Settings:
    """How to learn.

    Attributes:
        steps: updates.
        prompts: a step.
        samples: completions of each.
        beta, top_k: of the steered policy; values are not normalised.
        temperature: of the reference.
        max_new_tokens: T.
        kl_weight: eta, in standard deviations of the reward a nat.
        share: of the positions that are differentiated in a step.
        learning_rate: of Adam.
        seed: of everything.
    """

    steps: int = 40
    prompts: int = 16
    samples: int = 4
    beta: float = 5.0
    top_k: int = 50
    temperature: float = 1.0
    max_new_tokens: int = 48
    kl_weight: float = 0.05
    share: float = 0.5
    learning_rate: float = 1e-4
    seed: int = 0


@torch.no_grad()
def sampled(
    steering: Steering, model: PreTrainedModel, rows: Sequence[list[int]], eos: frozenset[int], settings: Settings
) -> tuple[list[list[int]], Positions, Tensor]:
    """Completions of token ids `rows`, all their positions, and the divergence of each completion, `[R]`."""
    (head,) = steering.functions.heads
    written: list[list[int]] = [[] for _ in rows]
    parts: list[Positions] = []
    spent = torch.zeros(len(rows))
    shaped = warpers(settings.temperature, top_p=1.0)
    with Session(steering, model, *left_padded(rows, model.device), shaped) as session:
        live = torch.arange(len(rows))
        for _ in range(settings.max_new_tokens):
            step = session.score()
            drawn = sample_index(step.tilted)
            tokens = step.candidates.gather(1, drawn[:, None])[:, 0]
            hidden = session._hidden[head.config.layer].clone()  # the head has just read them
            parts.append(Positions(live, hidden, step.candidates, step.reference, drawn))
            spent[live] += step.kl.cpu()
            for row, token in zip(live.tolist(), tokens.tolist(), strict=True):
                written[row].append(token)
            session.append(tokens, drawn)
            goes_on = torch.tensor([token not in eos for token in tokens.tolist()])
            if not goes_on.any():
                break
            if not goes_on.all():
                kept = torch.nonzero(goes_on)[:, 0]
                session.select(kept.to(model.device))
                live = live[kept]
    columns = [torch.cat([getattr(part, name) for part in parts]) for name in Positions.__dataclass_fields__]
    return written, Positions(*columns), spent


def advantages(rewards: np.ndarray, samples: int) -> Tensor:
    """Rewards `[P * S]` less the mean of the prompt's other completions."""
    own = torch.from_numpy(rewards).float().view(-1, samples)
    return (own - (own.sum(dim=1, keepdim=True) - own) / (samples - 1)).flatten()


def surrogate(
    head: ValueHead, positions: Positions, advantage: Tensor, weights: Tensor, settings: Settings, count: int
) -> tuple[Tensor, Tensor]:
    """What is minimised over some positions, a completion: the policy gradient's surrogate and the divergence.

    Args:
        head: in training mode, without dropout.
        positions: of `count` completions.
        advantage: `[count]`, in standard deviations of the reward.
        weights: `[M]`, lambda.
        settings: beta.
        count: of completions.
    """
    values = head(positions.hidden.float(), positions.candidates) @ weights
    masked = positions.reference == -torch.inf
    scores = (positions.reference + settings.beta * values).masked_fill(masked, -torch.inf)
    log_policy = torch.log_softmax(scores, dim=1)
    taken = log_policy.gather(1, positions.chosen[:, None])[:, 0]
    spent = kl_divergence(log_policy, positions.reference, normalized=True)
    return -(advantage[positions.row] * taken).sum() / count, spent.sum() / count


def reinforce(
    head: ValueHead,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[dict[str, Any]],
    rewards: dict[str, Reward],
    settings: Settings,
) -> list[dict[str, Any]]:
    """Learn; returns what every step met."""
    rng = random.Random(settings.seed)
    torch.manual_seed(settings.seed)
    head.dropout.p = 0.0
    optimizer = torch.optim.Adam(head.parameters(), lr=settings.learning_rate)
    eos = Reference.of(model, tokenizer).eos
    encoded = dict(zip([row["id"] for row in rows], encode_prompts(list(rows), tokenizer, 10**6), strict=True))
    scale = np.array(head.config.reward_scale)
    history = []
    for number in tqdm(range(settings.steps), desc="reinforce", unit="step"):
        name = list(rewards)[number % len(rewards)]
        weights = torch.zeros(len(head.config.objectives))
        weights[head.config.objectives.index(name)] = 1.0
        chosen = rng.sample(list(rows), min(settings.prompts, len(rows)))
        repeated = [row for row in chosen for _ in range(settings.samples)]
        head.eval()
        steering = Steering(
            head, weights.tolist(), settings.beta, model=model, tokenizer=tokenizer, top_k=settings.top_k,
            normalize="none",
        )  # fmt: skip
        written, positions, spent = sampled(steering, model, [encoded[r["id"]] for r in repeated], eos, settings)
        texts = tokenizer.batch_decode(written, skip_special_tokens=True)
        found = np.array(compute_rewards(rewards[name], [r["prompt"] for r in repeated], texts, {}, name))
        gain = advantages(found / scale[head.config.objectives.index(name)], settings.samples)
        head.train()
        optimizer.zero_grad()
        drawn = torch.randperm(len(positions))[: max(1, int(settings.share * len(positions)))]
        for part in drawn.split(256):
            loss, divergence = surrogate(head, positions.taken(part), gain, weights, settings, len(repeated))
            ((loss + settings.kl_weight * divergence) / settings.share).backward()
        torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimizer.step()
        history.append({"objective": name, "reward": float(found.mean()), "kl": float(spent.mean())})
        tqdm.write(f"step {number + 1}, {name}: reward {found.mean():.3f}, {spent.mean():.1f} nats")
    head.eval()
    return history


def main() -> None:
    """Learn from a head in a folder, and save it in another."""
    arguments = parser().parse_args()
    model, tokenizer = load_chat_model(arguments.model, torch.float32)
    head = ValueHead.from_pretrained(arguments.head).bind(model)
    rewards: dict[str, Callable[..., Any]] = {}
    for given in arguments.reward:
        name, _, spec = given.partition("=")
        rewards[name] = load_reward(spec)
    settings = Settings(**{name: getattr(arguments, name) for name in Settings.__dataclass_fields__})
    started = time.monotonic()
    history = reinforce(head, model, tokenizer, read_prompts(arguments.prompts), rewards, settings)
    head.save_pretrained(arguments.output)
    write_json(arguments.output / "reinforce.json", {"history": history, "seconds": round(time.monotonic() - started)})


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    result = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    add = result.add_argument
    add("--head", required=True)
    add("--prompts", required=True)
    add("--reward", nargs="+", required=True, metavar="NAME=SPEC")
    add("--output", type=Path, required=True)
    add("--model", default="smollm2")
    for name, known in Settings.__dataclass_fields__.items():
        add(f"--{name.replace('_', '-')}", type=type(known.default), default=known.default)
    return result


if __name__ == "__main__":
    main()
