"""Blocks of tokens, several sampled, one kept by value: controlled decoding block by block, and its robust form."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Unpack, get_args

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteriaList

from ...backbone import Backbone
from ...core.tilting import combine
from ...steering.policy import Requests
from ...steering.signatures import StrategyOptions
from ...steering.step import Choice, check_scores
from ...values.function import ValueFunction
from .base import MavisOutput, MavisStrategy, pad_token
from .sampling import sample_index
from .search import whole_number
from .session import Session
from .worst_case import worst_case_weights

Combination = Literal["weighted", "worst-case"]
Source = Literal["reference", "tilted"]
Keeping = Literal["sample", "best"]


class MavisBlockwise(MavisStrategy):
    """Writes the next `block_length` tokens `num_blocks` times over and keeps one of these blocks by value.

    The form of controlled decoding (Mudgal et al., 2024) that looks at whole blocks of the reference's own text, and of
    robust multi-objective decoding (RMOD; Son et al., 2025). It needs a value only at the end of every block: value
    models read K rows once a block in place of k candidates at every token. The base model writes K rows for each, at K
    times the compute and K times the memory of its cache.

    The block kept is drawn with probability proportional to exp(beta v), which is Algorithm 2 with K blocks in place of
    k candidates: they are samples of the reference already. A block ends early where its text does.

    With `combination="worst-case"` v is not lambda's weighted sum: at every block the weights are those under which the
    policy fares worst (`worst_case.worst_case_weights`), so that the objective which would be left behind counts most.
    Values are compared across objectives as standardised by the `reward_mean` and `reward_scale` of their value
    functions, are not normalised further, and beta is per standard deviation. Objectives of weight 0 take no part.

    With `do_sample=False` nothing is random: the blocks begin with the K likeliest tokens and go on greedily, and the
    best is kept.

    With `num_blocks=1` this is plain sampling from the reference, the same text as `MavisSampling(..., beta=0,
    unscored="keep")` with the same seed, or with `sample_from="tilted"` the same as `MavisSampling`.

    Args:
        num_blocks: K, blocks to choose from.
        block_length: b, tokens of a block. 1 chooses among K tokens.
        combination: `"weighted"` or `"worst-case"`.
        sample_from: what the blocks are sampled from: `"reference"`, or `"tilted"`, the policy of `MavisSampling`. Only
            for this do the settings about candidates matter.
        keep: `"sample"`, as above, or `"best"`: always the block of the highest v, as controlled decoding does.
        args, kwargs: as for `MavisStrategy`. A streamer receives the tokens of a block once it is kept.

    Returns (from `generate`):
        `num_return_sequences` independent sequences a prompt, with their `values` [R, M] and as `sequences_scores` [R]
        their combined values; for `"worst-case"` the standardised value of the objective that is worst off.

    Raises:
        ValueError: numbers below 1, an unknown choice, more blocks than candidates with `do_sample=False`; with
            `"worst-case"` unequal weights or a `kl_budget`; a trace or scores of single steps.
    """

    shows_steps = False

    def __init__(
        self,
        value_functions: ValueFunction | Sequence[ValueFunction] | Mapping[str, ValueFunction] | None = None,
        weights: Mapping[str, float] | Sequence[float] | Tensor | None = None,
        beta: float | Tensor | None = None,
        *,
        num_blocks: int = 4,
        block_length: int = 8,
        combination: Combination = "weighted",
        sample_from: Source = "reference",
        keep: Keeping = "sample",
        **kwargs: Unpack[StrategyOptions],
    ) -> None:
        super().__init__(value_functions, weights, beta, **kwargs)
        self.num_blocks = whole_number("num_blocks", num_blocks)
        self.block_length = whole_number("block_length", block_length)
        for name, given, known in (
            ("combination", combination, Combination),
            ("sample_from", sample_from, Source),
            ("keep", keep, Keeping),
        ):
            if given not in get_args(known):
                raise ValueError(f"{name} must be one of {', '.join(map(repr, get_args(known)))}, got {given!r}")
        self.combination, self.sample_from, self.keep = combination, sample_from, keep

    def decode(
        self, session: Session, stopping_criteria: StoppingCriteriaList, config: GenerationConfig
    ) -> MavisOutput:
        sample, pad = bool(config.do_sample), pad_token(config, self)
        self._check_settings(Backbone.of(session.model).scores, sample)
        written = session.input_ids
        count, device = len(written), written.device
        live = torch.arange(count, device=device)
        values = torch.zeros(count, len(self.objectives), device=device, dtype=torch.float32)
        scores = torch.zeros(count, device=device, dtype=torch.float32)
        while len(live):
            requests = session.of_requests
            blocks = self._write(session, stopping_criteria, sample, pad)
            places, best = self._choose(blocks.values.unflatten(0, (-1, self.num_blocks)), requests, sample)
            kept = places + torch.arange(len(live), device=device) * self.num_blocks
            values[live], scores[live] = blocks.values[kept], best

            new = torch.full((count, int(blocks.lengths[kept].max())), pad, device=device)
            new[live] = blocks.tokens[kept, : new.shape[1]]
            written = torch.cat([written, new], dim=1)
            if session.streamer is not None:
                for column in new.cpu().unbind(dim=1):
                    session.streamer.put(column)

            going = torch.nonzero(blocks.rows[kept] >= 0)[:, 0]
            live = live[going]
            if len(live):
                session.select(blocks.rows[kept[going]])
        return MavisOutput(sequences=written, values=values, sequences_scores=scores)

    def _write(self, session: Session, stopping_criteria: StoppingCriteriaList, sample: bool, pad: int) -> _Blocks:
        """K blocks after each of the R rows of `session`."""
        count, k, device = len(session), self.num_blocks, session.input_ids.device
        tokens = torch.full((count * k, self.block_length), pad, device=device)
        values = torch.zeros(count * k, len(self.objectives), device=device, dtype=torch.float32)
        lengths = torch.zeros(count * k, dtype=torch.long, device=device)
        running = torch.arange(count * k, device=device)  # the block that each row writes
        for position in range(self.block_length):
            first, last = position == 0, position == self.block_length - 1
            new = self._draw(session, k if first else 1, sample)
            tokens[running, position] = new
            lengths[running] += 1
            if first:  # valued before the rows multiply, so that the prompt is read once and not K times
                own = session.values(new.view(count, k)).flatten(0, 1)
                session.select(running // k)
            done = stopping_criteria(torch.cat([session.input_ids, new[:, None]], dim=1), None).to(device)
            ending = torch.ones_like(done) if last else done
            valued = last or bool(done.any())
            if valued and not first:
                own = session.values(new[:, None], ending[:, None])[:, 0]
            session.append(new, running % k if first else torch.zeros_like(new) if valued else None)
            if valued:
                values[running] = torch.where(ending[:, None], own, values[running])
                going = torch.nonzero(~done)[:, 0]
                running = running[going]
                if not len(running):
                    break
                if len(going) < len(done):
                    session.select(going)
        rows = torch.full_like(lengths, -1).index_copy(0, running, torch.arange(len(running), device=device))
        self.check_values(values[:, None], torch.ones_like(lengths[:, None], dtype=torch.bool))
        return _Blocks(tokens, lengths, values, rows)

    def _draw(self, session: Session, copies: int, sample: bool) -> Tensor:
        """[R * copies] the next tokens of the rows of `session`: sampled, or the likeliest ones of each."""
        candidates = None
        if self.sample_from == "tilted":
            step = session.score()
            log_probs = step.tilted if step.everything is None else step.everything
            candidates = step.candidates if step.everything is None else None
            self.check_step(step)
        else:
            scores = self.known(session.reference())
            forbidden = torch.isneginf(scores.amax(dim=1, keepdim=True))
            log_probs = torch.log_softmax(scores, dim=-1).masked_fill(forbidden, -torch.inf)
            check_scores(log_probs)
        if sample:
            drawn = sample_index(log_probs.repeat_interleave(copies, dim=0)).view(-1, copies)
        elif copies == 1:
            drawn = log_probs.argmax(dim=1, keepdim=True)
        else:
            top = log_probs.topk(copies, dim=1)
            drawn = torch.where(torch.isneginf(top.values), top.indices[:, :1], top.indices)
        return (drawn if candidates is None else candidates.gather(1, drawn)).flatten()

    def _choose(self, values: Tensor, requests: Requests, sample: bool) -> tuple[Tensor, Tensor]:
        """Which of its blocks every row keeps, and the score of that block; [R] each.

        Args:
            values: [R, K, M] at the blocks' ends.
            requests: of the rows.
            sample: whether the call samples.
        """
        count, k, _ = values.shape
        if self.combination == "weighted":
            every = torch.arange(k, device=values.device).expand(count, k)
            uniform = values.new_full((count, k), -math.log(k))
            step = self.policy.tilt(Choice(every, uniform, uniform[:, 0] == -torch.inf, None), values, requests)
            combined, log_probs, scores = step.combined, step.tilted, step.combined
        else:
            mean, scale, _ = self.functions.units().to(values.device)
            standard = (values - mean) / scale
            active = (self.policy.weights_of(values, requests) != 0).expand(count, -1)
            beta = self.policy.beta_of(values, requests)
            weights = worst_case_weights(
                standard.double().cpu().numpy(), beta.double().cpu().numpy(), active.cpu().numpy()
            )
            combined = combine(standard, torch.from_numpy(weights).to(values))
            log_probs = torch.log_softmax(beta.reshape(-1, 1) * combined, dim=1)
            scores = standard.masked_fill(~active[:, None], torch.inf).amin(dim=2)
        if k == 1:
            places = torch.zeros(count, dtype=torch.long, device=values.device)
        else:
            places = sample_index(log_probs) if sample and self.keep == "sample" else combined.argmax(dim=1)
        return places, scores.gather(1, places[:, None])[:, 0]

    def _check_settings(self, vocabulary: int, sample: bool) -> None:
        config = self.config
        limited = self.sample_from == "tilted" and not config.keeps_unscored and config.top_k is not None
        candidates = min(vocabulary, config.top_k) if limited and config.top_k is not None else vocabulary
        if not sample and self.num_blocks > candidates:
            raise ValueError(
                f"without sampling the {self.num_blocks} blocks begin with the likeliest tokens, but there are only "
                f"{candidates} candidates: lower num_blocks, raise top_k or pass do_sample=True"
            )
        if self.combination == "weighted":
            return
        if config.kl_budget is not None:
            raise ValueError(
                f'kl_budget={config.kl_budget} needs weights that are known: pass beta with combination="worst-case"'
            )
        most = self.weights.amax(dim=-1, keepdim=True)
        if (most <= 0).any() or ((self.weights != 0) & (self.weights != most)).any():
            raise ValueError(
                'combination="worst-case" finds the weights itself: give all objectives the same weight, or 0 to '
                f"those that take no part; got {self.weights.tolist()} for {self.objectives}"
            )


@dataclass(frozen=True)
class _Blocks:
    """K blocks of each of R rows, one after the other.

    Attributes:
        tokens: [R * K, b], padded.
        lengths: [R * K] their tokens.
        values: [R * K, M] of the text up to their ends.
        rows: [R * K] the row of the session that goes on from there, -1 if the text has ended.
    """

    tokens: Tensor
    lengths: Tensor
    values: Tensor
    rows: Tensor
