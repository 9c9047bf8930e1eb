"""Sampling the extensions of Algorithm 3, from the reference or from a steered policy, for many trees side by side.

All branches of all trees are rows of one `Session`: a prompt is computed once, a branch that forks is copied instead of
recomputed, and one that ends leaves. No row ever waits for another's level, so that trees of depth L and length T need
T forward passes.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mavis_logits.decoding.strategies.sampling import sample_index
from mavis_logits.decoding.strategies.session import Session
from mavis_logits.steering.steering import Steering

from ..trees.tree import Tree
from .growth import Branch, Growth
from .reference import warpers

if TYPE_CHECKING:
    from .config import CollectConfig


@torch.no_grad()
def sample_trees(
    model: PreTrainedModel,
    rows: Sequence[dict[str, Any]],
    prompts: Sequence[list[int]],
    eos: set[int],
    shape: CollectConfig,
    seed: int,
    temperature: float = 1.0,
    steering: Steering | None = None,
    top_p: float = 1.0,
) -> list[Tree]:
    """Algorithm 3 for P prompts side by side; rewards come later, and values from them (`trees.targets`).

    Args:
        model: the reference.
        rows: P prompt rows.
        prompts: their token ids, none empty.
        eos: tokens that end a completion.
        shape: of the trees.
        seed: of all randomness.
        temperature, top_p: of the sampling policy; a steered policy tilts the reference that they leave.
        steering: value functions and settings of pi_gen (Algorithm 2); None for the reference itself.

    Returns:
        P trees; log pi_gen is that of the policy that was sampled from, log pi_ref that of the reference at temperature
        1 over the full vocabulary.

    Raises:
        ValueError: an empty prompt, a base model without a token-addressed cache, a value that is not finite.
    """
    growth = Growth(rows, prompts, eos, shape, random.Random(seed))
    generator = torch.Generator(model.device).manual_seed(seed)
    for row, prompt in zip(rows, prompts, strict=True):
        if not prompt:
            raise ValueError(f"the prompt {row['id']!r} has no tokens: drop it from the prompt file")
    with Session(steering, model, *left_padded(prompts, model.device), warpers(temperature, top_p)) as session:
        if steering is None:  # the prompts are read before their rows multiply
            session.reference()
        else:
            session.score()
        branches = growth.start()
        session.select(torch.tensor([branch.tree for branch in branches], device=model.device))
        while branches:
            sampled = zip(branches, *_sample(session, steering, generator), strict=True)
            for branch, token, logp_gen, logp_ref in sampled:
                branch.add(token, logp_gen, logp_ref)
            branches = _go_on(session, growth, branches)
    return growth.trees()


def left_padded(prompts: Sequence[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and attention mask [P, T] of prompts' token ids."""
    longest = max(map(len, prompts))
    padded = [([0] * (longest - len(p)) + p, [0] * (longest - len(p)) + [1] * len(p)) for p in prompts]
    ids, mask = torch.tensor(padded, device=device).unbind(dim=1)
    return ids, mask


def _sample(
    session: Session, steering: Steering | None, generator: torch.Generator
) -> tuple[list[int], list[float], list[float]]:
    """Append a token to every row; returns the tokens, their log pi_gen and their log pi_ref."""
    scores = session.reference()
    chosen: Tensor | None = None
    if steering is None:
        policy = torch.log_softmax(scores, dim=-1)
        tokens = drawn = sample_index(policy, generator, policy.dtype)
    else:
        step = session.score()
        steering.check_step(step)
        policy = step.tilted if step.everything is None else step.everything
        tokens = drawn = sample_index(policy, generator)
        if step.everything is None:
            chosen, tokens = drawn, step.candidates.gather(1, drawn[:, None])[:, 0]
    logp_gen = policy.gather(1, drawn[:, None])[:, 0]
    logits = session.logits
    if steering is None and logits is scores:
        logp_ref = logp_gen
    else:
        logp_ref = logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(dim=-1)
    session.append(tokens, chosen)
    return tokens.tolist(), logp_gen.tolist(), logp_ref.tolist()


def _go_on(session: Session, growth: Growth, branches: list[Branch]) -> list[Branch]:
    """The branches after a step: those that are not finished, and what goes on from those that are.

    Branches stay in their rows as far as possible, and children take the rows of finished ones: the caches copy little.
    """
    finished = [row for row, branch in enumerate(branches) if growth.finished(branch)]
    if not finished:
        return branches
    children = [(row, child) for row in finished for child in growth.finish(branches[row])]
    placed = list(enumerate(branches))
    for row, child in zip(finished, children, strict=False):
        placed[row] = child
    placed += children[len(finished) :]
    for row in reversed(finished[len(children) :]):  # rows that nobody took: the last ones move there
        last = placed.pop()
        if row < len(placed):
            placed[row] = last
    rows, after = [row for row, _ in placed], [branch for _, branch in placed]
    if after:
        session.select(torch.tensor(rows, device=session.input_ids.device))
        if any(len(branch.sequence) < session.lengths[row] for row, branch in enumerate(after)):
            session.replace([branch.sequence for branch in after])
    return after
