"""What strategies that write several sequences a prompt and rank them have in common."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteriaList

from .base import Call, MavisOutput, MavisStrategy, pad_token
from .beams import Beams, draw_distinct, ranking
from .session import Session


class MavisSearch(MavisStrategy):
    """A strategy that writes several sequences for every prompt and returns the best, `num_return_sequences` of them.

    All candidates are valued, also where a row has only one. To get more than one sequence back use `do_sample=True`,
    on which `generate` itself insists.

    Raises:
        ValueError: a trace, a streamer or scores of single steps (rows change places and are dropped), or weights or
            beta for another number of requests than there are prompts.
    """

    streams = shows_steps = False
    distinct = False  # whether copies of a sequence give way to others on the way, as they do in what is returned

    @property
    @abstractmethod
    def size(self) -> int:
        """N, the sequences of a prompt at the beginning."""

    @property
    @abstractmethod
    def kept(self) -> int:
        """The sequences of a prompt at the end."""

    @abstractmethod
    def plan(self, step: int, size: int) -> tuple[int, int]:
        """What to do at token number `step` (from 1), while there are `size` sequences a prompt.

        Returns:
            how many tokens to draw after every sequence, and how many sequences to keep of all these.
        """

    def final_scores(self, beams: Beams, prompts: list[list[int]]) -> Tensor:
        """What the finished sequences of the P prompts (token ids) are ranked by, [P * N]: their combined values."""
        return beams.scores

    def decode(
        self, session: Session, stopping_criteria: StoppingCriteriaList, config: GenerationConfig
    ) -> MavisOutput:
        rows = zip(session.input_ids.tolist(), session.lengths, strict=True)
        prompts = [row[len(row) - length :] for row, length in rows]  # without padding
        beams = Beams(session, self.size, stopping_criteria, pad_token(config, self))
        step = 0
        while not beams.finished:
            step += 1
            drawn, kept = self.plan(step, beams.size)
            ways = beams.ways(draw_distinct(session, drawn, bool(config.do_sample)))
            # One way a sequence, and all are kept: their order stays, and with it the order of the draws.
            beams.go(ways if ways.tokens.shape[1] == kept else ways.best(kept, self.distinct))
        scores = self.final_scores(beams, prompts)
        by_prompt = scores.view(len(prompts), -1)
        best = ranking(by_prompt, beams.alike, distinct=True)[:, : config.num_return_sequences or 1]
        # Copies are returned only if there is too little else, but at the place of their score.
        best = best.gather(1, by_prompt.gather(1, best).argsort(dim=1, descending=True, stable=True))
        best = (best + torch.arange(len(prompts), device=best.device)[:, None] * beams.size).reshape(-1)
        longest = int(beams.lengths[best].max())
        return MavisOutput(
            sequences=beams.written[best, :longest], values=beams.values[best], sequences_scores=scores[best]
        )

    def prompts(self, rows: Tensor, config: GenerationConfig) -> Tensor:
        """Every prompt once."""
        return rows[:: config.num_return_sequences or 1]

    def check(self, call: Call) -> None:
        super().check(call)
        name, returned = type(self).__name__, call.config.num_return_sequences or 1
        if returned > self.kept:
            raise ValueError(f"num_return_sequences={returned}, but {name} ends with {self.kept} sequences a prompt")
        count = len(call.input_ids) // returned
        for what, setting in self.policy.by_request.items():
            if len(setting) != count:
                raise ValueError(f"{what} are given for {len(setting)} requests, but there are {count} prompts")


def whole_number(name: str, given: Any) -> int:
    """`given`, if it is a whole number of at least 1.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(given, int) or isinstance(given, bool) or given < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, got {given!r}")
    return given
