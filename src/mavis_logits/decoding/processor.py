"""MAVIS decoding as a logits processor: `model.generate(logits_processor=[mavis])`."""

from __future__ import annotations

import threading
import time
import warnings
import weakref
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from transformers import LogitsProcessor

from ..backbone import Backbone
from ..backbone.hidden import HiddenStates
from ..backbone.watch import Watch
from ..scoring.rows import LeftPadding, Plan, RowTracker, Tokens, ended_rows
from ..scoring.scorer import Scored, ValueScorer, make_scorer
from ..steering.steering import Steering
from ..steering.step import Choice, Step, check_scores
from ..steering.trace import MavisTrace
from ..values.ensemble import ValueFunction, check_context
from .given import Given

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .given import Prompt

_SUSPICIOUS = 64  # calls in a row without a state: more than an assistant drafts
# Scores of tokens that are no candidates: none is left of their probability, but their order. Ends of text come behind
# the -1e9 of beams that do not exist, lest generate's beam search take one for a sequence.
_FAR, _FARTHER, _SPREAD = 2.0**23, 1e10, 2.0**10


class _Cached(NamedTuple):
    """What a thread has of a value model."""

    scorer: ValueScorer
    tracker: RowTracker
    watch: Watch


class MavisLogitsProcessor(Steering, LogitsProcessor):
    """Tilts next-token scores by the values of the top candidates (Algorithm 2); arguments as for `Steering`.

    `generate` runs processors before temperature, top-k and top-p; with temperature T it samples from
    softmax((log pi_ref + beta v) / T). To tilt a reference of temperature T instead, as the paper does, pass
    `reference_temperature=T` here and leave generate's at 1. The processor returns log-probabilities, so that beams may
    be compared by their sums. One object serves any number of `generate` calls, and threads.

    A copy (`copy.copy`, `copy.deepcopy`) is attached to the same model, shares the value functions and has caches of
    its own; one that was pickled holds its value functions, and is attached to nothing until `attach`. What `attach`
    puts on the model goes when the processor is dropped, and is not in copies of the model. Value functions that are
    trained, loaded, cast or switched between calls are followed. They are read without dropout, and left in the mode
    that they are in.

    Put constraints (grammars, banned words) in front of it: they choose among what it then values. One behind it may
    forbid all of its candidates; the token that is likeliest under the reference of those allowed is then taken, an end
    of text last. For this, tokens that are no candidates get scores of about -1e7, in the order of the reference, and
    not -inf. Their probability is 0 all the same.

    Without `model=` the tokens alone must tell what is padding and which rows `generate` has closed (`rows.py`), and
    nothing tells that a prompt was given as embeddings or images, or to an encoder, which value models cannot read.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._begin()
        super().__init__(*args, **kwargs)

    def _begin(self) -> None:
        """What is this object's alone, and no copy's."""
        self._local = threading.local()
        self._hidden: HiddenStates | None = None
        self._given: Given | None = None

    def attach(self, model: PreTrainedModel) -> MavisLogitsProcessor:
        """Take hidden states from `model` until `detach`; usable as `with mavis.attach(model): ...`.

        Raises:
            ValueError: a value head was trained on another model.
        """
        super().attach(model)
        self.detach()
        self._listen(model)
        return self

    def _listen(self, model: PreTrainedModel) -> None:
        self._base = weakref.ref(model)
        if self._functions.heads:
            self._hidden = HiddenStates(model, [head.config.layer for head in self._functions.heads])
        self._given = Given(Backbone.of(model).model)

    def detach(self) -> None:
        """Remove the hooks that `attach` put on the base model."""
        if self._hidden is not None:
            self._hidden.remove()
        if self._given is not None:
            self._given.remove()
        self._hidden = self._given = None
        self._base = None

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        return {name: value for name, value in state.items() if name not in ("_local", "_hidden", "_given")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._begin()
        if (model := self.base) is not None:  # a copy, of one whose heads have been bound to it
            self._listen(model)

    def __enter__(self) -> MavisLogitsProcessor:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def reset(self) -> None:
        """Free the value models' caches, and begin `stats` and `trace` anew."""
        self._local = threading.local()
        super().reset()

    @torch.inference_mode(False)  # caches outlive the mode of the call that they were made in
    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Tilted log-probabilities.

        Args:
            input_ids: [R, T] tokens so far, padded on the left; T is 0 if the prompts are given as embeddings.
            scores: [R, V] the base model's next-token scores.

        Returns:
            [R, V] in the dtype of `scores`.
        """
        self._check(input_ids, scores)
        if _is_probe(scores):
            self.stats.pass_through()
            return scores
        hidden = None
        if self._functions.heads:
            if self._hidden is None:
                raise ValueError(
                    "a value head needs the base model's hidden states: pass model=model, or use mavis.attach(model)"
                )
            if self._hidden.moved and (base := self.base) is not None:
                super().attach(base)
                self._hidden.moved = False
            if input_ids.shape[1] < 2 or (self._given is not None and self._given.waiting):  # another text
                self._follow_base()
            hidden = self._hidden.take(input_ids)
            if hidden is None:
                self._pass_through()
                return scores
            self._local.passed = 0
        prompts = self._given.take() if self._given is not None else []
        new = self._is_new(input_ids)
        if new:  # where the prompts end is known of those that the base model has read
            self._local.begun = input_ids.shape[1] if prompts else 0
        live = ~ended_rows(input_ids, self._eos, self.pad_token_id, self._local.begun)
        choice = self.choose(scores)
        known = [token for token in sorted(self._eos) if token < scores.shape[1]]
        eos = torch.tensor(known, dtype=torch.long, device=scores.device)
        ended = torch.isin(input_ids[:, -1:], eos).any(dim=1)
        # Once a text has ended, a grammar may well forbid everything.
        over = ended if self.pad_token_id is None else ended | (input_ids[:, -1:] == self.pad_token_id).any(dim=1)
        live = live & ~(over & torch.isneginf(choice.reference).all(dim=1))
        check_scores(choice.reference, live)
        started = time.perf_counter()
        scored = self.worth_scoring(choice) & live[:, None]
        self._functions.refresh(thorough=new)
        with self._functions.reading():
            values = self._values(input_ids, hidden, choice, scored, live, prompts)
        seconds = time.perf_counter() - started
        self._check_values(values, scored)
        step = self.tilt(choice, values.masked_fill(~scored[..., None], 0.0))

        step = replace(step, kl=torch.where(live & ~ended, step.kl, 0.0))
        self.stats.add(len(scores), step.kl, seconds)
        if self.trace is not None:
            idle = torch.tensor(self._idle, device=values.device)
            self._record(
                input_ids, replace(step, values=values.masked_fill(idle | ~scored[..., None], torch.nan)), live
            )
        if self._leaves_scores_alone(choice.candidates.shape[1], scores.shape[1]):
            return scores
        log_probs = step.log_probs(scores.shape[1])
        if step.everything is None:
            far = torch.log_softmax(scores.float() / self.config.reference_temperature, dim=-1) * _SPREAD - _FAR
            far[:, eos] -= _FARTHER
            log_probs = torch.where(torch.isneginf(log_probs), far, log_probs)
        return torch.where(live[:, None], log_probs.to(scores.dtype), scores)

    def _pass_through(self) -> None:
        """Count a call without a state of the base model behind it; so many in a row are no assistant's drafts."""
        self.stats.pass_through()
        self._local.passed = getattr(self._local, "passed", 0) + 1
        if self._local.passed == 1 and self._hidden is not None and self._hidden.may_be_unseen:
            raise ValueError(
                "the base model has been compiled since this processor was attached to it, and its hidden states may "
                "go by unseen: call mavis.attach(model) again"
            )
        if self._local.passed == _SUSPICIOUS:
            warnings.warn(
                f"{_SUSPICIOUS} calls in a row came without a hidden state of the model that this processor is "
                "attached to, and were left unsteered: is another model generating? Call mavis.attach(model) with it.",
                stacklevel=3,
            )

    def _values(
        self,
        input_ids: Tensor,
        hidden: dict[int | None, Tensor] | None,
        choice: Choice,
        scored: Tensor,
        live: Tensor,
        prompts: list[Prompt],
    ) -> Tensor:
        """Values [R, k, M] of the candidates; those not `scored` mean nothing."""
        candidates = choice.candidates
        parts: dict[ValueFunction, Tensor] = {}
        for head in self._functions.heads:
            assert hidden is not None
            parts[head] = head(hidden[head.config.layer], None if self.config.top_k is None else candidates)
        models = self._functions.busy_models(self._idle)
        if models and scored.any():
            # Rows that have ended are gone for good. Those that need no value stay: their tokens wait.
            sequences = self._sequences(input_ids.cpu().numpy(), prompts)
            going = [sequence for sequence, goes_on in zip(sequences, live.tolist(), strict=True) if goes_on]
            kept = None if self.config.candidate_min_p is None else scored[live]
            for model in models:
                values = self._score(model, going, candidates[live], kept)
                every = values.new_zeros(len(live), *values.shape[1:])
                parts[model] = every.index_put((live,), values)
        if not parts:
            return candidates.new_zeros(*candidates.shape, len(self.objectives), dtype=torch.float32)
        return self._functions.gather(parts)

    def _sequences(self, input_ids: Tokens, prompts: list[Prompt]) -> list[Tokens]:
        """The rows of `input_ids` [R, T] without their padding.

        Raises:
            ValueError: the base model has read more than these; as for `LeftPadding`.
        """
        names = [model.config.objectives for model in self._functions.busy_models(self._idle)]
        if input_ids.shape[1] == 0:
            raise ValueError(
                f"the prompt is given as inputs_embeds, which the value models for {names} cannot read: give input_ids "
                "beside them, or use value heads"
            )
        read = [(prompt, padding) for prompt in prompts if (padding := prompt.padding(input_ids)) is not None]
        prompt, masked = read[-1] if read else (None, None)
        if prompt is not None and prompt.unreadable is not None:
            raise ValueError(
                f"the base model was also given {prompt.unreadable}, which the value models for {names} cannot read: "
                "use value heads, or leave it out"
            )
        if "padding" not in self._local.__dict__:
            self._local.padding = LeftPadding()
        pad, borders = self.pad_token_id, self._borders
        if self._given is not None and len(input_ids) == 1 and (pad is None or pad in borders):
            # An assistant drafts before the base model reads, whose mask will tell. A single prompt is seldom padded.
            pad, borders = None, frozenset()
        stripped: list[Tokens] = self._local.padding.strip(input_ids, masked, pad, borders)
        return stripped

    def _score(self, model: Scored, sequences: list[Any], candidates: Tensor, kept: Tensor | None) -> Tensor:
        """Values [R, k, M] under one value model, by this thread's cache for it."""
        check_context(model, max(map(len, sequences)) + 1)
        cached, plan = self._cached(model, sequences)
        fed = candidates
        if kept is not None:
            columns = int(kept.sum(dim=1).max())  # the likeliest come first
            fed, kept = candidates[:, :columns], kept[:, :columns]
        try:
            values = cached.scorer.score(plan, fed, kept)
        except BaseException:  # the cache may be half updated
            self._local.cached.pop(model, None)
            raise
        cached.tracker.update(sequences, (fed if kept is None else fed.masked_fill(~kept, -1)).cpu().numpy())
        missing = candidates.shape[1] - fed.shape[1]
        return values if not missing else torch.nn.functional.pad(values, (0, 0, 0, missing))

    def _cached(self, model: Scored, sequences: list[Any]) -> tuple[_Cached, Plan]:
        """This thread's cache for `model`, and how to go on from it. It outlives a `generate` call, for chats."""
        every = self._local.__dict__.setdefault("cached", {})
        cached = every.get(model)
        if cached is not None:
            plan = cached.tracker.plan(sequences)
            if not cached.watch.changed(thorough=not plan.is_next_token):
                return cached, plan
        # What has been cached is no longer what the model computes.
        cached = every[model] = _Cached(make_scorer(model, self.compile, self.reading), RowTracker(), Watch(model))
        return cached, cached.tracker.plan(sequences)

    def _is_new(self, input_ids: Tensor) -> bool:
        """Whether these are not the rows of the last call with a token more, as far as their shape tells."""
        before = getattr(self._local, "shape", None)
        self._local.shape = input_ids.shape
        return before is None or input_ids.shape[1] != before[1] + 1

    def _leaves_scores_alone(self, k: int, vocabulary: int) -> bool:
        """With beta 0 and nothing cut, generate's own scores are handed back: not a bit changes."""
        config = self.config
        plain = config.kl_budget is None and config.reference_temperature == 1.0 and not self._beta.any()
        whole = k == vocabulary and config.candidate_min_p is None
        return plain and (whole or config.unscored == "keep")

    def _record(self, input_ids: Tensor, step: Step, live: Tensor) -> None:
        """Add a step to the trace, which begins anew with every `generate` call."""
        assert self.trace is not None
        before: Tensor | None = getattr(self._local, "traced", None)
        goes_on = before is not None and input_ids.shape[1] <= before.shape[1] + 1  # no later turn of a chat
        if goes_on and _begins(before, input_ids):
            self._local.trace.took(input_ids[:, -1])
        elif not (goes_on and _begins(getattr(self._local, "prompt", None), input_ids)):  # nor reordered or rejected
            self._local.trace = MavisTrace(self.objectives, self._eos)
            self._local.prompt = input_ids.clone()
        self._local.traced = input_ids.clone()
        self.trace = self._local.trace
        self.trace.add_step(step, length=input_ids.shape[1], live=live)

    def _check(self, input_ids: Tensor, scores: Tensor) -> None:
        if (
            not isinstance(input_ids, Tensor)
            or input_ids.ndim != 2
            or scores.ndim != 2
            or len(input_ids) != len(scores)
        ):
            raise ValueError(
                "MavisLogitsProcessor needs the tokens so far, [rows, length], beside scores [rows, vocabulary]; got "
                f"{getattr(input_ids, 'shape', None)} and {tuple(scores.shape)}. Continuous batching gives processors "
                "no history: use generate, or generate_batch without this processor."
            )
        if input_ids.is_floating_point() or not scores.is_floating_point():
            raise ValueError(
                f"expected whole-number token ids and floating-point scores, got {input_ids.dtype} and {scores.dtype}"
            )
        if input_ids.shape[1] == 0 and self._hidden is None:
            raise ValueError(
                "the prompt is empty: give generate at least one token to go on from. A prompt in inputs_embeds can be "
                "steered by value heads alone"
            )
        self._check_devices(scores)


def _begins(prefix: Tensor | None, input_ids: Tensor) -> bool:
    """Whether every row of `input_ids` [R, T] goes on from the same row of `prefix` [R, T'], T' < T."""
    if prefix is None or len(prefix) != len(input_ids) or prefix.shape[1] >= input_ids.shape[1]:
        return False
    return torch.equal(prefix, input_ids[:, : prefix.shape[1]])


def _is_probe(scores: Tensor) -> bool:
    """Whether the scores are all the same: prompt lookup asks in this way which tokens are forbidden. None is."""
    first = scores[0, 0]
    return bool((scores[0, :8] == first).all()) and bool((scores == first).all()) and bool(first > -torch.inf)
