"""MAVIS decoding as a logits processor: `model.generate(logits_processor=[mavis])`."""

from __future__ import annotations

import threading
import time
import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor

from ..backbone import Backbone
from ..backbone.hidden import SOURCE, HiddenStates
from ..scoring.reader import States, ValueReader
from ..scoring.rows import Endings, LeftPadding, RowTracker, Tokens, endings, ids_on
from ..steering.regions import steered_rows
from ..steering.signatures import SteeringOptions
from ..steering.steering import Steering
from ..steering.step import Choice, Step, check_scores
from ..steering.trace import MavisTrace
from ..values.function import ValueFunction
from .calls import encoder_prompts, temperature_of_call
from .given import Given
from .scores import check_given, far_scores, is_probe, tied_first

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .given import Prompt

_SUSPICIOUS = 64  # calls in a row without a state: more than an assistant drafts
_NOT_ASKED = torch.empty(0)


@dataclass
class _Call:
    """One call of the processor.

    Attributes:
        input_ids: [R, T] tokens so far, with padding.
        scores: [R, V] that the processor was given.
        states: of the base model, by layer.
        prompts: what the base model has read since the last call, if more than a token.
        begins: whether a text may begin here: these are not the rows of the last call with a token more, or the base
            model has read more than that.
        begun: length of the prompts, 0 if not known.
        kept: [R, k] bool, candidates whose values count in rows that have not ended.
        seconds: that reading the values has taken.
    """

    input_ids: Tensor
    scores: Tensor
    states: States
    prompts: list[Prompt]
    begins: bool
    begun: int
    kept: Tensor = _NOT_ASKED
    seconds: float = 0.0


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

    def __init__(
        self,
        value_functions: ValueFunction | Sequence[ValueFunction] | Mapping[str, ValueFunction] | None = None,
        weights: Mapping[str, float] | Sequence[float] | Tensor | None = None,
        beta: float | Tensor | None = None,
        **kwargs: Unpack[SteeringOptions],
    ) -> None:
        self._begin()
        super().__init__(value_functions, weights, beta, **kwargs)

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
        if self.functions.layers:
            self._hidden = HiddenStates(model, self.functions.layers)
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

        Waits for the device once, with value models twice: for the tokens of the rows, and for NaN to be told.

        Args:
            input_ids: [R, T] tokens so far, padded on the left; T is 0 if the prompts are given as embeddings.
            scores: [R, V] the base model's next-token scores.

        Returns:
            [R, V] in the dtype of `scores`.
        """
        check_given(input_ids, scores, self._hidden is not None)
        states = self._states(input_ids)
        if states is None:
            self._pass_through()
            return scores
        self._local.passed = 0
        prompts = self._given.take() if self._given is not None else []
        new = self._is_new(input_ids)
        if new:  # where the prompts end is known of those that the base model has read
            self._local.begun = input_ids.shape[1] if prompts else 0
        call = _Call(input_ids, scores, states, prompts, new or bool(prompts), self._local.begun)
        if call.begins:
            self.check_devices(scores)
            self._local.temperature = self._temperature()
        steered = self._steered(call)
        if self.trace is None and not any(steered):
            return scores
        policy = self.policy_at(getattr(self._local, "temperature", 1.0))
        step = policy.step(self.known(scores), partial(self._read, call))
        # All that the host must know, in one piece: it waits for the device once.
        told = torch.cat([input_ids[:, -2:], step.broken[:, None], tied_first(step.reference)], dim=1).tolist()
        *last, broken, tied = zip(*told, strict=True)
        if tied[0] and is_probe(scores):
            self.stats.pass_through()
            return scores
        ending = self._endings(call, list(zip(*last, strict=True)))
        live = [not closed for closed in ending.closed]
        if any(wrong and goes_on for wrong, goes_on in zip(broken, live, strict=True)):
            live = self._check_step(call, step, ending)
        going = [goes_on and wanted for goes_on, wanted in zip(live, steered, strict=True)]
        uncounted = [ended or not goes_on for ended, goes_on in zip(ending.ended, going, strict=True)]
        kl = step.kl.masked_fill(_on(uncounted, scores), 0.0) if any(uncounted) else step.kl
        self.stats.add(len(scores), kl, call.seconds)
        if self.trace is not None:
            unknown = _on(self.idle, scores) | ~(call.kept & _on(live, scores)[:, None])[..., None]
            values = step.values.masked_fill(unknown, torch.nan)
            self._record(input_ids, replace(step, kl=kl, values=values), _on(going, scores))
        if self._leaves_scores_alone(step.candidates.shape[1], scores.shape[1]):
            return scores
        log_probs = step.everything
        if log_probs is None:
            best = scores.gather(1, step.candidates[:, :1])
            ends = ids_on(frozenset(token for token in self.special.eos if token < scores.shape[1]), scores.device)
            log_probs = far_scores(scores, best, ends, self.config.reference_temperature)
            log_probs.scatter_reduce_(1, step.candidates, step.tilted, "amax")  # those that take no part stay far
        log_probs = log_probs.to(scores.dtype)
        if left := [row for row, goes_on in enumerate(going) if not goes_on]:
            log_probs[left] = scores[left]
        return log_probs

    def _temperature(self) -> float:
        """At which the reference is sampled in the end, where values hang on it."""
        base = self.base if self.functions.heed_temperature else None
        return 1.0 if base is None else temperature_of_call(base)

    def _endings(self, call: _Call, last: Sequence[Sequence[int]]) -> Endings:
        """Which rows have ended, as their `last` tokens [R, 2] tell."""
        length = call.input_ids.shape[1]
        return endings(last or [()] * len(call.scores), length, self.special.eos, self.pad_token_id, call.begun)

    def _check_step(self, call: _Call, step: Step, ending: Endings) -> list[bool]:
        """[R] which rows `generate` has not closed, where scores or values of some are not what they should be.

        Raises:
            ValueError: those of one of these.
        """
        live = ending.goes_on(step.empty.tolist())
        own = _on(live, call.scores)
        check_scores(step.reference, own)
        self.check_values(step.values, call.kept & own[:, None])
        return live

    def _steered(self, call: _Call) -> list[bool]:
        """[R] whether the next token of each row lies where its answer is steered."""
        if self.regions is None:
            return [True] * len(call.scores)
        prompt, ids = getattr(self._local, "asked", None), call.input_ids
        if call.prompts or prompt is None or not _begins(prompt, ids):
            prompt = self._local.asked = ids.clone()
        return steered_rows(self.regions, ids.tolist(), prompt.shape[1], self.tokenizer)

    def _states(self, input_ids: Tensor) -> States | None:
        """The base model's states behind these scores, by layer; None if they are another's."""
        if not self.functions.layers:
            return {}
        if self._hidden is None:
            raise ValueError(
                "value heads, and objectives in words, need what the base model has computed: pass model=model, or use "
                "mavis.attach(model)"
            )
        if self._hidden.moved and (base := self.base) is not None:
            super().attach(base)
            self._hidden.moved = False
        if input_ids.shape[1] < 2 or (self._given is not None and self._given.waiting):  # another text
            self.follow_base()
        states = self._hidden.take(input_ids)
        if states is not None and (base := self._reads_for_words()) is not None:
            states[SOURCE] = encoder_prompts(base, len(input_ids))
        return states

    def _reads_for_words(self) -> PreTrainedModel | None:
        """The base model, if it has an encoder whose prompts objectives in words have to know; else None."""
        if not self.functions.words:
            return None
        words = [model for model in self.functions.busy_models(self.idle) if model in self.functions.words]
        base = self.base if words else None
        return base if base is not None and Backbone.of(base).is_encoder_decoder else None

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

    def _read(self, call: _Call, choice: Choice, kept: Tensor) -> Tensor:
        """Values [R, k, M] of the candidates; those not `kept`, or in rows that have ended, mean nothing."""
        call.kept = kept
        started = time.perf_counter()
        with self.functions.reading(), self._aside():
            values = self._values(call, choice)
        call.seconds = time.perf_counter() - started
        return values

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """While it is open, the base model reads for objectives in words, and not for `generate`."""
        if not self.functions.words or self._hidden is None or self._given is None:
            yield
            return
        with self._hidden.undisturbed(), self._given.undisturbed():
            yield

    def _values(self, call: _Call, choice: Choice) -> Tensor:
        reader, tracker = self._reader()
        whole, candidates = self.config.top_k is None, choice.candidates
        models = self.functions.busy_models(self.idle)
        if not models:
            self.functions.refresh(call.begins)
            return reader.values(None, [], call.states, candidates, idle=self.idle, whole=whole)
        best = choice.reference.amax(dim=1)
        flags = torch.stack([choice.empty, ~torch.isfinite(best), tied_first(choice.reference)[:, 0]], dim=1)
        asked = candidates.masked_fill(~call.kept, -1)
        # All that the host must know, in one piece: it waits for the device once.
        length, known = call.input_ids.shape[1], torch.cat([call.input_ids, asked, flags], dim=1).cpu().numpy()
        input_ids, tried = known[:, :length], known[:, length:-3]
        nothing, unsound, tied = known[:, -3:].T.astype(bool)
        live = np.array(self._endings(call, input_ids[:, -2:].tolist()).goes_on(nothing.tolist()))
        if (live & unsound).any():
            check_scores(choice.reference, _on(live, call.scores))
        if not live.any() or (tied[0] and is_probe(call.scores)):
            return candidates.new_zeros(*candidates.shape, len(self.objectives), dtype=torch.float32)
        going = [row for row, goes_on in zip(self._sequences(input_ids, call.prompts), live, strict=True) if goes_on]
        try:
            plan = tracker.plan(going)
            reader.refresh(thorough=call.begins or not plan.is_next_token)
            reader.follow(plan, candidates.device)
            rows, kept, states = call.input_ids, call.kept, call.states
            places = _on(np.flatnonzero(live), candidates)
            if not live.all():  # rows that have ended are gone for good
                rows, kept, candidates = rows[places], kept[places], candidates[places]
                states = {layer: state[places] for layer, state in states.items()}
            columns = int((tried[live] >= 0).sum(axis=1).max())  # the likeliest come first
            cut = self.config.candidate_min_p is not None
            values = reader.values(
                rows, [len(row) for row in going], states, candidates, kept if cut else None, self.idle,
                columns=columns if cut else None,
            )  # fmt: skip
        except BaseException:  # caches may be half updated
            self._local.__dict__.pop("reader", None)
            raise
        tracker.update(going, tried[live][:, :columns])
        if live.all():
            return values
        return values.new_zeros(len(live), *values.shape[1:]).index_copy(0, places, values)

    def _reader(self) -> tuple[ValueReader, RowTracker]:
        """This thread's caches of the value models, and which rows they hold. They outlive a call, for chats."""
        if "reader" not in self._local.__dict__:
            reader = ValueReader(self.functions, self.compile, self.reading, watch=True)
            self._local.reader = reader, RowTracker()
        found: tuple[ValueReader, RowTracker] = self._local.reader
        return found

    def _sequences(self, input_ids: Tokens, prompts: list[Prompt]) -> list[Tokens]:
        """The rows of `input_ids` [R, T] without their padding.

        Raises:
            ValueError: the base model has read more than these; as for `LeftPadding`.
        """
        names = [model.config.objectives for model in self.functions.busy_models(self.idle)]
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
        pad, borders = self.pad_token_id, self.special.borders
        if self._given is not None and len(input_ids) == 1 and (pad is None or pad in borders):
            # An assistant drafts before the base model reads, whose mask will tell. A single prompt is seldom padded.
            pad, borders = None, frozenset()
        stripped: list[Tokens] = self._local.padding.strip(input_ids, masked, pad, borders)
        return stripped

    def _is_new(self, input_ids: Tensor) -> bool:
        """Whether these are not the rows of the last call with a token more, as far as their shape tells."""
        before = getattr(self._local, "shape", None)
        self._local.shape = input_ids.shape
        return before is None or input_ids.shape[1] != before[1] + 1

    def _leaves_scores_alone(self, k: int, vocabulary: int) -> bool:
        """With beta 0 and nothing cut, generate's own scores are handed back: not a bit changes."""
        config = self.config
        whole = k == vocabulary and config.candidate_min_p is None
        return self.policy.is_reference and (whole or config.keeps_unscored)

    def _record(self, input_ids: Tensor, step: Step, live: Tensor) -> None:
        """Add a step to the trace, which begins anew with every `generate` call."""
        assert self.trace is not None
        before: Tensor | None = getattr(self._local, "traced", None)
        goes_on = before is not None and input_ids.shape[1] <= before.shape[1] + 1  # no later turn of a chat
        if goes_on and _begins(before, input_ids):
            self._local.trace.took(input_ids[:, -1])
        elif not (goes_on and _begins(getattr(self._local, "prompt", None), input_ids)):  # nor reordered or rejected
            self._local.trace = MavisTrace(self.objectives, self.special.eos)
            self._local.prompt = input_ids.clone()
        self._local.traced = input_ids.clone()
        trace: MavisTrace = self._local.trace
        trace.add_step(step, length=input_ids.shape[1], live=live)
        self.trace = trace  # the latest call's: other threads have theirs


def _begins(prefix: Tensor | None, input_ids: Tensor) -> bool:
    """Whether every row of `input_ids` [R, T] goes on from the same row of `prefix` [R, T'], T' < T."""
    if prefix is None or len(prefix) != len(input_ids) or prefix.shape[1] >= input_ids.shape[1]:
        return False
    return torch.equal(prefix, input_ids[:, : prefix.shape[1]])


def _on(numbers: Any, beside: Tensor) -> Tensor:
    """What the host knows, on the device of `beside`."""
    return torch.as_tensor(numbers, device=beside.device)
