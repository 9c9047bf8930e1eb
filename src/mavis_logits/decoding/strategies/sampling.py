"""Algorithm 2, token by token."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, StoppingCriteriaList

from ...steering.step import Step
from .base import MavisOutput, MavisStrategy, pad_token
from .session import Session

_BLOCK = 256  # of a row whose running sum is taken in two steps


class MavisSampling(MavisStrategy):
    """Samples every token from the tilted distribution (Algorithm 2), or takes its mode with `do_sample=False`.

    The same distribution as `MavisLogitsProcessor`, at less cost: nothing is reconciled with `generate`, rows that have
    ended leave the batch, of the base model's cache too, and tokens are drawn among the k candidates, not all of V.
    `weights`, `beta` and `config` may be changed between steps, from a streamer or a stopping criterion.

    Example:
        `model.generate(**inputs, custom_generate=MavisSampling(value_models, {"helpful": 1.0}), do_sample=True)`
    """

    keeps_rows = True

    def decode(
        self, session: Session, stopping_criteria: StoppingCriteriaList, config: GenerationConfig
    ) -> MavisOutput:
        pad = pad_token(config, self)
        written = session.input_ids
        count, device = len(written), written.device
        live = torch.arange(count, device=device)
        keep_scores = bool(config.return_dict_in_generate and config.output_scores)
        keep_logits = bool(config.return_dict_in_generate and config.output_logits)
        scores: list[Tensor] = []
        logits: list[Tensor] = []
        last_values = torch.zeros(count, len(self.objectives), device=device, dtype=torch.float32)
        while len(live):
            step = session.score()
            chosen, tokens = draw(step, bool(config.do_sample))
            everyone = len(live) == count
            if session.trace is not None:
                every, mask = _of_all_rows(step, live, count)
                session.trace.add_step(every, length=written.shape[1], live=mask)
            if keep_scores:
                scores.append(_spread(step.log_probs(session.reference().shape[1]), live, count, pad))
            if keep_logits:
                logits.append(_spread(session.reference(), live, count, pad))
            own = step.values[torch.arange(len(live), device=device), chosen.clamp(min=0)]
            last_values[live] = own.masked_fill(chosen[:, None] < 0, torch.nan)
            new = tokens if everyone else torch.full((count,), pad, device=device).index_copy(0, live, tokens)
            written = torch.cat([written, new[:, None]], dim=1)
            if session.streamer is not None:
                session.streamer.put(new.cpu())
            if session.trace is not None:
                session.trace.took(new)
            done = stopping_criteria(written, tuple(scores) if keep_scores else None).to(device)
            session.append(tokens, None if self.config.keeps_unscored else chosen)
            ended, broken = torch.stack([done[live], step.broken]).tolist()  # the one wait for the device
            if any(broken):
                self.check_step(step)
            if any(ended):
                going = torch.nonzero(~done[live])[:, 0]
                if len(going):
                    session.select(going)
                live = live[going]
        return MavisOutput(
            sequences=written,
            scores=tuple(scores) if keep_scores else None,
            logits=tuple(logits) if keep_logits else None,
            values=last_values,
        )


def _of_all_rows(step: Step, live: Tensor, count: int) -> tuple[Step, Tensor]:
    """A step of the rows `live` as one of all `count`, and bool [count], which of them are live."""
    rows = torch.zeros(count, dtype=torch.long, device=live.device).index_copy(
        0, live, torch.arange(len(live), device=live.device)
    )
    mask = torch.zeros(count, dtype=torch.bool, device=live.device).index_fill(0, live, True)
    every = replace(
        step,
        candidates=step.candidates[rows],
        reference=step.reference[rows],
        values=step.values[rows],
        combined=step.combined[rows],
        tilted=step.tilted[rows],
        others=step.others[rows],
        beta=step.beta if step.beta.ndim == 0 else step.beta[rows],
        kl=torch.where(mask, step.kl[rows], 0.0),
        unscored=None,
    )
    return every, mask


def draw(step: Step, sample: bool) -> tuple[Tensor, Tensor]:
    """A token of every row from the tilted distribution.

    Returns:
        its number among the candidates, -1 if it is none of them, and its id; [R] each.
    """
    log_probs = step.tilted if step.everything is None else step.everything
    drawn = sample_index(log_probs) if sample else log_probs.argmax(dim=1)
    if step.everything is None:
        return drawn, step.candidates.gather(1, drawn[:, None])[:, 0]
    match = step.candidates == drawn[:, None]
    return torch.where(match.any(dim=1), match.int().argmax(dim=1), -1), drawn


def sample_index(
    log_probs: Tensor, generator: torch.Generator | None = None, dtype: torch.dtype = torch.float64
) -> Tensor:
    """[R] an index of every row of `log_probs` [R, n], by inverting the cumulative distribution, summed in `dtype`.

    Faster than `torch.multinomial`, which draws n exponentials a row, and a NaN does not stop it: that is noticed
    later, without waiting for the device. A running sum is slow where a sum is not, so that of a whole vocabulary goes
    over blocks first, and then over one block a row.
    """
    rows, count = log_probs.shape
    probability = log_probs.to(dtype).exp()
    point = torch.rand(rows, 1, dtype=dtype, device=log_probs.device, generator=generator)
    if count <= 2 * _BLOCK:
        return _first_above(probability.cumsum(dim=-1), point)[0]
    blocks = nn.functional.pad(probability, (0, -count % _BLOCK)).view(rows, -1, _BLOCK)
    sums = blocks.sum(dim=-1)
    ends = sums.cumsum(dim=-1)
    block, point = _first_above(ends, point)
    within = blocks[torch.arange(rows, device=block.device), block].cumsum(dim=-1)
    inside = (point - (ends - sums).gather(1, block[:, None])) / within[:, -1:]
    return (block * _BLOCK + _first_above(within, inside)[0]).clamp(max=count - 1)


def _first_above(cumulative: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """[R] the first index of every row of running sums [R, n] that is above `share` [R, 1] of the whole, which is at a
    positive probability even where `share` rounds to 0 or 1; and that share itself."""
    whole = cumulative[:, -1:]
    point = (share.clamp(min=0) * whole).minimum(torch.nextafter(whole, torch.zeros_like(whole)))
    index = torch.searchsorted(cumulative, point, right=True)[:, 0]
    return index.clamp(max=cumulative.shape[1] - 1), point


def _spread(scores: Tensor, live: Tensor, count: int, pad: int) -> Tensor:
    """[count, V] from the [R, V] of the rows `live`; a finished row can only go on with padding."""
    every = scores.new_full((count, scores.shape[1]), -torch.inf)
    every[:, pad] = 0.0
    return every.index_copy(0, live, scores)
