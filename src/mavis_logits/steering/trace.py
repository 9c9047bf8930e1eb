"""What a processor did: running totals, and on demand every step."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..core.holds import fork_safe_lock
from .step import Step, TraceStep

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_counting = fork_safe_lock()  # one object may be counting in several threads
_ADDED_AT_ONCE = 256  # steps
KEPT = 256  # candidates a row that a trace keeps of a step


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
    _kl: list[Tensor] = field(default_factory=list, repr=False)  # on the device until asked for

    @property
    def kl(self) -> float:
        """Sum over steps and rows of the step's exact KL divergence from the full-vocabulary reference, in nats."""
        with _counting:
            return float(torch.cat(self._kl).sum()) if self._kl else 0.0

    def add(self, rows: int, kl: Tensor, seconds: float) -> None:
        """Count one step of `rows` rows with divergences `kl` [rows]."""
        with _counting:
            self.steps += 1
            self.tokens += rows
            self.seconds += seconds
            self._kl.append(kl)
            if len(self._kl) == _ADDED_AT_ONCE:
                self._kl[:] = [torch.cat(self._kl).sum(dim=0, keepdim=True)]

    def pass_through(self) -> None:
        """Count one call left unsteered."""
        with _counting:
            self.passed_through += 1


class MavisTrace:
    """The steps of the latest `generate` call, in order.

    A step over more than `KEPT` candidates is cut down to so many (`TraceStep.narrow`) when the next one comes, whose
    prompt tells which token was taken: over a whole vocabulary a trace holds one full step, and a few kilobytes a row
    for each before it.
    """

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
            hit = (step.candidates == completions[:, t, None]) & torch.isfinite(step.tilted)
            counted = written[:, t] & step.live
            others = torch.full_like(step.kl, -torch.inf) if step.others is None else step.others
            missed = counted & ~hit.any(dim=1) & torch.isinf(others)
            if missed.any():
                row = int(torch.nonzero(missed)[0])
                raise ValueError(
                    f"token {t} of row {row} ({int(completions[row, t])}) was none of the {hit.shape[1]} candidates "
                    "that the trace holds of that step: pass the completions that the traced call returned"
                )
            ratio = torch.where(hit, step.tilted - step.reference, 0.0).sum(dim=1)
            columns.append(torch.where(counted, torch.where(hit.any(dim=1), ratio, others), 0.0))
        return torch.stack(columns, dim=1)

    def to_html(
        self, tokenizer: PreTrainedTokenizerBase, path: str | Path | None = None, *, sequences: Tensor | None = None
    ) -> str:
        """A page that colours each token by how much it was tilted, and shows on hover what it was chosen from.

        The page is one file without scripts that loads nothing. It shows the likeliest candidates before and after the
        tilt, their values and the step's KL divergence.

        Args:
            tokenizer: the base model's.
            path: file to write the page to.
            sequences: [R, T] what the traced call returned, prompts included. The page then shows the prompts, and the
                last token, which no step has seen the choice of; without it stands a question mark. Needed after
                assisted decoding, whose last drafts may have been rejected.

        Returns:
            The page.

        Raises:
            ValueError: an empty trace, or sequences of another call (also of beam search, whose steps are no rows).
            OSError: the page cannot be written.
        """
        from .trace_html import render_page  # jinja2 only for those who want the page

        if path is not None and not Path(path).parent.is_dir():
            raise FileNotFoundError(f"cannot write the page to {path}: make the folder {Path(path).parent} first")
        page = render_page(self.objectives, self.steps, self.eos_token_ids, tokenizer, sequences)
        if path is not None:
            Path(path).write_text(page, encoding="utf-8")
        return page

    def add(self, **step: Any) -> None:
        """Append a step, after those whose tokens it goes on from: later ones were for drafts since rejected."""
        added = TraceStep(**step)
        before = len(self.steps)
        while self.steps and self.steps[-1].length >= added.length:
            self.steps.pop()
        if self.steps and len(self.steps) < before:
            self.steps[-1].taken.fill_(-1)  # perhaps a rejected draft
        if self.steps:
            self.steps[-1] = self.steps[-1].narrow(KEPT)
        self.steps.append(added)

    def add_step(self, step: Step, length: int, live: Tensor) -> None:
        """Append a step of Algorithm 2 whose token is not known yet."""
        self.add(
            length=length, live=live, candidates=step.candidates, reference=step.reference, tilted=step.tilted,
            values=step.values, beta=step.beta.expand(len(live)), kl=step.kl,
            taken=torch.full_like(step.candidates[:, 0], -1), others=step.others,
        )  # fmt: skip

    def took(self, tokens: Tensor) -> None:
        """Record the tokens [R] that followed the last step."""
        if self.steps and len(tokens) == len(self.steps[-1].taken):
            self.steps[-1].taken.copy_(tokens)
