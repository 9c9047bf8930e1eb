"""What a processor did: running totals, and on demand every step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class MavisStats:
    """Totals since the processor was made or `reset`.

    Attributes:
        steps: calls that steered.
        tokens: rows steered, over all steps.
        passed_through: calls left unsteered, because they were not the base model's (an assistant's drafts).
        seconds: wall time in value functions (on a GPU: time to launch them).
    """

    steps: int = 0
    tokens: int = 0
    passed_through: int = 0
    seconds: float = 0.0
    _kl: Tensor | float = field(default=0.0, repr=False)

    @property
    def kl(self) -> float:
        """Sum over steps and rows of the step's exact KL divergence from the full-vocabulary reference, in nats."""
        return float(self._kl)

    def add(self, rows: int, kl: Tensor, seconds: float) -> None:
        """Count one step of `rows` rows with divergences `kl` [rows]."""
        self.steps += 1
        self.tokens += rows
        self.seconds += seconds
        self._kl = self._kl + kl.sum()  # stays on the device until asked for


@dataclass(frozen=True)
class TraceStep:
    """One step of R rows over k candidates and M objectives.

    Attributes:
        length: tokens per row before the step, padding included.
        live: [R] bool, rows that were steered.
        candidates: [R, k] token ids.
        reference: [R, k] log pi_ref, normalised over the whole vocabulary.
        tilted: [R, k] log-probability after the tilt.
        values: [R, k, M] in reward units; NaN for value models that were not run, having weight 0.
        beta: [R].
        kl: [R] exact divergence of the step, in nats.
        taken: [R] the token that followed, -1 if not known.
    """

    length: int
    live: Tensor
    candidates: Tensor
    reference: Tensor
    tilted: Tensor
    values: Tensor
    beta: Tensor
    kl: Tensor
    taken: Tensor


class MavisTrace:
    """The steps of the latest `generate` call, in order."""

    def __init__(self, objectives: list[str], eos_token_ids: frozenset[int] = frozenset()) -> None:
        self.objectives = objectives
        self.eos_token_ids = eos_token_ids
        self.steps: list[TraceStep] = []

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, index: int) -> TraceStep:
        return self.steps[index]

    def log_ratios(self, completions: Tensor) -> Tensor:
        """log(pi(a_t) / pi_ref(a_t)) of every token of sampled completions; summed over t, the terms of equation 7.

        Args:
            completions: [R, T], the new tokens that the traced call returned, one a step.

        Returns:
            [R, T]; 0 for the padding after a row's end.

        Raises:
            ValueError: another number of rows or steps than was traced, or a token that was no candidate.
        """
        rows, count = completions.shape
        if not count or count > len(self.steps) or any(len(step.live) != rows for step in self.steps):
            traced = {len(step.live) for step in self.steps}
            raise ValueError(
                f"completions are {rows} rows x {count} tokens, but the trace holds {len(self.steps)} steps of "
                f"{traced or 'no'} rows"
            )
        device = self.steps[0].candidates.device
        completions = completions.to(device)
        ends = torch.isin(completions, torch.tensor(sorted(self.eos_token_ids), device=device))
        written = ends.cumsum(dim=1) - ends.long() == 0  # up to and with the first EOS
        columns = []
        for t, step in enumerate(self.steps[:count]):
            hit = step.candidates == completions[:, t, None]
            counted = written[:, t] & step.live
            missed = counted & ~hit.any(dim=1)
            if missed.any():
                row = int(torch.nonzero(missed)[0])
                raise ValueError(
                    f"token {t} of row {row} ({int(completions[row, t])}) was no candidate of the traced step"
                )
            ratio = torch.where(hit, step.tilted - step.reference, 0.0).sum(dim=1)
            columns.append(torch.where(counted, ratio, 0.0))
        return torch.stack(columns, dim=1)

    def add(self, **step: Any) -> None:
        """Append a step, and fill in what the previous one led to."""
        self.steps.append(TraceStep(**step))

    def took(self, tokens: Tensor) -> None:
        """Record the tokens [R] that followed the last step."""
        if self.steps and len(tokens) == len(self.steps[-1].taken):
            self.steps[-1].taken.copy_(tokens)
