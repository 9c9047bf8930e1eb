"""Monte Carlo tree search over tokens or blocks, with values at the leaves and the tilted policy as prior."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Unpack

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteriaList

from ...steering.signatures import StrategyOptions
from ...values.function import ValueFunction
from .base import MavisOutput, MavisStrategy, pad_token
from .sampling import draw, sample_index
from .search import whole_number
from .session import Session
from .tree import Children, Path, Tree


class MavisTreeSearch(MavisStrategy):
    """Looks ahead before every token: Monte Carlo tree search guided by values (section 4.4 names it).

    As in AlphaZero, with value functions in place of random playouts. A simulation follows the most promising children
    (`tree.Tree.best_place`: PUCT with the tilted distribution of Algorithm 2 as prior, over the same candidates) down
    to a text that has not been looked at, has the models read it, and counts its combined value for all texts on its
    way. After `num_simulations` of them the next token is the child with the most visits, or with `do_sample=True` one
    drawn in proportion to its visits, the prior counting as one more. What is known behind it is kept for the next.

    With `num_simulations=1` only the text so far is looked at, and this is `MavisSampling`: the same text with the same
    seed.

    The prompts of a batch search side by side, and a simulation costs one forward pass of all models with one row a
    prompt: a token costs `num_simulations` times what it does with `MavisSampling`. Rows move about in their trees;
    what a text shares with the one read before stays cached, and the few tokens that it does not are read in the same
    pass. A text that ends need not be read: its value is known.

    Args:
        num_simulations: texts looked at before every token (or block).
        block_length: b, tokens between two decisions. A child then begins with one of the candidates and goes on with
            b - 1 tokens of the tilted distribution, written when it is first visited, in b passes.
        c_puct: how much the prior counts against what was found; values are taken relative to the tree's smallest and
            largest one.
        args, kwargs: as for `MavisStrategy`; `top_k` and `candidate_min_p` decide how many children there are. A
            streamer receives tokens as they are decided. Processors and stopping criteria are also asked about texts
            that are only looked at.

    Returns (from `generate`):
        `num_return_sequences` independent sequences a prompt, with their `values` [R, M] and as `sequences_scores` [R]
        their combined values.

    Raises:
        ValueError: numbers out of range, an `unscored` other than "drop" (only candidates have values), a trace or
            scores of single steps.
    """

    shows_steps = False
    _whatever_is_recommended: ClassVar[dict[str, Any]] = {"unscored": "drop"}

    def __init__(
        self,
        value_functions: ValueFunction | Sequence[ValueFunction] | Mapping[str, ValueFunction] | None = None,
        weights: Mapping[str, float] | Sequence[float] | Tensor | None = None,
        beta: float | Tensor | None = None,
        *,
        num_simulations: int = 16,
        block_length: int = 1,
        c_puct: float = 1.25,
        **kwargs: Unpack[StrategyOptions],
    ) -> None:
        super().__init__(value_functions, weights, beta, **kwargs)
        self.num_simulations = whole_number("num_simulations", num_simulations)
        self.block_length = whole_number("block_length", block_length)
        if not isinstance(c_puct, int | float) or not 0 <= c_puct < math.inf:
            raise ValueError(f"c_puct must be a finite number of at least 0, got {c_puct!r}")
        self.c_puct = float(c_puct)

    def decode(
        self, session: Session, stopping_criteria: StoppingCriteriaList, config: GenerationConfig
    ) -> MavisOutput:
        if self.config.keeps_unscored:
            raise ValueError(
                f'unscored="{self.config.unscored}" also samples tokens that have no value, which no tree can search: '
                'use "drop", or MavisSampling'
            )
        sample, pad, device = bool(config.do_sample), pad_token(config, self), session.input_ids.device
        prompt = session.input_ids.shape[1]
        trees = [
            Tree(row, prompt - length, self.c_puct)
            for row, length in zip(session.input_ids.tolist(), session.lengths, strict=True)
        ]
        live, streamed = trees, prompt
        while live:
            for _ in range(self.num_simulations):
                self._simulate(session, live, stopping_criteria, sample, pad)
            policy = torch.from_numpy(np.stack([tree.policy() for tree in live])).to(device)
            places = sample_index(policy) if sample else policy.argmax(dim=1)
            for tree, place in zip(live, places.tolist(), strict=True):
                tree.advance(place)
            for tree, ended in zip(live, _ended([tree.text for tree in live], stopping_criteria, device), strict=True):
                tree.root.ended = ended
            going = [number for number, tree in enumerate(live) if not tree.root.ended]
            if 0 < len(going) < len(live):
                session.select(torch.tensor(going, device=device))
            live = [live[number] for number in going]
            if session.streamer is not None:
                # A column of tokens is put as soon as every row has its token; ended rows have padding.
                decided = min((len(tree.text) for tree in live), default=max(len(tree.text) for tree in trees))
                for column in _padded(trees, pad, device)[:, streamed:decided].cpu().unbind(dim=1):
                    session.streamer.put(column)
                streamed = max(streamed, decided)
        return MavisOutput(
            sequences=_padded(trees, pad, device),
            values=torch.from_numpy(np.stack([tree.root.values for tree in trees])).to(device),
            sequences_scores=torch.tensor([tree.root.score for tree in trees], device=device, dtype=torch.float32),
        )

    def _simulate(
        self, session: Session, trees: list[Tree], stopping_criteria: StoppingCriteriaList, sample: bool, pad: int
    ) -> None:
        """One simulation in each of `trees`, whose rows are those of `session`."""
        paths = [tree.descend() for tree in trees]
        for _ in range(self.block_length):
            unknown = [path for path in paths if path.leaf.ended is None]
            ended = _ended([path.text for path in unknown], stopping_criteria, session.input_ids.device)
            for path, end in zip(unknown, ended, strict=True):
                path.leaf.ended = end
            reading = [not path.leaf.ended and path.leaf.children is None for path in paths]
            if not any(reading):
                break
            # The others wait at their roots, which have not ended.
            texts = [path.text if reads else tree.text for path, tree, reads in zip(paths, trees, reading, strict=True)]
            session.replace([text[tree.padding :] for text, tree in zip(texts, trees, strict=True)], pad)
            self._read(session, list(zip(trees, paths, strict=True)), reading, sample)
        for path in paths:
            path.back_up()

    def _read(self, session: Session, rows: list[tuple[Tree, Path]], reading: list[bool], sample: bool) -> None:
        """Have the models read the leaves: blocks still being written get their next token, others are expanded."""
        step = session.score(need_values=True)
        self.check_step(step)
        writing = [
            reads and bool(path.steps) and len(path.leaf.tokens) < self.block_length
            for reads, (_, path) in zip(reading, rows, strict=True)
        ]
        drawn = draw(step, sample)[0].tolist() if any(writing) else []
        candidates, log_priors, scores, values = (
            x.cpu().numpy() for x in (step.candidates, step.tilted, step.combined, step.values)
        )
        for row, (tree, path) in enumerate(rows):
            if writing[row]:
                place = drawn[row]
                path.write(int(candidates[row, place]), float(scores[row, place]), values[row, place])
            elif reading[row]:
                tree.expand(path.leaf, Children(candidates[row], log_priors[row], scores[row], values[row]))


def _ended(texts: Sequence[list[int]], stopping_criteria: StoppingCriteriaList, device: torch.device) -> list[bool]:
    """Whether generation stops after each of `texts`, of which criteria see those of one length together."""
    ended = [False] * len(texts)
    for length in sorted({len(text) for text in texts}):
        rows = [row for row, text in enumerate(texts) if len(text) == length]
        ids = torch.tensor([texts[row] for row in rows], device=device)
        for row, end in zip(rows, stopping_criteria(ids, None).tolist(), strict=True):
            ended[row] = end
    return ended


def _padded(trees: Sequence[Tree], pad: int, device: torch.device) -> Tensor:
    """[R, T] the texts up to the roots, padded on the right."""
    longest = max(len(tree.text) for tree in trees)
    return torch.tensor([tree.text + [pad] * (longest - len(tree.text)) for tree in trees], device=device)
